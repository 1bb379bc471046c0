//! Inspection of training data before a run: lengths, duplicates, contradictions, short groups, scripts and
//! special tokens.
//!
//! [`inspect`] reads files of any size in bounded memory; [`inspect_first_rows`] looks at the beginning of an
//! open [`Dataset`](crate::data::Dataset).

mod duplicates;
mod example;
mod finding;
mod inspector;
mod minhash;
mod near;
mod progress;
mod record;
mod report;
mod settings;
mod sorter;
mod sources;
mod special_tokens;
mod tally;
#[cfg(test)]
mod tests;
mod text_stats;
mod tokens;

pub use finding::Finding;
pub use inspector::{inspect, inspect_first_rows};
pub use progress::{Phase, Progress};
pub use report::{
    Basis, ByRole, ExampleReport, FileReport, FindingReport, LengthReport, OtherRow, Report,
    RoleLengths, SampleSize, TextCounts, TokenLengths,
};
pub use settings::Settings;
pub use text_stats::ScriptShare;
