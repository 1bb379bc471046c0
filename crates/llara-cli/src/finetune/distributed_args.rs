//! Options of `llara finetune` and `llara pretrain` about runs on several processes.

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

/// Options of fine-tuning.
#[derive(clap::Args)]
#[command(next_help_heading = "Several processes (mpirun, srun)")]
pub(super) struct DistributedArgs {
    #[command(flatten)]
    pub(super) processes: ProcessArgs,
    /// Divide gradients by the number of processes with --negatives-cross-device, as the reference does: for
    /// comparisons with it step by step
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    #[arg(default_value = "false", action = ArgAction::Set)]
    #[arg(value_parser = BoolishValueParser::new(), hide_possible_values = true)]
    pub(super) reference_gradient_scale: bool,
}
