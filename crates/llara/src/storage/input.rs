//! Opening files for reading: regular files only, and a clear message for compressed ones.

use std::fs::File;
use std::io::{Error as IoError, ErrorKind as Io, Read, Result as IoResult};
use std::path::Path;

use crate::{Error, ErrorKind};

/// Opens a regular file for reading.
///
/// # Errors
/// The errors of [`File::open`]; [`Io::InvalidInput`] for a folder, a named pipe, a socket or a device. The
/// type is checked before the file is opened, because opening a pipe that has no writer blocks.
pub(crate) fn open_file(path: &Path) -> IoResult<File> {
    if !std::fs::metadata(path)?.is_file() {
        let what = "this is not a regular file; folders, pipes and devices cannot be read here";
        return Err(IoError::new(Io::InvalidInput, what));
    }
    File::open(path)
}

/// The contents of a regular file.
///
/// # Errors
/// Those of [`open_file`], and a failed read.
pub(crate) fn read_file(path: &Path) -> IoResult<Vec<u8>> {
    let mut bytes = Vec::new();
    open_file(path)?.read_to_end(&mut bytes)?;
    Ok(bytes)
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
