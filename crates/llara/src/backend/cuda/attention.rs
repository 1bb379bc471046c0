//! Causal attention over packed sequences: bf16 with heads of 64, 96 or 128 features with tensor cores,
//! all other cases with plain kernels, which do not use tensor cores.

use super::device::{Cuda, Device, kernel_args};
use super::driver::error;
use super::tensor::{Block, CudaTensor, block};
use crate::Result;
use crate::backend::{AttentionGradients, AttentionInput, AttentionOutput, Dtype, Shape};

kernel_args!(AttentionArgs {
    q: u64,
    k: u64,
    v: u64,
    out: u64,
    lse: u64,
    dout: u64,
    delta: u64,
    dq: u64,
    dk: u64,
    dv: u64,
    q_offsets: u64,
    k_offsets: u64,
    q_stride: u32,
    k_stride: u32,
    v_stride: u32,
    out_stride: u32,
    dout_stride: u32,
    dq_stride: u32,
    dk_stride: u32,
    dv_stride: u32,
    sequences: u32,
    query_rows: u32,
    key_rows: u32,
    heads: u32,
    kv_heads: u32,
    head_dim: u32,
    window: u32,
    scale: f32,
    query_tiles: u32,
    key_tiles: u32,
});

/// f32 elements of the state per query and head: the log-sum-exp.
pub(super) const STATE_PER_HEAD: usize = 1;

/// The largest head of the plain kernels.
const LARGEST_HEAD: usize = 256;
/// Threads of a block, in every kernel.
const THREADS: u32 = 128;
/// Rows of a block of the plain kernels: one per warp.
const PLAIN_ROWS: usize = 4;
/// Queries of a block of the tensor-core kernels that compute rows of queries.
const QUERIES: usize = 128;
/// Keys of a block of the tensor-core kernel that computes the gradients of keys and values.
const KEYS: usize = 64;

/// The kernels that compute attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kernels {
    /// With tensor cores, for heads of this many features.
    Tiled(usize),
    /// For any head size, in a dtype.
    Plain(Dtype),
}

impl Kernels {
    /// Tensor cores if there is a kernel for the head size and every row can be loaded 16 bytes at a time.
    fn select(head_dim: usize, blocks: &[Block]) -> Result<Self> {
        if head_dim > LARGEST_HEAD {
            return Err(error("CUDA: the attention heads are too large")
                .expected(format!("at most {LARGEST_HEAD} features"))
                .got(head_dim)
                .hint("compute on the CPU"));
        }
        let dtype = blocks[0].dtype;
        let tiled = dtype == Dtype::Bf16
            && matches!(head_dim, 64 | 96 | 128)
            && blocks.iter().all(|x| x.pointer.is_multiple_of(16) && x.stride.is_multiple_of(8));
        Ok(if tiled { Kernels::Tiled(head_dim) } else { Kernels::Plain(dtype) })
    }
}

impl Device {
    pub(super) fn attention(
        &self,
        input: &AttentionInput<'_, Cuda>,
    ) -> Result<AttentionOutput<Cuda>> {
        let mut args = arguments(input);
        let q = Block::from(input.q);
        let out = self.unspecified(q.rows, q.cols, q.dtype)?;
        let heads = input.shape.heads;
        let state = self.unspecified(q.rows, heads * STATE_PER_HEAD, Dtype::F32)?;
        (args.out, args.out_stride, args.lse) = (out.pointer(), q.cols as u32, state.pointer());
        let blocks = [q, input.k.into(), input.v.into(), Block::from(&out)];
        match Kernels::select(input.shape.head_dim, &blocks)? {
            Kernels::Tiled(hd) => {
                let tiles;
                (tiles, args.query_tiles) = number_tiles(&input.queries.bounds, QUERIES);
                let grid = [tiles, heads, 1];
                let kernel = format!("attention_forward_{hd}");
                self.launch_with_shared(&kernel, grid, THREADS, 512 * hd, args)?;
            }
            Kernels::Plain(dtype) => {
                let grid = [q.rows.div_ceil(PLAIN_ROWS), heads];
                self.launch(&format!("attention_forward_plain_{dtype}"), grid, THREADS, args)?;
            }
        }
        Ok(AttentionOutput { out, state })
    }

    pub(super) fn attention_backward(
        &self,
        dout: &CudaTensor,
        input: &AttentionInput<'_, Cuda>,
        output: &AttentionOutput<Cuda>,
    ) -> Result<AttentionGradients<CudaTensor>> {
        let shape = input.shape;
        let (q_cols, kv_cols) = (shape.q_cols(), shape.kv_cols());
        let (q_rows, rows, dtype) = (input.q.rows, input.k.rows, input.q.dtype());
        let gradients = if q_rows == rows {
            AttentionGradients::Fused(self.unspecified(rows, q_cols + 2 * kv_cols, dtype)?)
        } else {
            AttentionGradients::Separate {
                dq: self.unspecified(q_rows, q_cols, dtype)?,
                dkv: self.unspecified(rows, 2 * kv_cols, dtype)?,
            }
        };
        let (dq, dkv, first) = match &gradients {
            AttentionGradients::Fused(dqkv) => (dqkv, dqkv, q_cols),
            AttentionGradients::Separate { dq, dkv } => (dq, dkv, 0),
        };
        let dq = block(dq, (0, q_rows), (0, q_cols));
        let [dk, dv] =
            [first, first + kv_cols].map(|column| block(dkv, (0, rows), (column, kv_cols)));
        self.attention_gradients(dout.into(), input, output, [dq, dk, dv])?;
        Ok(gradients)
    }

