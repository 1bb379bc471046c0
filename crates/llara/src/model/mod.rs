//! One decoder for Llama, Mistral, Qwen2 and Qwen3: a family is configuration, not code.
//!
//! Each layer has its forward and backward pass next to each other, with the formula; what the backward pass needs
//! is a struct. Only [`weights`] reads and writes files.

mod adapter;
mod attention;
mod block;
mod branches;
mod config;
mod decoder;
mod gradients_ready;
mod head;
mod input;
mod linear;
mod logits;
mod lora;
mod mlp;
mod norm;
mod parameter;
mod pass;
mod rope;
mod streamed;
mod trained_tokens;
pub mod weights;

pub use config::{DecoderConfig, Family};
pub use decoder::{Decoder, SavedDecoder};
pub use gradients_ready::GradientsReady;
pub(crate) use head::HEAD_WEIGHT;
pub(crate) use input::mean_pool_backward;
pub use input::{Input, mean_pool};
pub use lora::{LoraConfig, PROJECTIONS, SavedTokens};
pub use parameter::{NamedTensor, Parameter, ParameterValues, Values};
pub use pass::Dropout;
pub use rope::RopeScaling;
pub(crate) use streamed::embed_streamed;
pub(crate) use trained_tokens::{TRAINED_TOKENS, check_gaps, place_rows};
