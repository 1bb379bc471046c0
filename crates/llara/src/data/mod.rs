//! Training data, from files to packed batches: [`Dataset`] reads and checks rows, [`Sampler`] draws rows
//! and their passages, [`Batch`] is the input of a model.

mod batch;
mod dataset;
mod file_batches;
mod files;
mod lengths;
mod pieces;
mod prefetch;
mod pretraining;
mod row;
mod sampler;
mod source;
mod teacher_scores;

pub(crate) use batch::positives;
pub use batch::{Batch, BatchView};
pub use dataset::{BadRows, DataFile, Dataset, Skipped};
pub use file_batches::FileRows;
pub(crate) use files::{data_files, open_data_file, read_rows};
pub use lengths::{Histogram, LONGEST_MEASURED, LengthSummary, Lengths};
pub use pieces::PieceLength;
pub(crate) use prefetch::{Prefetched, prefetch};
pub use pretraining::{PretrainingData, PretrainingRow, first_characters};
pub use row::TrainingRow;
pub use sampler::{Draw, Group, Sampler, SamplerConfig, Sampling};
pub(crate) use source::passage_prompt_name;
pub use source::{BatchRows, DataSource, DataSources, Instructions};
