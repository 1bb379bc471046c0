//! Fine-tune decoder language models into text-embedding models.
//!
//! A query and a passage each become one embedding. The InfoNCE loss raises the similarity of a query to
//! its positive passage and lowers it to hard negatives and to the other passages of the batch. The
//! recipe is LLARA's (Llama2Vec): a prompt that ends in special tokens, whose last hidden states are
//! averaged.
//!
//! Start with [`BiEncoderModel`]; `examples/first_steps.rs` uses most of it. In reading order:
//!
//! 1. [`text`]: texts to token ids, with a template around them;
//! 2. [`data`]: training rows to one packed batch;
//! 3. [`backend`]: the operations of a device, and their implementation on the CPU;
//! 4. [`model`]: the decoder, forward and backward written out, and its files;
//! 5. [`loss`]: the training objective and its gradient;
//! 6. [`dist`]: collective communication between processes;
//! 7. [`BiEncoderModel`]: the model with `encode`, `forward` and `save`;
//! 8. [`train`]: gradients, optimizer, schedule, the loop;
//! 9. [`retrieval`]: encoding collections, exact search, trec_eval's metrics;
//! 10. [`check`]: everything that can be wrong with a model folder, in one report.
//! 11. [`inspect`]: training data before a run.

pub mod backend;
mod biencoder;
pub mod check;
pub mod data;
pub mod dist;
mod error;
#[cfg(any(test, feature = "fuzzing"))]
#[doc(hidden)]
pub mod fuzzing;
pub mod hub;
pub mod init;
pub mod inspect;
pub mod loss;
pub mod model;
pub mod retrieval;
mod storage;
pub mod text;
pub mod train;

pub use biencoder::{
    BiEncoderModel, BiEncoderOptions, EncoderOutput, Features, Loader, Outline, Probes, Recipe,
    RunFacts, Shortcuts, compute_similarity,
};
pub use error::{Error, ErrorKind, ErrorParts, Result, escape_controls};
pub use storage::{
    FolderLock, OutputLock, Recovered, finish_interrupted, free_disk_bytes, read_text_file,
    read_toml, refresh_file, replace_file,
};
pub use text::Role;

/// Compiles the code in the README.
#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
struct Readme;
