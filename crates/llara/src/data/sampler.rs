//! Selection of the rows of each batch and of the passages of each row: a pure function of seed, epoch and
//! step. It does not depend on the number of processes.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use rand::rngs::ChaCha8Rng;
use rand::{Rng, SeedableRng};
use serde::{Deserialize, Serialize};

use super::TrainingRow;
use super::file_batches::{FileBatch, FileBatches, FileRows};
use crate::{Error, ErrorKind, Result};

/// How rows and passages are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Sampling {
    /// Each epoch visits every row once, in a new random order. Passages are drawn at random.
    Random,
    /// Rows in file order; after the last row the first one follows, also within a batch. The first
    /// passages of each row are used.
    Sequential,
}

/// Settings of a [`Sampler`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SamplerConfig {
    /// Seed of [`Sampling::Random`].
    pub seed: u64,
    /// How rows and passages are chosen.
    pub sampling: Sampling,
    /// Number of rows in the dataset.
    pub rows: usize,
    /// Number of rows in a batch, over all processes.
    pub batch_size: usize,
    /// Number of passages per row: 1 positive and `group_size − 1` hard negatives.
    pub group_size: usize,
    /// Skip the last batch of an epoch if it is incomplete. ([`Sampling::Sequential`] has no incomplete
    /// batches.)
    pub drop_last: bool,
}

/// Draws batches of rows, and a group of passages from each row.
#[derive(Debug)]
pub struct Sampler {
    config: SamplerConfig,
    steps_per_epoch: u64,
    /// Where the rows of a batch come from one file.
    files: Option<FileBatches>,
    /// The orders that were used last. A cache: without it, each batch would compute them.
    orders: Mutex<HashMap<OrderOf, Arc<[usize]>>>,
}

/// What an order of rows or files is for; a file has one number, all rows together have another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct OrderOf {
    purpose: Purpose,
    /// Epoch, or pass over a file.
    epoch: u64,
    /// Number of the file.
    file: usize,
}

/// One row of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Draw {
    /// Index of the row in the dataset.
    pub row: usize,
    /// Epoch, from 0.
    pub epoch: u64,
}

/// The texts of one row in a batch.
#[derive(Debug, Clone, PartialEq)]
pub struct Group<'r> {
    /// The query.
    pub query: &'r str,
    /// `group_size` passages, the positive first.
    pub passages: Vec<&'r str>,
    /// The instruction of the row, if it has one.
    pub prompt: Option<&'r str>,
    /// A teacher's score of each passage, if the row has scores of both positives and negatives.
    pub teacher_scores: Option<Vec<f32>>,
}

impl Sampler {
    /// Creates a sampler.
    ///
    /// # Errors
    /// There are no rows, the batch size or the group size is 0, a batch has more than `u32::MAX` passages,
    /// or `drop_last` leaves no batch.
    pub fn new(config: SamplerConfig) -> Result<Self> {
        let SamplerConfig { rows, batch_size, group_size, .. } = config;
        let error = |what: &str| Error::new(ErrorKind::Argument, what);
        if rows == 0 {
            return Err(error("there are no rows to sample"));
        }
        if batch_size == 0 {
            return Err(error("the batch size is 0").expected("at least 1"));
        }
        if group_size == 0 {
            return Err(error("the group size is too small")
                .expected("at least 1: 1 positive and group size − 1 hard negatives")
                .got(group_size));
        }
        if batch_size.checked_mul(group_size).is_none_or(|passages| passages > u32::MAX as usize) {
            return Err(error("batch size × group size is too large")
                .expected(format!("at most {} passages in a batch", u32::MAX))
                .got(format!("{batch_size} × {group_size}")));
        }
        let drop_last = config.drop_last && config.sampling == Sampling::Random;
        if drop_last && rows < batch_size {
            return Err(error("there is no complete batch, and incomplete ones are dropped")
                .expected(format!("at least {batch_size} rows, one batch"))
                .got(rows)
                .hint("use a smaller batch, or do not drop the last batch"));
        }
        let batches = if drop_last { rows / batch_size } else { rows.div_ceil(batch_size) };
        let orders = Mutex::default();
        Ok(Self { config, steps_per_epoch: batches as u64, files: None, orders })
    }

