//! Flags of the reference and its trainer that this program has no setting for: those that mean
//! nothing here are accepted with a line that says what stands in their place; those that ask for
//! what this version cannot do are refused by name.

use clap::{Arg, ArgAction, ArgMatches, Command};
use llara::{Error, ErrorKind, Result};

/// Accepted, and what stands in their place.
const REPLACED: &[(&str, &str)] = &[
    ("deepspeed", "one process on one device: there is nothing to shard"),
    ("fsdp", "one process on one device: there is nothing to shard"),
    ("fsdp-config", "one process on one device: there is nothing to shard"),
    ("gradient-checkpointing", "--chunk-tokens bounds the memory of activations, exactly"),
    ("gradient-checkpointing-kwargs", "--chunk-tokens bounds the memory of activations"),
    ("fp16", "--dtype bf16 computes in 16 bits, without a loss scale"),
    ("tf32", "--dtype says what is computed in"),
    ("fp16-opt-level", "--dtype says what is computed in"),
    ("half-precision-backend", "--dtype says what is computed in"),
    ("torch-compile", "kernels are compiled ahead of time"),
    ("ddp-find-unused-parameters", "a parameter without a gradient is always an error"),
    ("ddp-timeout", "one process: nothing waits for another"),
    ("ddp-backend", "one process: nothing is exchanged"),
    ("ddp-bucket-cap-mb", "one process: nothing is exchanged"),
    ("local-rank", "one process"),
    ("use-flash-attn", "attention always runs over packed sequences, without padding"),
    ("dataloader-num-workers", "texts are tokenized by all threads (--threads)"),
    ("dataloader-pin-memory", "batches are made where they are used"),
    ("group-by-length", "sequences are packed without padding, so length costs nothing"),
    ("remove-unused-columns", "query, pos, neg and prompt are read; other fields are passed over"),
    ("report-to", "log.jsonl and TensorBoard events are always written"),
    ("logging-dir", "TensorBoard events go to runs/ in the output folder"),
    ("run-name", "a run is known by its output folder"),
    ("disable-tqdm", "there is a bar on a terminal and plain lines elsewhere"),
    ("do-train", "finetune always trains"),
    ("save-safetensors", "weights are always saved as safetensors"),
    ("low-cpu-mem-usage", "weights are always read tensor by tensor"),
    ("use-slow-tokenizer", "tokenizer.json is always used"),
    ("token", "the Hub's token is read from HF_TOKEN"),
    ("trust-remote-code", "code of a model folder is never run"),
    ("use-cpu", "--device says what computes"),
    ("no-cuda", "--device says what computes"),
    ("cache-path", "rows are read where they are, without a cache"),
    ("load-disk-path", "rows are read from --train-data"),
    ("save-to-disk", "rows are read where they are, so nothing prepared is there to save"),
    ("save-disk-path", "rows are read where they are, so nothing prepared is there to save"),
    ("save-max-shard-size", "rows are read where they are, so nothing prepared is there to save"),
    ("num-shards", "rows are read where they are, so nothing prepared is there to save"),
    ("fix-position-embedding", "rotary positions have no parameters, so there is nothing to fix"),
    ("cache-chunk-size", "--chunk-tokens bounds the memory of activations, exactly"),
    ("save-only-model", "checkpoints are always the model alone"),
    ("log-level", "standard error has the notes and the progress, and nothing else"),
    ("logging-first-step", "--logging-steps 1 logs every step"),
    ("per-device-eval-batch-size", "there is no evaluation during training"),
    ("eval-steps", "there is no evaluation during training"),
];

/// The options by which it is judged whether a flag asks for something else.
pub(super) struct OwnSettings<'a> {
    /// The model as it was named.
    pub(super) model: &'a str,
    /// Steps between two checkpoints; 0: none.
    pub(super) save_steps: u64,
    /// The run's seed.
    pub(super) seed: u64,
}

