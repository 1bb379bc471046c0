//! Dense retrieval with a trained model: embedding files of texts, exact search, and evaluation.

mod beir;
mod embedder;
mod embedding_writer;
mod embeddings;
mod encode;
mod lines;
mod metrics;
mod origin;
mod qrels;
mod run;
mod search;
mod shared_embedder;
mod texts;
mod verify;

pub use beir::{BeirDataset, TextTable, UnknownIds};
pub use embedder::TextEmbedder;
pub use embedding_writer::EmbeddingWriter;
pub use embeddings::{begins_like_embeddings, read_embeddings};
pub use encode::{
    BLOCK_TEXTS, Embedder, Progress, embed_texts, encode_stream, evaluate_dataset,
    take_part_in_encoding,
};
pub use metrics::{Metrics, evaluate, evaluate_each};
pub use origin::Origin;
pub use qrels::Qrels;
pub use run::{Hit, Ranking, Run, begins_like_trec_run, check_trec_run, write_trec_run};
pub use search::{SearchOptions, Searcher, Similarity, search};
pub use shared_embedder::SharedEmbedder;
pub use texts::{Chunks, TextFile, TextFormat};
pub use verify::verify_embeddings;
