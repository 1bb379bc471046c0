//! The predicted memory of a run of fine-tuning.

use llara::backend::Backend;
use llara::train::plan::{EvaluationShape, LargestBatch, PlannedTask, RunShape};
use llara::{Result, Role};

use super::{Args, Prepared};
use crate::training::{Forecast, Remedies, group_shape};

/// Plans a step of the largest expected batch, in each of so many processes.
pub(crate) fn forecast(
    args: &Args,
    prepared: &Prepared<impl Backend>,
    processes: usize,
) -> Result<Forecast> {
    let Prepared { dataset, config, evaluation, .. } = prepared;
    let prompts = &prepared.outline.prompts;
    let shape = |e| EvaluationShape::of(e, config, prompts, &prepared.recipe.tasks);
    let evaluation = evaluation.as_ref().map(shape).transpose()?;
    let shape = RunShape {
        decoder: prepared.outline.decoder.clone(),
        prompts: prompts.clone(),
        lora: prepared.lora()?,
        precision: prepared.precision,
        options: args.model_options(&prepared.recipe, processes),
        evaluation,
        task: PlannedTask::Finetuning(prepared.config.objective.clone()),
        group: group_shape(config, processes, args.has_cross_device_negatives()),
        memory: prepared.backend.memory(),
        process_bytes: 0,
        saves_merged: args.common.lora.save_merged_lora_model,
    };
    let batch = LargestBatch::of_run(dataset, &shape.prompts, config, shape.dedups_sequences())?;
    let remedies = Remedies {
        max_len_option: "--passage-max-len",
        max_len: config.passage_max_len,
        smallest_max_len: prompts.encode(Role::Passage, "", usize::MAX)?.len() + 1,
        adapter: true,
    };
    let checkpoint = prepared.checkpoint.as_ref();
    let machine = (&prepared.backend, prepared.local_processes);
    Forecast::new(shape, batch, (&args.common.training, checkpoint), remedies, machine)
}
