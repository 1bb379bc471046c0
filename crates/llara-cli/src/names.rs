//! Spellings of options that Python programs use.

use std::ffi::OsString;

use clap::Command;

/// Converts `--snake_case` and `--snake_case=value` to `--snake-case…`. Values and all arguments after `--`
/// are not changed.
pub(super) fn kebab_case(args: Vec<OsString>) -> Vec<OsString> {
    let mut options = true;
    let convert = |arg: OsString| {
        options &= arg != "--";
        let Some(text) = arg.to_str().filter(|text| options && text.starts_with("--")) else {
            return arg;
        };
        match text.split_once('=') {
            Some((name, value)) => format!("{}={value}", name.replace('_', "-")).into(),
            None => text.replace('_', "-").into(),
        }
    };
    args.into_iter().map(convert).collect()
}

/// Converts `--option -1e-3` to `--option=-1e-3`, so that a negative number is parsed as the option's value
/// in every spelling.
pub(super) fn join_negative_numbers(args: Vec<OsString>) -> Vec<OsString> {
    let mut joined: Vec<OsString> = Vec::with_capacity(args.len());
    let mut options = true;
    for arg in args {
        options &= arg != "--";
        let number = arg.to_str().is_some_and(|a| a.starts_with('-') && a.parse::<f64>().is_ok());
        let option = |before: &&mut OsString| {
            before.to_str().is_some_and(|b| b.starts_with("--") && b.len() > 2 && !b.contains('='))
        };
        match joined.last_mut().filter(option) {
            Some(before) if options && number => {
                before.push("=");
                before.push(arg);
            }
            _ => joined.push(arg),
        }
    }
    joined
}

/// Converts `--no-flag`, which transformers accepts, to `--flag=false` for flags that take true or false.
pub(super) fn expand_negated(args: Vec<OsString>, command: &Command) -> Vec<OsString> {
    let verb = args.get(1).and_then(|verb| command.find_subcommand(verb));
    let Some(verb) = verb else { return args };
    let find = |name: &str| {
        verb.get_arguments().find(|arg| {
            arg.get_long() == Some(name)
                || arg.get_all_aliases().is_some_and(|all| all.contains(&name))
        })
    };
    let expand = |arg: OsString| {
        let name = arg.to_str().and_then(|text| text.strip_prefix("--"));
        let Some((full, name)) = name.and_then(|name| Some((name, name.strip_prefix("no-")?)))
        else {
            return arg;
        };
        let negatable =
            find(name).is_some_and(|flag| flag.get_num_args().is_some_and(|n| n.min_values() == 0));
        if negatable && find(full).is_none() { format!("--{name}=false").into() } else { arg }
    };
    args.into_iter().map(expand).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn names_change_and_values_do_not() {
        let args = ["llara", "--train_data", "my_file", "--a_b=c_d", "-x_y", "--", "--e_f"];
        let expected = ["llara", "--train-data", "my_file", "--a-b=c_d", "-x_y", "--", "--e_f"];
        assert_eq!(kebab_case(args.map(OsString::from).to_vec()), expected);
    }

    #[test]
    fn negative_numbers_belong_to_the_option_before_them() {
        let args = ["l", "--rate", "-1e-3", "--seed", "-1", "--a=b", "-2", "--x", "-y", "--", "-3"];
        let expected = ["l", "--rate=-1e-3", "--seed=-1", "--a=b", "-2", "--x", "-y", "--", "-3"];
        assert_eq!(join_negative_numbers(args.map(OsString::from).to_vec()), expected);
    }

    #[test]
    fn flags_may_be_negated() {
        let args = ["llara", "finetune", "--no-normlized", "--no-cuda", "--no-model", "--no-tf32"];
        let expected =
            ["llara", "finetune", "--normlized=false", "--no-cuda", "--no-model", "--tf32=false"];
        let args = args.map(OsString::from).to_vec();
        assert_eq!(expand_negated(args, &crate::command()), expected);
    }

    proptest! {
        #[test]
        fn twice_is_once(args in prop::collection::vec("(--)?[a-z_=-]{0,9}", 0..9)) {
            let args: Vec<OsString> = args.into_iter().map(OsString::from).collect();
            let once = kebab_case(args);
            prop_assert_eq!(kebab_case(once.clone()), once);
        }
    }
}
