//! `llara plan`: estimates memory and work of a training run from its data, the model's configuration
//! and the tokenizer, without reading weights.

mod network;
mod picture;

use serde_json::json;

use llara::backend::Backend;

use super::compute::on_device;
use super::finetune::{self, Forecast, Prepared, Purpose};
use super::processes::Processes;
use super::talk::{count, counted, print, say};
use network::{NetworkArgs, NetworkPlan};

/// Number of texts whose lengths are measured.
const TEXTS: usize = 10_000;

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

/// The options of a run, and those of its network.
#[derive(clap::Args)]
pub(super) struct PlanArgs {
    #[command(flatten)]
    run: finetune::Args,
    #[command(flatten)]
    network: NetworkArgs,
}

pub(super) fn run(args: &PlanArgs) -> anyhow::Result<()> {
    on_device!(args.run.compute, backend => plan(&args.run, &args.network, backend))
}

fn plan(args: &finetune::Args, network: &NetworkArgs, backend: impl Backend) -> anyhow::Result<()> {
    let prepared = Prepared::new(args, Purpose::Plan, backend, &Processes::one())?;
    let forecast = Forecast::new(args, &prepared, network.processes as usize)?;
    let prompts = &prepared.outline.prompts;
    let lengths = prepared.lengths(TEXTS)?;

    for line in picture::lengths(&lengths) {
        say!("{line}");
    }
    for line in finetune::length_warnings(&lengths, prompts)? {
        say!("{line}");
    }
    say!("");
    for line in picture::memory(&forecast.plan) {
        say!("{line}");
    }
    say!("");
    let batch = &forecast.batch;
    let config = &prepared.outline.decoder;
    say!(
        "model     {}: {}, hidden {}, vocabulary {}",
        prepared.model_name,
        counted(config.num_hidden_layers, "layer"),
        config.hidden_size,
        count(config.vocab_size)
    );
    say!(
        "batch     {} and {}, {} encoded tokens; the largest expected batch of {}, {} sampled",
        if batch.query.len() == 1 {
            "1 query".into()
        } else {
            count(batch.query.len()) + " queries"
        },
        counted(batch.passage.len(), "passage"),
        count(forecast.plan.chunks.tokens),
        counted(batch.steps as usize, "step"),
        count(batch.sampled_steps as usize)
    );
    say!("work      {} per step", forecast.work());
    for line in forecast.lines() {
        say!("{line}");
    }
    let negatives_cross_device = args.has_cross_device_negatives();
    let network = NetworkPlan::new(network, &forecast, &prepared, negatives_cross_device);
    for line in network.iter().flat_map(NetworkPlan::lines) {
        say!("{line}");
    }
    let refusal = forecast.refusal()?;
    if let Some(refusal) = &refusal {
        say!("finetune would refuse: {refusal}");
    }

    let [query, passage] = lengths.map(|texts| {
        let mut summary = json!(texts.lengths.summary());
        summary["max_len"] = texts.max_len.into();
        summary["cut_share"] = texts.truncated_share().into();
        summary
    });
    let mut result = json!({
        "peak_bytes": forecast.plan.peak_bytes(),
        "peak_phase": forecast.plan.peak_phase(),
        "budget_bytes": forecast.budget,
        "fits": forecast.fits(),
        "refused": refusal.is_some(),
        "plan": forecast.plan,
        "batch": {
            "queries": batch.query.len(),
            "passages": batch.passage.len(),
            "steps": batch.steps,
            "sampled_steps": batch.sampled_steps,
        },
        "lengths": { "query": query, "passage": passage },
    });
    if let Some(network) = network {
        result["network"] = network.json();
    }
    Ok(print(result)?)
}
