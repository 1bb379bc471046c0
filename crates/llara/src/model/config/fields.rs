//! Typed access to the fields of `config.json`: each number has a range, each error names its field.

use std::fmt::Display;
use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use crate::{Error, ErrorKind, Result};

/// Longest value that an error quotes, in characters.
const QUOTED_CHARS: usize = 80;

/// A JSON object whose fields are read one at a time. `null` counts as a missing field.
#[derive(Clone, Copy)]
pub(super) struct Fields<'j> {
    object: Option<&'j Map<String, Value>>,
    /// The location of the fields, for errors; such as ` of rope_scaling`.
    place: &'static str,
}

impl<'j> Fields<'j> {
    pub(super) fn new(object: &'j Map<String, Value>) -> Self {
        Fields { object: Some(object), place: "" }
    }

    /// The object in field `name`; an empty object if the field is missing.
    pub(super) fn object(&self, name: &str, place: &'static str) -> Result<Fields<'j>> {
        match self.value(name) {
            None => Ok(Fields { object: None, place }),
            Some(Value::Object(object)) => Ok(Fields { object: Some(object), place }),
            Some(other) => Err(self.wrong(name, "is not an object", "an object", other)),
        }
    }

    /// Whether the field is present, `null` included.
    pub(super) fn has(&self, name: &str) -> bool {
        self.object.is_some_and(|object| object.contains_key(name))
    }

    pub(super) fn value(&self, name: &str) -> Option<&'j Value> {
        self.object?.get(name).filter(|value| !value.is_null())
    }

    pub(super) fn values(&self) -> impl Iterator<Item = (&'j String, &'j Value)> {
        self.object.into_iter().flatten()
    }

    /// A whole number in `range`.
    pub(super) fn whole(&self, name: &str, range: RangeInclusive<usize>) -> Result<Option<usize>> {
        let Some(value) = self.value(name) else { return Ok(None) };
        let number = value.as_u64().and_then(|n| usize::try_from(n).ok());
        match number.filter(|n| range.contains(n)) {
            Some(number) => Ok(Some(number)),
            None => {
                let expected = format!("a whole number from {} to {}", range.start(), range.end());
                Err(self.wrong(name, "is out of range", expected, value))
            }
        }
    }

    /// [`whole`](Self::whole) of a field without a default.
    pub(super) fn required(&self, name: &str, range: RangeInclusive<usize>) -> Result<usize> {
        let expected = format!("a whole number from {} to {}", range.start(), range.end());
        self.whole(name, range)?.ok_or_else(|| self.missing(name, expected))
    }

    /// A number in `range`.
    pub(super) fn real(&self, name: &str, range: RangeInclusive<f64>) -> Result<Option<f64>> {
        let Some(value) = self.value(name) else { return Ok(None) };
        match value.as_f64().filter(|x| range.contains(x)) {
            Some(number) => Ok(Some(number)),
            None => {
                let expected = format!("a number from {:?} to {:?}", range.start(), range.end());
                Err(self.wrong(name, "is out of range", expected, value))
            }
        }
    }

    pub(super) fn required_real(&self, name: &str, range: RangeInclusive<f64>) -> Result<f64> {
        let expected = format!("a number from {:?} to {:?}", range.start(), range.end());
        self.real(name, range)?.ok_or_else(|| self.missing(name, expected))
    }

    pub(super) fn flag(&self, name: &str) -> Result<Option<bool>> {
        match self.value(name) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(*flag)),
            Some(other) => Err(self.wrong(name, "is not a boolean", "true or false", other)),
        }
    }

    pub(super) fn text(&self, name: &str) -> Result<Option<&'j str>> {
        match self.value(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(self.wrong(name, "is not a string", "a string", other)),
        }
    }

    pub(super) fn missing(&self, name: &str, expected: impl Display) -> Error {
        Error::new(ErrorKind::Config, format!("`{name}`{} is missing", self.place))
            .expected(expected)
            .got("no such field")
    }

    fn wrong(&self, name: &str, what: &str, expected: impl Display, got: &Value) -> Error {
        Error::new(ErrorKind::Config, format!("`{name}`{} {what}", self.place))
            .expected(expected)
            .got(quote(got))
    }
}

/// A value for an error: as JSON, in which control characters are escaped, and shortened.
pub(super) fn quote(value: &Value) -> String {
    shorten(&value.to_string())
}

/// A string for an error, like [`quote`].
pub(super) fn quote_text(text: &str) -> String {
    shorten(&format!("{text:?}"))
}

fn shorten(text: &str) -> String {
    // JSON does not escape the control characters outside ASCII.
    let mut shown: String = text
        .chars()
        .take(QUOTED_CHARS)
        .map(|c| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c })
        .collect();
    if text.chars().nth(QUOTED_CHARS).is_some() {
        shown.push('…');
    }
    shown
}
