//! From embeddings to a loss, and back to the gradient by the embeddings.

mod info_nce;
mod objective;

pub use info_nce::{InfoNce, Scored};
pub use objective::{Contrastive, Embeddings, LossAndGradient, Objective, RowsPerRank};
