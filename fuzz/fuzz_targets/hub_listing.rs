//! The Hub's list of a model's files.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| llara::fuzzing::hub_listing(data));
