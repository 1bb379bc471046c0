//! Fine-tune decoder language models into text-embedding models.
//!
//! A query and a passage each become one vector; InfoNCE pulls a query towards its passage and away
//! from hard negatives and from the other passages of the batch. The recipe is LLARA's (Llama2Vec): a
//! prompt that ends in special tokens, whose last hidden states are averaged.
//!
//! Start with [`BiEncoderModel`]; `examples/first_steps.rs` goes once around. In reading order:
//!
//! 1. [`text`]: texts to token ids, with a template around them;
//! 2. [`data`]: training rows to one packed batch;
//! 3. [`backend`]: everything that a device must do, and the CPU that does it;
//! 4. [`model`]: the decoder, forward and backward written out, and its files;
//! 5. [`loss`]: InfoNCE and its gradient;
//! 6. [`dist`]: what processes of one run say to each other;
//! 7. [`BiEncoderModel`]: all of that behind `encode`, `forward` and `save`;
//! 8. [`train`]: gradients, optimizer, schedule, the loop;
//! 9. [`retrieval`]: encoding collections, exact search, trec_eval's metrics.

pub mod backend;
mod biencoder;
pub mod data;
pub mod dist;
mod error;
pub mod hub;
pub mod init;
pub mod loss;
pub mod model;
pub mod retrieval;
mod storage;
pub mod text;
pub mod train;

pub use biencoder::{
    BiEncoderModel, BiEncoderOptions, EncoderOutput, Features, Loader, Outline, Probes, Recipe,
    Shortcuts, compute_similarity,
};
pub use error::{Error, ErrorKind, Result, escape_controls};
pub use text::Role;

/// The code in the README, held to compile.
#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
struct Readme;
