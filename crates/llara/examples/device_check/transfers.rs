//! Copies between the host and the device while other copies and operations wait: memory that is reused too early, or
//! read before a copy has ended, gives wrong numbers.

use llara::Result;
use llara::backend::{Backend, Dtype, Shape};

use super::Report;

pub(crate) fn check<B: Backend>(backend: &B, report: &mut Report) -> Result<()> {
    let lists = many_lists(backend)?;
    report.holds("lists of indices, uploaded in sequence", lists, "each is read as uploaded");
    let downloads = overlapping_downloads(backend)?;
    report.holds("downloads that are finished in another order", downloads, "each has its matrix");
    let dropped = dropped_downloads(backend)?;
    report.holds("downloads that are dropped", dropped, "they change no other transfer");
    let threads = another_thread(backend)?;
    report.holds("operations from another thread", threads, "the same numbers");
    let reused = reused_memory(backend)?;
    report.holds("memory of dropped matrices", reused, "not overwritten before its last use");
    let blocks = blocks(backend)?;
    report.holds("blocks of matrices, uploaded and downloaded", blocks, "the same elements");
    // In flight when the device is closed.
    let large: Vec<u32> = (0..100_000).collect();
    backend.upload_indices([&large])?;
    Ok(())
}

fn sequence(start: usize, count: usize) -> Vec<f32> {
    (start..start + count).map(|i| i as f32).collect()
}

/// All lists have one size, so that the same pinned buffers are used for them again.
fn many_lists<B: Backend>(backend: &B) -> Result<bool> {
    const LENGTH: usize = 700;
    let table = backend.upload(&sequence(0, 2000), 2000, 1)?;
    let list = |i: usize| (0..LENGTH).map(|j| ((i * 131 + j * 7) % 2000) as u32).collect();
    let lists: Vec<Vec<u32>> = (0..24).map(list).collect();
    let gathered = lists
        .iter()
        .map(|list| {
            let [first, second] = backend.upload_indices([list, &list[..5]])?;
            Ok((backend.gather_rows(&table, &first)?, backend.gather_rows(&table, &second)?))
        })
        .collect::<Result<Vec<_>>>()?;
    let mut same = true;
    for ((first, second), list) in gathered.iter().zip(&lists) {
        let want: Vec<f32> = list.iter().map(|&i| i as f32).collect();
        same &= backend.download(first)? == want && backend.download(second)? == want[..5];
    }
    Ok(same)
}

fn overlapping_downloads<B: Backend>(backend: &B) -> Result<bool> {
    let tensors: Vec<B::Tensor> =
        (0..6).map(|i| backend.upload(&sequence(1000 * i, 600), 30, 20)).collect::<Result<_>>()?;
    let started: Vec<B::Download> =
        tensors.iter().map(|x| backend.start_download(x)).collect::<Result<_>>()?;
    drop(tensors);
    let mut same = true;
    for (i, download) in started.into_iter().enumerate().rev() {
        same &= backend.finish_download(download)? == sequence(1000 * i, 600);
    }
    Ok(same)
}

fn dropped_downloads<B: Backend>(backend: &B) -> Result<bool> {
    let mut same = true;
    for i in 0..4 {
        let x = backend.upload(&sequence(10 * i, 500), 500, 1)?;
        drop(backend.start_download(&x)?);
        let list: Vec<u32> = (0..500).rev().collect();
        let [list] = backend.upload_indices([&list])?;
        let reversed = backend.download(&backend.gather_rows(&x, &list)?)?;
        same &= reversed.into_iter().rev().eq(sequence(10 * i, 500));
    }
    Ok(same)
}

fn another_thread<B: Backend>(backend: &B) -> Result<bool> {
    let run = || {
        let x = backend.upload(&sequence(3, 64), 8, 8)?;
        let y = backend.cast(&x, Dtype::Bf16)?;
        let mut zeros = backend.zeros(8, 8, Dtype::F32)?;
        backend.write_elements(&mut zeros, 60, &[1.5, 2.5])?;
        Ok([backend.download(&y)?, backend.download(&zeros)?])
    };
    let here: [Vec<f32>; 2] = run()?;
    let there: Result<[Vec<f32>; 2]> = std::thread::scope(|scope| {
        scope.spawn(run).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    });
    Ok(here == there? && here[1][59..] == [0.0, 1.5, 2.5, 0.0, 0.0])
}

/// Chains of operations whose inputs are dropped as soon as the operation was called.
fn reused_memory<B: Backend>(backend: &B) -> Result<bool> {
    let mut same = true;
    for rows in [3, 64, 257] {
        let mut x = backend.upload(&sequence(0, rows * 48), rows, 48)?;
        for _ in 0..10 {
            let mut y = backend.zeros(rows, 48, Dtype::F32)?;
            backend.add_scaled(x.view(), 0.5, y.view_mut())?;
            drop(x);
            let mut z = backend.zeros(rows, 48, Dtype::F32)?;
            backend.add_scaled(y.view(), 2.0, z.view_mut())?;
            x = z;
        }
        same &= backend.download(&x)? == sequence(0, rows * 48);
    }
    Ok(same)
}

fn blocks<B: Backend>(backend: &B) -> Result<bool> {
    let mut x = backend.zeros(9, 13, Dtype::F32)?;
    backend.upload_into(&sequence(5, 4 * 6), x.view_mut().with_rows(2..6).with_cols(3..9))?;
    let block = backend.download_view(x.view().with_rows(2..6).with_cols(3..9))?;
    let total: f32 = backend.download(&x)?.iter().sum();
    let elements = backend.read_elements(&x, 2 * 13 + 3..2 * 13 + 9)?;
    let want = sequence(5, 4 * 6);
    Ok(block == want && total == want.iter().sum::<f32>() && elements == want[..6])
}
