//! `--resume-from-checkpoint`: which checkpoint a run continues from, and what it takes from it.

use std::path::Path;

use llara::backend::{Cpu, Dtype};
use llara::train::plan::Cut;
use llara::train::{Checkpoint, Latest};
use llara::{Error, ErrorKind, FolderLock, Result};

use super::Args;
use super::args::ResumeFrom;
use crate::output_folder;
use crate::talk::say;

/// Locks the output folder and finds the checkpoint to continue from, if one is asked for. Without one, a
/// folder that has contents is refused, unless it may be overwritten.
pub(super) fn claim(args: &Args, output_dir: &Path) -> Result<(FolderLock, Option<Checkpoint>)> {
    let overwrite = args.output.overwrite_output_dir;
    match &args.output.resume_from_checkpoint {
        None | Some(ResumeFrom::Nothing) => {
            Ok((output_folder::claim(output_dir, overwrite)?, None))
        }
        Some(ResumeFrom::Latest) => {
            let lock = output_folder::claim_with_contents(output_dir)?;
            let checkpoint = latest(output_dir)?;
            if checkpoint.is_none() {
                output_folder::check_resumable(output_dir, overwrite)?;
                say!(
                    "note: {} has no checkpoint to resume from: the run starts from the beginning",
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

/// The newest undamaged checkpoint; newer ones that are skipped are named.
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
                .got(format!("{} that are not", skipped.len()))
                .hint(
                    "their weights may still load: see the warnings; --overwrite-output-dir without \
                     --resume-from-checkpoint starts a new run and removes them",
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

/// What activations are computed in. A resumed run does not measure again what `--dtype auto` and the choice
/// of the kernel depend on: another outcome would give other roundings.
pub(super) fn precision(args: &Args, checkpoint: Option<&Checkpoint>) -> Dtype {
    let Some(checkpoint) = checkpoint else { return args.precision() };
    if checkpoint.dtype() == Dtype::Bf16 {
        Cpu::use_bf16_kernels(checkpoint.kernels());
    }
    if args.chooses_precision() { checkpoint.dtype() } else { args.precision() }
}

/// How batches are split into chunks. What is chosen by the free memory stays as it was chosen: other chunks
/// give other roundings.
pub(super) fn cut(asked: Cut, checkpoint: Option<&Checkpoint>) -> Cut {
    let Some(chunking) = checkpoint.map(Checkpoint::chunking) else { return asked };
    match asked {
        Cut::Free => Cut::Fixed(chunking),
        Cut::Size(size) if size.max_tokens == chunking.max_tokens => Cut::Fixed(chunking),
        asked => asked,
    }
}
