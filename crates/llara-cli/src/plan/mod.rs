//! `llara plan` and `llara plan-pretraining`: estimate memory and work of a training run from its data, the
//! model's configuration and the tokenizer, without reading weights.

mod finetuning;
mod network;
mod picture;
mod planned_run;
mod pretraining;

use super::compute::on_device;
use super::{finetune, pretrain};
use network::NetworkArgs;

pub(super) const AFTER_HELP: &str = "\
Takes the options of `llara finetune`. Trains nothing, reads no weights and writes no files.

Examples:
  llara plan --model base --train-data train.jsonl
  llara plan --model Qwen/Qwen3-0.6B --template qwen3-embedding --train-data data/ \\
      --use-lora --per-device-train-batch-size 64 --memory-budget 12GiB
  llara plan --config run.toml --memory-budget 50%
  llara plan --config run.toml --processes 8 --network 25GB/s --negatives-cross-device

Prints one JSON object: memory by category in bytes, chunks, work of a step, text lengths, and
whether the run fits into memory; with --processes also network: memory of each process, bytes
sent and the time for that.";

pub(super) const PRETRAINING_AFTER_HELP: &str = "\
Takes the options of `llara pretrain`. Trains nothing, reads no weights and writes no files.

Examples:
  llara plan-pretraining --model Qwen/Qwen3-0.6B --text wiki/ --dtype bf16
  llara plan-pretraining --model base --train-data rows.jsonl --cutoff-len 1024 --memory-budget 12GiB
  llara plan-pretraining --config run.toml --processes 8 --network 25GB/s

Prints one JSON object, as `llara plan`: memory by category in bytes, chunks, work of a step, text
lengths, and whether the run fits into memory; with --processes also network.";

/// The options of a run of fine-tuning, and those of its network.
#[derive(clap::Args)]
pub(super) struct PlanArgs {
    #[command(flatten)]
    run: finetune::Args,
    #[command(flatten)]
    network: NetworkArgs,
}

/// The options of a run of pretraining, and those of its network.
#[derive(clap::Args)]
pub(super) struct PretrainingPlanArgs {
    #[command(flatten)]
    run: pretrain::Args,
    #[command(flatten)]
    network: NetworkArgs,
}

pub(super) fn run(args: &PlanArgs) -> anyhow::Result<()> {
    on_device!(args.run.common.compute, backend => finetuning::plan(&args.run, &args.network, backend))
}

pub(super) fn run_pretraining(args: &PretrainingPlanArgs) -> anyhow::Result<()> {
    on_device!(args.run.common.compute, backend => pretraining::plan(&args.run, &args.network, backend))
}
