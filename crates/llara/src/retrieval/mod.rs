//! Dense retrieval with a trained encoder: embed files, search exactly, and score the rankings.

mod beir;
mod embedder;
mod encode;
mod lines;
mod metrics;
mod origin;
mod qrels;
mod run;
mod search;
mod texts;
mod vector_writer;
mod vectors;

pub use beir::{BeirDataset, TextTable};
pub use embedder::TextEmbedder;
pub use encode::{BLOCK_TEXTS, Embedder, Progress, encode_stream, evaluate_dataset};
pub use metrics::{Metrics, evaluate};
pub use origin::Origin;
pub use qrels::Qrels;
pub use run::{Hit, Ranking, Run, write_trec_run};
pub use search::{SearchOptions, Searcher, Similarity, search};
pub use texts::{Chunks, TextFile, TextFormat};
pub use vector_writer::VectorWriter;
pub use vectors::read_vectors;
