//! What all checks share: drawing inputs, comparing results, collecting the cases.

use rand::{RngExt, SeedableRng, rngs::ChaCha8Rng};

use super::case::Case;
use super::reference::Matrix;
use crate::Result;
use crate::backend::{Backend, Dtype, Shape, View, ViewMut, WeightUse};

/// The largest relative rounding error of f32.
const ROUNDING: f64 = f32::EPSILON as f64 / 2.0;

/// Step of a finite difference. In f64 the truncation error (h²) and the rounding error (1e-16 / h) are then
/// both below 1e-9, far below the precision of f32.
const STEP: f64 = 1e-5;

/// A gradient of at most this many elements is compared with finite differences in all elements. Of a larger
/// gradient, this many elements are compared at either end, where the tails of loops are, and twice as many
/// at random.
const ALL_UP_TO: usize = 150;
const SAMPLED_AT_ENDS: usize = 4;

/// The allowed error of a result, relative to the largest element of the reference.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bound {
    relative: f64,
    floor: f64,
    by_row: bool,
}

impl Bound {
    /// No error.
    pub(super) const EXACT: Bound = Bound { relative: 0.0, floor: 0.0, by_row: false };

    /// The error of this many roundings.
    pub(super) fn roundings(count: f64) -> Self {
        Bound { relative: count * ROUNDING, ..Self::EXACT }
    }

    /// A sum of `terms` products of numbers of order one. Rounding errors have either sign and grow with the
    /// square root of their number, and so does the sum itself, unless its terms cancel.
    pub(super) fn sum(terms: usize) -> Self {
        let root = (terms as f64).sqrt();
        Self::roundings(8.0 + 2.0 * root).at_least(root)
    }

    /// If the result is smaller than `magnitude`, errors are relative to `magnitude`: the size of the terms
    /// that cancel in it.
    pub(super) fn at_least(self, magnitude: f64) -> Self {
        Bound { floor: self.floor.max(magnitude), ..self }
    }

    /// Errors of each row are relative to the largest element of that row.
    pub(super) fn by_row(self) -> Self {
        Bound { by_row: true, ..self }
    }
}

/// The state of a family of checks.
pub(super) struct Suite<'b, B: Backend> {
    /// The backend under test.
    pub(super) backend: &'b B,
    generator: ChaCha8Rng,
    /// Draws coordinates for finite differences. Separate, so that inputs do not depend on their number.
    sampler: ChaCha8Rng,
    cases: Vec<Case>,
    current: usize,
}

impl<'b, B: Backend> Suite<'b, B> {
    pub(super) fn new(backend: &'b B) -> Self {
        let [generator, sampler] = [7, 8].map(ChaCha8Rng::seed_from_u64);
        Suite { backend, generator, sampler, cases: Vec::new(), current: 0 }
    }

    pub(super) fn finish(self) -> Vec<Case> {
        self.cases
    }

    /// Makes `name` the current case: the next checks belong to it.
    pub(super) fn case(&mut self, name: &'static str) -> &mut Self {
        let known = self.cases.iter().position(|case| case.name == name);
        self.current = known.unwrap_or_else(|| {
            self.cases.push(Case {
                name,
                worst: 0.0,
                allowed: 0.0,
                detail: "all exact".to_owned(),
                checks: 0,
                bits: FNV_OFFSET,
            });
            self.cases.len() - 1
        });
        self
    }

    // ---- Inputs -------------------------------------------------------------------------------

    /// Uniform numbers of mean 0 and variance 1, all of them f32.
    pub(super) fn random(&mut self, rows: usize, cols: usize) -> Matrix {
        let width = 3f64.sqrt();
        Matrix::from_fn(rows, cols, |_, _| (self.generator.random::<f64>() * 2.0 - 1.0) * width)
            .rounded()
    }

    /// Indices below `end`.
    pub(super) fn indices(&mut self, count: usize, end: usize) -> Vec<u32> {
        (0..count).map(|_| self.generator.random_range(0..end as u32)).collect()
    }

