//! Evaluating the model in memory on all sets.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::time::Instant;

use super::history::{EvalRecord, Evaluated};
use super::query_report::SetReport;
use super::settings::{EvalSet, Evaluation};
use crate::backend::Backend;
use crate::biencoder::BiEncoderModel;
use crate::data::Instructions;
use crate::dist::Collective;
use crate::retrieval::{SearchOptions, SharedEmbedder, TextEmbedder, evaluate_dataset};
use crate::{Error, ErrorKind, Result};

/// The instructions of tasks, by name.
type Tasks = BTreeMap<String, Instructions>;

/// Passages that are retrieved per query: as many as the metrics look at.
const TOP_K: usize = 100;

/// The figures of `model` and the reports of all sets; `None` if any process was told to stop.
///
/// A set that has the name of a task of the training data is encoded with the task's instructions.
///
/// `stops` is called after each batch with the number of texts encoded so far and that of all texts; it returns
/// whether the evaluation should end.
///
/// The processes of the group share the embedding of the texts; each searches. The figures that all of them return are
/// those of rank 0.
///
/// # Errors
/// When embeddings or scores are not finite, or the device or another process fails.
pub(in crate::train) fn evaluate<B: Backend>(
    (evaluation, tasks): (&Evaluation, &Tasks),
    model: &BiEncoderModel<B>,
    (step, epoch): (u64, f64),
    collective: &dyn Collective<B>,
    stops: &mut dyn FnMut(usize, usize) -> bool,
) -> Result<Option<(Evaluated, Vec<SetReport>)>> {
    let sets = (evaluation, tasks);
    let result = evaluate_sets(sets, model, (step, epoch), collective, stops);
    let (found, status) = match result {
        Ok(found) => (found, Ok(())),
        Err(error) => (None, Err(error)),
    };
    collective.agree(status)?;

    // A process that was told to stop takes part as well.
    let mut numbers = vec![f64::from(u8::from(found.is_none()))];
    numbers.resize(1 + 3 * evaluation.sets.len(), 0.0);
    if collective.rank() == 0
        && let Some(found) = &found
    {
        for ((record, _), numbers) in found.iter().zip(numbers[1..].chunks_exact_mut(3)) {
            numbers.copy_from_slice(&[record.ndcg_at_10, record.mrr_at_10, record.recall_at_100]);
        }
    }
    collective.all_reduce_scalars(&mut numbers)?;
    let Some(found) = found.filter(|_| numbers[0] == 0.0) else { return Ok(None) };
    let (mut records, reports): (Vec<_>, Vec<_>) = found.into_iter().unzip();
    for (record, numbers) in records.iter_mut().zip(numbers[1..].chunks_exact(3)) {
        [record.ndcg_at_10, record.mrr_at_10, record.recall_at_100] =
            [numbers[0], numbers[1], numbers[2]];
    }
    Ok(Some((Evaluated::new(step, &evaluation.metric, records), reports)))
}

/// The figures of this process; `None` if any process was told to stop.
fn evaluate_sets<B: Backend>(
    (evaluation, tasks): (&Evaluation, &Tasks),
    model: &BiEncoderModel<B>,
    (step, epoch): (u64, f64),
    collective: &dyn Collective<B>,
    stops: &mut dyn FnMut(usize, usize) -> bool,
) -> Result<Option<Vec<(EvalRecord, SetReport)>>> {
    let total: usize = evaluation.sets.iter().map(EvalSet::texts).sum();
    let (stops, done, stopped) = (RefCell::new(stops), Cell::new(0), Cell::new(false));
    let on_batch = |texts| {
        done.set(done.get() + texts);
        stopped.set((stops.borrow_mut())(done.get(), total));
        match stopped.get() {
            true => Err(Error::new(ErrorKind::Backend, "the evaluation was stopped")),
            false => Ok(()),
        }
    };
    let mut embedder = TextEmbedder::new(model);
    embedder.batch_tokens = evaluation.batch_tokens;
    embedder.on_batch = Some(&on_batch);

    let mut found = Vec::with_capacity(evaluation.sets.len());
    for set in &evaluation.sets {
        let start = Instant::now();
        let of_task = tasks.get(&set.name);
        embedder.use_instructions(of_task.cloned().unwrap_or(model.recipe().instructions()));
        let options =
            SearchOptions { top_k: TOP_K, ignore_identical_ids: set.ignore_identical_ids };
        let shared =
            SharedEmbedder { inner: &embedder, collective, stopped: &stopped, done: &done };
        let result = evaluate_dataset(&shared, &embedder, &set.dataset, options, &mut |_| ());
        let (metrics, run) = match result {
            Err(_) if stopped.get() => return Ok(None),
            result => result?,
        };
        let record = EvalRecord {
            step,
            epoch,
            dataset: set.name.clone(),
            split: set.split.clone(),
            ndcg_at_10: metrics.ndcg_at_10,
            mrr_at_10: metrics.mrr_at_10,
            recall_at_100: metrics.recall_at_100,
            queries: metrics.queries,
            seconds: start.elapsed().as_secs_f64(),
        };
        found.push((record, SetReport::new(set, &run, step)));
    }
    Ok(Some(found))
}
