//! The result of the checks of one operation.

use std::fmt;

/// The result of the checks of one operation.
#[derive(Debug, Clone, PartialEq)]
pub struct Case {
    /// The operation, and how it was checked.
    pub name: &'static str,
    /// Largest error, relative to the magnitude of the result; infinite for NaN or a wrong shape. With several
    /// checks, the error of the check that is closest to its bound, or that exceeds it the most.
    pub worst: f64,
    /// The bound of that check.
    pub allowed: f64,
    /// A description of that check: shapes, element, expected and got.
    pub detail: String,
    /// Number of checks.
    pub checks: usize,
    /// Hash of the bits of all results that the backend returned.
    pub bits: u64,
}

impl Case {
    /// Whether every check is within its bound.
    pub fn passed(&self) -> bool {
        self.worst <= self.allowed
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Case { name, worst, allowed, detail, checks, bits } = self;
        let verdict = if self.passed() { "ok" } else { "FAILED" };
        write!(f, "{verdict}: {name}: {worst:.1e} of {allowed:.1e} allowed in {checks} checks ")?;
        write!(f, "({bits:016x}); {detail}")
    }
}
