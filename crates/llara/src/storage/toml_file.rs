//! Reading TOML files that users write.

use std::path::Path;

use serde::de::DeserializeOwned;

use super::read_text_file;
use crate::{Error, ErrorKind, Result};

/// Largest TOML file that is read, in bytes.
const MAX_BYTES: u64 = 1 << 20;

/// Reads a TOML file. `name` is what the file is, for errors: "the template"; `expected` describes its keys.
///
/// # Errors
/// The file cannot be read, is larger than 1 MiB, is not TOML, or has unknown, missing or mistyped keys.
pub fn read_toml<T: DeserializeOwned>(path: &Path, name: &str, expected: &str) -> Result<T> {
    let text = read_text_file(path, &format!("read {name}"), MAX_BYTES)?;
    toml::from_str(&text).map_err(|e| {
        let message: String = e.message().trim().chars().filter(|c| !c.is_control()).collect();
        let error = Error::new(ErrorKind::Config, format!("{name} is not valid: {message}"))
            .expected(expected);
        match e.span() {
            Some(span) => error.line(path, line_of(&text, span.start)),
            None => error.file(path),
        }
    })
}

fn line_of(text: &str, offset: usize) -> u64 {
    1 + text.bytes().take(offset).filter(|&b| b == b'\n').count() as u64
}
