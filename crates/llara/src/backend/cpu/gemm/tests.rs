//! Products compared with plain f64 loops, for every kernel that this processor supports.

use super::*;

/// Rows, columns, inner dimension: around the sizes of vectors, tiles, panels and blocks.
const SHAPES: [(usize, usize, usize); 14] = [
    (1, 1, 1),
    (1, 17, 33),
    (3, 65, 1),
    (5, 16, 2),
    (6, 64, 16),
    (7, 33, 17),
    (17, 130, 65),
    (33, 1, 130),
    (65, 129, 34),
    (97, 47, 31),
    (130, 65, 64),
    (13, 70, 1601),
    (8, 67, 3201),
    (4, 9, 0),
];

fn units() -> impl Iterator<Item = Unit> {
    Unit::ALL.into_iter().filter(|unit| unit.is_available())
}

fn random(len: usize, seed: u32) -> Vec<f32> {
    let mut x = seed | 1;
    let mut next = || {
        x = x.wrapping_mul(0x915f_77f5).wrapping_add(0x9e37_79b9);
        (x >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

fn rounded(x: &[f32]) -> Vec<bf16> {
    x.iter().map(|&x| bf16::from_f32(x)).collect()
}

/// A matrix in memory, with gaps between rows, transposed or not, in both dtypes.
struct Stored {
    single: Vec<f32>,
    half: Vec<bf16>,
    rows: usize,
    cols: usize,
    transposed: bool,
}

impl Stored {
    fn new(rows: usize, cols: usize, transposed: bool, seed: u32) -> Self {
        let (lines, length) = if transposed { (cols, rows) } else { (rows, cols) };
        // NaN in the gaps: a kernel that reads one fails the test.
        let mut single = vec![f32::NAN; lines * (length + 3)];
        let values = random(lines * length, seed);
        for (i, x) in values.into_iter().enumerate() {
            single[i / length * (length + 3) + i % length] = x;
        }
        Stored { half: rounded(&single), single, rows, cols, transposed }
    }

    fn view<'a, T: Copy>(&self, data: &'a [T]) -> View<'a, T> {
        let (rows, cols) = (self.rows, self.cols);
        match self.transposed {
            true => View::strided(data, (cols, rows), rows + 3).t(),
            false => View::strided(data, (rows, cols), cols + 3),
        }
    }

    fn at(&self, row: usize, col: usize, precision: Precision) -> f64 {
        let (line, i, length) = match self.transposed {
            true => (col, row, self.rows),
            false => (row, col, self.cols),
        };
        let at = line * (length + 3) + i;
        match precision {
            Precision::F32 => f64::from(self.single[at]),
            Precision::Bf16 => f64::from(self.half[at].to_f32()),
        }
    }
}

#[test]
fn every_form_and_kernel_agrees_with_plain_loops() {
    for (case, &(m, n, k)) in SHAPES.iter().enumerate() {
        for (a_transposed, b_transposed) in
            [(false, true), (false, false), (true, false), (true, true)]
        {
            let a = Stored::new(m, k, a_transposed, 2 * case as u32);
            let b = Stored::new(k, n, b_transposed, 77 * case as u32 + 5);
            for precision in [Precision::F32, Precision::Bf16] {
                let want: Vec<f64> = (0..m * n)
                    .map(|i| {
                        let term = |p| a.at(i / n, p, precision) * b.at(p, i % n, precision);
                        (0..k).map(term).sum()
                    })
                    .collect();
                for unit in units() {
                    check(&a, &b, (precision, unit), &want);
                }
            }
        }
    }
}

/// Compares products of f32 and bf16 operands, on several threads and on one, with `want`.
fn check(a: &Stored, b: &Stored, (precision, unit): (Precision, Unit), want: &[f64]) {
    let (m, n, k) = (a.rows, b.cols, a.cols);
    let mut lefts = vec![Operand::F32(a.view(&a.single))];
    let mut rights = vec![Operand::F32(b.view(&b.single))];
    if precision == Precision::Bf16 {
        lefts.push(a.view(&a.half).into());
        rights.push(b.view(&b.half).into());
    }
    let gemm = Gemm::<f32>::new(precision).unit(unit);
    for &left in &lefts {
        for &right in &rights {
            let mut got = vec![f32::NAN; m * n];
            gemm.multiply(ViewMut::new(&mut got, m, n), left, right);
            let mut again = vec![f32::NAN; m * n];
            gemm.serial().multiply(ViewMut::new(&mut again, m, n), left, right);
            for (i, (&got, want)) in got.iter().zip(want).enumerate() {
                let bound = 1e-7 * (k as f64 + 4.0);
                assert!(
                    (f64::from(got) - want).abs() <= bound,
                    "{unit:?} {precision:?} {m} x {n} x {k} at {i}: {got} against {want}"
                );
            }
            assert_eq!(got, again, "{unit:?} {precision:?} {m} x {n} x {k} on one thread");
        }
    }
}

/// The test for Miri: every way to pack, an odd inner dimension, and a bf16 result with two blocks of the
/// inner dimension, whose sums are in scratch memory.
#[test]
fn small_products_access_only_their_own_memory() {
    for (case, &(m, n, k)) in [(1, 1, 1), (7, 18, 3), (8, 70, 2)].iter().enumerate() {
        for (a_transposed, b_transposed) in [(false, true), (true, false)] {
            let a = Stored::new(m, k, a_transposed, 2 * case as u32);
            let b = Stored::new(k, n, b_transposed, 77 * case as u32 + 5);
            let mut got = vec![f32::NAN; m * n];
            let gemm = Gemm::new(Precision::F32).unit(Unit::Portable).serial();
            gemm.multiply(ViewMut::new(&mut got, m, n), a.view(&a.single), b.view(&b.single));
            for (i, &got) in got.iter().enumerate() {
                let at = |p| a.at(i / n, p, Precision::F32) * b.at(p, i % n, Precision::F32);
                let want: f64 = (0..k).map(at).sum();
                assert!((f64::from(got) - want).abs() <= 1e-6, "{m} x {n} x {k} at {i}: {got}");
            }
        }
    }
    let k = 800;
    let (ones, mut out) = (vec![bf16::ONE; 9 * k], vec![bf16::ZERO; 8]);
    let gemm = Gemm::new(Precision::Bf16).unit(Unit::Portable).serial();
    gemm.multiply(ViewMut::new(&mut out, 8, 1), View::new(&ones, 8, k), View::new(&ones, k, 1));
    assert_eq!(out, vec![bf16::from_f32(k as f32); 8]);
}

/// More rows than have sums in scratch memory at a time, and several blocks of the inner dimension.
#[test]
#[cfg_attr(miri, ignore = "millions of operations")]
fn rows_beyond_those_with_sums_have_the_bits_of_a_product_of_their_own() {
    let (m, n, k) = (split::SUM_ROWS + 40, 18, 1700);
    let (a, b) = (rounded(&random(m * k, 3)), rounded(&random(k * n, 4)));
    let gemm = || Gemm::new(Precision::Bf16).serial();
    let mut all = vec![bf16::NAN; m * n];
    gemm().multiply(ViewMut::new(&mut all, m, n), View::new(&a, m, k), View::new(&b, n, k).t());
    for row in [0, 5, split::SUM_ROWS - 1, split::SUM_ROWS, m - 1] {
        let mut alone = vec![bf16::NAN; n];
        let of_row = View::new(&a[row * k..][..k], 1, k);
        gemm().multiply(ViewMut::new(&mut alone, 1, n), of_row, View::new(&b, n, k).t());
        assert!(alone.iter().all(|x| x.is_finite()));
        assert_eq!(all[row * n..][..n], alone, "row {row}");
    }
}

#[test]
fn bias_and_residual_are_added_once() {
    // The last has several blocks of the inner dimension for every kernel.
    for (m, n, k) in [(1, 1, 1), (7, 33, 17), (65, 130, 64), (9, 700, 1700)] {
        let a = Stored::new(m, k, false, 3);
        let b = Stored::new(k, n, true, 4);
        let (bias, before, residual) = (random(n, 5), random(m * n, 6), random(m * n, 7));
        for (precision, unit) in units().flat_map(|u| [(Precision::F32, u), (Precision::Bf16, u)]) {
            let (left, right) = (a.view(&a.single), b.view(&b.single));
            let mut product = vec![0.0; m * n];
            let gemm = Gemm::new(precision).unit(unit);
            gemm.multiply(ViewMut::new(&mut product, m, n), left, right);
            let residual_view = View::new(&residual, m, n);
            let ontos = [Onto::Nothing, Onto::Result, Onto::Residual(residual_view)];
            for (onto, with_bias) in
                ontos.into_iter().flat_map(|onto| [(onto, false), (onto, true)])
            {
                let mut gemm = gemm.alpha(-1.5).onto(onto);
                if with_bias {
                    gemm = gemm.bias(&bias);
                }
                // With gaps between rows, which must not change.
                let stride = n + 2;
                let mut got = vec![7.5; m * stride];
                for (row, before) in got.chunks_mut(stride).zip(before.chunks(n)) {
                    row[..n].copy_from_slice(before);
                }
                gemm.multiply(ViewMut::strided(&mut got, (m, n), stride), left, right);
                for (i, row) in got.chunks(stride).enumerate() {
                    assert_eq!(row[n..], [7.5, 7.5]);
                    for (j, got) in row[..n].iter().enumerate() {
                        let added = match onto {
                            Onto::Nothing => 0.0,
                            Onto::Result => before[i * n + j],
                            Onto::Residual(_) => residual[i * n + j],
                        };
                        let added = added + bias[j] * f32::from(with_bias);
                        let want = -1.5 * product[i * n + j] + added;
                        assert!((got - want).abs() <= 1e-4, "{unit:?} {onto:?}: {got}, {want}");
                    }
                }
            }
        }
    }
}

#[test]
fn a_bf16_result_is_the_f32_result_rounded_once() {
    for (m, n, k) in [(1, 1, 3), (7, 33, 16), (65, 130, 64), (20, 700, 1700)] {
        let (a, b) = (Stored::new(m, k, false, 8), Stored::new(k, n, false, 9));
        let before = rounded(&random(m * n, 10));
        let bias = random(n, 11);
        for unit in units() {
            let mut wide: Vec<f32> = before.iter().map(|x| x.to_f32()).collect();
            let gemm = Gemm::new(Precision::Bf16).unit(unit).accumulate().bias(&bias);
            let out = ViewMut::new(&mut wide, m, n);
            gemm.multiply(out, a.view(&a.half), b.view(&b.single));
            let mut narrow = before.clone();
            let gemm = Gemm::new(Precision::Bf16).unit(unit).accumulate().bias(&bias);
            let out = ViewMut::new(&mut narrow, m, n);
            gemm.multiply(out, a.view(&a.half), b.view(&b.single));
            assert_eq!(narrow, rounded(&wide), "{unit:?} {m} x {n} x {k}");
        }
    }
}

#[test]
fn bits_do_not_depend_on_threads_or_on_other_rows() {
    let (m, n, k) = (301, 200, 1000);
    for (a_transposed, precision) in
        [(false, Precision::F32), (true, Precision::F32), (false, Precision::Bf16)]
    {
        let a = Stored::new(m, k, a_transposed, 12);
        let b = Stored::new(k, n, true, 13);
        let on = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let mut out = vec![0.0f32; m * n];
            pool.install(|| {
                let out = ViewMut::new(&mut out, m, n);
                Gemm::new(precision).multiply(out, a.view(&a.single), b.view(&b.single));
            });
            out
        };
        let one = on(1);
        for threads in [2, 3, 7] {
            assert_eq!(on(threads), one, "{threads} threads");
        }
        if !a_transposed {
            let alone = View::strided(&a.single[200 * (k + 3)..], (5, k), k + 3);
            let mut rows = vec![0.0f32; 5 * n];
            let out = ViewMut::new(&mut rows, 5, n);
            Gemm::new(precision).multiply(out, alone, b.view(&b.single));
            assert_eq!(rows, one[200 * n..205 * n]);
        }
    }
}

