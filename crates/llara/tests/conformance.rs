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
            assert_eq!(one.bits, many.bits, "{}: different bits on {threads} threads", one.name);
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

/// Runs the suite with every other set of vector instructions that this processor has.
#[test]
fn on_every_vector_unit() -> Tested {
    use llara::backend::gemm::Unit;
    if std::env::var_os("LLARA_CPU").is_some() {
        return Ok(());
    }
    for unit in Unit::ALL.into_iter().filter(|unit| unit.is_available()) {
        let run = std::process::Command::new(std::env::current_exe()?)
            .env("LLARA_CPU", unit.name())
            .output()?;
        let output = String::from_utf8_lossy(&run.stdout);
        assert!(run.status.success(), "LLARA_CPU={}:\n{output}", unit.name());
        assert!(!output.contains(" 0 passed"), "LLARA_CPU={}:\n{output}", unit.name());
    }
    Ok(())
}

/// With an invalid selection, the first allocation fails.
#[test]
fn an_unknown_vector_unit_is_an_error() -> Tested {
    if std::env::var("LLARA_CPU").is_ok_and(|unit| unit == "abacus") {
        let error = Cpu::check_environment().expect_err("no such unit").to_string();
        assert!(error.contains("LLARA_CPU") && error.contains("portable"), "{error}");
        let error = conformance::products(&Cpu::new()).expect_err("no such unit").to_string();
        assert!(error.contains("LLARA_CPU"), "{error}");
        return Ok(());
    }
    let run = std::process::Command::new(std::env::current_exe()?)
        .args(["--exact", "an_unknown_vector_unit_is_an_error"])
        .env("LLARA_CPU", "abacus")
        .output()?;
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stdout));
    assert!(String::from_utf8_lossy(&run.stdout).contains("1 passed"));
    Ok(())
}