    fn attention_gradients(
        &self,
        dout: Block,
        input: &AttentionInput<'_, Cuda>,
        output: &AttentionOutput<Cuda>,
        [dq, dk, dv]: [Block; 3],
    ) -> Result<()> {
        let (heads, kv_heads) = (input.shape.heads, input.shape.kv_heads);
        assert_eq!(dout.shape(), output.out.shape(), "attention_backward: gradient");
        assert_eq!(dout.dtype, dq.dtype, "attention_backward: dtype");
        let out = Block::from(&output.out);
        let delta = self.unspecified(dq.rows, heads, Dtype::F32)?;
        let mut args = arguments(input);
        (args.out, args.out_stride) = (out.pointer, out.stride as u32);
        (args.dout, args.dout_stride) = (dout.pointer, dout.stride as u32);
        (args.lse, args.delta) = (output.state.pointer(), delta.pointer());
        (args.dq, args.dq_stride) = (dq.pointer, dq.stride as u32);
        (args.dk, args.dk_stride) = (dk.pointer, dk.stride as u32);
        (args.dv, args.dv_stride) = (dv.pointer, dv.stride as u32);
        let query_grid = [dq.rows.div_ceil(PLAIN_ROWS), heads];
        self.launch(&format!("attention_delta_{}", dq.dtype), query_grid, THREADS, args)?;
        let inputs = [input.q, input.k, input.v].map(Block::from);
        let blocks = [inputs.as_slice(), &[dout, dq, dk, dv]].concat();
        match Kernels::select(input.shape.head_dim, &blocks)? {
            Kernels::Tiled(hd) => {
                let (query_tiles, key_tiles);
                (query_tiles, args.query_tiles) = number_tiles(&input.queries.bounds, QUERIES);
                (key_tiles, args.key_tiles) = number_tiles(&input.keys.bounds, KEYS);
                let grid = [query_tiles, heads, 1];
                let kernel = format!("attention_backward_queries_{hd}");
                self.launch_with_shared(&kernel, grid, THREADS, 768 * hd, args)?;
                let grid = [key_tiles, kv_heads, 1];
                let kernel = format!("attention_backward_keys_{hd}");
                self.launch_with_shared(&kernel, grid, THREADS, 512 * hd + 4608, args)
            }
            Kernels::Plain(dtype) => {
                let kernel = format!("attention_backward_queries_plain_{dtype}");
                self.launch(&kernel, query_grid, THREADS, args)?;
                let grid = [dk.rows.div_ceil(PLAIN_ROWS), kv_heads];
                self.launch(&format!("attention_backward_keys_plain_{dtype}"), grid, THREADS, args)
            }
        }
    }
}

/// The arguments that all passes share.
fn arguments(input: &AttentionInput<'_, Cuda>) -> AttentionArgs {
    let AttentionInput { q, k, v, queries, keys, shape } = input;
    let [q, k, v] = [*q, *k, *v].map(Block::from);
    assert_eq!(q.shape(), (queries.rows(), shape.q_cols()), "attention: q");
    assert_eq!(k.shape(), (keys.rows(), shape.kv_cols()), "attention: k");
    assert_eq!(v.shape(), k.shape(), "attention: v");
    assert_eq!((k.dtype, v.dtype), (q.dtype, q.dtype), "attention: dtypes");
    assert_eq!(queries.sequences(), keys.sequences(), "attention: sequences");
    let small = |n: usize| u32::try_from(n).expect("a matrix of fewer than 2^32 rows and columns");
    AttentionArgs {
        q: q.pointer,
        k: k.pointer,
        v: v.pointer,
        out: 0,
        lse: 0,
        dout: 0,
        delta: 0,
        dq: 0,
        dk: 0,
        dv: 0,
        q_offsets: queries.offsets.pointer(),
        k_offsets: keys.offsets.pointer(),
        q_stride: small(q.stride),
        k_stride: small(k.stride),
        v_stride: small(v.stride),
        out_stride: 0,
        dout_stride: 0,
        dq_stride: 0,
        dk_stride: 0,
        dv_stride: 0,
        sequences: small(queries.sequences()),
        query_rows: small(q.rows),
        key_rows: small(k.rows),
        heads: small(shape.heads),
        kv_heads: small(shape.kv_heads),
        head_dim: small(shape.head_dim),
        window: shape.window.map_or(0, |window| window.min(1 << 31) as u32),
        scale: shape.scale,
        query_tiles: 0,
        key_tiles: 0,
    }
}

/// The numbers of tiles of `tile` rows in sequences with these bounds, and how they are numbered (`block_tile` in
/// attention.cuh): by sequence, with this many numbers each, or with 0 by a search, if that needs fewer blocks.
fn number_tiles(bounds: &[u32], tile: usize) -> (usize, u32) {
    let sequences = bounds.len() - 1;
    let longest = bounds.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or(0);
    let per_sequence = (longest as usize).div_ceil(tile).max(1);
    let with_search = bounds[sequences] as usize / tile + sequences;
    if per_sequence * sequences <= with_search {
        (per_sequence * sequences, per_sequence as u32)
    } else {
        (with_search, 0)
    }
}

#[cfg(test)]
mod tests {
    use super::number_tiles;

    #[test]
    fn similar_lengths_are_numbered_by_sequence() {
        assert_eq!(number_tiles(&[0, 128, 256, 384], 128), (3, 1));
        assert_eq!(number_tiles(&[0, 128, 256, 384], 64), (6, 2));
        assert_eq!(number_tiles(&[0, 3, 3, 5], 64), (3, 1));
        assert_eq!(number_tiles(&[0, 0], 64), (1, 1));
    }

    #[test]
    fn one_long_sequence_among_short_ones_is_searched() {
        assert_eq!(number_tiles(&[0, 1, 2, 300], 128), (5, 0));
    }
}
