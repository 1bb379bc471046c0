//! Files that appear whole or not at all, fingerprints of contents, lines, and the safetensors format, for
//! whoever reads or writes.

mod fingerprint;
mod input;
mod lines;
mod number;
mod output;
mod partial;
mod safetensors;
mod staging;

pub(crate) use fingerprint::Fingerprint;
pub(crate) use input::{compressed, open_file, read_file, read_text_file};
pub(crate) use lines::{LineReader, MAX_LINE_BYTES};
pub(crate) use number::is_readable;
pub(crate) use output::{OutputFile, check_output_path};
pub(crate) use partial::PartialFile;
pub(crate) use safetensors::{Declaration, SafetensorsFile, SafetensorsWriter, safetensors_header};
pub(crate) use staging::Staging;
