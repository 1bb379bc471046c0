//! The operations that a device must provide to train a model.
//!
//! A backend owns its memory: [`Backend::Tensor`], [`Backend::Index`] and [`Backend::Weight`] are
//! opaque, and code outside this module does not read their elements during a training step. The loss and
//! the gradient norm of a step stay on the device; [`Backend::start_download`] enqueues a copy of them
//! without synchronizing with the device. A backend may return from a call before the device has finished;
//! it runs operations in the order of the calls.
//!
//! Every matrix is row-major `[rows, cols]`. `T` is the number of tokens in a packed batch,
//! `S` the number of its sequences, `d` the hidden size, `H` and `KV` the query and key/value
//! heads, `hd` the head size. Shapes that do not match are programming errors and panic. Failures at
//! run time (out of memory, a lost device) are reported as an [`Error`](crate::Error).
//!
//! Elements are f32, or bf16 where a model computes in mixed precision: then activations and their
//! gradients are bf16; the residual stream and its gradient, the embeddings, the loss, trainable
//! parameters, their gradients and their moments stay f32. An operation converts its inputs to f32,
//! accumulates in f32, and rounds once, when it stores the result. The output has the dtype of the
//! first input unless the operation says otherwise.
//!
//! Backward functions take `onto: Option<Tensor>`: the gradient of the same input from another path
//! (a residual connection, a second projection). The result is accumulated into this tensor, which is then
//! returned.
//!
//! [`conformance`] runs the same checks on any backend: a new device implements [`Backend`] and must pass
//! that suite.

pub mod conformance;
mod counting;
mod cpu;
mod cuda;
mod interface;
mod memory;
mod operands;
mod tensor;

pub use counting::{CountedTensor, CountingBackend};
pub use cpu::{Cpu, gemm};
pub use cuda::{Cuda, CudaDownload, CudaIndex, CudaTensor, CudaWeight, KernelTime};
pub use interface::{
    AttentionInput, AttentionOutput, Backend, Layout, ListedColumns, PreparedWeight, RopeTable,
    ScatterPlan, ScoreMask, TokenIds,
};
pub use memory::{DeviceMemory, KernelSizes, OffsetAllocator};
pub use operands::{
    Accumulate, AdamWStep, AttentionGradients, AttentionShape, DistillationLoss, DropoutKey,
    Epilogue, RopeDirection, ScatterRows, WeightUse,
};
pub use tensor::{Dtype, Elements, Shape, View, ViewMut};
