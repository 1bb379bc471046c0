//! A table of all flags of the reference and of `transformers.TrainingArguments`. The flags that are not
//! options of `llara finetune` are parsed and checked by this table.

use Treatment::{NoEffect, Supported};

/// How a flag is treated.
pub(super) enum Treatment {
    /// It is an option of `llara finetune`, or an alias of one.
    Supported,
    /// It is accepted. A note states why it has no effect.
    NoEffect(&'static str),
    /// Values that ask for the program's only behavior are accepted; others are refused.
    Limited(Limited),
}

/// Which values of a flag are accepted.
pub(super) struct Limited {
    /// Whether a value is accepted.
    pub(crate) is_accepted: fn(&str, &OwnSettings<'_>) -> bool,
    /// What other values ask for.
    pub(crate) asks_for: &'static str,
    /// What to do instead.
    pub(crate) hint: &'static str,
}

/// Options of the run that some flags repeat.
pub(crate) struct OwnSettings<'a> {
    /// The model as it is named on the command line.
    pub(crate) model: &'a str,
    /// The run's seed.
    pub(crate) seed: u64,
    /// Whether the model is evaluated during the run.
    pub(crate) evaluates: bool,
}

const ONE_PROCESS: &str = "the run is one process on one device";
const MEMORY: &str = "--memory-budget and --chunk-tokens limit the memory of activations";
const DTYPE: &str = "--dtype chooses the number format; bf16 needs no loss scale";
const COMPILED: &str = "kernels are compiled ahead of time";
const LOADER: &str = "texts are read and tokenized by all threads (--threads)";
const LOGS: &str = "log.jsonl and TensorBoard events are written to the output folder, progress to \
                    standard error; --logging-steps sets the interval";
const DEVICE: &str = "--device chooses the device";
const ROWS: &str = "rows are read directly from --train-data, without a cache";
const WHOLE_STATE: &str =
    "checkpoints always contain the complete state of the run, and resuming restores it";
const EVALUATION: &str = "an evaluation (--eval-dataset) searches all passages of a test collection and \
                          computes nDCG@10, MRR@10 and Recall@100";
const EVAL_BATCH: &str = "--eval-batch-tokens limits the batches of an evaluation";
const EVAL_DTYPE: &str = "evaluation uses the number format of the training, --dtype";
const NO_UPLOAD: &str = "the model is not uploaded";

/// Name (with dashes) and treatment of every flag.
#[rustfmt::skip] // one flag a line
pub(super) const FLAGS: &[(&str, Treatment)] = &[
    ("model-name-or-path", Supported),
    ("cache-dir", Supported),
    ("use-lora", Supported),
    ("lora-rank", Supported),
    ("lora-alpha", Supported),
    ("lora-dropout", Supported),
    ("target-modules", Supported),
    ("save-merged-lora-model", Supported),
    ("from-peft", Supported),
    ("peft-model-path", Supported),
    ("train-data", Supported),
    ("train-group-size", Supported),
    ("query-max-len", Supported),
    ("passage-max-len", Supported),
    ("query-instruction-for-retrieval", Supported),
    ("passage-instruction-for-retrieval", Supported),
    ("negatives-cross-device", Supported),
    ("temperature", Supported),
    ("normlized", Supported),
    ("normalized", Supported),
    ("sub-batch-size", Supported),
    ("output-dir", Supported),
    ("overwrite-output-dir", Supported),
    ("per-device-train-batch-size", Supported),
    ("learning-rate", Supported),
    ("weight-decay", Supported),
    ("adam-beta1", Supported),
    ("adam-beta2", Supported),
    ("adam-epsilon", Supported),
    ("max-grad-norm", Supported),
    ("num-train-epochs", Supported),
    ("max-steps", Supported),
    ("lr-scheduler-type", Supported),
    ("warmup-ratio", Supported),
    ("warmup-steps", Supported),
    ("logging-steps", Supported),
    ("save-strategy", Supported),
    ("save-steps", Supported),
    ("save-total-limit", Supported),
    ("seed", Supported),
    ("bf16", Supported),
    ("dataloader-drop-last", Supported),
    ("deepspeed", NoEffect(ONE_PROCESS)),
    ("fsdp", NoEffect(ONE_PROCESS)),
    ("fsdp-config", NoEffect(ONE_PROCESS)),
    ("fsdp-min-num-params", NoEffect(ONE_PROCESS)),
    ("fsdp-transformer-layer-cls-to-wrap", NoEffect(ONE_PROCESS)),
    ("sharded-ddp", NoEffect(ONE_PROCESS)),
    ("ddp-find-unused-parameters", NoEffect(ONE_PROCESS)),
    ("ddp-timeout", NoEffect(ONE_PROCESS)),
    ("ddp-backend", NoEffect(ONE_PROCESS)),
    ("ddp-bucket-cap-mb", NoEffect(ONE_PROCESS)),
    ("ddp-broadcast-buffers", NoEffect(ONE_PROCESS)),
    ("ddp-static-graph", NoEffect(ONE_PROCESS)),
    ("local-rank", NoEffect(ONE_PROCESS)),
    ("xpu-backend", NoEffect(ONE_PROCESS)),
    ("log-on-each-node", NoEffect(ONE_PROCESS)),
    ("save-on-each-node", NoEffect(ONE_PROCESS)),
    ("average-tokens-across-devices", NoEffect(ONE_PROCESS)),
    ("dispatch-batches", NoEffect(ONE_PROCESS)),
    ("split-batches", NoEffect(ONE_PROCESS)),
    ("accelerator-config", NoEffect(ONE_PROCESS)),
    ("parallelism-config", NoEffect(ONE_PROCESS)),
    ("mp-parameters", NoEffect(ONE_PROCESS)),
    ("ray-scope", NoEffect(ONE_PROCESS)),
    ("log-level-replica", NoEffect(ONE_PROCESS)),
    ("gradient-checkpointing", NoEffect(MEMORY)),
    ("gradient-checkpointing-kwargs", NoEffect(MEMORY)),
    ("activation-checkpointing", NoEffect(MEMORY)),
    ("activation-checkpointing-kwargs", NoEffect(MEMORY)),
    ("cache-chunk-size", NoEffect(MEMORY)),
    ("torch-empty-cache-steps", NoEffect(MEMORY)),
    ("auto-find-batch-size", NoEffect(MEMORY)),
    ("use-cache", NoEffect(MEMORY)),
    ("fp16", NoEffect(DTYPE)),
    ("tf32", NoEffect(DTYPE)),
    ("fp16-opt-level", NoEffect(DTYPE)),
    ("fp16-backend", NoEffect(DTYPE)),
    ("half-precision-backend", NoEffect(DTYPE)),
    ("torch-compile", NoEffect(COMPILED)),
    ("torch-compile-backend", NoEffect(COMPILED)),
    ("torch-compile-mode", NoEffect(COMPILED)),
    ("torchdynamo", NoEffect(COMPILED)),
    ("jit-mode-eval", NoEffect(COMPILED)),
    ("use-ipex", NoEffect(COMPILED)),
    ("use-liger-kernel", NoEffect(COMPILED)),
    ("liger-kernel-config", NoEffect(COMPILED)),
    ("use-flash-attn", NoEffect("attention always runs over packed sequences, without padding")),
    ("dataloader-num-workers", NoEffect(LOADER)),
    ("dataloader-pin-memory", NoEffect(LOADER)),
    ("dataloader-persistent-workers", NoEffect(LOADER)),
    ("dataloader-prefetch-factor", NoEffect(LOADER)),
    ("dataloader-multiprocessing-context", NoEffect(LOADER)),
    ("dataloader-in-order", NoEffect(LOADER)),
    ("group-by-length", NoEffect("sequences are packed without padding, so sorting them by length saves nothing")),
    ("length-column-name", NoEffect("sequences are packed without padding, so sorting them by length saves nothing")),
    ("remove-unused-columns", NoEffect("query, pos, neg and prompt are read; other fields are ignored")),
    ("label-names", NoEffect("query, pos, neg and prompt are read; other fields are ignored")),
    ("report-to", NoEffect(LOGS)),
    ("logging-dir", NoEffect(LOGS)),
    ("run-name", NoEffect(LOGS)),
    ("project", NoEffect(LOGS)),
    ("trackio-space-id", NoEffect(LOGS)),
    ("trackio-bucket-id", NoEffect(LOGS)),
    ("trackio-static-space-id", NoEffect(LOGS)),
    ("disable-tqdm", NoEffect(LOGS)),
    ("log-level", NoEffect(LOGS)),
    ("logging-first-step", NoEffect(LOGS)),
    ("logging-nan-inf-filter", NoEffect(LOGS)),
    ("include-num-input-tokens-seen", NoEffect(LOGS)),
    ("include-tokens-per-second", NoEffect(LOGS)),
    ("skip-memory-metrics", NoEffect(LOGS)),
    ("do-train", NoEffect("the verb always trains")),
    ("save-safetensors", NoEffect("weights are always saved as safetensors")),
    ("low-cpu-mem-usage", NoEffect("weights are always read tensor by tensor")),
    ("use-slow-tokenizer", NoEffect("tokenizer.json is always used")),
    ("token", NoEffect("the access token of the Hub is read from HF_TOKEN")),
    ("trust-remote-code", NoEffect("code in a model folder is never run")),
    ("use-cpu", NoEffect(DEVICE)),
    ("no-cuda", NoEffect(DEVICE)),
    ("use-mps-device", NoEffect(DEVICE)),
    ("tpu-num-cores", NoEffect(DEVICE)),
    ("tpu-metrics-debug", NoEffect(DEVICE)),
    ("cache-path", NoEffect(ROWS)),
    ("load-disk-path", NoEffect(ROWS)),
    ("save-to-disk", NoEffect(ROWS)),
    ("save-disk-path", NoEffect(ROWS)),
    ("save-max-shard-size", NoEffect(ROWS)),
    ("num-shards", NoEffect(ROWS)),
    ("fix-position-embedding", NoEffect("rotary position embeddings have no parameters")),
    ("save-only-model", NoEffect(WHOLE_STATE)),
    ("restore-callback-states-from-checkpoint", NoEffect(WHOLE_STATE)),
    ("ignore-data-skip", NoEffect("a resumed run does not read the rows of earlier steps")),
    ("enable-jit-checkpoint", NoEffect("SIGTERM, SIGINT and SIGUSR1 always save a checkpoint")),
    ("full-determinism", NoEffect("runs are always deterministic")),
    ("per-device-eval-batch-size", NoEffect(EVAL_BATCH)),
    ("per-gpu-eval-batch-size", NoEffect(EVAL_BATCH)),
    ("eval-steps", Supported),
    ("eval-accumulation-steps", NoEffect(EVAL_BATCH)),
    ("eval-do-concat-batches", NoEffect(EVALUATION)),
    ("eval-use-gather-object", NoEffect(EVALUATION)),
    ("batch-eval-metrics", NoEffect(EVALUATION)),
    ("prediction-loss-only", NoEffect(EVALUATION)),
    ("include-inputs-for-metrics", NoEffect(EVALUATION)),
    ("include-for-metrics", NoEffect(EVALUATION)),
    ("metric-for-best-model", Supported),
    ("bf16-full-eval", NoEffect(EVAL_DTYPE)),
    ("fp16-full-eval", NoEffect(EVAL_DTYPE)),
    ("use-legacy-prediction-loop", NoEffect(EVALUATION)),
    ("hub-model-id", NoEffect(NO_UPLOAD)),
    ("hub-strategy", NoEffect(NO_UPLOAD)),
    ("hub-token", NoEffect(NO_UPLOAD)),
    ("hub-private-repo", NoEffect(NO_UPLOAD)),
    ("hub-always-push", NoEffect(NO_UPLOAD)),
    ("hub-revision", NoEffect(NO_UPLOAD)),
    ("push-to-hub-model-id", NoEffect(NO_UPLOAD)),
    ("push-to-hub-organization", NoEffect(NO_UPLOAD)),
    ("push-to-hub-token", NoEffect(NO_UPLOAD)),
    ("resume-from-checkpoint", Supported),
    ("gradient-accumulation-steps", limited(is_one,
        "gradient accumulation", "omit it and increase --per-device-train-batch-size, which also gives more negatives")),
    ("per-gpu-train-batch-size", limited(is_off,
        "a batch size under its deprecated name", "use --per-device-train-batch-size")),
    ("optim", limited(is_adamw,
        "an optimizer other than AdamW", "omit it")),
    ("adafactor", limited(is_off,
        "an optimizer other than AdamW", "omit it")),
    ("optim-args", limited(is_empty,
        "options of another optimizer", "omit it")),
    ("optim-target-modules", limited(is_empty,
        "an optimizer with projected gradients", "omit it; --target-modules chooses the projections with adapters")),
    ("lr-scheduler-kwargs", limited(is_empty,
        "options of a learning-rate schedule", "omit it")),
    ("neftune-noise-alpha", limited(is_zero_or_off,
        "noise on the embeddings", "omit it")),
    ("label-smoothing-factor", limited(is_zero,
        "smoothed labels", "omit it")),
    ("past-index", limited(is_minus_one,
        "hidden states of earlier batches", "omit it")),
    ("logging-strategy", limited(is_steps,
        "logging at intervals that are not steps", "use --logging-steps")),
    ("evaluation-strategy", Supported),
    ("eval-strategy", Supported),
    ("eval-on-start", Supported),
    ("load-best-model-at-end", Supported),
    ("do-eval", limited(is_off_or_evaluated,
        "evaluation during training without a test collection", "give one with --eval-dataset")),
    ("evaluate-during-training", limited(is_off_or_evaluated,
        "evaluation during training without a test collection", "give one with --eval-dataset")),
    ("eval-delay", limited(is_zero,
        "a later first evaluation", "omit it; --eval-on-start false leaves out the starting model")),
    ("greater-is-better", limited(is_on_or_none,
        "a metric that is better when it is lower", "omit it: all metrics here are better when they are greater")),
    ("do-predict", limited(is_off,
        "prediction after training", "run llara encode afterwards")),
    ("debug", limited(is_empty,
        "a debugger of PyTorch", "omit it")),
    ("train-sampling-strategy", limited(is_random,
        "another order of the rows", "use --sampling")),
    ("config-name", limited(is_model,
        "the configuration of another model", "put that config.json into the model folder")),
    ("tokenizer-name", limited(is_model,
        "the tokenizer of another model", "put that tokenizer.json into the model folder")),
    ("data-seed", limited(is_seed,
        "a separate seed for the data", "use --seed")),
    ("max-example-num-per-dataset", limited(is_no_bound,
        "a part of the rows of each file", "shorten the files, or the run with --max-steps")),
    ("load-from-disk", limited(is_off,
        "rows saved by the Python library datasets", "give JSONL files as --train-data")),
    ("exit-after-save", limited(is_off,
        "preparing data without training", "omit it")),
    ("shuffle-ratio", limited(is_zero,
        "texts with shuffled sentences", "omit it")),
    ("sentence-pooling-method", limited(is_mean,
        "a pooling other than the template's mean of the last tokens", "omit it; for last-token pooling, use a template with pooled_tokens = 1")),
    ("lora-extra-parameters", limited(is_empty,
        "additional trained parameters", "omit it")),
    ("push-to-hub", limited(is_off,
        "uploading the model", "upload the output folder afterwards")),
];

const fn limited(
    is_accepted: fn(&str, &OwnSettings<'_>) -> bool,
    asks_for: &'static str,
    hint: &'static str,
) -> Treatment {
    Treatment::Limited(Limited { is_accepted, asks_for, hint })
}

fn is_off(value: &str, _: &OwnSettings<'_>) -> bool {
    ["false", "no", "off", "0", "none", ""].contains(&&*value.to_ascii_lowercase())
}

fn is_off_or_evaluated(value: &str, own: &OwnSettings<'_>) -> bool {
    own.evaluates || is_off(value, own)
}

fn is_on_or_none(value: &str, _: &OwnSettings<'_>) -> bool {
    ["true", "yes", "on", "1", "none", ""].contains(&&*value.to_ascii_lowercase())
}

fn is_empty(value: &str, _: &OwnSettings<'_>) -> bool {
    ["", "none", "{}", "[]"].contains(&&*value.to_ascii_lowercase())
}

fn is_one(value: &str, _: &OwnSettings<'_>) -> bool {
    value == "1"
}

fn is_minus_one(value: &str, _: &OwnSettings<'_>) -> bool {
    value == "-1"
}

fn is_zero(value: &str, _: &OwnSettings<'_>) -> bool {
    value.parse() == Ok(0.0f64)
}

fn is_zero_or_off(value: &str, own: &OwnSettings<'_>) -> bool {
    is_zero(value, own) || is_off(value, own)
}

fn is_adamw(value: &str, _: &OwnSettings<'_>) -> bool {
    value.starts_with("adamw_torch") || value == "adamw_hf"
}

fn is_steps(value: &str, _: &OwnSettings<'_>) -> bool {
    value == "steps"
}

fn is_random(value: &str, _: &OwnSettings<'_>) -> bool {
    value == "random"
}

fn is_mean(value: &str, _: &OwnSettings<'_>) -> bool {
    value == "mean"
}

fn is_model(value: &str, own: &OwnSettings<'_>) -> bool {
    value == own.model || value.is_empty() || value == "None"
}

fn is_seed(value: &str, own: &OwnSettings<'_>) -> bool {
    value == "None" || value.parse() == Ok(own.seed)
}

/// The reference's default is a hundred million.
fn is_no_bound(value: &str, _: &OwnSettings<'_>) -> bool {
    value.parse::<u64>().is_ok_and(|rows| rows >= 100_000_000)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn the_table_has_every_flag_of_the_reference_and_its_trainer() {
        let list = include_str!("../../tests/fixtures/reference_flags.txt");
        let expected: BTreeSet<String> = list
            .lines()
            .filter(|line| !line.starts_with('#'))
            .map(|name| name.replace('_', "-"))
            .collect();
        let table: BTreeSet<String> = FLAGS.iter().map(|(name, _)| (*name).to_owned()).collect();
        assert!(expected.len() >= 171, "{}", expected.len());
        assert_eq!(table.len(), FLAGS.len(), "a flag is in the table twice");
        assert_eq!(table, expected);
    }

    #[test]
    fn every_flag_is_parsed_with_and_without_a_value() {
        let verb = crate::command();
        let verb = verb.find_subcommand("finetune").unwrap();
        for (name, treatment) in FLAGS {
            let arg = verb.get_arguments().find(|arg| {
                arg.get_long() == Some(name)
                    || arg.get_all_aliases().is_some_and(|all| all.contains(name))
            });
            let arg = arg.unwrap_or_else(|| panic!("--{name} is not parsed"));
            if !matches!(treatment, Treatment::Supported) {
                assert!(arg.is_hide_set() && arg.get_num_args() == Some((0..).into()), "{name}");
            }
        }
    }
}
