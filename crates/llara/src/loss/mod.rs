//! The loss of embeddings, and its gradient with respect to the embeddings.

mod info_nce;
mod objective;
mod options;
mod terms;
mod text_keys;

pub use info_nce::{InfoNce, Scored};
pub use objective::{Contrastive, Embeddings, Labels, LossAndGradient, Objective, RowsPerRank};
pub use options::{
    Distillation, DistillationKind, FalseNegatives, MatryoshkaPrefix, ObjectiveContext,
    ObjectiveOptions,
};
pub use text_keys::TextKeys;
