//! Training: from rows to trained weights.
//!
//! [`Trainer`] is the loop for any [`Task`]: [`Finetuning`] or [`Pretraining`]. [`accumulate_gradients`] and
//! [`accumulate_pretraining_gradients`] compute the gradients of one batch, [`AdamW`] and
//! [`Schedule`] update the weights, [`RunLog`] records the run; [`plan`] predicts its memory and work.

mod batches;
mod checkpoint;
mod config;
mod evaluation;
mod finetuning;
mod flat_layout;
mod in_turn;
mod loss_terms;
mod observer;
mod optimizer;
pub mod plan;
mod pretraining;
mod reduction;
mod run_log;
mod schedule;
mod state;
mod step;
mod step_input;
mod task;
mod tensorboard;
mod traffic;
mod trainer;

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) use checkpoint::write_checkpoint_manifest;
pub use checkpoint::{Checkpoint, Latest, RunProgress, remove_unfinished, state_bytes};
pub use config::{Batching, RunLength, Saving, TrainConfig};
pub use evaluation::{
    BestMetric, EarlyStopping, EvalHistory, EvalMetric, EvalRecord, EvalSet, Evaluated, Evaluation,
    FoundPassage, MissedPassage, QueryReport, SetReport,
};
pub use finetuning::Finetuning;
pub use flat_layout::{FlatLayout, ParameterSlice, bucket_elements};
pub use in_turn::FinetuningInTurn;
pub use loss_terms::LossTerms;
pub use observer::{EvalEvent, Observer, StepRecord, Summary};
pub use optimizer::{AdamW, AdamWConfig, is_decayed};
pub use pretraining::{
    LossWeights, Pretraining, PretrainingEncoder, PretrainingInput, PretrainingLoss,
    PretrainingOptions, PretrainingSample, SetObjective, TrainingSequence,
    accumulate_pretraining_gradients,
};
pub use run_log::RunLog;
pub use schedule::{Decay, Schedule, Warmup};
pub use state::TrainState;
pub use step::{Chunking, accumulate_gradients, accumulate_gradients_with};
pub use step_input::StepInput;
pub use task::{Task, TaskInput};
pub use tensorboard::EventWriter;
pub use traffic::StepTraffic;
pub use trainer::Trainer;
