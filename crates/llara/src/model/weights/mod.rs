//! The model folder: reading and writing weights in the file formats of Hugging Face.

mod files;
mod folder;
mod load;

pub use files::WeightFiles;
pub(crate) use folder::element_parts;
pub use folder::{ModelFolder, SaveDtype};
pub(crate) use load::{Mismatch, misfits, prefix_of};
pub use load::{load_decoder, random_decoder};
