//! Files and folders that appear complete or not at all, locks, fingerprints, lines, and the safetensors
//! format.

mod disk_space;
mod fingerprint;
mod folder_lock;
mod input;
mod lines;
mod number;
mod output;
mod partial;
mod replace;
mod safetensors;
mod small_file;
mod staging;

pub use disk_space::free_disk_bytes;
pub(crate) use fingerprint::Fingerprint;
pub use folder_lock::FolderLock;
pub(crate) use input::{compressed, open_file, read_file};
pub(crate) use lines::{LineReader, MAX_LINE_BYTES};
pub(crate) use number::{is_readable, rounded};
pub(crate) use output::{OutputFile, check_output_path};
pub(crate) use partial::PartialFile;
pub use replace::{Recovered, finish_interrupted};
pub(crate) use safetensors::{
    Declaration, SafetensorsFile, SafetensorsWriter, WrittenFile, safetensors_header,
};
pub(crate) use small_file::read_limited;
pub(crate) use staging::Staging;

use std::path::Path;

use crate::Error;

/// A failed write to a file that is removed again when the write fails.
fn write_failed(action: &str, path: &Path, source: std::io::Error) -> Error {
    use std::io::ErrorKind as Io;
    let full = matches!(source.kind(), Io::StorageFull | Io::QuotaExceeded | Io::FileTooLarge);
    let error = Error::io(action, path, source);
    if full {
        error.hint("free some space or choose another folder; nothing was left half-written")
    } else {
        error
    }
}
