//! `--save-dtype`: the number format of saved weights.

use clap::ValueEnum;
use llara::model::weights::SaveDtype;

/// The value of the option.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(super) enum SavedAs {
    Auto,
    F32,
    Bf16,
    F16,
}

impl From<SavedAs> for SaveDtype {
    fn from(saved_as: SavedAs) -> Self {
        match saved_as {
            SavedAs::Auto => SaveDtype::AsLoaded,
            SavedAs::F32 => SaveDtype::F32,
            SavedAs::Bf16 => SaveDtype::Bf16,
            SavedAs::F16 => SaveDtype::F16,
        }
    }
}
