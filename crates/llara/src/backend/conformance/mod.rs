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
mod case;
mod masks_and_distillation;
mod mixed;
mod norms;
mod objective;
mod plain;
mod pointwise;
mod products;
mod rows;
mod suite;

pub use attention::attention;
pub use case::Case;
pub use mixed::mixed;
pub use norms::norms;
pub use objective::objective;
pub use pointwise::pointwise;
pub use products::products;
pub use rows::rows;

use super::Backend;
use crate::Result;

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
