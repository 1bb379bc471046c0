//! Checks for every backend: each operation of [`Backend`] is compared with a reference implementation in f64;
//! each backward pass also with finite differences of that implementation.
//!
//! These checks are library code and not test code, so that a device can be checked on a machine without a
//! Rust toolchain. Shapes are deliberately not multiples of tile sizes. Inputs are drawn from fixed seeds, so
//! they are the same for every backend, and [`Case::bits`] shows whether two runs agree bit for bit.
//!
//! ```
//! use llara::backend::{Cpu, conformance};
//! let cases = conformance::objective(&Cpu::new())?;
//! assert!(cases.iter().all(|case| case.passed()));
//! # Ok::<(), llara::Error>(())
//! ```

mod attention;
mod both;
mod case;
mod dtypes;
mod masks_and_distillation;
mod mixed;
mod norms;
mod objective;
mod pointwise;
mod products;
mod reference;
mod rows;
mod sets;
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

/// Runs the checks of all operations.
///
/// # Errors
/// Errors of the backend are returned unchanged. A wrong result is not an error but a [`Case`] that has not passed.
pub fn run<B: Backend>(backend: &B) -> Result<Vec<Case>> {
    let families = [products, rows, norms, attention, pointwise, objective, mixed];
    let mut cases = Vec::new();
    for family in families {
        cases.extend(family(backend)?);
    }
    Ok(cases)
}
