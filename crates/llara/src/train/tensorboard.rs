//! TensorBoard event files: scalars per step, in the format of TensorFlow's summary writers.
//!
//! An event file is a sequence of TFRecords (`tensorflow/core/lib/io/record_writer.h`), each with
//! one `Event` (`tensorflow/core/util/event.proto`), of which this writes four fields:
//!
//! ```text
//! record: length u64 | masked crc32c(length) u32 | event | masked crc32c(event) u32   little endian
//! Event:  1 wall_time double | 2 step int64 | 3 file_version string | 5 summary { 1 value* }
//! value:  1 tag string | 2 simple_value float
//! ```

use std::fs::File;
use std::io::{BufWriter, ErrorKind as Io, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::{Error, Result};

/// Writes scalars to an event file that TensorBoard shows.
///
/// Event files are appended to: TensorBoard reads them while they are written and ignores a last
/// record that is incomplete. Records are buffered until [`flush`](Self::flush) or the drop.
#[derive(Debug)]
pub struct EventWriter {
    file: BufWriter<File>,
    path: PathBuf,
}

impl EventWriter {
    /// Creates an event file in `folder`, which is created if it is missing. The file's name is
    /// `events.out.tfevents.<unix seconds>.<host>`, with a number appended if it exists.
    ///
    /// # Errors
    /// [`ErrorKind::Io`](crate::ErrorKind::Io): the folder or the file cannot be created or written.
    pub fn create(folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref();
        std::fs::create_dir_all(folder).map_err(|e| Error::io("create the folder", folder, e))?;
        let now = unix_time();
        let name = format!("events.out.tfevents.{:010}.{}", now.as_secs(), host_name());
        let mut path = folder.join(&name);
        let mut taken = 0;
        let file = loop {
            match File::create_new(&path) {
                Err(e) if e.kind() == Io::AlreadyExists => {
                    taken += 1;
                    path = folder.join(format!("{name}.{taken}"));
                }
                file => break file.map_err(|e| Error::io("create the event file", &path, e))?,
            }
        };
        let mut writer = EventWriter { file: BufWriter::new(file), path };
        writer.write(&version_event(now.as_secs_f64()))?;
        writer.flush()?;
        Ok(writer)
    }

    /// The event file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Adds one point to the curve `tag`. Values that are not finite are written too: TensorBoard marks them, and
    /// they show where a run diverged.
    ///
    /// # Errors
    /// [`ErrorKind::Io`](crate::ErrorKind::Io): the write failed.
    pub fn scalar(&mut self, step: u64, tag: &str, value: f32) -> Result<()> {
        self.write(&scalar_event(unix_time().as_secs_f64(), step, tag, value))
    }

    /// Writes all buffered records to the file, so that a running TensorBoard can read them.
    ///
    /// # Errors
    /// [`ErrorKind::Io`](crate::ErrorKind::Io): the write failed.
    pub fn flush(&mut self) -> Result<()> {
        self.file.flush().map_err(|e| Error::io("write the event file", &self.path, e))
    }

    fn write(&mut self, event: &[u8]) -> Result<()> {
        self.file
            .write_all(&record(event))
            .map_err(|e| Error::io("write the event file", &self.path, e))
    }
}

fn unix_time() -> Duration {
    // The time is before 1970 only if the clock is wrong; then the times of the curve are also wrong.
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// The name of this machine, usable in a file name.
fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname")
        .or_else(|_| std::fs::read_to_string("/etc/hostname"))
        .ok()
        .or_else(|| std::env::var("HOSTNAME").ok())
        .or_else(|| std::env::var("COMPUTERNAME").ok())
        .unwrap_or_default();
    let fit = |c: char| if c.is_ascii_alphanumeric() || "-_.".contains(c) { c } else { '-' };
    let name: String = name.trim().chars().map(fit).collect();
    if name.is_empty() { "localhost".into() } else { name }
}

/// The first event of a file, with the version of the format.
fn version_event(wall_time: f64) -> Vec<u8> {
    let mut event = Vec::new();
    fixed64(&mut event, 1, wall_time);
    bytes(&mut event, 3, b"brain.Event:2");
    event
}

fn scalar_event(wall_time: f64, step: u64, tag: &str, value: f32) -> Vec<u8> {
    let mut point = Vec::new();
    bytes(&mut point, 1, tag.as_bytes());
    fixed32(&mut point, 2, value);
    let mut summary = Vec::new();
    bytes(&mut summary, 1, &point);
    let mut event = Vec::new();
    fixed64(&mut event, 1, wall_time);
    key(&mut event, 2, 0);
    varint(&mut event, step);
    bytes(&mut event, 5, &summary);
    event
}

/// Protobuf's field key: number and wire type (0 varint, 1 64 bits, 2 length and bytes, 5 32 bits).
fn key(out: &mut Vec<u8>, field: u64, wire_type: u64) {
    varint(out, field << 3 | wire_type);
}

/// Seven bits per byte, lowest first; the top bit means that more bytes follow.
fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn fixed64(out: &mut Vec<u8>, field: u64, value: f64) {
    key(out, field, 1);
    out.extend_from_slice(&value.to_le_bytes());
}

fn fixed32(out: &mut Vec<u8>, field: u64, value: f32) {
    key(out, field, 5);
    out.extend_from_slice(&value.to_le_bytes());
}

fn bytes(out: &mut Vec<u8>, field: u64, value: &[u8]) {
    key(out, field, 2);
    varint(out, value.len() as u64);
    out.extend_from_slice(value);
}

/// Frames an event as a TFRecord.
fn record(event: &[u8]) -> Vec<u8> {
    let length = (event.len() as u64).to_le_bytes();
    let mut record = length.to_vec();
    record.extend_from_slice(&masked_crc32c(&length).to_le_bytes());
    record.extend_from_slice(event);
    record.extend_from_slice(&masked_crc32c(event).to_le_bytes());
    record
}

/// Masked, because a checksum of data that contains its own checksum would be weak
/// (`tensorflow/core/lib/hash/crc32c.h`).
fn masked_crc32c(data: &[u8]) -> u32 {
    crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// CRC-32C (Castagnoli), RFC 3720 appendix B.4.
fn crc32c(data: &[u8]) -> u32 {
    !data.iter().fold(!0, |crc, &byte| CRC32C[usize::from(crc as u8 ^ byte)] ^ crc >> 8)
}

/// The remainder of every byte, bits reflected.
const CRC32C: [u32; 256] = {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        let mut remainder = byte as u32;
        let mut bit = 0;
        while bit < 8 {
            let carry = if remainder & 1 == 1 { 0x82f6_3b78 } else { 0 };
            remainder = remainder >> 1 ^ carry;
            bit += 1;
        }
        table[byte] = remainder;
        byte += 1;
    }
    table
};

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn checksums_are_those_of_rfc_3720() {
        assert_eq!(crc32c(b""), 0);
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
    }

    #[test]
    fn varints_are_encoded_as_in_protobuf() {
        for (value, expected) in [
            (0, vec![0]),
            (127, vec![127]),
            (150, vec![0x96, 1]),
            (u64::MAX, [vec![0xff; 9], vec![1]].concat()),
        ] {
            let mut out = Vec::new();
            varint(&mut out, value);
            assert_eq!(out, expected);
        }
    }

    #[test]
    fn files_are_equal_to_those_of_the_tensorboard_package() {
        // RecordWriter of tensorboard 2.21.0 with the same two events.
        let golden = "1800000000000000a37f4b220900001040fc54d9411a0d627261696e2e4576656e743a32338d\
            2fe92100000000000000017becf60900002040fc54d94110ac022a130a110a0a747261696e2f6c6f7373\
            150000203f4a45df00";
        let mut file = record(&version_event(1_700_000_000.25));
        file.extend(record(&scalar_event(1_700_000_000.5, 300, "train/loss", 0.625)));
        let hex: String = file.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, golden);
    }

    #[test]
    fn a_file_starts_with_its_version_and_has_an_unused_name() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("runs/1");
        let mut writers: Vec<EventWriter> =
            (0..3).map(|_| EventWriter::create(&folder).unwrap()).collect();
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 3);
        let start = std::fs::read(writers[0].path()).unwrap();
        assert!(start.windows(13).any(|window| window == b"brain.Event:2"));
        writers[0].scalar(1, "loss", 0.5).unwrap();
        writers[0].flush().unwrap();
        assert!(std::fs::read(writers[0].path()).unwrap().len() > start.len());
        let name = writers[0].path().file_name().unwrap().to_str().unwrap();
        assert!(name.starts_with("events.out.tfevents.") && !name.contains(char::is_whitespace));
    }

    proptest! {
        #[test]
        fn records_check_out(event in prop::collection::vec(any::<u8>(), 0..300)) {
            let record = record(&event);
            let (length, rest) = record.split_at(8);
            prop_assert_eq!(length, (event.len() as u64).to_le_bytes());
            prop_assert_eq!(&rest[..4], masked_crc32c(length).to_le_bytes());
            prop_assert_eq!(&rest[4..rest.len() - 4], event.as_slice());
            prop_assert_eq!(&rest[rest.len() - 4..], masked_crc32c(&event).to_le_bytes());
        }
    }
}
