//! Options of `llara finetune` about the output folder, the log and checkpoints.

use std::path::PathBuf;

use clap::builder::BoolishValueParser;
use clap::{ArgAction, ValueEnum};
use llara::train::Saving;

use super::steps::whole_steps;
use crate::save_dtype::SavedAs;

#[derive(clap::Args)]
#[command(next_help_heading = "Output")]
pub(crate) struct OutputArgs {
    /// Output folder of the model and the log; new or empty
    #[arg(long, value_name = "DIR")]
    // required, except for verbs that save no model; see `main::command`
    pub(crate) output_dir: Option<PathBuf>,
    /// Replace an earlier run in the output folder: its log and its checkpoint-N folders are deleted when
    /// training starts, its model when the new one is saved and verified
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    #[arg(default_value = "false", action = ArgAction::Set)]
    #[arg(value_parser = BoolishValueParser::new(), hide_possible_values = true)]
    pub(crate) overwrite_output_dir: bool,
    /// Number of steps between two lines of log.jsonl
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = whole_steps)]
    pub(crate) logging_steps: u64,
    /// When checkpoints are saved, as checkpoint-N: steps (every --save-steps), epoch (at the end of each
    /// epoch) or no (only the final model is saved)
    #[arg(long, value_name = "WHEN", value_enum, default_value_t = SaveStrategy::Steps)]
    #[arg(hide_possible_values = true)]
    save_strategy: SaveStrategy,
    /// Number of steps between two checkpoints; 0: only the final model is saved
    #[arg(long, value_name = "N", default_value_t = 500, value_parser = whole_steps)]
    pub(crate) save_steps: u64,
    /// Maximum number of checkpoints; older ones are deleted, but not the one of the best evaluated step;
    /// 0: no limit
    #[arg(long, value_name = "N", default_value_t = 0)]
    save_total_limit: usize,
    /// Continue an interrupted run: from the newest undamaged checkpoint in the output folder (latest;
    /// without a checkpoint a new run is started), or from the checkpoint folder DIR
    #[arg(long, value_name = "latest|DIR", num_args = 0..=1, default_missing_value = "latest")]
    #[arg(value_parser = resume_from)]
    pub(crate) resume_from_checkpoint: Option<ResumeFrom>,
    /// Number format of saved weights: f32, bf16, f16, or auto (that of the loaded weights)
    #[arg(long, value_name = "DTYPE", value_enum, default_value_t = SavedAs::Auto)]
    #[arg(hide_possible_values = true)]
    save_dtype: SavedAs,
}

/// When checkpoints are saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum SaveStrategy {
    /// Only the final model is saved
    No,
    /// Every `--save-steps`
    Steps,
    /// At the end of each epoch
    Epoch,
}

/// The checkpoint that a run continues from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ResumeFrom {
    /// None: the option is turned off, as a script may do.
    Nothing,
    /// The newest one in the output folder, if there is one.
    Latest,
    /// This folder.
    Folder(PathBuf),
}

fn resume_from(text: &str) -> Result<ResumeFrom, String> {
    Ok(match &*text.to_ascii_lowercase() {
        "latest" | "true" | "yes" | "on" | "1" => ResumeFrom::Latest,
        "" | "false" | "no" | "off" | "0" | "none" => ResumeFrom::Nothing,
        _ => ResumeFrom::Folder(text.into()),
    })
}

impl OutputArgs {
    /// Whether a checkpoint is saved at the end of each epoch.
    pub(crate) fn saves_by_epoch(&self) -> bool {
        self.save_strategy == SaveStrategy::Epoch
    }

    /// When checkpoints are saved and how many are kept. An epoch has `steps_per_epoch` steps.
    pub(crate) fn saving(&self, steps_per_epoch: u64) -> Saving {
        let every = match self.save_strategy {
            SaveStrategy::No => None,
            SaveStrategy::Steps => Some(self.save_steps),
            SaveStrategy::Epoch => Some(steps_per_epoch),
        };
        Saving {
            every: every.filter(|&steps| steps > 0),
            keep: Some(self.save_total_limit).filter(|&limit| limit > 0),
            dtype: self.save_dtype.into(),
        }
    }
}
