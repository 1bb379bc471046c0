//! Checks before a verb starts that its output would not overwrite an input or be written among inputs.

use std::fs::{self, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use llara::{Error, ErrorKind, Result};

/// Refuses an output that is an input, is inside an input folder, or is a folder that contains an input.
/// Each input is a description and a path. Symbolic links, hard links and `..` are resolved. An input that
/// does not exist, such as a model id of the Hub, is ignored.
pub(super) fn check_apart(output: &Path, inputs: &[(&str, &Path)]) -> Result<()> {
    let resolved = resolve(output);
    let existing = fs::metadata(output).ok();
    for (what, input) in inputs {
        let (Ok(path), Ok(metadata)) = (input.canonicalize(), fs::metadata(input)) else {
            continue;
        };
        let same = existing.as_ref().is_some_and(|output| is_same(output, &metadata));
        let problem = if (same || path == resolved) && !metadata.is_dir() {
            format!("the output and {what} are the same")
        } else if path.starts_with(&resolved) {
            format!("{what} is in the output folder, where it could be overwritten")
        } else if metadata.is_dir() && resolved.starts_with(&path) {
            format!("the output is in the folder of {what}")
        } else if metadata.is_dir() && existing.as_ref().is_some_and(|o| is_linked(o, &path)) {
            format!("the output is a hard link to a file of {what}")
        } else {
            continue;
        };
        return Err(Error::new(ErrorKind::Argument, problem)
            .file(output)
            .expected("a path outside all inputs")
            .got(input.display())
            .hint("choose another output"));
    }
    Ok(())
}

/// Refuses to replace a file that this program did not write. `is_own` recognizes its files.
pub(super) fn check_replaceable(
    output: &Path,
    (what, is_own): (&str, impl Fn(&Path) -> std::io::Result<bool>),
    overwrite: bool,
) -> Result<()> {
    let Ok(metadata) = fs::metadata(output) else { return Ok(()) };
    if overwrite || !metadata.is_file() || metadata.len() == 0 {
        return Ok(());
    }
    if is_own(output).map_err(|e| Error::io("read the file that the output replaces", output, e))? {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Argument, format!("the output exists and is not {what}"))
        .file(output)
        .expected(format!("a new file, or {what} to be replaced"))
        .hint("choose another output, or replace the file with --overwrite"))
}

/// `path` with symbolic links and `..` resolved, as far as it exists.
fn resolve(path: &Path) -> PathBuf {
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let mut resolved = PathBuf::new();
    for component in absolute.components() {
        match component {
            Component::ParentDir => {
                resolved.pop();
            }
            other => resolved.push(other),
        }
        if let Ok(canonical) = resolved.canonicalize() {
            resolved = canonical;
        }
    }
    resolved
}

fn is_same(a: &Metadata, b: &Metadata) -> bool {
    (a.dev(), a.ino()) == (b.dev(), b.ino())
}

/// Whether an existing file is a hard link to a file in `folder` or in one of its subfolders.
fn is_linked(output: &Metadata, folder: &Path) -> bool {
    if output.is_dir() || output.nlink() < 2 {
        return false;
    }
    let files = |folder: &Path| {
        let entries = fs::read_dir(folder).into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).collect::<Vec<_>>()
    };
    let same = |path: &PathBuf| fs::metadata(path).is_ok_and(|other| is_same(output, &other));
    let entries = files(folder);
    entries.iter().any(same)
        || entries.iter().filter(|p| p.is_dir()).any(|p| files(p).iter().any(same))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn outputs_must_be_outside_the_inputs() {
        let root = tempfile::tempdir().unwrap();
        let at = |name: &str| root.path().join(name);
        for folder in ["model/sub", "data"] {
            fs::create_dir_all(at(folder)).unwrap();
        }
        for file in ["model/weights", "model/sub/file", "data/rows"] {
            fs::write(at(file), "x").unwrap();
        }
        symlink(at("model"), at("link")).unwrap();
        symlink(at("data/rows"), at("rows")).unwrap();
        fs::hard_link(at("data/rows"), at("hard")).unwrap();
        fs::hard_link(at("model/sub/file"), at("inner")).unwrap();
        let (model, rows) = (at("model"), at("data/rows"));
        let inputs = [("the model", model.as_path()), ("the rows", rows.as_path())];
        for (output, expected) in [
            ("model", "in the output folder"),
            ("link", "in the output folder"),
            ("data/rows", "are the same"),
            ("rows", "are the same"),
            ("hard", "are the same"),
            ("data/../data/./rows", "are the same"),
            ("none/../data/rows", "are the same"),
            ("data", "in the output folder"),
            ("", "in the output folder"),
            ("model/weights", "in the folder of the model"),
            ("model/new/v.npy", "in the folder of the model"),
            ("link/new", "in the folder of the model"),
            ("link/../model/new", "in the folder of the model"),
            ("inner", "hard link to a file of the model"),
        ] {
            let error = check_apart(&at(output), &inputs).map(|()| output).unwrap_err().to_string();
            assert!(error.contains(expected), "{output}: {error}");
        }
        for output in ["data/rows.npy", "models", "new/folder", "model2/weights", "data/rows/../v"]
        {
            check_apart(&at(output), &inputs).unwrap();
        }
        let absent = at("absent");
        check_apart(&at("absent/x"), &[("the model", &absent)]).unwrap();
    }

    #[test]
    fn files_of_other_programs_are_not_replaced() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("file");
        let check =
            |own: bool, overwrite| check_replaceable(&path, ("ours", |_| Ok(own)), overwrite);
        check(false, false).unwrap();
        fs::write(&path, "").unwrap();
        check(false, false).unwrap();
        fs::write(&path, "theirs").unwrap();
        let error = check(false, false).unwrap_err().to_string();
        assert!(error.contains("is not ours") && error.contains("--overwrite"), "{error}");
        check(false, true).unwrap();
        check(true, false).unwrap();
    }
}
