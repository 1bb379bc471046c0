//! Options of a training run about several processes.

use clap::ArgAction;
use clap::builder::BoolishValueParser;

use crate::processes::CollectiveArgs;

/// Options of every training run.
#[derive(clap::Args)]
#[command(next_help_heading = "Several processes (mpirun, srun)")]
pub(crate) struct ProcessArgs {
    /// Divide the optimizer's moments among the processes (ZeRO stage 1): the same result within rounding, and the
    /// memory of the moments divided by the number of processes
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    #[arg(default_value = "true", action = ArgAction::Set)]
    #[arg(value_parser = BoolishValueParser::new(), hide_possible_values = true)]
    pub(crate) shard_optimizer: bool,
    #[command(flatten)]
    pub(crate) collective: CollectiveArgs,
}
