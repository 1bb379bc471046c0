//! The command line: one file per verb, each of which parses its arguments and calls the library.
//!
//! Results go to standard output, messages to standard error. Exit codes: 0: success; 1: failure, with the
//! reason on standard error; 2: invalid command line; 130, 138, 143: stopped by SIGINT, SIGUSR1, SIGTERM; 75:
//! stopped by `--max-time`.

mod check;
mod compute;
mod encode;
mod eval_report;
mod evaluate;
mod finetune;
mod histogram;
mod init;
mod inspect_data;
mod interrupt;
mod merge;
mod names;
mod output_folder;
mod paths;
mod plan;
mod pretrain;
mod processes;
mod progress;
mod report;
mod run_file;
mod save_dtype;
mod search;
mod talk;
mod trained_model;
mod training;
mod values;
mod verify_distributed;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

/// Fine-tune decoder language models into text-embedding models, and use them.
#[derive(Parser)]
#[command(name = "llara", version, color = clap::ColorChoice::Never, max_term_width = 100)]
#[command(args_override_self = true)]
#[command(after_help = "\
Long options can be spelled with underscores: --train_group_size is --train-group-size.
Results go to standard output, messages to standard error.

Example, from training data to a search:
  llara init     --preset tiny --train-data train.jsonl --output-dir base
  llara finetune --model base --train-data train.jsonl --output-dir tuned --use-lora false
  llara evaluate --model tuned --dataset beir/ --split test
  llara search   --model tuned --corpus beir/ --query 'when does tin melt?'")]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    Init(init::Args),
    InspectData(inspect_data::Args),
    Pretrain(Box<pretrain::Args>),
    Finetune(Box<finetune::Args>),
    /// Estimate memory, work and text lengths of a training run without training
    #[command(after_help = plan::AFTER_HELP)]
    Plan(Box<plan::PlanArgs>),
    /// Estimate memory, work and text lengths of a pretraining run without training
    #[command(after_help = plan::PRETRAINING_AFTER_HELP)]
    PlanPretraining(Box<plan::PretrainingPlanArgs>),
    /// Compare training on several processes with one process: losses, gradients, weights
    #[command(after_help = verify_distributed::AFTER_HELP)]
    VerifyDistributed(Box<verify_distributed::VerifyArgs>),
    Encode(Box<encode::Args>),
    Evaluate(Box<evaluate::Args>),
    Search(search::Args),
    Merge(merge::Args),
    Check(check::Args),
    Report(report::Args),
}

fn main() -> ExitCode {
    execute(std::env::args_os().collect())
}

/// Runs the command line `args`, the program's name first.
fn execute(args: Vec<OsString>) -> ExitCode {
    let parsed = interrupt::report_file_size_limit().map_err(Into::into).and_then(|()| parse(args));
    let error = match parsed.and_then(run) {
        Ok(()) => return ExitCode::SUCCESS,
        Err(error) => error,
    };
    match error.downcast_ref::<clap::Error>() {
        // Help and version are errors to clap too. A failure to print them cannot be reported.
        Some(usage) => {
            let _ = usage.print();
            u8::try_from(usage.exit_code()).map_or(ExitCode::FAILURE, ExitCode::from)
        }
        None => {
            if let Some(stopped) = error.downcast_ref::<interrupt::Stopped>() {
                return ExitCode::from(stopped.code);
            }
            // The faults of a folder, differences, and an error of several processes were printed already.
            if error.downcast_ref::<check::Faulty>().is_none()
                && error.downcast_ref::<processes::Reported>().is_none()
                && error.downcast_ref::<verify_distributed::Different>().is_none()
            {
                talk::report(&format!("error: {error}"));
            }
            ExitCode::FAILURE
        }
    }
}

fn parse(args: Vec<OsString>) -> anyhow::Result<Cli> {
    let command = command();
    let args = names::join_negative_numbers(names::kebab_case(args));
    let args = names::expand_negated(args, &command);
    let matches = command.clone().try_get_matches_from(&args)?;
    let args = run_file::extend(args, &command, &matches)?;
    Ok(Cli::from_arg_matches(&command.try_get_matches_from(args)?)?)
}

