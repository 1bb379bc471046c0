//! Parsers for option values that select an enum value of the library.

use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use llara::Role;
use llara::data::{BadRows, Sampling};
use llara::retrieval::UnknownIds;

/// A parser that accepts the names of `choices`: `(name, help, value)`.
fn one_of<T: Copy + Send + Sync + 'static>(
    choices: &'static [(&'static str, &'static str, T)],
) -> impl TypedValueParser<Value = T> {
    let names = choices.iter().map(|(name, help, _)| PossibleValue::new(*name).help(*help));
    PossibleValuesParser::new(names).try_map(move |given| {
        let choice = choices.iter().find(|(name, ..)| *name == given);
        choice.map(|(.., value)| *value).ok_or("not one of the possible values")
    })
}

/// `query` or `passage`.
pub(super) fn role() -> impl TypedValueParser<Value = Role> {
    one_of(&[
        ("query", "A text that passages are searched for", Role::Query),
        ("passage", "A text that is searched", Role::Passage),
    ])
}

/// `random` or `sequential`.
pub(super) fn sampling() -> impl TypedValueParser<Value = Sampling> {
    one_of(&[
        (
            "random",
            "Each epoch visits every row once, in random order; passages are drawn at random",
            Sampling::Random,
        ),
        (
            "sequential",
            "Rows in file order, repeated from the start at the end of the data; the first passages",
            Sampling::Sequential,
        ),
    ])
}

/// `error` or `skip`, for judgments.
pub(super) fn unknown_ids() -> impl TypedValueParser<Value = UnknownIds> {
    one_of(&[
        ("error", "Stop with an error that lists the ids", UnknownIds::Error),
        ("skip", "Ignore the judgment and count it", UnknownIds::Skip),
    ])
}

/// `error` or `skip`.
pub(super) fn bad_rows() -> impl TypedValueParser<Value = BadRows> {
    one_of(&[
        ("error", "Stop with an error that names the row", BadRows::Error),
        ("skip", "Skip the row and count it", BadRows::Skip),
    ])
}
