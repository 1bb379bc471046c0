//! Evaluation while a model is trained: retrieval metrics on test collections, the best step, early stopping.
//!
//! The model in memory encodes every query and passage of each collection, with the weights that training
//! computes with and without dropout; gradients and optimizer state stay where they are. Evaluation draws no
//! random number and writes to no weight, so a run with and one without it end with the same bytes.
//!
//! Of several processes each one evaluates, so that none waits for another longer than in a step; the figures
//! of rank 0 count on all of them.

mod evaluator;
mod history;
mod metric;
mod query_report;
mod settings;
mod state;

pub(super) use evaluator::evaluate;
pub use history::{EvalHistory, EvalRecord, Evaluated};
pub use metric::{BestMetric, EvalMetric};
pub use query_report::{FoundPassage, MissedPassage, QueryReport, SetReport};
pub use settings::{EarlyStopping, EvalSet, Evaluation};
pub(super) use state::EvalState;