    /// Creates a sampler whose batches have rows of one file each. `files` are all files of the dataset;
    /// `weights` are their shares of the batches, or empty: proportional to their rows. An epoch is then one
    /// pass over every file, with its own last batch; otherwise every file continues from epoch to epoch and
    /// begins again when its rows are used up.
    ///
    /// # Errors
    /// As for [`Sampler::new`]; [`Sampling::Sequential`]; weights that are not one positive number for each
    /// file; a file without a complete batch, if incomplete ones are dropped.
    pub fn per_file(
        config: SamplerConfig,
        files: &[FileRows<'_>],
        weights: &[f64],
    ) -> Result<Self> {
        let sampler = Self::new(config)?;
        if config.sampling == Sampling::Sequential {
            return Err(Error::new(
                ErrorKind::Argument,
                "batches from one file each need random sampling",
            )
            .expected("--sampling random with --batching per-file"));
        }
        let files = FileBatches::new(files, weights, config.batch_size, config.drop_last)?;
        Ok(Self { steps_per_epoch: files.steps_per_epoch(), files: Some(files), ..sampler })
    }

    /// The settings.
    pub fn config(&self) -> &SamplerConfig {
        &self.config
    }

    /// The number of batches in an epoch; at least 1.
    pub fn steps_per_epoch(&self) -> u64 {
        self.steps_per_epoch
    }

    /// The rows of a batch; never empty. `step` counts from 0 over all epochs.
    pub fn batch(&self, step: u64) -> Vec<Draw> {
        let (rows, batch_size) = (self.config.rows, self.config.batch_size);
        match self.config.sampling {
            Sampling::Sequential => {
                let first = u128::from(step) * batch_size as u128;
                let draw = |i: u128| Draw {
                    row: (i % rows as u128) as usize,
                    epoch: (i / rows as u128) as u64,
                };
                (first..first + batch_size as u128).map(draw).collect()
            }
            Sampling::Random => {
                let epoch = step / self.steps_per_epoch;
                let within = (step % self.steps_per_epoch) as usize;
                if let Some(files) = &self.files {
                    return self.batch_of_file(files, epoch, within);
                }
                // Below `rows`: the step within the epoch is below `steps_per_epoch`.
                let first = within * batch_size;
                let order = self.order(OrderOf { purpose: Purpose::Order, epoch, file: 0 }, || {
                    (0..rows).collect()
                });
                order[first..rows.min(first.saturating_add(batch_size))]
                    .iter()
                    .map(|&row| Draw { row, epoch })
                    .collect()
            }
        }
    }

    /// The texts of a drawn row. [`Sampling::Sequential`]: the first positive and the first negatives,
    /// repeated from the start if there are too few. [`Sampling::Random`]: one positive, drawn uniformly,
    /// and negatives drawn without replacement from as many copies of the list as are needed. The draw
    /// depends only on seed, epoch and row.
    ///
    /// # Errors
    /// The row has no positive, or no negative although the group size is 2 or more.
    pub fn group<'r>(&self, draw: &Draw, row: &'r TrainingRow) -> Result<Group<'r>> {
        let negatives = self.config.group_size - 1;
        if row.pos.is_empty() || (row.neg.is_empty() && negatives > 0) {
            return Err(Error::new(ErrorKind::Data, "a row lacks positives or hard negatives")
                .got(format!("{} and {}", row.pos.len(), row.neg.len())));
        }
        let (positive, chosen): (usize, Vec<usize>) = match self.config.sampling {
            Sampling::Sequential => (0, (0..row.neg.len()).cycle().take(negatives).collect()),
            Sampling::Random => {
                let mut rng = self.rng(Purpose::Group, draw.epoch, draw.row as u64);
                let positive = below(&mut rng, row.pos.len() as u64) as usize;
                let copies = negatives.div_ceil(row.neg.len().max(1));
                let mut pool: Vec<usize> = (0..row.neg.len() * copies).collect();
                shuffle_front(&mut rng, &mut pool, negatives);
                (positive, pool[..negatives].iter().map(|i| i % row.neg.len()).collect())
            }
        };
        let mut passages = Vec::with_capacity(self.config.group_size);
        passages.push(row.pos[positive].as_str());
        passages.extend(chosen.iter().map(|&i| row.neg[i].as_str()));
        let teacher_scores = match (&row.pos_scores, &row.neg_scores) {
            (Some(pos), Some(neg)) => {
                Some(std::iter::once(pos[positive]).chain(chosen.iter().map(|&i| neg[i])).collect())
            }
            _ => None,
        };
        Ok(Group { query: &row.query, passages, prompt: row.prompt.as_deref(), teacher_scores })
    }

    /// The rows of the step `within` an epoch.
    fn batch_of_file(&self, files: &FileBatches, epoch: u64, within: usize) -> Vec<Draw> {
        let order_of_files = OrderOf { purpose: Purpose::Files, epoch, file: 0 };
        let order = self.order(order_of_files, || files.files_of_epoch());
        let batch = files.batches(epoch, &order[..=within]).pop();
        let Some(FileBatch { file, first_row, rows, pass, number }) = batch else {
            unreachable!("a step has a batch")
        };
        let order_of_rows = OrderOf { purpose: Purpose::RowsOfFile, epoch: pass, file };
        let order = self.order(order_of_rows, || (first_row..first_row + rows).collect());
        let first = number * self.config.batch_size;
        order[first..rows.min(first.saturating_add(self.config.batch_size))]
            .iter()
            .map(|&row| Draw { row, epoch: pass })
            .collect()
    }

    /// `items` in the order `of` something. The last order of each file is kept.
    fn order(&self, of: OrderOf, items: impl FnOnce() -> Vec<usize>) -> Arc<[usize]> {
        // A poisoned cache is still valid: it is changed after an order is complete.
        let mut cached = self.orders.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(order) = cached.get(&of) {
            return Arc::clone(order);
        }
        let mut order = items();
        let all = order.len();
        shuffle_front(&mut self.rng(of.purpose, of.epoch, of.file as u64), &mut order, all);
        let order: Arc<[usize]> = order.into();
        cached.retain(|other, _| (other.purpose, other.file) != (of.purpose, of.file));
        cached.insert(of, Arc::clone(&order));
        order
    }

    /// A separate generator for each draw, the same on every platform.
    fn rng(&self, purpose: Purpose, epoch: u64, row: u64) -> ChaCha8Rng {
        let mut key = [0; 32];
        for (part, number) in
            key.chunks_exact_mut(8).zip([self.config.seed, epoch, row, purpose as u64])
        {
            part.copy_from_slice(&number.to_le_bytes());
        }
        ChaCha8Rng::from_seed(key)
    }
}

