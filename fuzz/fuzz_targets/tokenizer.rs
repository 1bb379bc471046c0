//! `tokenizer.json`.
//!
//! llara catches panics of the tokenizers crate and turns them into errors. libFuzzer's panic hook
//! would abort before that, so it is replaced; a panic that leaves llara still ends the run.

#![no_main]

libfuzzer_sys::fuzz_target!(
    init: std::panic::set_hook(Box::new(|_| ())),
    |data: &[u8]| llara::fuzzing::tokenizer(data)
);
