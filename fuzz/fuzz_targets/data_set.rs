//! Data set files in TOML.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| llara::fuzzing::data_set(data));
