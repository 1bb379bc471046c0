//! Reading a whole file into memory, with a limit on its size.

use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

use crate::{Error, ErrorKind, Result};

/// The contents of a regular file of at most `limit` bytes. `action` completes "cannot …" in errors.
///
/// # Errors
/// The file cannot be read, is larger, or is not a regular file: reading a named pipe would block
/// until somebody writes to it.
pub(crate) fn read_limited(path: &Path, action: &str, limit: u64) -> Result<Vec<u8>> {
    let io = |e| Error::io(action, path, e);
    let metadata = fs::metadata(path).map_err(io)?;
    if !metadata.is_file() {
        let got = if metadata.is_dir() { "a folder" } else { "a pipe, socket or device" };
        return Err(Error::new(ErrorKind::Io, format!("cannot {action}: not a regular file"))
            .file(path)
            .expected("a regular file")
            .got(got)
            .hint("check the path"));
    }
    let too_large = |length: u64| {
        Error::new(ErrorKind::Io, format!("cannot {action}: the file is too large"))
            .file(path)
            .expected(format!("at most {limit} bytes"))
            .got(format!("{length} bytes or more"))
            .hint("this is not a file of this kind: check the path")
    };
    if metadata.len() > limit {
        return Err(too_large(metadata.len()));
    }
    // The length may be wrong (files of /proc) or change meanwhile.
    let mut bytes = Vec::with_capacity(metadata.len() as usize);
    File::open(path).map_err(io)?.take(limit + 1).read_to_end(&mut bytes).map_err(io)?;
    if bytes.len() as u64 > limit {
        return Err(too_large(bytes.len() as u64));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_regular_files_within_the_limit_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        fs::write(&path, "12345").unwrap();
        assert_eq!(read_limited(&path, "read it", 5).unwrap(), b"12345");
        let e = read_limited(&path, "read it", 4).unwrap_err().to_string();
        assert!(e.contains("cannot read it: the file is too large"), "{e}");
        let e = read_limited(dir.path(), "read it", 4).unwrap_err().to_string();
        assert!(e.contains("not a regular file") && e.contains("a folder"), "{e}");
        let pipe = dir.path().join("pipe");
        let made = std::process::Command::new("mkfifo").arg(&pipe).status();
        if made.is_ok_and(|status| status.success()) {
            let e = read_limited(&pipe, "read it", 4).unwrap_err().to_string();
            assert!(e.contains("a pipe, socket or device"), "{e}");
        }
    }
}
