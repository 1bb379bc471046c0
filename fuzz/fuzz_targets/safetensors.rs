//! The header of a safetensors file, and its tensors.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| llara::fuzzing::safetensors(data));
