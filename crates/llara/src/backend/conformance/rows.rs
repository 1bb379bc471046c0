//! Checks of buffers, and of gathering, scattering and averaging rows.

use super::case::Case;
use super::reference::{self, Matrix};
use super::suite::{Bound, Suite, inner, inner_mut};
use crate::Result;
use crate::backend::{Backend, Dtype, Elements, ScatterPlan, ScatterRows, Shape};

/// Copies to, from and on the device, and the operations that gather, scatter or average rows.
///
/// # Errors
/// Errors of the backend are returned unchanged.
pub fn rows<B: Backend>(backend: &B) -> Result<Vec<Case>> {
    let mut suite = Suite::new(backend);
    round_trip(&mut suite)?;
    for shape in [(1, 1), (1, 130), (65, 1), (17, 33), (300, 130)] {
        zeros(&mut suite, shape)?;
        copies(&mut suite, shape)?;
    }
    // Rows of the table, columns, rows gathered: fewer than in the table, more, and none.
    for (table, cols, gathered) in
        [(1, 1, 1), (1, 17, 5), (130, 1, 33), (33, 65, 200), (65, 130, 17), (9, 3, 0)]
    {
        gather_and_scatter(&mut suite, (table, cols, gathered))?;
    }
    let many: Vec<usize> = (0..150).map(|s| 1 + s % 8).collect();
    for (lengths, cols) in
        [(&[1][..], 1), (&[1, 1, 1], 17), (&[8, 3, 1, 65, 8], 33), (&[130], 2), (&many, 130)]
    {
        segment_means(&mut suite, lengths, cols)?;
    }
    for shape in [(1, 1), (1, 130), (65, 1), (17, 33), (300, 130)] {
        sums(&mut suite, shape)?;
    }
    Ok(suite.finish())
}

/// Every f32 must be equal bit for bit after an upload and a download.
fn round_trip<B: Backend>(suite: &mut Suite<'_, B>) -> Result<()> {
    suite.case("upload and download");
    let odd = [
        0.0,
        -0.0,
        f32::MIN_POSITIVE,
        f32::from_bits(1),
        f32::MAX,
        f32::NEG_INFINITY,
        f32::NAN,
        1.0 + f32::EPSILON,
    ];
    for (rows, cols) in [(1, 8), (8, 1), (33, 17), (0, 5), (130, 1030)] {
        let sent: Vec<f32> = (0..rows * cols).map(|i| odd[i % 8] * (1 + i / 8) as f32).collect();
        let x = suite.backend.upload(&sent, rows, cols)?;
        let back = suite.read(&x)?;
        let same = sent.iter().map(|x| x.to_bits()).eq(back.iter().map(|x| x.to_bits()));
        suite.require(&format!("[{rows}, {cols}]"), same && x.shape() == (rows, cols));
    }
    Ok(())
}

fn zeros<B: Backend>(suite: &mut Suite<'_, B>, (rows, cols): (usize, usize)) -> Result<()> {
    // A freed buffer of the same size contains ones.
    drop(suite.tensor(&Matrix::from_fn(rows, cols, |_, _| 1.0))?);
    let got = suite.backend.zeros(rows, cols, Dtype::F32)?;
    let want = Matrix::zeros(rows, cols);
    suite.case("zeros").check(&format!("[{rows}, {cols}]"), &got, &want, Bound::EXACT)?;
    let got = suite.backend.zeros(rows, cols, Dtype::Bf16)?;
    suite.require("zeros in bf16", got.dtype() == Dtype::Bf16);
    suite.check(&format!("[{rows}, {cols}], bf16"), &got, &want, Bound::EXACT)
}

/// From and to blocks of larger matrices.
fn copies<B: Backend>(suite: &mut Suite<'_, B>, (rows, cols): (usize, usize)) -> Result<()> {
    let backend = suite.backend;
    let what = format!("[{rows}, {cols}]");
    let x = suite.random(rows, cols);
    let data: Vec<f32> = x.data.iter().map(|&x| x as f32).collect();
    let from = suite.padded(&x)?;
    let mut to = suite.padded(&Matrix::zeros(rows, cols))?;
    backend.copy(inner(&from), inner_mut(&mut to))?;
    suite.case("copy").check_inner(&what, &to, &x, Bound::EXACT)?;
    let block = backend.download_view(inner(&from))?;
    suite.require("download_view gives the block", block == data);
    let mut to = suite.padded(&Matrix::zeros(rows, cols))?;
    backend.upload_into(&data, inner_mut(&mut to))?;
    suite.case("upload_into").check_inner(&what, &to, &x, Bound::EXACT)?;
    let halves: Vec<half::bf16> = data.iter().map(|&x| half::bf16::from_f32(x)).collect();
    let rounded = Matrix { data: halves.iter().map(|x| x.to_f64()).collect(), ..x };
    let got = backend.upload(Elements::Bf16(&halves), rows, cols)?;
    suite.require("bf16 stays bf16", got.dtype() == Dtype::Bf16);
    suite.check(&format!("{what}, bf16"), &got, &rounded, Bound::EXACT)?;
    // With conversion, in both directions.
    let mut narrow = backend.zeros(rows, cols, Dtype::Bf16)?;
    backend.copy(inner(&from), narrow.view_mut())?;
    suite.case("copy").check(&format!("{what}, to bf16"), &narrow, &rounded, Bound::EXACT)?;
    let mut wide = suite.padded(&Matrix::zeros(rows, cols))?;
    backend.copy(narrow.view(), inner_mut(&mut wide))?;
    suite.check_inner(&format!("{what}, to f32"), &wide, &rounded, Bound::EXACT)
}

