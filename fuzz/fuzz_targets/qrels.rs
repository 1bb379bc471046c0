//! Relevance judgments.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| llara::fuzzing::qrels(data));