    /// `x` on the device; it must be [`rounded`](Matrix::rounded).
    ///
    /// Also allocates and frees a matrix of NaN of the same shape. The backend may reuse its memory, so a
    /// kernel that does not write all of its result fails the check.
    pub(super) fn tensor(&self, x: &Matrix) -> Result<B::Tensor> {
        let data: Vec<f32> = x.data.iter().map(|&x| x as f32).collect();
        let tensor = self.backend.upload(&data, x.rows, x.cols)?;
        drop(self.backend.upload(&vec![f32::NAN; data.len()], x.rows, x.cols)?);
        Ok(tensor)
    }

    /// [`tensor`](Suite::tensor) of an optional matrix.
    pub(super) fn optional_tensor(&self, x: Option<&Matrix>) -> Result<Option<B::Tensor>> {
        x.map(|x| self.tensor(x)).transpose()
    }

    /// `x` on the device as a weight.
    pub(super) fn weight(&self, x: &Matrix) -> Result<B::Weight> {
        self.backend.prepare(self.tensor(x)?, WeightUse::Frozen(Dtype::F32))
    }

    /// `x` on the device, as a block of a larger matrix of NaN: see [`inner`].
    pub(super) fn padded(&self, x: &Matrix) -> Result<B::Tensor> {
        let around = Matrix::from_fn(x.rows + 3, x.cols + 5, |i, j| {
            let inside = (1..=x.rows).contains(&i) && (2..2 + x.cols).contains(&j);
            if inside { x.row(i - 1)[j - 2] } else { f64::NAN }
        });
        self.tensor(&around)
    }

    /// A list of indices on the device.
    pub(super) fn index(&self, data: &[u32]) -> Result<B::Index> {
        let [index] = self.backend.upload_indices([data])?;
        Ok(index)
    }

    // ---- Checks -------------------------------------------------------------------------------

    /// `got` must be `want`, within `bound`.
    pub(super) fn check(
        &mut self,
        what: &str,
        got: &B::Tensor,
        want: &Matrix,
        bound: Bound,
    ) -> Result<()> {
        if got.shape() != want.shape() {
            self.reject(what, &format!("{:?} instead of {:?}", got.shape(), want.shape()));
            return Ok(());
        }
        let got = self.read(got)?;
        let group = if bound.by_row { want.cols } else { want.data.len() };
        let mut worst = Deviation::default();
        for start in (0..want.data.len()).step_by(group.max(1)) {
            let group = start..start + group;
            worst = worst.max(deviation(&got[group.clone()], &want.data[group], bound, start));
        }
        self.record(what, worst, bound, |at| format!("({}, {})", at / want.cols, at % want.cols));
        Ok(())
    }

    /// The inner block of `got` must be `want`, and the NaN around it unchanged: see
    /// [`padded`](Suite::padded).
    pub(super) fn check_inner(
        &mut self,
        what: &str,
        got: &B::Tensor,
        want: &Matrix,
        bound: Bound,
    ) -> Result<()> {
        let (rows, cols) = got.shape();
        let all = self.read(got)?;
        let inside = |at: usize| {
            let (i, j) = (at / cols, at % cols);
            (1..=want.rows).contains(&i) && (2..2 + want.cols).contains(&j)
        };
        let untouched = (0..rows * cols).filter(|&at| !inside(at)).all(|at| all[at].is_nan());
        self.require(&format!("{what}: only the block is written"), untouched);
        let data: Vec<f32> = (0..rows * cols).filter(|&at| inside(at)).map(|at| all[at]).collect();
        let block = self.backend.upload(&data, want.rows, want.cols)?;
        self.check(what, &block, want, bound)
    }