/// From and to blocks of larger matrices.
fn sums<B: Backend>(suite: &mut Suite<'_, B>, (rows, cols): (usize, usize)) -> Result<()> {
    let (x, y) = (suite.random(rows, cols), suite.random(rows, cols));
    let from = suite.padded(&x)?;
    for scale in [1.0, -0.5, 0.3f32] {
        let mut to = suite.padded(&y)?;
        suite.backend.add_scaled(inner(&from), scale, inner_mut(&mut to))?;
        let want = y.clone().plus(&x.clone().map(|x| f64::from(scale) * x));
        let what = format!("[{rows}, {cols}], scale {scale}");
        let bound = Bound::roundings(2.0).at_least(2.0);
        suite.case("add_scaled").check_inner(&what, &to, &want, bound)?;
    }
    let mut whole = suite.tensor(&y)?;
    suite.backend.add_scaled(suite.tensor(&x)?.view(), 1.0, whole.view_mut())?;
    let what = format!("[{rows}, {cols}], whole");
    suite.check(&what, &whole, &y.plus(&x), Bound::roundings(1.0).at_least(2.0))
}

fn gather_and_scatter<B: Backend>(
    suite: &mut Suite<'_, B>,
    (table, cols, gathered): (usize, usize, usize),
) -> Result<()> {
    let what = format!("{gathered} rows of [{table}, {cols}]");
    let x = suite.random(table, cols);
    let rows = suite.indices(gathered, table);
    let rows_on = suite.index(&rows)?;
    let y = suite.backend.gather_rows(&suite.tensor(&x)?, &rows_on)?;
    suite.case("gather_rows").check(&what, &y, &reference::gather_rows(&x, &rows), Bound::EXACT)?;

    let dy = suite.random(gathered, cols);
    let before = suite.random(table, cols);
    let mut dx = suite.tensor(&before)?;
    let plan = ScatterPlan::upload(&ScatterRows::new(&rows), suite.backend)?;
    suite.backend.scatter_add_rows(&suite.tensor(&dy)?, &plan, &mut dx)?;
    let want = reference::scatter_add_rows(&dy, &rows, before.clone());
    let bound = Bound::sum(1 + gathered / table);
    suite.case("scatter_add_rows").check(&what, &dx, &want, bound)?;
    suite.case("scatter_add_rows by finite differences").check_gradient(
        &what,
        &dx,
        &x,
        bound,
        |x| dy.dot(&reference::gather_rows(x, &rows)) + before.dot(x),
    )
}

fn segment_means<B: Backend>(
    suite: &mut Suite<'_, B>,
    lengths: &[usize],
    cols: usize,
) -> Result<()> {
    let offsets: Vec<u32> = std::iter::once(0)
        .chain(lengths.iter().scan(0, |end, &length| {
            *end += length as u32;
            Some(*end)
        }))
        .collect();
    let rows = lengths.iter().sum();
    let longest = lengths.iter().copied().max().unwrap_or(0);
    let what = format!("{} segments of [{rows}, {cols}], the longest of {longest}", lengths.len());
    let x = suite.random(rows, cols);
    let offsets_on = suite.index(&offsets)?;
    let y = suite.backend.segment_mean(&suite.tensor(&x)?, &offsets_on)?;
    let root = (longest as f64).sqrt();
    let bound = Bound::roundings(8.0 + root).at_least(1.0 / root);
    suite.case("segment_mean").check(&what, &y, &reference::segment_mean(&x, &offsets), bound)?;

    let dy = suite.random(lengths.len(), cols);
    let dx = suite.backend.segment_mean_backward(&suite.tensor(&dy)?, &offsets_on, rows)?;
    let want = Matrix::from_fn(rows, cols, |row, j| {
        let s = offsets.partition_point(|&start| start as usize <= row) - 1;
        dy.row(s)[j] / lengths[s] as f64
    });
    let bound = Bound::roundings(3.0).by_row();
    suite.case("segment_mean_backward").check(&what, &dx, &want, bound)?;
    suite.case("segment_mean_backward by finite differences").check_gradient(
        &what,
        &dx,
        &x,
        Bound::roundings(4.0),
        |x| dy.dot(&reference::segment_mean(x, &offsets)),
    )
}
