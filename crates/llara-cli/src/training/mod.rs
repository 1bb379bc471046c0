//! What the training verbs share: options, the preparation of a run, its predicted memory, the run itself.

mod args;
mod eval_args;
mod flag_table;
mod forecast;
mod group;
mod lora_args;
mod optimizer_args;
mod output_args;
mod prepare;
mod process_args;
mod ranges;
mod report_facts;
mod resume;
mod run;
mod steps;
mod traffic;
mod trainer_flags;
mod training_args;

pub(super) use args::{CommonArgs, ModelArgs};
pub(super) use forecast::{Forecast, Remedies, group_shape};
pub(super) use group::{announce_processes, smallest_chunking};
pub(super) use lora_args::Adapter;
pub(super) use prepare::{
    CheckedArgs, Purpose, attach_adapter, check_evaluated_texts, check_probes, loader, missing,
    starting_recipe, with_added_tokens,
};
pub(super) use ranges::{check_loop, require};
pub(super) use report_facts::{adapter_setting, common_settings};
pub(super) use resume::Claimed;
pub(super) use run::{Run, say_skipped};
