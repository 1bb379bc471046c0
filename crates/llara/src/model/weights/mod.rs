//! The model folder: weights read from and written to the files that Hugging Face tools use.

mod files;
mod folder;
mod load;

pub use files::WeightFiles;
pub use folder::{ModelFolder, SaveDtype};
pub(crate) use load::{Mismatch, misfits, prefix_of};
pub use load::{load_decoder, random_decoder};
