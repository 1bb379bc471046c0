//! The operations that a device must provide for a model to be trained on it.
//!
//! A backend owns its memory: [`Backend::Tensor`], [`Backend::Index`] and [`Backend::Weight`] are
//! opaque, and nothing above this module reads an element of one inside a training step. The loss and
//! the gradient norm of a step stay on the device; [`Backend::start_download`] asks for them without
//! stopping it. Backends whose calls return before the device has finished run them in order.
//!
//! Every matrix is row-major `[rows, cols]`. `T` is the number of tokens in a packed batch,
//! `S` the number of its sequences, `d` the hidden size, `H` and `KV` the query and key/value
//! heads, `hd` the head size. Shapes that do not match are programming errors and panic; what a
//! user can cause (out of memory, a lost device) is an [`Error`](crate::Error).
//!
//! Elements are f32, or bf16 where a model computes in mixed precision: then activations and their
//! gradients are bf16; the residual stream and its gradient, the embeddings, the loss, trainable
//! parameters, their gradients and their moments stay f32. An operation converts its inputs to f32,
//! accumulates in f32, and rounds once, when it stores the result. The output has the dtype of the
//! first input unless the operation says otherwise.
//!
//! Backward functions take `onto: Option<Tensor>`: a gradient of the same input from another path
//! (a residual connection, a second projection). It is consumed, added to and returned.
//!
//! [`conformance`] runs the same checks on any backend: a new device implements [`Backend`] and passes
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
    AttentionInput, AttentionOutput, Backend, Layout, MaskedColumns, PreparedWeight, RopeTable,
    ScatterPlan, ScoreMask, TokenIds,
};
pub use memory::{DeviceMemory, OffsetAllocator};
pub use operands::{
    Accumulate, AdamWStep, AttentionGradients, AttentionShape, DistillationLoss, DropoutKey,
    Epilogue, RopeDirection, ScatterRows, WeightUse,
};
pub use tensor::{Dtype, Elements, Shape, View, ViewMut};
