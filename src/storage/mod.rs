//! Files that appear whole or not at all, and the safetensors format, for whoever reads or writes.

mod number;
mod output;
mod safetensors;
mod staging;

pub(crate) use number::is_readable;
pub(crate) use output::OutputFile;
pub(crate) use safetensors::{Declaration, SafetensorsFile, SafetensorsWriter, safetensors_header};
pub(crate) use staging::Staging;
