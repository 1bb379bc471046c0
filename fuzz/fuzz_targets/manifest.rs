//! The manifest of an interrupted run.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| llara::fuzzing::manifest(data));
