//! What all processes of a run must have in common.

use crate::backend::Backend;
use crate::dist::Collective;
use crate::storage::Fingerprint;
use crate::{Error, ErrorKind, Result};

/// The value of this process if all processes have one; else an error on every process.
///
/// # Errors
/// The error of this process, or of another one.
pub(super) fn agree_on<B: Backend, V>(
    result: Result<V>,
    collective: &dyn Collective<B>,
) -> Result<V> {
    match result {
        Ok(value) => collective.agree(Ok(())).map(|()| value),
        Err(error) => {
            let kind = error.kind();
            collective.agree(Err(error))?;
            Err(Error::new(kind, "a process has failed"))
        }
    }
}

/// Checks that all processes have the same hash of `what`.
///
/// # Errors
/// The first rank that differs from rank 0, on every rank.
pub(super) fn check_same<B: Backend>(
    hash: u64,
    what: &str,
    collective: &dyn Collective<B>,
) -> Result<()> {
    let hashes = collective.all_gather_words(&[hash])?;
    match hashes.iter().position(|hash| *hash != hashes[0]) {
        None => Ok(()),
        Some(rank) => Err(Error::new(
            ErrorKind::Distributed,
            format!("rank {rank} has other {what} than rank 0"),
        )
        .expected("the same options, training data, model and kernels in every process")
        .hint(
            "start all processes with one command line; on several hosts, compare the files and the \
             processors (LLARA_CPU selects the kernels)",
        )),
    }
}

/// A hash of a description.
pub(super) fn hash(description: &str) -> u64 {
    let mut fingerprint = Fingerprint::new();
    fingerprint.add(description.as_bytes());
    fingerprint.short()
}
