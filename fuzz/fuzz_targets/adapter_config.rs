//! `adapter_config.json`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| llara::fuzzing::adapter_config(data));
