//! Parsers for option values that select an enum value of the library.

use std::time::Duration;

use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use llara::Role;
use llara::data::{BadRows, BatchRows, Sampling};
use llara::model::SavedTokens;
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

/// A time such as `3h50m`, `1d`, `90m`, `45s`, or a number of seconds.
pub(super) fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || "expected a time such as 3h50m, 90m or 45s".to_owned();
    let mut seconds = 0u64;
    let mut rest = text.trim();
    if rest.is_empty() {
        return Err(wrong());
    }
    while !rest.is_empty() {
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit_and_rest) = rest.split_at(digits);
        let number: u64 = number.parse().map_err(|_| wrong())?;
        let mut characters = unit_and_rest.chars();
        let unit = match characters.next() {
            Some('d') => 86_400,
            Some('h') => 3_600,
            Some('m') => 60,
            Some('s') => 1,
            None if rest.len() == text.trim().len() => 1,
            _ => return Err(wrong()),
        };
        seconds =
            number.checked_mul(unit).and_then(|n| seconds.checked_add(n)).ok_or_else(wrong)?;
        rest = characters.as_str();
    }
    match seconds {
        0 => Err(wrong()),
        seconds => Ok(Duration::from_secs(seconds)),
    }
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

/// `mixed` or `per-file`.
pub(super) fn batch_rows() -> impl TypedValueParser<Value = BatchRows> {
    one_of(&[
        ("mixed", "Rows of all files together", BatchRows::Mixed),
        ("per-file", "Rows of one file", BatchRows::PerFile),
    ])
}

/// `error` or `skip`, for judgments.
pub(super) fn unknown_ids() -> impl TypedValueParser<Value = UnknownIds> {
    one_of(&[
        ("error", "Stop with an error that lists the ids", UnknownIds::Error),
        ("skip", "Ignore the judgment and count it", UnknownIds::Skip),
    ])
}

/// `trainable-token-indices` or `modules-to-save`.
pub(super) fn saved_tokens() -> impl TypedValueParser<Value = SavedTokens> {
    one_of(&[
        (
            "trainable-token-indices",
            "Only the rows of the added tokens; needs PEFT 0.15 or later",
            SavedTokens::TrainableTokenIndices,
        ),
        (
            "modules-to-save",
            "The whole embedding table, with the trained rows in it",
            SavedTokens::ModulesToSave,
        ),
    ])
}

/// `error` or `skip`.
pub(super) fn bad_rows() -> impl TypedValueParser<Value = BadRows> {
    one_of(&[
        ("error", "Stop with an error that names the row", BadRows::Error),
        ("skip", "Skip the row and count it", BadRows::Skip),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_as_people_write_them() {
        for (text, seconds) in
            [("3h50m", 13_800), ("90m", 5_400), ("45s", 45), ("1d2h", 93_600), ("600", 600)]
        {
            assert_eq!(duration(text), Ok(Duration::from_secs(seconds)), "{text}");
        }
        for text in
            ["", "h", "3h50", "0s", "0", "-5m", "1.5h", "5x", "99999999999999999999s", "3 h"]
        {
            assert!(duration(text).is_err(), "{text}");
        }
        assert!(duration(&format!("{}d", u64::MAX)).is_err());
    }
}
