//! Flags of the reference and its trainer that are not options of this program: accepted with a note if they
//! have no effect, refused if they ask for an unsupported feature.

use clap::{Arg, ArgAction, ArgMatches, Command};
use llara::{Error, ErrorKind, Result};

use super::flag_table::{FLAGS, OwnSettings, Treatment};

/// The flags that are given.
#[derive(Default)]
pub(crate) struct TrainerFlags {
    /// Name and values.
    given: Vec<(&'static str, Vec<String>)>,
}

impl TrainerFlags {
    /// A note for each accepted flag without an effect, given the run's `own` settings.
    ///
    /// # Errors
    /// The first flag that asks for an unsupported feature.
    pub(crate) fn check(&self, own: &OwnSettings<'_>) -> Result<Vec<String>> {
        let mut notes = Vec::new();
        for (name, treatment) in FLAGS {
            let Some(values) = self.values(name) else { continue };
            match treatment {
                Treatment::Supported => {}
                Treatment::NoEffect(why) => notes.push(format!("--{name} has no effect: {why}")),
                Treatment::Limited(flag) => {
                    if !values.iter().all(|value| (flag.is_accepted)(value, own)) {
                        let what = format!("`--{name}` is not supported");
                        return Err(Error::new(ErrorKind::Argument, what)
                            .got(format!(
                                "--{name} {}, which asks for {}",
                                values.join(" "),
                                flag.asks_for
                            ))
                            .hint(flag.hint));
                    }
                }
            }
        }
        Ok(notes)
    }

    fn values(&self, name: &str) -> Option<&[String]> {
        self.given.iter().find(|(given, _)| *given == name).map(|(_, values)| values.as_slice())
    }
}

/// The flags that are not options of this program.
fn names() -> impl Iterator<Item = &'static str> {
    let others = FLAGS.iter().filter(|(_, treatment)| !matches!(treatment, Treatment::Supported));
    others.map(|(name, _)| *name)
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

    const OWN: OwnSettings<'_> = OwnSettings { model: "org/name", seed: 42, evaluates: false };

    fn check(args: &[&str]) -> Result<Vec<String>> {
        let command = TrainerFlags::augment_args(Command::new("t").no_binary_name(true));
        let matches = command.try_get_matches_from(args).unwrap();
        TrainerFlags::from_arg_matches(&matches).unwrap().check(&OWN)
    }

    #[test]
    fn every_accepted_flag_gets_one_line() {
        let lines = check(&["--fp16", "--deepspeed", "../s.json", "--tf32", "False"]).unwrap();
        assert_eq!(lines.len(), 3, "{lines:?}");
        assert!(lines[0].starts_with("--deepspeed") && lines[1].starts_with("--fp16"));
        assert_eq!(check(&["--do-eval=false", "--optim", "adamw_torch"]).unwrap().len(), 0);
    }

    #[test]
    fn values_without_an_effect_give_no_note() {
        for args in [
            &["--shuffle-ratio", "0.0", "--label-smoothing-factor", "0"][..],
            &["--max-example-num-per-dataset", "100000000", "--load-from-disk", "False"],
            &["--tokenizer-name", "org/name", "--data-seed", "42", "--optim-args="],
            &["--sentence-pooling-method", "mean", "--do-eval", "False"],
            &["--greater-is-better", "True", "--eval-delay", "0"],
        ] {
            assert_eq!(check(args).unwrap().len(), 0, "{args:?}");
        }
    }

    #[test]
    fn unsupported_features_are_refused_by_name() {
        for args in [
            &["--gradient-accumulation-steps", "2"][..],
            &["--optim", "adafactor"],
            &["--shuffle-ratio", "0.1"],
            &["--max-example-num-per-dataset", "1000"],
            &["--sentence-pooling-method", "last_token"],
            &["--label-smoothing-factor", "0.1"],
            &["--greater-is-better", "False"],
            &["--eval-delay", "100"],
            &["--do-eval"],
            &["--config-name", "org/other"],
            &["--data-seed", "7"],
            &["--exit-after-save", "True"],
            &["--neftune-noise-alpha", "5"],
        ] {
            let e = check(args).unwrap_err().to_string();
            assert!(e.starts_with(&format!("`{}` is not supported", args[0])), "{e}");
            assert!(e.contains("hint: "), "{e}");
        }
    }
}
