//! The loss of embeddings, and its gradient with respect to the embeddings.

mod info_nce;
mod objective;

pub use info_nce::{InfoNce, Scored};
pub use objective::{Contrastive, Embeddings, LossAndGradient, Objective, RowsPerRank};
