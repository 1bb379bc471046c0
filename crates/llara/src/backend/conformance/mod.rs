//! One body of checks for every backend: each operation of [`Backend`] against a plain f64 version,
//! each backward also against finite differences of that version.
//!
//! Library code and not test code, so that a device can prove itself on the machine that has it, with
//! no toolchain there. Shapes are awkward on purpose; inputs are drawn from fixed seeds, so a case
//! means the same on every backend, and [`Case::bits`] tells whether two runs agree to the last bit.
//!
//! ```
//! use llara::backend::{Cpu, conformance};
//! let cases = conformance::objective(&Cpu::new())?;
//! assert!(cases.iter().all(|case| case.passed()));
//! # Ok::<(), llara::Error>(())
//! ```

mod attention;
mod mixed;
mod norms;
mod objective;
mod plain;
mod pointwise;
mod products;
mod rows;
mod suite;

use std::fmt;

pub use attention::attention;
pub use mixed::mixed;
pub use norms::norms;
pub use objective::objective;
pub use pointwise::pointwise;
pub use products::products;
pub use rows::rows;

use super::Backend;
use crate::Result;

/// What became of the checks of one operation.
#[derive(Debug, Clone, PartialEq)]
pub struct Case {
    /// The operation, and how it was checked.
    pub name: &'static str,
    /// Largest error, relative to the magnitude of the result; infinite for a NaN or a wrong shape.
    /// Of several checks, that of the one closest to its bound, or furthest beyond it.
    pub worst: f64,
    /// The bound of that check.
    pub allowed: f64,
    /// Which check that was: shapes, element, expected and got.
    pub detail: String,
    /// Number of checks.
    pub checks: usize,
    /// Hash of the bits of everything that the backend returned.
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

/// Every family in turn.
///
/// # Errors
/// What the backend itself reports. A wrong result is a [`Case`] that has not passed.
pub fn run<B: Backend>(backend: &B) -> Result<Vec<Case>> {
    let families = [products, rows, norms, attention, pointwise, objective, mixed];
    let mut cases = Vec::new();
    for family in families {
        cases.extend(family(backend)?);
    }
    Ok(cases)
}
