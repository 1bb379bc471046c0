//! Reading input files: regular files only, with a limit on the size of files that are read into memory,
//! and a clear message for compressed ones.

use std::fs::{self, File};
use std::io::{Error as IoError, ErrorKind as Io, Read, Result as IoResult};
use std::path::Path;

use crate::{Error, ErrorKind, Result};

/// Largest file that [`read_file`] reads, in bytes.
const MAX_FILE_BYTES: u64 = 512 << 20;

/// Opens a regular file for reading.
///
/// # Errors
/// The errors of [`File::open`]; [`Io::InvalidInput`] for a folder, a named pipe, a socket or a device. The
/// type is checked before the file is opened, because opening a pipe that has no writer blocks.
pub(crate) fn open_file(path: &Path) -> IoResult<File> {
    if !fs::metadata(path)?.is_file() {
        let what = "this is not a regular file; folders, pipes and devices cannot be read here";
        return Err(IoError::new(Io::InvalidInput, what));
    }
    File::open(path)
}

/// The contents of a regular file of at most 512 MiB.
///
/// # Errors
/// Those of [`open_file`], [`Io::FileTooLarge`], and a failed read.
pub(crate) fn read_file(path: &Path) -> IoResult<Vec<u8>> {
    read_at_most(path, MAX_FILE_BYTES)?.map_err(|length| {
        let what = format!("the file has {length} bytes or more, the limit is {MAX_FILE_BYTES}");
        IoError::new(Io::FileTooLarge, what)
    })
}

/// The contents of a regular file of at most `limit` bytes. `action` completes "cannot …" in errors.
///
/// # Errors
/// [`ErrorKind::Io`]: the file cannot be read, is larger than `limit`, or is not a regular file.
pub(crate) fn read_limited(path: &Path, action: &str, limit: u64) -> Result<Vec<u8>> {
    let error = |what: &str| {
        Error::new(ErrorKind::Io, format!("cannot {action}: {what}"))
            .file(path)
            .hint("check the path")
    };
    match read_at_most(path, limit) {
        Ok(Ok(bytes)) => Ok(bytes),
        Ok(Err(length)) => Err(error("the file is too large")
            .expected(format!("at most {limit} bytes"))
            .got(format!("{length} bytes or more"))
            .hint("this is not a file of this kind: check the path")),
        Err(e) if e.kind() == Io::InvalidInput => {
            let got = if path.is_dir() { "a folder" } else { "a pipe, socket or device" };
            Err(error("not a regular file").expected("a regular file").got(got))
        }
        Err(e) => Err(Error::io(action, path, e)),
    }
}

/// The contents of a UTF-8 text file of at most `limit` bytes. `action` completes "cannot …" in errors.
///
/// # Errors
/// [`ErrorKind::Io`]: the file cannot be read, is larger than `limit`, or is not a regular file;
/// [`ErrorKind::Config`]: it is not UTF-8, with the line.
pub fn read_text_file(path: &Path, action: &str, limit: u64) -> Result<String> {
    String::from_utf8(read_limited(path, action, limit)?).map_err(|e| {
        let valid = &e.as_bytes()[..e.utf8_error().valid_up_to()];
        let line = 1 + valid.iter().filter(|&&byte| byte == b'\n').count() as u64;
        Error::new(ErrorKind::Config, format!("cannot {action}: not UTF-8"))
            .line(path, line)
            .hint("convert the file to UTF-8")
    })
}

/// The contents of a regular file, or, if it has more than `limit` bytes, a lower bound of its length.
fn read_at_most(path: &Path, limit: u64) -> IoResult<Result<Vec<u8>, u64>> {
    let file = open_file(path)?;
    let length = file.metadata()?.len();
    if length > limit {
        return Ok(Err(length));
    }
    // The length may be wrong (files of /proc) or change during the read.
    let mut bytes = Vec::with_capacity(length as usize);
    file.take(limit.saturating_add(1)).read_to_end(&mut bytes)?;
    let length = bytes.len() as u64;
    Ok(if length > limit { Err(length) } else { Ok(bytes) })
}