    /// `got` must be the gradient of `objective` at `x`, by central differences.
    pub(super) fn check_gradient(
        &mut self,
        what: &str,
        got: &B::Tensor,
        x: &Matrix,
        bound: Bound,
        objective: impl Fn(&Matrix) -> f64,
    ) -> Result<()> {
        if got.shape() != x.shape() {
            self.reject(what, &format!("{:?} instead of {:?}", got.shape(), x.shape()));
            return Ok(());
        }
        let all = self.read(got)?;
        let coordinates = self.coordinates(all.len());
        let mut perturbed = x.clone();
        let mut want = Vec::with_capacity(coordinates.len());
        for &at in &coordinates {
            let (above, below) = (x.data[at] + STEP, x.data[at] - STEP);
            perturbed.data[at] = above;
            let rise = objective(&perturbed);
            perturbed.data[at] = below;
            want.push((rise - objective(&perturbed)) / (above - below));
            perturbed.data[at] = x.data[at];
        }
        let got: Vec<f32> = coordinates.iter().map(|&at| all[at]).collect();
        let worst = deviation(&got, &want, bound, 0);
        let place = |at| {
            let at: usize = coordinates[at];
            format!("({}, {})", at / x.cols, at % x.cols)
        };
        self.record(what, worst, bound, place);
        // All elements must be finite, also those that were not sampled.
        self.require(what, all.iter().all(|x| x.is_finite()));
        Ok(())
    }

    /// Checks that a property holds.
    pub(super) fn require(&mut self, what: &str, holds: bool) {
        if holds {
            self.cases[self.current].checks += 1;
        } else {
            self.reject(what, "does not hold");
        }
    }

    /// Copies `x` to the host and adds its bits to the hash of the case.
    pub(super) fn read(&mut self, x: &B::Tensor) -> Result<Vec<f32>> {
        let data = self.backend.download(x)?;
        let bits = &mut self.cases[self.current].bits;
        for byte in data.iter().flat_map(|x| x.to_bits().to_le_bytes()) {
            *bits = (*bits ^ u64::from(byte)).wrapping_mul(FNV_PRIME);
        }
        Ok(data)
    }

    fn coordinates(&mut self, len: usize) -> Vec<usize> {
        if len <= ALL_UP_TO {
            return (0..len).collect();
        }
        let between = (0..2 * SAMPLED_AT_ENDS).map(|_| self.sampler.random_range(0..len));
        (0..SAMPLED_AT_ENDS).chain(between).chain(len - SAMPLED_AT_ENDS..len).collect()
    }

    fn reject(&mut self, what: &str, why: &str) {
        let case = &mut self.cases[self.current];
        case.checks += 1;
        if case.worst <= case.allowed {
            (case.worst, case.allowed) = (f64::INFINITY, 0.0);
            case.detail = format!("{what}: {why}");
        }
    }

    /// Counts a check, and reports it in the case if no earlier check was closer to its bound.
    fn record(
        &mut self,
        what: &str,
        worst: Deviation,
        bound: Bound,
        place: impl Fn(usize) -> String,
    ) {
        let case = &mut self.cases[self.current];
        case.checks += 1;
        // Cross-multiplied, because the bound may be 0. A case that has failed keeps its first failure.
        let closer = worst.error * case.allowed > case.worst * bound.relative || case.worst == 0.0;
        if worst.error > 0.0 && closer && case.passed() {
            (case.worst, case.allowed) = (worst.error, bound.relative);
            let Deviation { at, got, want, .. } = worst;
            case.detail = format!("{what}: element {} is {got:e}, not {want:e}", place(at));
        }
    }
}

/// The inner block of a matrix from [`Suite::padded`].
pub(super) fn inner<T: Shape>(x: &T) -> View<'_, T> {
    x.view().with_rows(1..x.rows() - 2).with_cols(2..x.cols() - 3)
}

/// The same, mutable.
pub(super) fn inner_mut<T: Shape>(x: &mut T) -> ViewMut<'_, T> {
    let (rows, cols) = x.shape();
    x.view_mut().with_rows(1..rows - 2).with_cols(2..cols - 3)
}

/// The largest error of a comparison, and where it is.
#[derive(Debug, Clone, Copy, Default)]
struct Deviation {
    error: f64,
    at: usize,
    got: f64,
    want: f64,
}

