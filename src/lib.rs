//! llara
mod error;
pub use error::{Error, ErrorKind, Result};
pub mod backend;
mod biencoder;
pub mod data;
pub mod dist;
pub mod hub;
pub mod init;
pub mod loss;
pub mod model;
pub mod retrieval;
pub mod text;
pub mod train;
pub use biencoder::{
    BiEncoderModel, BiEncoderOptions, EncoderOutput, Features, Loader, Probes, Recipe,
    compute_similarity,
};
pub use text::Role;
