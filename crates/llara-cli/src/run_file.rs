//! `--config run.toml`: options in a file. Its entries are added to the command line as options, except for
//! those that are already given, so that one parser checks both.

use std::ffi::OsString;
use std::path::Path;

use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Command};
use llara::{Error, ErrorKind, Result, read_toml};
use toml::Value;

/// The name of the option.
const CONFIG: &str = "config";

/// Adds the entries of the run file, if `matches` has one, to `args`.
///
/// # Errors
/// The file cannot be read or is not TOML, a key is not an option, or a value is invalid for its option.
pub(super) fn extend(
    mut args: Vec<OsString>,
    command: &Command,
    matches: &ArgMatches,
) -> Result<Vec<OsString>> {
    let Some((verb, matches)) = matches.subcommand() else { return Ok(args) };
    let Ok(Some(path)) = matches.try_get_one::<std::path::PathBuf>(CONFIG) else { return Ok(args) };
    let Some(verb) = command.find_subcommand(verb) else { return Ok(args) };

    let table: toml::Table = read_toml(path, "the run file", "options without the dashes")?;
    let mut all = Vec::new();
    let mut new = Vec::new();
    for (key, value) in &table {
        let arg = find(verb, key).ok_or_else(|| unknown(verb, key, path))?;
        let options = options(arg, key, value, path)?;
        if matches.value_source(arg.get_id().as_str()) != Some(ValueSource::CommandLine) {
            new.extend(options.iter().cloned());
        }
        all.extend(options);
    }
    check_alone(verb, all, path)?;
    args.extend(new);
    Ok(args)
}

/// The option of a key, in either spelling.
fn find<'c>(verb: &'c Command, key: &str) -> Option<&'c Arg> {
    let name = key.replace('_', "-");
    verb.get_arguments().find(|arg| {
        arg.get_id() != CONFIG
            && (arg.get_long() == Some(&name)
                || arg.get_all_aliases().is_some_and(|all| all.contains(&&*name)))
    })
}

fn unknown(verb: &Command, key: &str, path: &Path) -> Error {
    let error = Error::new(ErrorKind::Config, format!("`{key}` is not an option")).file(path);
    let name = key.replace('_', "-");
    let known = verb.get_arguments().filter_map(Arg::get_long).filter(|&known| known != CONFIG);
    match known.min_by_key(|known| edit_distance(known, &name)) {
        Some(nearest) => error
            .expected(format!("an option of `llara {}` without the dashes", verb.get_name()))
            .hint(format!("did you mean `{nearest}`?")),
        None => error,
    }
}

/// Converts an entry to command-line options.
fn options(arg: &Arg, key: &str, value: &Value, path: &Path) -> Result<Vec<OsString>> {
    let wrong = |expected: &str| {
        Error::new(ErrorKind::Config, format!("the value of `{key}` has the wrong type"))
            .file(path)
            .expected(expected)
            .got(value)
    };
    let name = arg.get_long().unwrap_or(key);
    let option = |value: &Value| match value {
        Value::String(text) => Ok(format!("--{name}={text}").into()),
        Value::Integer(_) | Value::Float(_) | Value::Boolean(_) => {
            Ok(format!("--{name}={value}").into())
        }
        _ => Err(wrong("a string, a number, true or false")),
    };
    match value {
        Value::Array(values) if matches!(arg.get_action(), ArgAction::Append) => {
            values.iter().map(option).collect()
        }
        Value::Array(_) => Err(wrong("one value")),
        value => Ok(vec![option(value)?]),
    }
}

/// Parses only the options of the file, so that errors in them are reported with its path.
fn check_alone(verb: &Command, options: Vec<OsString>, path: &Path) -> Result<()> {
    let mut args = vec![verb.get_name().into(), format!("--{CONFIG}").into(), path.into()];
    args.extend(options);
    let Err(e) = verb.clone().try_get_matches_from(args) else { return Ok(()) };
    let text = e.to_string();
    let lines: Vec<&str> = text.lines().take_while(|line| !line.trim().is_empty()).collect();
    let what = lines.join("\n");
    Err(Error::new(ErrorKind::Config, what.trim_start_matches("error: ")).file(path))
}

/// The Levenshtein distance.
fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, &y) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn extended(file: &str, given: &[&str]) -> Result<Vec<String>> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run.toml");
        std::fs::write(&path, file).unwrap();
        let mut args = vec!["llara", "finetune", "--config", path.to_str().unwrap()];
        args.extend(given);
        let command = crate::command();
        let matches = command.clone().try_get_matches_from(&args).unwrap();
        let count = args.len();
        let args = args.into_iter().map(OsString::from).collect();
        let all = extend(args, &command, &matches)?;
        Ok(all[count..].iter().map(|arg| arg.to_str().unwrap().to_owned()).collect())
    }

    #[test]
    fn entries_become_options_that_are_not_given() {
        let file = "seed = 7\nlearning_rate = 1e-3\nnormlized = false\n\
                    train-data = [\"a\", \"b\"]\nmodel = \"-m\"";
        assert_eq!(
            extended(file, &["--seed", "8"]).unwrap(),
            [
                "--learning-rate=0.001",
                "--model=-m",
                "--normalized=false",
                "--train-data=a",
                "--train-data=b"
            ]
        );
        assert!(!extended(file, &["--train-data", "c"]).unwrap().join(" ").contains("train-data"));
    }

    #[test]
    fn errors_name_the_file() {
        for (file, parts) in [
            (
                "lerning_rate = 1",
                ["`lerning_rate` is not an option", "did you mean `learning-rate`?"],
            ),
            ("config = \"x\"", ["`config` is not an option", "run.toml"]),
            ("seed = \"x\"", ["run.toml: invalid value 'x' for '--seed", "an integer"]),
            ("seed = [1]", ["`seed` has the wrong type", "one value"]),
            ("sampling = \"all\"", ["invalid value 'all'", "random, sequential"]),
            ("seed = 1\nmodel = {a = 1}", ["`model` has the wrong type", "a string"]),
            ("seed = 1\nmodel = ", ["run.toml:2: the run file is not valid", ""]),
        ] {
            let error = extended(file, &[]).unwrap_err().to_string();
            assert!(parts.iter().all(|part| error.contains(part)), "{error}");
        }
    }

    #[test]
    fn distances_are_levenshteins() {
        for (a, b, distance) in [("", "", 0), ("abc", "", 3), ("kitten", "sitting", 3)] {
            assert_eq!((edit_distance(a, b), edit_distance(b, a)), (distance, distance));
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn any_file_is_read_or_refused(
            file in "([a-z_]{1,6} ?= ?[\\[\\]\"0-9a-z,{}=.-]{0,9}\n?){0,4}",
        ) {
            let _ = extended(&file, &[]);
        }
    }
}
