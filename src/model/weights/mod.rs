//! The model folder: weights read from and written to the files that Hugging Face tools use.

mod file;
mod files;
mod folder;
mod load;
mod number;
mod staging;

pub use files::WeightFiles;
pub use folder::{ModelFolder, SaveDtype};
pub use load::{load_decoder, random_decoder};
pub(crate) use staging::Staging;
