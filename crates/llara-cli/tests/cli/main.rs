//! Tests of the program: the binary, files, exit codes, standard output and standard error.

#![allow(clippy::unwrap_used, reason = "a test fails at the line of the panic")]

mod adapters;
mod added_tokens;
mod bad_data;
mod bad_models;
mod check;
mod data_sets;
mod evaluation;
mod files;
mod fixture;
mod full_disk;
mod hub;
mod inspect_data;
mod model_card;
mod objectives;
mod output_folder;
mod plan;
mod pretrain;
mod process_failures;
mod processes;
mod reference_command;
mod report;
mod report_in_browser;
mod resume;
mod resumed_encoding;
mod run_file;
mod sentence_transformers;
mod settings;
mod verbs;
mod verify_distributed;
