//! `trainer_state.json` of a checkpoint.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| llara::fuzzing::trainer_state(data));
