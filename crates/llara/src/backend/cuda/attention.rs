//! Causal attention over packed sequences: bf16 with heads of 64, 96 or 128 features by tensor cores, anything
//! else by plain kernels.

use super::Cuda;
use super::device::{Device, kernel_args};
use super::tensor::{Block, CudaTensor};
use crate::Result;
use crate::backend::{AttentionGradients, AttentionInput, AttentionOutput, Dtype, Layout, Shape};

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
});

/// f32 elements of the state for each query and head: its log-sum-exp.
pub(super) const STATE_PER_HEAD: usize = 1;

impl Device {
    pub(super) fn attention(
        &self,
        input: &AttentionInput<'_, Cuda>,
    ) -> Result<AttentionOutput<Cuda>> {
        let args = arguments(input);
        todo!()
    }

    pub(super) fn attention_backward(
        &self,
        dout: &CudaTensor,
        input: &AttentionInput<'_, Cuda>,
        output: &AttentionOutput<Cuda>,
    ) -> Result<AttentionGradients<CudaTensor>> {
        todo!()
    }
}

/// What all passes need.
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
    }
}
