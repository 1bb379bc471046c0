//! Atomic and resumable files, folders that are replaced atomically, locks, hashes, lines, and the
//! safetensors format.

mod disk_space;
mod fingerprint;
mod generated;
mod input;
mod lines;
mod lock;
mod number;
mod output;
mod partial;
mod replace;
mod safetensors;
mod safetensors_writer;
mod staging;
mod tensor_scan;
mod toml_file;

pub use disk_space::free_disk_bytes;
pub(crate) use fingerprint::Fingerprint;
pub(crate) use generated::{CARD_FILE, with_seal};
pub use input::read_text_file;
pub(crate) use input::{compressed, open_file, read_file, read_limited};
pub(crate) use lines::{LineReader, MAX_LINE_BYTES};
pub use lock::{FolderLock, OutputLock};
pub(crate) use number::{is_readable, rounded};
pub(crate) use output::{OutputFile, check_output_path, remove_unfinished_file};
pub use output::{refresh_file, replace_file};
pub(crate) use partial::PartialFile;
pub(crate) use replace::{INDEX_FILE, WEIGHTS_FILE, is_leftover};
pub use replace::{Recovered, finish_interrupted};
pub(crate) use safetensors::{PART_ELEMENTS, SafetensorsFile};
pub(crate) use safetensors_writer::{
    Declaration, SafetensorsWriter, WrittenFile, safetensors_header,
};
pub(crate) use staging::Staging;
pub use toml_file::read_toml;
