//! `--resume-from-checkpoint`: the checkpoint that a run continues from, and the settings that are taken from
//! it.

use std::path::{Path, PathBuf};

use llara::backend::{Backend, Dtype};
use llara::train::plan::ChunkPolicy;
use llara::train::{Checkpoint, Latest};
use llara::{Error, ErrorKind, FolderLock, Result};

use super::output_args::{OutputArgs, ResumeFrom};
use super::training_args::TrainingArgs;
use crate::compute::Precision;
use crate::output_folder;
use crate::processes::Processes;
use crate::talk::{counted, say};

/// What the first process has decided for all, before a model or data is read.
pub(crate) struct Claimed {
    /// The output folder; empty for a run that saves nothing.
    pub(crate) output_dir: PathBuf,
    /// The lock of the output folder; the first process has it.
    pub(crate) lock: Option<FolderLock>,
    /// The checkpoint that the run continues from.
    pub(crate) checkpoint: Option<Checkpoint>,
    /// The number format of activations.
    pub(crate) precision: Dtype,
}

impl Claimed {
    /// Claims the output folder, if there is one, and chooses the number format. Every process calls it.
    ///
    /// # Errors
    /// The folder cannot be used, or has no checkpoint to continue from; on every process.
    pub(crate) fn by_first(
        (output, output_dir): (&OutputArgs, Option<PathBuf>),
        dtype: (&TrainingArgs, &Precision),
        backend: &impl Backend,
        processes: &Processes,
    ) -> anyhow::Result<Self> {
        let (lock, checkpoint) = match &output_dir {
            Some(output_dir) => claim_by_first(output, output_dir, processes)?,
            None => (None, None),
        };
        let own = precision(dtype, checkpoint.as_ref(), backend);
        let precision = processes.shared_precision(own, backend)?;
        Ok(Claimed { output_dir: output_dir.unwrap_or_default(), lock, checkpoint, precision })
    }
}

/// [`claim`] by the first process. The others have no lock, and open the checkpoint that it has chosen.
fn claim_by_first(
    output: &OutputArgs,
    output_dir: &Path,
    processes: &Processes,
) -> anyhow::Result<(Option<FolderLock>, Option<Checkpoint>)> {
    let claimed = processes.first(|| Ok(claim(output, output_dir)?))?;
    processes.check_shared(output_dir)?;
    let (lock, checkpoint) = claimed.map_or((None, None), |(lock, found)| (Some(lock), found));
    let folder = checkpoint.as_ref().map(|checkpoint| checkpoint.dir().display().to_string());
    let folder = processes.choose(folder.unwrap_or_default())?;
    let opened = || match (processes.is_first(), folder.as_str()) {
        (true, _) => Ok(checkpoint),
        (false, "") => Ok(None),
        (false, folder) => Ok(Some(Checkpoint::open(Path::new(folder))?)),
    };
    Ok((lock, processes.agree(opened())?))
}

/// Locks the output folder and finds the checkpoint to continue from, if the option is given. Without a
/// checkpoint, a folder that is not empty is refused unless it may be overwritten.
fn claim(output: &OutputArgs, output_dir: &Path) -> Result<(FolderLock, Option<Checkpoint>)> {
    let overwrite = output.overwrite_output_dir;
    match &output.resume_from_checkpoint {
        None | Some(ResumeFrom::Nothing) => {
            Ok((output_folder::claim(output_dir, overwrite)?, None))
        }
        Some(ResumeFrom::Latest) => {
            let lock = output_folder::claim_with_contents(output_dir)?;
            let checkpoint = latest(output_dir)?;
            if checkpoint.is_none() {
                output_folder::check_resumable(output_dir, overwrite)?;
                say!(
                    "note: {} has no checkpoint to resume from: this starts a new run",
                    output_dir.display()
                );
            }
            Ok((lock, checkpoint))
        }
        Some(ResumeFrom::Folder(folder)) => {
            let canonical = |path: &Path| path.canonicalize().ok();
            let own = canonical(folder).and_then(|folder| folder.parent().map(Path::to_owned));
            let lock = match own.is_some() && own == canonical(output_dir) {
                true => output_folder::claim_with_contents(output_dir)?,
                false => output_folder::claim(output_dir, overwrite)?,
            };
            Ok((lock, Some(Checkpoint::open(folder)?)))
        }
    }
}

/// The newest undamaged checkpoint. Prints why newer ones are skipped.
fn latest(output_dir: &Path) -> Result<Option<Checkpoint>> {
    let Latest { checkpoint, skipped } = Checkpoint::latest(output_dir)?;
    match (&checkpoint, skipped.len()) {
        (None, 1..) => {
            for error in &skipped {
                say!("warning: {error}");
            }
            Err(Error::new(ErrorKind::Io, "no checkpoint of this run can be resumed from")
                .file(output_dir)
                .expected("a complete and undamaged checkpoint-N")
                .got(counted(skipped.len(), "damaged checkpoint"))
                .hint(
                    "see the warnings; the model files may be undamaged. To delete the checkpoints and \
                     start a new run, use --overwrite-output-dir without --resume-from-checkpoint",
                ))
        }
        (Some(used), _) => {
            for error in &skipped {
                say!("warning: skipped a checkpoint: {error}");
            }
            if !skipped.is_empty() {
                say!("note: {} is used instead", used.dir().display());
            }
            Ok(checkpoint)
        }
        (None, _) => Ok(None),
    }
}

/// The number format of activations. A resumed run takes the choices of `--dtype auto` and of the kernels from
/// the checkpoint instead of another measurement, which could change the rounding of results.
fn precision(
    (training, precision): (&TrainingArgs, &Precision),
    checkpoint: Option<&Checkpoint>,
    backend: &impl Backend,
) -> Dtype {
    let Some(checkpoint) = checkpoint else { return training.dtype(precision, backend) };
    if checkpoint.dtype() == Dtype::Bf16 {
        backend.use_kernels(checkpoint.kernels());
    }
    // With `auto` the number format depends on the device.
    let is_auto = !training.bf16 && precision.is_auto();
    if is_auto { checkpoint.dtype() } else { training.dtype(precision, backend) }
}

/// Which properties of the chunks are chosen. A resumed run takes those that depend on the free memory from the
/// checkpoint: other chunks would change the rounding of results.
pub(crate) fn chunk_policy(given: ChunkPolicy, checkpoint: Option<&Checkpoint>) -> ChunkPolicy {
    let Some(chunking) = checkpoint.map(Checkpoint::chunking) else { return given };
    match given {
        ChunkPolicy::Auto => ChunkPolicy::Fixed(chunking),
        ChunkPolicy::FixedSize(size) if size.max_tokens == chunking.max_tokens => {
            ChunkPolicy::Fixed(chunking)
        }
        given => given,
    }
}