/// Part of the generator's key, so that an epoch's order and row 0's passages use different streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Purpose {
    Order = 0,
    Group = 1,
    Files = 2,
    RowsOfFile = 3,
}

/// Uniform in `0..n` without bias, the same for every width of `usize`.
fn below(rng: &mut impl Rng, n: u64) -> u64 {
    // With the lowest 2⁶⁴ mod n numbers, small remainders would be more likely.
    let biased = n.wrapping_neg() % n;
    loop {
        let x = rng.next_u64();
        if x >= biased {
            return x % n;
        }
    }
}

/// Fisher–Yates from the front: the first `count` items are a uniform draw without replacement.
fn shuffle_front(rng: &mut impl Rng, items: &mut [usize], count: usize) {
    for i in 0..count {
        let rest = (items.len() - i) as u64;
        items.swap(i, i + below(rng, rest) as usize);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn config(sampling: Sampling, rows: usize, batch_size: usize) -> SamplerConfig {
        SamplerConfig { seed: 42, sampling, rows, batch_size, group_size: 4, drop_last: false }
    }

    fn rows_of(sampler: &Sampler, step: u64) -> Vec<usize> {
        sampler.batch(step).iter().map(|d| d.row).collect()
    }

    fn row(pos: usize, neg: usize) -> TrainingRow {
        TrainingRow {
            query: "q".into(),
            pos: (0..pos).map(|i| format!("p{i}")).collect(),
            neg: (0..neg).map(|i| format!("n{i}")).collect(),
            id: None,
            prompt: Some("find: ".into()),
            passage_instruction: None,
            pos_scores: None,
            neg_scores: None,
        }
    }

    #[test]
    fn sequential_continues_with_the_first_row() {
        let s = Sampler::new(config(Sampling::Sequential, 10, 3)).unwrap();
        assert_eq!(s.steps_per_epoch(), 4);
        assert_eq!(rows_of(&s, 0), [0, 1, 2]);
        assert_eq!(rows_of(&s, 3), [9, 0, 1]);
        assert_eq!(s.batch(3).iter().map(|d| d.epoch).collect::<Vec<_>>(), [0, 1, 1]);
        let few = Sampler::new(config(Sampling::Sequential, 2, 5)).unwrap();
        assert_eq!(rows_of(&few, 1), [1, 0, 1, 0, 1]);
        assert_eq!(few.batch(u64::MAX).len(), 5);
        let texts = row(2, 2);
        let group = s.group(&s.batch(0)[0], &texts).unwrap();
        assert_eq!(group.passages, ["p0", "n0", "n1", "n0"]);
        assert_eq!((group.query, group.prompt), ("q", Some("find: ")));
    }

    #[test]
    fn draws_are_the_same_on_every_platform_and_in_every_version() {
        let s = Sampler::new(config(Sampling::Random, 10, 10)).unwrap();
        assert_eq!(rows_of(&s, 0), [9, 7, 8, 2, 4, 5, 0, 1, 6, 3]);
        let texts = row(3, 9);
        let group = s.group(&Draw { row: 5, epoch: 1 }, &texts).unwrap();
        assert_eq!(group.passages, ["p2", "n6", "n0", "n3"]);
    }

    #[test]
    fn scores_are_those_of_the_drawn_passages() {
        let score = |name: &str| {
            name[1..].parse::<f32>().unwrap() + if name.starts_with('p') { 50.0 } else { 0.0 }
        };
        let scored = TrainingRow {
            pos_scores: Some(vec![50.0, 51.0, 52.0]),
            neg_scores: Some((0..5u8).map(f32::from).collect()),
            ..row(3, 5)
        };
        for sampling in [Sampling::Random, Sampling::Sequential] {
            let s =
                Sampler::new(SamplerConfig { group_size: 8, ..config(sampling, 9, 3) }).unwrap();
            for epoch in 0..20 {
                let group = s.group(&Draw { row: 2, epoch }, &scored).unwrap();
                let want: Vec<f32> = group.passages.iter().map(|name| score(name)).collect();
                assert_eq!(group.teacher_scores, Some(want));
            }
            let half = TrainingRow { neg_scores: None, ..scored.clone() };
            assert!(s.group(&Draw { row: 2, epoch: 0 }, &half).unwrap().teacher_scores.is_none());
        }
    }

    #[test]
    fn impossible_settings_are_refused() {
        let good = config(Sampling::Random, 10, 3);
        for (bad, part) in [
            (SamplerConfig { rows: 0, ..good }, "no rows"),
            (SamplerConfig { batch_size: 0, ..good }, "batch size"),
            (SamplerConfig { group_size: 0, ..good }, "1 positive"),
            (SamplerConfig { batch_size: usize::MAX, ..good }, "too large"),
            (SamplerConfig { drop_last: true, batch_size: 11, ..good }, "at least 11 rows"),
        ] {
            let e = Sampler::new(bad).unwrap_err();
            assert_eq!(e.kind(), ErrorKind::Argument);
            assert!(e.to_string().contains(part), "{e}");
        }
        let s = Sampler::new(good).unwrap();
        assert!(s.group(&s.batch(0)[0], &row(1, 0)).is_err());
        for sampling in [Sampling::Random, Sampling::Sequential] {
            let alone = Sampler::new(SamplerConfig { group_size: 1, sampling, ..good }).unwrap();
            let texts = row(1, 0);
            assert_eq!(alone.group(&alone.batch(0)[0], &texts).unwrap().passages, ["p0"]);
        }
        assert!(s.group(&s.batch(0)[0], &row(0, 1)).is_err());
    }

    #[test]
    fn negatives_are_uniform() {
        let s = Sampler::new(config(Sampling::Random, 1, 1)).unwrap();
        let texts = row(2, 6);
        let mut counts = [0; 6];
        for epoch in 0..6000 {
            for p in &s.group(&Draw { row: 0, epoch }, &texts).unwrap().passages[1..] {
                counts[p[1..].parse::<usize>().unwrap()] += 1;
            }
        }
        // 3 of 6 in each of 6000 draws; the standard deviation is 39.
        assert!(counts.iter().all(|c| (2800..3200).contains(c)), "{counts:?}");
    }

    fn per_file(rows: &[usize], weights: &[f64], c: SamplerConfig) -> Sampler {
        let file = |&rows: &usize| FileRows { path: std::path::Path::new("f"), rows };
        let files: Vec<FileRows<'_>> = rows.iter().map(file).collect();
        let c = SamplerConfig { rows: rows.iter().sum(), ..c };
        Sampler::per_file(c, &files, weights).unwrap()
    }

    #[test]
    fn batches_of_one_file_need_random_sampling() {
        let files = [FileRows { path: std::path::Path::new("f"), rows: 9 }];
        let sequential = config(Sampling::Sequential, 9, 3);
        let error = Sampler::per_file(sequential, &files, &[]).unwrap_err().to_string();
        assert!(error.contains("--batching per-file"), "{error}");
    }

    proptest! {
        #[test]
        fn batches_of_one_file_are_complete_and_depend_only_on_seed_and_step(
            rows in prop::collection::vec(1usize..30, 1..5), weighted: bool, batch_size in 1usize..9,
            seed: u64, start in 0u64..40,
        ) {
            let c = SamplerConfig { seed, ..config(Sampling::Random, 0, batch_size) };
            let weights: Vec<f64> = (1..=rows.len()).map(|i| i as f64).collect();
            let weights = if weighted { &weights[..] } else { &[] };
            let s = per_file(&rows, weights, c);
            let file_of = |row: usize| {
                let ends = rows.iter().scan(0, |end, rows| { *end += rows; Some(*end) });
                ends.take_while(|&end| end <= row).count()
            };
            // How often each row was visited in each pass over its file.
            let mut visits = std::collections::BTreeMap::new();
            let epochs = 3;
            for step in 0..epochs * s.steps_per_epoch() {
                let batch = s.batch(step);
                let file = file_of(batch[0].row);
                prop_assert!(!batch.is_empty() && batch.len() <= batch_size);
                prop_assert!(batch.iter().all(|draw| file_of(draw.row) == file));
                prop_assert!(weighted || batch.iter().all(|d| d.epoch == step / s.steps_per_epoch()));
                for draw in batch {
                    *visits.entry((file, draw.epoch, draw.row)).or_insert(0) += 1;
                }
            }
            prop_assert!(visits.values().all(|&count| count == 1));
            for (file, &of_file) in rows.iter().enumerate() {
                let passes = visits.keys().filter(|key| key.0 == file).map(|key| key.1);
                let last = passes.max().unwrap();
                for pass in 0..last + u64::from(!weighted) {
                    let seen = visits.keys().filter(|key| (key.0, key.1) == (file, pass)).count();
                    prop_assert_eq!(seen, of_file);
                }
            }
            prop_assert_eq!(s.batch(start), per_file(&rows, weights, c).batch(start));
        }

        #[test]
        fn an_epoch_visits_every_row_once(
            rows in 1usize..200, batch_size in 1usize..40, seed: u64, epoch in 0u64..5, drop_last: bool,
        ) {
            let drop_last = drop_last && rows >= batch_size;
            let c = SamplerConfig { seed, drop_last, ..config(Sampling::Random, rows, batch_size) };
            let s = Sampler::new(c).unwrap();
            let steps = s.steps_per_epoch();
            let mut seen = Vec::new();
            for step in epoch * steps..(epoch + 1) * steps {
                let batch = s.batch(step);
                prop_assert!(!batch.is_empty() && batch.iter().all(|d| d.epoch == epoch));
                prop_assert!(!drop_last || batch.len() == batch_size);
                seen.extend(batch.iter().map(|d| d.row));
            }
            let visited = if drop_last { rows / batch_size * batch_size } else { rows };
            prop_assert_eq!(seen.len(), visited);
            seen.sort_unstable();
            seen.dedup();
            prop_assert_eq!(seen.len(), visited);
            prop_assert!(seen.iter().all(|&r| r < rows));
        }

        #[test]
        fn batches_do_not_depend_on_earlier_calls(
            rows in 1usize..60, batch_size in 1usize..9, seed: u64, steps in prop::collection::vec(0u64..90, 1..9),
        ) {
            let c = SamplerConfig { seed, ..config(Sampling::Random, rows, batch_size) };
            let used = Sampler::new(c).unwrap();
            for step in steps {
                prop_assert_eq!(used.batch(step), Sampler::new(c).unwrap().batch(step));
            }
        }

        #[test]
        fn groups_are_complete_and_depend_only_on_seed_epoch_and_row(
            pos in 1usize..4, neg in 1usize..12, group_size in 2usize..20, seed: u64, epoch: u64, index: usize,
        ) {
            let texts = row(pos, neg);
            let draw = Draw { row: index, epoch };
            let c = SamplerConfig { seed, group_size, ..config(Sampling::Random, 7, 2) };
            let group = |c| Sampler::new(c).unwrap().group(&draw, &texts).unwrap().passages;
            let passages = group(c);
            prop_assert_eq!(&passages, &group(SamplerConfig { rows: 99, batch_size: 5, ..c }));
            prop_assert_eq!(passages.len(), group_size);
            prop_assert!(passages[0].starts_with('p') && passages[1..].iter().all(|p| p.starts_with('n')));
            let most = (group_size - 1).div_ceil(neg);
            for n in &texts.neg {
                prop_assert!(passages.iter().filter(|p| *p == n).count() <= most);
            }
        }
    }
}