/// The definition of the command line. Every option accepts negative numbers as values, so that a value out
/// of range is reported as such and not as an unknown option. `plan`, `plan-pretraining` and `verify-distributed` have no
/// output folder.
fn command() -> clap::Command {
    let output = "output_dir";
    Cli::command()
        .mut_subcommand("finetune", |verb| {
            verb.mut_arg(output, |arg| arg.required_unless_present("config")).override_usage(
                "llara finetune [OPTIONS] --model <DIR|HUB_ID> --train-data <PATH>... --output-dir <DIR>\n       \
                 llara finetune [OPTIONS] --config <FILE>",
            )
        })
        .mut_subcommand("pretrain", |verb| {
            with_defaults_of_pretraining(verb)
                .mut_arg(output, |arg| arg.required_unless_present("config"))
                .override_usage(
                    "llara pretrain [OPTIONS] --model <DIR|HUB_ID> --text <PATH>... --output-dir <DIR>\n       \
                     llara pretrain [OPTIONS] --model <DIR|HUB_ID> --train-data <PATH>... --output-dir <DIR>\n       \
                     llara pretrain [OPTIONS] --config <FILE>",
                )
        })
        .mut_subcommand("plan", |verb| {
            verb.mut_arg(output, |arg| arg.hide(true)).override_usage(
                "llara plan [OPTIONS] --model <DIR|HUB_ID> --train-data <PATH>...\n       \
                 llara plan [OPTIONS] --config <FILE>",
            )
        })
        .mut_subcommand("plan-pretraining", |verb| {
            with_defaults_of_pretraining(verb).mut_arg(output, |arg| arg.hide(true)).override_usage(
                "llara plan-pretraining [OPTIONS] --model <DIR|HUB_ID> --text <PATH>...\n       \
                 llara plan-pretraining [OPTIONS] --model <DIR|HUB_ID> --train-data <PATH>...\n       \
                 llara plan-pretraining [OPTIONS] --config <FILE>",
            )
        })
        .mut_subcommand("verify-distributed", |verb| {
            verb.mut_arg(output, |arg| arg.hide(true)).override_usage(
                "llara verify-distributed [OPTIONS] --model <DIR|HUB_ID> --train-data <PATH>...\n       \
                 llara verify-distributed [OPTIONS] --config <FILE>",
            )
        })
        .mut_subcommand("check", |verb| verb.override_usage("llara check [OPTIONS] <DIR>"))
        .mut_subcommand("merge", |verb| {
            verb.override_usage(
                "llara merge [OPTIONS] --model <DIR|HUB_ID> --adapter <DIR> --output-dir <DIR>",
            )
        })
        .mut_subcommands(|verb| {
            verb.mut_args(|arg| match arg.get_action().takes_values() {
                true => arg.allow_negative_numbers(true),
                false => arg,
            })
        })
}

/// All weights are trained, and the model gets the tokens that it lacks, unless the user says otherwise.
fn with_defaults_of_pretraining(verb: clap::Command) -> clap::Command {
    verb.mut_arg("use_lora", |arg| arg.default_value("false"))
        .mut_arg("add_special_tokens", |arg| arg.default_value("true"))
}

fn run(cli: Cli) -> anyhow::Result<()> {
    match cli.verb {
        Verb::Pretrain(_)
        | Verb::Finetune(_)
        | Verb::Encode(_)
        | Verb::Evaluate(_)
        | Verb::VerifyDistributed(_) => {}
        _ => processes::refuse_several()?,
    }
    match cli.verb {
        Verb::Init(args) => init::run(&args),
        Verb::InspectData(args) => inspect_data::run(&args),
        Verb::Pretrain(args) => pretrain::run(*args),
        Verb::Finetune(args) => finetune::run(*args),
        Verb::Plan(args) => plan::run(&args),
        Verb::PlanPretraining(args) => plan::run_pretraining(&args),
        Verb::VerifyDistributed(args) => verify_distributed::run(*args),
        Verb::Encode(args) => encode::run(*args),
        Verb::Evaluate(args) => evaluate::run(*args),
        Verb::Search(args) => search::run(&args),
        Verb::Merge(args) => merge::run(&args),
        Verb::Check(args) => check::run(&args),
        Verb::Report(args) => report::run(&args),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_definition_is_consistent() {
        command().debug_assert();
    }

    #[test]
    fn every_visible_option_has_a_help_text_and_a_heading() {
        for verb in command().get_subcommands() {
            assert!(verb.get_after_help().is_some(), "{} has no example", verb.get_name());
            for arg in verb.get_arguments().filter(|arg| !arg.is_hide_set()) {
                let id = arg.get_id().as_str();
                assert!(arg.get_help().is_some(), "{} --{id} has no help", verb.get_name());
                let heading = arg.get_help_heading();
                assert!(heading.is_some() || id == "help", "--{id} has no heading");
            }
        }
    }
}
