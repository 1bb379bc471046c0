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
    ("fp16", "computes in f32"),
    ("bf16", "computes in f32"),
    ("tf32", "computes in f32"),
    ("fp16-opt-level", "computes in f32"),
    ("half-precision-backend", "computes in f32"),
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
];

/// A flag of which only some values can be had.
struct Limited {
    name: &'static str,
    /// Whether a value asks for nothing that is not done anyway.
    harmless: fn(&str) -> bool,
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
    limited("save-strategy", is_steps, "saving by another measure than steps", "use --save-steps"),
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
];

const fn limited(
    name: &'static str,
    harmless: fn(&str) -> bool,
    asks_for: &'static str,
    hint: &'static str,
) -> Limited {
    Limited { name, harmless, asks_for, hint }
}

fn is_off(value: &str) -> bool {
    ["false", "no", "off", "0", "none"].contains(&&*value.to_ascii_lowercase())
}

fn is_one(value: &str) -> bool {
    value == "1"
}

fn is_adamw(value: &str) -> bool {
    value.starts_with("adamw_torch") || value == "adamw_hf"
}

fn is_steps(value: &str) -> bool {
    value == "steps"
}

/// Those of these flags that were given.
#[derive(Default)]
pub(super) struct TrainerFlags {
    /// Name and values.
    given: Vec<(&'static str, Vec<String>)>,
}

impl TrainerFlags {
    /// What to say about flags that were accepted, a line each.
    ///
    /// # Errors
    /// The first that asks for what cannot be done.
    pub(super) fn check(&self) -> Result<Vec<String>> {
        for flag in LIMITED {
            let Some(values) = self.values(flag.name) else { continue };
            if !values.iter().all(|value| (flag.harmless)(value)) {
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

    fn check(args: &[&str]) -> Result<Vec<String>> {
        let command = TrainerFlags::augment_args(Command::new("t").no_binary_name(true));
        let matches = command.try_get_matches_from(args).unwrap();
        TrainerFlags::from_arg_matches(&matches).unwrap().check()
    }

    #[test]
    fn every_accepted_flag_gets_one_line() {
        let lines = check(&["--fp16", "--deepspeed", "../s.json", "--bf16", "False"]).unwrap();
        assert_eq!(lines.len(), 3, "{lines:?}");
        assert!(lines[0].starts_with("--deepspeed") && lines[1].starts_with("--fp16"));
        assert_eq!(check(&["--do-eval=false", "--optim", "adamw_torch"]).unwrap().len(), 0);
    }

    #[test]
    fn what_cannot_be_done_is_refused_by_name() {
        for args in [
            &["--resume-from-checkpoint", "x"][..],
            &["--gradient-accumulation-steps", "2"],
            &["--optim", "adafactor"],
        ] {
            let e = check(args).unwrap_err().to_string();
            assert!(e.starts_with(&format!("`{}` is not in this version", args[0])), "{e}");
            assert!(e.contains("hint: "), "{e}");
        }
    }
}
