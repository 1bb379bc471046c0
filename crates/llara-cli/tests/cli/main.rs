//! The program as its users run it: the binary, real files, exit codes, both outputs.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on should say where")]

mod adapters;
mod bad_data;
mod bad_models;
mod files;
mod fixture;
mod full_disk;
mod hub;
mod output_folder;
mod plan;
mod reference_command;
mod resume;
mod resumed_encoding;
mod run_file;
mod settings;
mod verbs;
