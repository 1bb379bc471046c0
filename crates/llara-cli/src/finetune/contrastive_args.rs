//! Options of `llara finetune` about the comparison of queries with passages.

use clap::ArgAction;
use clap::builder::BoolishValueParser;

/// Options about the comparison of queries with passages.
#[derive(clap::Args)]
#[command(next_help_heading = "Training")]
pub(super) struct ContrastiveArgs {
    /// Divisor of the similarities in the loss; always 1.0 with --normalized false
    #[arg(long, value_name = "X", default_value_t = 0.02)]
    pub(super) temperature: f32,
    /// Use the passages of all processes as negatives; has no effect with one process
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    #[arg(default_value = "false", action = ArgAction::Set)]
    #[arg(value_parser = BoolishValueParser::new(), hide_possible_values = true)]
    pub(super) negatives_cross_device: bool,
    /// Encode equal texts of a batch only once; has no effect with dropout
    #[arg(long, alias = "equal-once", value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    #[arg(default_value = "true", action = ArgAction::Set)]
    #[arg(value_parser = BoolishValueParser::new(), hide_possible_values = true)]
    pub(super) dedup_sequences: bool,
}

/// Options about fine-tuning on several processes.
#[derive(clap::Args)]
#[command(next_help_heading = "Several processes (mpirun, srun)")]
pub(super) struct DistributedArgs {
    /// Divide gradients by the number of processes with --negatives-cross-device, as the reference does: for
    /// comparisons with it step by step
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    #[arg(default_value = "false", action = ArgAction::Set)]
    #[arg(value_parser = BoolishValueParser::new(), hide_possible_values = true)]
    pub(super) reference_gradient_scale: bool,
}
