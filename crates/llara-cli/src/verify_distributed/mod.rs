//! `llara verify-distributed`: trains the same few steps with different numbers of processes, and with different settings
//! that must not change the result, and prints by how much the results differ.

mod case;
mod compare;
mod process;
mod runner;

use std::fmt;
use std::num::NonZeroUsize;
use std::path::PathBuf;

use serde_json::json;

use super::finetune;
use super::processes::refuse_several;
use super::talk::{count, counted, print, say};
use case::Computation;
use compare::{Bounds, Differences, compare};
use runner::{Launcher, Runner};

pub(super) const AFTER_HELP: &str = "\
Takes the options of `llara finetune`, and writes no model. --per-device-train-batch-size is the number of rows of
a step of all processes together. Each combination of a number of processes, chunks, division of the optimizer and
negatives is a run of its own. With negatives of all processes it is compared with one process that computes all rows
at once; with negatives of the own process, with one process that computes the parts of the processes in turn.

Differences are relative. Losses: the largest difference of a step. Gradients (of the first step, before clipping)
and weights (after the last step): the norm of the difference divided by the norm, over all trained parameters.
In f32, losses may differ by 1e-5, gradients and weights by 1e-4; in bf16 by 1e-2, 5e-2 and 1e-2. After the first
update, ten times the difference between one process with and without chunks is allowed if that is more.

Examples:
  llara verify-distributed --model base --train-data train.jsonl --use-lora false
  llara verify-distributed --config run.toml --processes 1,2,8 --steps 10 \\
      --launcher 'mpirun --host a:4,b:4 -n {}'
  llara verify-distributed --config run.toml --launcher 'srun --mpi=pmix -n {}'

Prints one JSON object: equal (whether all differences are within the bounds) and the differences of each run. The
exit code is 1 if one exceeds its bound.";

/// The options of a run, and what is compared.
#[derive(clap::Args)]
pub(super) struct VerifyArgs {
    #[command(flatten)]
    run: finetune::Args,
    #[command(flatten)]
    comparison: ComparisonArgs,
}

#[derive(clap::Args)]
#[command(next_help_heading = "Comparison")]
struct ComparisonArgs {
    /// Numbers of processes; each must divide the batch size
    #[arg(long, value_name = "N,N,…", value_delimiter = ',', default_value = "1,2,4")]
    processes: Vec<NonZeroUsize>,
    /// Number of steps
    #[arg(long, value_name = "N", default_value_t = 3)]
    #[arg(value_parser = clap::value_parser!(u64).range(1..))]
    steps: u64,
    /// Command that starts several processes; {} stands for their number
    #[arg(long, value_name = "COMMAND", default_value = "mpirun --oversubscribe -n {}")]
    launcher: Launcher,
    /// Folder for the results of two runs at a time, 8 bytes per trained parameter each; the first process of
    /// each run writes there [default: the folder of temporary files]
    #[arg(long, value_name = "DIR")]
    work_dir: Option<PathBuf>,
    /// What is computed by this process, which the program has started.
    #[arg(long, hide = true, requires = "results")]
    computation: Option<Computation>,
    /// The folder for its results.
    #[arg(long, hide = true)]
    results: Option<PathBuf>,
}

/// The error of a comparison that found differences, which were printed.
#[derive(Debug)]
pub(super) struct Different;

impl fmt::Display for Different {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the results differ")
    }
}

impl std::error::Error for Different {}

pub(super) fn run(args: VerifyArgs) -> anyhow::Result<()> {
    let VerifyArgs { run, comparison } = args;
    match (comparison.computation, &comparison.results) {
        (Some(computation), Some(results)) => {
            process::run(run, comparison.steps, computation, results)
        }
        _ => {
            refuse_several()?;
            compare_runs(&run, comparison)
        }
    }
}

/// Makes all runs, and compares each with the one that it must be equal to.
fn compare_runs(run: &finetune::Args, comparison: ComparisonArgs) -> anyhow::Result<()> {
    let ComparisonArgs { processes, steps, launcher, work_dir, .. } = comparison;
    let rows = run.batch_size();
    let groups = case::groups(&processes, rows, run.group_size())?;
    let runner = Runner::new(work_dir.unwrap_or_else(std::env::temp_dir), launcher)?;
    let runs: usize = groups.iter().map(|group| group.cases.len() + 1).sum();
    say!(
        "{} of {} with {} each; differences are relative",
        counted(runs, "run"),
        counted(usize::try_from(steps).unwrap_or(usize::MAX), "step"),
        counted(rows, "row"),
    );
    say!("{}", Differences::HEADER);

    let (mut found, mut equal) = (Vec::new(), true);
    let mut bounds: Option<Bounds> = None;
    for group in &groups {
        let expected = runner.run(&group.baseline)?;
        say!("{}", group.baseline);
        for case in &group.cases {
            let differences = compare(&runner.run(case)?, &expected)?;
            // The first case has one process.
            let bounds = *bounds.get_or_insert_with(|| {
                Bounds::of(expected.precision()).after_updates(&differences)
            });
            let within = differences.are_within(&bounds);
            say!("{}", differences.line(case, within));
            equal &= within;
            found.push(differences.json(case, &group.baseline, within));
        }
    }
    print(json!({ "equal": equal, "steps": steps, "rows": rows, "runs": found }))?;
    if !equal {
        return Err(Different.into());
    }
    say!("all of {} runs are equal within the bounds", count(found.len()));
    Ok(())
}
