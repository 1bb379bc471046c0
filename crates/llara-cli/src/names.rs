//! Option names as Python programs spell them.

use std::ffi::OsString;

/// `--snake_case` and `--snake_case=value` become `--snake-case…`; values stay as they are, and
/// so does everything behind `--`.
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

    proptest! {
        #[test]
        fn twice_is_once(args in prop::collection::vec("(--)?[a-z_=-]{0,9}", 0..9)) {
            let args: Vec<OsString> = args.into_iter().map(OsString::from).collect();
            let once = kebab_case(args);
            prop_assert_eq!(kebab_case(once.clone()), once);
        }
    }
}