/// First bytes of a compressed file, the name of its format, and the command that decompresses it.
const COMPRESSED: [(&[u8], &str, &str); 5] = [
    (b"\x1f\x8b", "gzip", "gunzip --keep"),
    (b"\x28\xb5\x2f\xfd", "zstd", "zstd --decompress"),
    (b"\xfd7zXZ\0", "xz", "xz --decompress --keep"),
    (b"BZh", "bzip2", "bunzip2 --keep"),
    (b"PK\x03\x04", "zip", "unzip"),
];

/// The error for a text file at `path` that begins with `start`, if these are the first bytes of a
/// compressed file.
pub(crate) fn compressed(path: &Path, start: &[u8]) -> Option<Error> {
    /// `BZh` could begin a text: the compression level and the magic number of a block follow it.
    fn is_bzip2(start: &[u8]) -> bool {
        start.get(3).is_some_and(u8::is_ascii_digit) && start[4..].starts_with(b"1AY&SY")
    }
    let (_, format, command) = COMPRESSED.iter().find(|(magic, format, _)| {
        start.starts_with(magic) && (*format != "bzip2" || is_bzip2(start))
    })?;
    Some(
        Error::new(ErrorKind::Data, format!("the file is compressed ({format})"))
            .file(path)
            .expected("uncompressed UTF-8 text")
            .hint(format!("decompress it first: {command} {}", path.display())),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_pipes_and_devices_are_refused_without_blocking() {
        let dir = tempfile::tempdir().unwrap();
        let pipe = dir.path().join("pipe");
        assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        for path in [dir.path(), &pipe, Path::new("/dev/zero")] {
            assert_eq!(read_file(path).unwrap_err().kind(), Io::InvalidInput, "{path:?}");
        }
        assert_eq!(read_file(&dir.path().join("none")).unwrap_err().kind(), Io::NotFound);
        std::fs::write(dir.path().join("file"), "text").unwrap();
        assert_eq!(read_file(&dir.path().join("file")).unwrap(), b"text");
    }

    #[test]
    fn only_regular_files_within_the_limit_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, "12345").unwrap();
        assert_eq!(read_limited(&path, "read it", 5).unwrap(), b"12345");
        let e = read_limited(&path, "read it", 4).unwrap_err().to_string();
        assert!(e.contains("cannot read it: the file is too large"), "{e}");
        let e = read_limited(dir.path(), "read it", 4).unwrap_err().to_string();
        assert!(e.contains("not a regular file") && e.contains("a folder"), "{e}");
        let pipe = dir.path().join("pipe");
        assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        let e = read_limited(&pipe, "read it", 4).unwrap_err().to_string();
        assert!(e.contains("a pipe, socket or device"), "{e}");
        let sparse = std::fs::File::create(dir.path().join("sparse")).unwrap();
        sparse.set_len(MAX_FILE_BYTES + 1).unwrap();
        assert_eq!(read_file(&dir.path().join("sparse")).unwrap_err().kind(), Io::FileTooLarge);
    }

    #[test]
    fn bytes_that_are_not_utf8_are_reported_with_their_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, "é\n\n").unwrap();
        assert_eq!(read_text_file(&path, "read it", 9).unwrap(), "é\n\n");
        std::fs::write(&path, b"a\nb\xff").unwrap();
        let e = read_text_file(&path, "read it", 9).unwrap_err().to_string();
        assert!(e.contains("f:2: cannot read it: not UTF-8"), "{e}");
    }

    #[test]
    fn compressed_files_are_recognized_and_texts_are_not() {
        let message = |start: &[u8]| compressed(Path::new("rows.gz"), start).map(|e| e.to_string());
        for (start, format) in [
            (&b"\x1f\x8b\x08\0"[..], "gzip"),
            (b"\x28\xb5\x2f\xfd\0", "zstd"),
            (b"\xfd7zXZ\0\0", "xz"),
            (b"BZh91AY&SY\0", "bzip2"),
            (b"PK\x03\x04\0", "zip"),
        ] {
            let message = message(start).unwrap();
            assert!(message.contains(format) && message.contains("decompress"), "{message}");
        }
        for start in [&b""[..], b"BZh", b"BZhang wrote", b"PK", b"{\"text\": 1}", b"\x1f"] {
            assert_eq!(message(start), None);
        }
    }
}
