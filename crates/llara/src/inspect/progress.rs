//! The progress of an inspection.

/// How far an inspection is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// What is done at present.
    pub phase: Phase,
    /// The amount that is done, in the phase's unit.
    pub done: u64,
    /// The amount of the entire phase.
    pub total: u64,
}

/// A part of an inspection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Reading the files; in bytes.
    Reading,
    /// Comparing the hashes of rows and texts; in hashes.
    Comparing,
    /// Tokenizing a sample; in rows.
    Tokenizing,
}
