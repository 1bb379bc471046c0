//! A model or adapter folder whose files are written and not yet compared with the weights.

use crate::storage::{Staging, WrittenFile};
use crate::{Error, Result};

/// A written folder that is not in place yet. Its files are compared with the hashes of what was written, flushed
/// and renamed by [`commit`](Self::commit), which needs no model and may run on another thread.
#[must_use]
pub(crate) struct StagedFolder {
    pub(super) staging: Staging,
    pub(super) written: Vec<WrittenFile>,
}

impl StagedFolder {
    /// Reads every tensor back, compares it, and moves the folder into place.
    ///
    /// # Errors
    /// A tensor differs: the folder is then kept as `DIR.unverified-N`. A file cannot be flushed or renamed.
    pub(crate) fn commit(self) -> Result<()> {
        let StagedFolder { staging, written } = self;
        match written.iter().try_for_each(|file| file.verify(staging.path())) {
            Ok(()) => staging.commit(),
            Err(error) => Err(keep_unverified(staging, error)),
        }
    }
}

/// Keeps a model or adapter that failed its verification, and says where.
pub(super) fn keep_unverified(staging: Staging, error: Error) -> Error {
    let target = staging.target().to_owned();
    match staging.keep_unverified() {
        Ok(kept) => error.file(&target).hint(format!(
            "the weights are not lost: what was written is in {}, and an earlier model in the output \
             folder is unchanged. Compare or load that folder before you use it",
            kept.display()
        )),
        Err(failed) => error.file(&target).because(failed),
    }
}
