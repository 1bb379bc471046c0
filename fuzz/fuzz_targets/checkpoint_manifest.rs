//! The manifest of a checkpoint.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| llara::fuzzing::checkpoint_manifest(data));
