//! Dense retrieval with a trained encoder: embed files, search exactly, and score the rankings.

mod beir;
mod embedder;
mod encode;
mod lines;
mod metrics;
mod qrels;
mod run;
mod search;
mod texts;
mod vectors;

pub use beir::{BeirDataset, TextTable};
pub use embedder::TextEmbedder;
pub use encode::{Embedder, Progress, encode_stream, evaluate_dataset};
pub use metrics::{Metrics, evaluate};
pub use qrels::Qrels;
pub use run::{Hit, Ranking, Run, write_trec_run};
pub use search::{SearchOptions, Searcher, Similarity, search};
pub use texts::{Chunks, TextFile, TextFormat};
pub use vectors::{VectorWriter, read_vectors};