#[test]
fn non_finite_values_affect_only_their_row() {
    let (m, n, k) = (8, 70, 35);
    for (unit, precision) in units().flat_map(|u| [(u, Precision::F32), (u, Precision::Bf16)]) {
        for bad in [f32::NAN, f32::INFINITY] {
            let mut a = vec![1.0; m * k];
            a[3 * k + k - 1] = bad;
            let b = vec![1.0f32; k * n];
            let mut out = vec![0.0f32; m * n];
            let (a, b) = (View::new(&a, m, k), View::new(&b, k, n));
            Gemm::new(precision).unit(unit).multiply(ViewMut::new(&mut out, m, n), a, b);
            for (i, row) in out.chunks(n).enumerate() {
                let fits = |x: &f32| if i == 3 { !x.is_finite() } else { *x == k as f32 };
                assert!(row.iter().all(fits), "{unit:?} {precision:?} row {i}");
            }
        }
    }
}

#[test]
#[should_panic(expected = "from 11")]
fn a_view_past_the_end_is_refused() {
    View::strided(&[0.0f32; 11], (3, 4), 4);
}

#[test]
#[should_panic(expected = "inner dimension")]
fn shapes_that_do_not_match_are_refused() {
    let (a, mut out) = ([0.0f32; 12], [0.0f32; 9]);
    let a = View::new(&a, 3, 4);
    Gemm::new(Precision::F32).multiply(ViewMut::new(&mut out, 3, 3), a, a);
}
