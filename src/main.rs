//! The `llara` program: parse, run, exit code.
fn main() {}
