//! Which runs are compared.

use std::fmt;
use std::num::NonZeroUsize;
use std::str::FromStr;

use llara::{Error, ErrorKind, Result};

/// What a process that the program has started computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Computation {
    /// The run that the options describe.
    Run,
    /// A run of this number of processes with negatives of their own, by one process.
    InTurn(NonZeroUsize),
}

impl fmt::Display for Computation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Computation::Run => f.write_str("run"),
            Computation::InTurn(parts) => write!(f, "in-turn:{parts}"),
        }
    }
}

impl FromStr for Computation {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let parts = text.strip_prefix("in-turn:").map(str::parse);
        match (text, parts) {
            ("run", _) => Ok(Computation::Run),
            (_, Some(Ok(parts))) => Ok(Computation::InTurn(parts)),
            _ => Err("expected run or in-turn:N".into()),
        }
    }
}

/// One run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Case {
    pub(super) processes: usize,
    pub(super) computation: Computation,
    /// Rows of a step of one process.
    pub(super) batch_size: usize,
    /// The most sequences of a chunk; `None`: one chunk if it fits in memory.
    pub(super) chunk: Option<usize>,
    /// Whether the moments are divided among the processes.
    pub(super) sharded: bool,
    /// Whether the passages of all processes are negatives.
    pub(super) cross_device: bool,
}

/// Runs that must be equal to one of them.
#[derive(Debug)]
pub(super) struct Group {
    pub(super) baseline: Case,
    pub(super) cases: Vec<Case>,
}

impl Case {
    /// The options that make the program compute this case. They follow those of the user, and override them.
    pub(super) fn options(&self) -> Vec<String> {
        vec![
            format!("--computation={}", self.computation),
            format!("--per-device-train-batch-size={}", self.batch_size),
            "--chunk-tokens=auto".into(),
            format!("--sub-batch-size={}", self.chunk.map_or("-1".into(), |size| size.to_string())),
            format!("--shard-optimizer={}", self.sharded),
            format!("--negatives-cross-device={}", self.cross_device),
            "--reference-gradient-scale=false".into(),
        ]
    }

    /// The negatives of a query, for results.
    pub(super) fn negatives(&self) -> &'static str {
        if self.cross_device { "all" } else { "own" }
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.computation, self.processes) {
            (Computation::InTurn(parts), _) => write!(f, "1 process, {parts} parts in turn")?,
            (Computation::Run, 1) => f.write_str("1 process, all rows")?,
            (Computation::Run, processes) => {
                let negatives = self.negatives();
                let optimizer = if self.sharded { "divided" } else { "whole" };
                write!(f, "{processes} processes, {negatives} negatives, {optimizer} optimizer")?;
            }
        }
        if self.chunk.is_some() { f.write_str(", in chunks") } else { Ok(()) }
    }
}

/// The runs with so many processes and a step of `rows` rows with `group_size` passages each: one group for
/// negatives of all processes, and one per number of processes for negatives of the own one. The first case of the
/// first group is one process in chunks.
///
/// # Errors
/// A number of processes does not divide the rows.
pub(super) fn groups(
    processes: &[NonZeroUsize],
    rows: usize,
    group_size: usize,
) -> Result<Vec<Group>> {
    let mut sizes = processes.to_vec();
    sizes.sort_unstable();
    sizes.dedup();
    if let Some(size) = sizes.iter().find(|size| !rows.is_multiple_of(size.get()) || rows == 0) {
        return Err(Error::new(ErrorKind::Argument, "a step cannot be divided evenly")
            .expected(format!("a number of rows that is a multiple of {size} processes"))
            .got(format!("--per-device-train-batch-size {rows}"))
            .hint(
                "it is the number of rows of all processes together; or choose other --processes",
            ));
    }
    let alone = Case {
        processes: 1,
        computation: Computation::Run,
        batch_size: rows,
        chunk: None,
        sharded: false,
        cross_device: false,
    };
    // About three chunks in each process.
    let chunk = |batch_size: usize| Some((batch_size * (1 + group_size)).div_ceil(3));
    let control = Case { chunk: chunk(rows), ..alone };
    let mut all = Group { baseline: alone, cases: vec![control] };
    let mut own = Vec::new();
    for size in sizes {
        let (processes, batch_size) = (size.get(), rows / size.get());
        if processes == 1 {
            continue;
        }
        let runs = |cross_device: bool| {
            let of = move |chunk: Option<usize>| {
                let run = Case { processes, batch_size, cross_device, chunk, ..alone };
                [true, false].map(|sharded| Case { sharded, ..run })
            };
            [None, chunk(batch_size)].into_iter().flat_map(of)
        };
        all.cases.extend(runs(true));
        let baseline = Case { computation: Computation::InTurn(size), batch_size, ..alone };
        own.push(Group { baseline, cases: runs(false).collect() });
    }
    Ok(std::iter::once(all).chain(own).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sizes(sizes: &[usize]) -> Vec<NonZeroUsize> {
        sizes.iter().filter_map(|size| NonZeroUsize::new(*size)).collect()
    }

    #[test]
    fn every_combination_is_compared_once() {
        let groups = groups(&sizes(&[4, 1, 2, 2]), 8, 3).unwrap();
        assert_eq!(groups.len(), 3);
        assert_eq!(groups[0].cases.len(), 1 + 4 + 4);
        assert!(groups.iter().all(|group| group.baseline.processes == 1));
        for group in &groups[1..] {
            assert_eq!(group.cases.len(), 4);
            assert!(group.cases.iter().all(|case| !case.cross_device));
        }
        let mut cases: Vec<String> =
            groups.iter().flat_map(|group| &group.cases).map(Case::to_string).collect();
        cases.sort();
        cases.dedup();
        assert_eq!(cases.len(), 17);
        for case in groups.iter().flat_map(|group| &group.cases) {
            assert_eq!(case.batch_size * case.processes, 8);
        }
    }

    #[test]
    fn rows_that_cannot_be_divided_are_refused() {
        let error = groups(&sizes(&[1, 3]), 8, 2).unwrap_err().to_string();
        assert!(error.contains("a multiple of 3 processes"), "{error}");
        assert!(groups(&sizes(&[1]), 0, 2).is_err());
    }

    #[test]
    fn computations_are_passed_on_as_text() {
        for computation in [Computation::Run, Computation::InTurn(NonZeroUsize::MIN)] {
            assert_eq!(computation.to_string().parse(), Ok(computation));
        }
        for text in ["", "in-turn:", "in-turn:0", "in-turn:x", "runs"] {
            assert!(text.parse::<Computation>().is_err(), "{text}");
        }
    }
}
