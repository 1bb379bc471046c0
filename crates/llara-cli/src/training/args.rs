//! The options of a training run that do not depend on what is trained.

use std::path::PathBuf;

use clap::ArgAction;
use clap::builder::BoolishValueParser;
use llara::Recipe;
use llara::data::Sampling;
use llara::loss::ObjectiveOptions;
use llara::train::{Batching, Chunking, TrainConfig};

use super::eval_args::EvalArgs;
use super::lora_args::LoraArgs;
use super::optimizer_args::OptimizerArgs;
use super::output_args::OutputArgs;
use super::process_args::ProcessArgs;
use super::trainer_flags::TrainerFlags;
use super::training_args::TrainingArgs;
use crate::compute::{Compute, Precision};

/// The options of every training verb, except those of its model.
#[derive(clap::Args)]
pub(crate) struct CommonArgs {
    #[command(flatten)]
    pub(crate) training: TrainingArgs,
    #[command(flatten)]
    pub(crate) lora: LoraArgs,
    #[command(flatten)]
    pub(crate) optimizer: OptimizerArgs,
    #[command(flatten)]
    pub(crate) processes: ProcessArgs,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
    #[command(flatten)]
    pub(crate) evaluation: EvalArgs,
    #[command(flatten)]
    pub(crate) compute: Compute,
    #[command(flatten)]
    pub(crate) precision: Precision,
    #[command(flatten)]
    pub(crate) trainer_flags: TrainerFlags,
}

impl CommonArgs {
    /// The settings of a run with one passage per row, in the default order. An epoch has `steps_per_epoch` steps.
    pub(crate) fn train_config(
        &self,
        output_dir: PathBuf,
        recipe: &Recipe,
        steps_per_epoch: u64,
    ) -> TrainConfig {
        let (training, optimizer) = (&self.training, &self.optimizer);
        TrainConfig {
            output_dir,
            length: training.length(),
            batch_size: training.per_device_train_batch_size,
            group_size: 1,
            query_max_len: recipe.query_max_len,
            passage_max_len: recipe.passage_max_len,
            objective: ObjectiveOptions::default(), // checked, then set, when the model is known
            sampling: Sampling::Random,
            batching: Batching::Mixed, // set when the data is known
            drop_last: false,
            seed: training.seed,
            learning_rate: optimizer.learning_rate,
            decay: optimizer.decay(),
            warmup: optimizer.warmup(),
            adamw: optimizer.adamw(),
            query_instruction: recipe.query_instruction.clone(),
            passage_instruction: recipe.passage_instruction.clone(),
            chunking: Chunking::default(), // chosen once the data is known
            logging_steps: self.output.logging_steps,
            saving: self.output.saving(steps_per_epoch),
            shard_optimizer: self.processes.shard_optimizer,
            bucket_elements: None,
        }
    }
}

#[derive(clap::Args)]
#[command(next_help_heading = "Model")]
pub(crate) struct ModelArgs {
    /// Folder of the model to train, or its name on the Hugging Face Hub (org/name)
    #[arg(long, alias = "model-name-or-path", value_name = "DIR|HUB_ID")]
    #[arg(required_unless_present = "config")]
    pub(crate) model: Option<String>,
    /// Cache folder of the Hub [default: HF_HUB_CACHE, HF_HOME/hub or ~/.cache/huggingface/hub]
    #[arg(long, value_name = "DIR")]
    pub(crate) cache_dir: Option<PathBuf>,
    /// Template of queries and passages: llara, e5-mistral, qwen3-embedding, or a TOML file
    /// [default: as the model was trained, or llara]
    #[arg(long, value_name = "NAME|FILE.toml")]
    pub(crate) template: Option<String>,
    /// Add the template's special tokens that the tokenizer lacks; their embeddings are trained, with an
    /// adapter as well, and saved
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    #[arg(default_value = "false", action = ArgAction::Set)]
    #[arg(value_parser = BoolishValueParser::new(), hide_possible_values = true)]
    pub(crate) add_special_tokens: bool,
    /// Whether embeddings are L2-normalized [default: as the model was trained, or true]
    #[arg(long, alias = "normlized", value_name = "BOOL", num_args = 0..=1)]
    #[arg(default_missing_value = "true", value_parser = BoolishValueParser::new())]
    #[arg(hide_possible_values = true)]
    pub(crate) normalized: Option<bool>,
}