/// A flag of which only some values can be had.
struct Limited {
    name: &'static str,
    /// Whether a value asks for nothing that is not done anyway.
    harmless: fn(&str, &OwnSettings<'_>) -> bool,
    /// What the others ask for.
    asks_for: &'static str,
    hint: &'static str,
}

const LIMITED: &[Limited] = &[
    limited(
        "resume-from-checkpoint",
        is_off,
        "resuming",
        "start again, or give the checkpoint as --model",
    ),
    limited(
        "gradient-accumulation-steps",
        is_one,
        "gradient accumulation",
        "leave it out and raise --per-device-train-batch-size, which also gives more negatives",
    ),
    limited("optim", is_adamw, "another optimizer than AdamW", "leave it out"),
    limited("save-strategy", saves_so, "saving by another measure than steps", "use --save-steps"),
    limited(
        "logging-strategy",
        is_steps,
        "logging by another measure than steps",
        "use --logging-steps",
    ),
    limited(
        "evaluation-strategy",
        is_off,
        "evaluation during training",
        "run llara evaluate afterwards",
    ),
    limited("eval-strategy", is_off, "evaluation during training", "run llara evaluate afterwards"),
    limited("do-eval", is_off, "evaluation during training", "run llara evaluate afterwards"),
    limited(
        "load-best-model-at-end",
        is_off,
        "evaluation during training",
        "keep models with --save-steps and run llara evaluate on them",
    ),
    limited(
        "config-name",
        is_model,
        "the configuration of another model",
        "put that config.json into the model folder",
    ),
    limited(
        "tokenizer-name",
        is_model,
        "the tokenizer of another model",
        "put that tokenizer.json into the model folder",
    ),
    limited("data-seed", is_seed, "another seed for the data than for the rest", "use --seed"),
    limited(
        "max-example-num-per-dataset",
        is_no_bound,
        "a part of the rows of each file",
        "shorten the files, or the run with --max-steps",
    ),
    limited(
        "load-from-disk",
        is_off,
        "rows that the Python library datasets has saved",
        "give JSONL files as --train-data",
    ),
    limited("exit-after-save", is_off, "preparing data without training", "leave it out"),
    limited("shuffle-ratio", is_zero, "texts with shuffled sentences", "leave it out"),
    limited(
        "sentence-pooling-method",
        is_mean,
        "another pooling than the template's, the mean of the last tokens",
        "leave it out; for the last token alone, use a template with pooled_tokens = 1",
    ),
    limited("label-smoothing-factor", is_zero, "smoothed labels", "leave it out"),
    limited("push-to-hub", is_off, "uploading the model", "upload the output folder afterwards"),
];

const fn limited(
    name: &'static str,
    harmless: fn(&str, &OwnSettings<'_>) -> bool,
    asks_for: &'static str,
    hint: &'static str,
) -> Limited {
    Limited { name, harmless, asks_for, hint }
}

fn is_off(value: &str, _: &OwnSettings<'_>) -> bool {
    ["false", "no", "off", "0", "none"].contains(&&*value.to_ascii_lowercase())
}

fn is_one(value: &str, _: &OwnSettings<'_>) -> bool {
    value == "1"
}

fn is_zero(value: &str, _: &OwnSettings<'_>) -> bool {
    value.parse() == Ok(0.0f64)
}

fn is_adamw(value: &str, _: &OwnSettings<'_>) -> bool {
    value.starts_with("adamw_torch") || value == "adamw_hf"
}

fn is_steps(value: &str, _: &OwnSettings<'_>) -> bool {
    value == "steps"
}

fn saves_so(value: &str, own: &OwnSettings<'_>) -> bool {
    value == "steps" || (value == "no" && own.save_steps == 0)
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

/// Those of these flags that were given.
#[derive(Default)]
pub(super) struct TrainerFlags {
    /// Name and values.
    given: Vec<(&'static str, Vec<String>)>,
}

impl TrainerFlags {
    /// What to say about flags that were accepted, a line each, beside the run's `own` settings.
    ///
    /// # Errors
    /// The first that asks for what cannot be done.
    pub(super) fn check(&self, own: &OwnSettings<'_>) -> Result<Vec<String>> {
        for flag in LIMITED {
            let Some(values) = self.values(flag.name) else { continue };
            if !values.iter().all(|value| (flag.harmless)(value, own)) {
                return Err(Error::new(
                    ErrorKind::Argument,
                    format!("`--{}` is not in this version", flag.name),
                )
                .got(format!(
                    "--{} {}, which asks for {}",
                    flag.name,
                    values.join(" "),
                    flag.asks_for
                ))
                .hint(flag.hint));
            }
        }
        let given = REPLACED.iter().filter(|(name, _)| self.values(name).is_some());
        Ok(given.map(|(name, instead)| format!("--{name} has no effect here: {instead}")).collect())
    }

    fn values(&self, name: &str) -> Option<&[String]> {
        self.given.iter().find(|(given, _)| *given == name).map(|(_, values)| values.as_slice())
    }
}

fn names() -> impl Iterator<Item = &'static str> {
    REPLACED.iter().map(|(name, _)| *name).chain(LIMITED.iter().map(|flag| flag.name))
}

impl clap::Args for TrainerFlags {
    fn augment_args(command: Command) -> Command {
        names().fold(command, |command, name| {
            command.arg(
                Arg::new(name)
                    .long(name)
                    .num_args(0..)
                    .default_missing_value("true")
                    .allow_negative_numbers(true)
                    .action(ArgAction::Append)
                    .hide(true),
            )
        })
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl clap::FromArgMatches for TrainerFlags {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut flags = TrainerFlags::default();
        flags.update_from_arg_matches(matches)?;
        Ok(flags)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        let given = |name| Some((name, matches.get_many::<String>(name)?.cloned().collect()));
        self.given = names().filter_map(given).collect();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::{Args as _, FromArgMatches as _};

    const OWN: OwnSettings<'_> = OwnSettings { model: "org/name", save_steps: 0, seed: 42 };

    fn check(args: &[&str]) -> Result<Vec<String>> {
        check_beside(args, &OWN)
    }

    fn check_beside(args: &[&str], own: &OwnSettings<'_>) -> Result<Vec<String>> {
        let command = TrainerFlags::augment_args(Command::new("t").no_binary_name(true));
        let matches = command.try_get_matches_from(args).unwrap();
        TrainerFlags::from_arg_matches(&matches).unwrap().check(own)
    }

    #[test]
    fn every_accepted_flag_gets_one_line() {
        let lines = check(&["--fp16", "--deepspeed", "../s.json", "--tf32", "False"]).unwrap();
        assert_eq!(lines.len(), 3, "{lines:?}");
        assert!(lines[0].starts_with("--deepspeed") && lines[1].starts_with("--fp16"));
        assert_eq!(check(&["--do-eval=false", "--optim", "adamw_torch"]).unwrap().len(), 0);
    }

    #[test]
    fn values_that_change_nothing_are_taken_in_silence() {
        for args in [
            &["--shuffle-ratio", "0.0", "--label-smoothing-factor", "0"][..],
            &["--max-example-num-per-dataset", "100000000", "--load-from-disk", "False"],
            &["--tokenizer-name", "org/name", "--data-seed", "42", "--save-strategy", "no"],
            &["--sentence-pooling-method", "mean", "--load-best-model-at-end", "False"],
        ] {
            assert_eq!(check(args).unwrap().len(), 0, "{args:?}");
        }
        let saving = OwnSettings { save_steps: 5, ..OWN };
        assert!(check_beside(&["--save-strategy", "no"], &saving).is_err());
        assert!(check_beside(&["--save-strategy", "steps"], &saving).is_ok());
    }

    #[test]
    fn what_cannot_be_done_is_refused_by_name() {
        for args in [
            &["--resume-from-checkpoint", "x"][..],
            &["--gradient-accumulation-steps", "2"],
            &["--optim", "adafactor"],
            &["--shuffle-ratio", "0.1"],
            &["--max-example-num-per-dataset", "1000"],
            &["--sentence-pooling-method", "last_token"],
            &["--label-smoothing-factor", "0.1"],
            &["--load-best-model-at-end"],
            &["--config-name", "org/other"],
            &["--data-seed", "7"],
            &["--exit-after-save", "True"],
        ] {
            let e = check(args).unwrap_err().to_string();
            assert!(e.starts_with(&format!("`{}` is not in this version", args[0])), "{e}");
            assert!(e.contains("hint: "), "{e}");
        }
    }
}
