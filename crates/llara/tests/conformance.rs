//! The CPU backend passes the conformance suite, with the same bits on any number of threads.

use std::error::Error;

use llara::Result;
use llara::backend::Cpu;
use llara::backend::conformance::{self, Case};

type Tested = std::result::Result<(), Box<dyn Error>>;

fn conforms(family: fn(&Cpu) -> Result<Vec<Case>>) -> Tested {
    let mut of_one_thread: Option<Vec<Case>> = None;
    for threads in [1, 2, 3] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
        let cases = pool.install(|| family(&Cpu::new()))?;
        let failed: Vec<String> =
            cases.iter().filter(|case| !case.passed()).map(Case::to_string).collect();
        assert!(failed.is_empty(), "{threads} threads:\n{}", failed.join("\n"));
        assert!(!cases.is_empty() && cases.iter().all(|case| case.checks > 0));
        for (one, many) in of_one_thread.iter().flatten().zip(&cases) {
            assert_eq!(one.bits, many.bits, "{}: other bits on {threads} threads", one.name);
        }
        of_one_thread.get_or_insert(cases);
    }
    Ok(())
}

#[test]
fn products() -> Tested {
    conforms(conformance::products)
}

#[test]
fn rows() -> Tested {
    conforms(conformance::rows)
}

#[test]
fn norms() -> Tested {
    conforms(conformance::norms)
}

#[test]
fn attention() -> Tested {
    conforms(conformance::attention)
}

#[test]
fn pointwise() -> Tested {
    conforms(conformance::pointwise)
}

#[test]
fn objective() -> Tested {
    conforms(conformance::objective)
}

#[test]
fn mixed() -> Tested {
    conforms(conformance::mixed)
}