impl Deviation {
    fn max(self, other: Deviation) -> Deviation {
        if other.error > self.error { other } else { self }
    }
}

/// Compares a group of elements that share a magnitude; the index of the first is `start`.
fn deviation(got: &[f32], want: &[f64], bound: Bound, start: usize) -> Deviation {
    let magnitude = want.iter().fold(bound.floor, |largest, want| largest.max(want.abs()));
    let mut worst = Deviation::default();
    for (i, (&got, &want)) in got.iter().zip(want).enumerate() {
        let got = f64::from(got);
        let error = match (got - want).abs() {
            0.0 => 0.0,
            difference if difference.is_finite() => difference / magnitude,
            _ => f64::INFINITY,
        };
        worst = worst.max(Deviation { error, at: start + i, got, want });
    }
    worst
}

/// The FNV-1a hash of Fowler, Noll and Vo, 64 bits.
const FNV_OFFSET: u64 = 0xcbf2_9ce4_8422_2325;
const FNV_PRIME: u64 = 0x0000_0100_0000_01b3;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Cpu;

    fn case_of(check: impl FnOnce(&mut Suite<'_, Cpu>)) -> Case {
        let cpu = Cpu::new();
        let mut suite = Suite::new(&cpu);
        suite.case("case");
        check(&mut suite);
        suite.finish().remove(0)
    }

    fn compared(got: &[f64], want: &[f64], bound: Bound) -> Case {
        let row = |x: &[f64]| Matrix { rows: 1, cols: x.len(), data: x.to_vec() };
        case_of(|suite| {
            let got = suite.tensor(&row(got)).unwrap();
            suite.check("row", &got, &row(want), bound).unwrap();
        })
    }

    #[test]
    fn a_case_fails_only_beyond_its_bound() {
        let bound = Bound::roundings(4.0);
        assert!(compared(&[1.0, 8.0], &[1.0 + 16.0 * ROUNDING, 8.0], bound).passed());
        let failed = compared(&[1.0, 8.0], &[1.0 + 40.0 * ROUNDING, 8.0], bound);
        assert!(!failed.passed());
        assert!(failed.detail.starts_with("row: element (0, 0) is 1e0"), "{failed}");
    }

    #[test]
    fn a_result_that_is_not_finite_or_has_another_shape_fails() {
        for wrong in [f64::NAN, f64::INFINITY] {
            assert!(!compared(&[wrong, 1.0], &[1.0, 1.0], Bound::roundings(1e30)).passed());
        }
        assert!(!compared(&[1.0], &[1.0, 1.0], Bound::roundings(1e30)).passed());
        assert!(!compared(&[1e-30], &[0.0], Bound::EXACT).passed());
        assert!(compared(&[-0.0], &[0.0], Bound::EXACT).passed());
    }

    #[test]
    fn a_failed_case_stays_failed_after_passing_checks() {
        let case = case_of(|suite| {
            suite.require("first", false);
            suite.require("second", true);
            let one = Matrix::from_fn(1, 1, |_, _| 1.0);
            let tensor = suite.tensor(&one).unwrap();
            suite.check("third", &tensor, &one, Bound::EXACT).unwrap();
        });
        assert!(!case.passed());
        assert_eq!((case.checks, &*case.detail), (3, "first: does not hold"));
    }

    #[test]
    fn a_gradient_with_a_relative_error_of_3e_6_fails() {
        let gradient_of_cube = |factor: f64| {
            case_of(|suite| {
                let x = suite.random(3, 5);
                let dx = Matrix::from_fn(3, 5, |i, j| factor * x.row(i)[j].powi(2)).rounded();
                let dx = suite.tensor(&dx).unwrap();
                let cubes = |x: &Matrix| x.data.iter().map(|x| x.powi(3)).sum();
                suite.check_gradient("cube", &dx, &x, Bound::roundings(4.0), cubes).unwrap();
            })
        };
        assert!(gradient_of_cube(3.0).passed());
        assert!(!gradient_of_cube(3.00001).passed());
    }
}
