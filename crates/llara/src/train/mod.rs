//! Training: from rows to trained weights.
//!
//! [`Trainer`] is the loop; [`accumulate_gradients`] is what one batch does to the gradients,
//! [`AdamW`] and [`Schedule`] turn gradients into new weights, [`RunLog`] is what stays of a run;
//! [`plan`] tells beforehand what all of it will take.

mod batches;
mod config;
mod optimizer;
pub mod plan;
mod run_log;
mod schedule;
mod step;
mod step_input;
mod tensorboard;
mod trainer;

pub use config::{RunLength, Saving, TrainConfig};
pub use optimizer::{AdamW, AdamWConfig, is_decayed};
pub use run_log::RunLog;
pub use schedule::{Decay, Schedule, Warmup};
pub use step::{Chunking, accumulate_gradients};
pub use step_input::StepInput;
pub use tensorboard::EventWriter;
pub use trainer::{Observer, StepRecord, Summary, Trainer};
