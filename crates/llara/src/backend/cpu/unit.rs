//! Selection of the vector instructions. Only this file queries the features of the processor.
//!
//! [`Unit::selected`] is the best unit of this processor, or the one that the environment variable
//! `LLARA_CPU` names: `avx512bf16`, `avx512`, `avx2` or `portable`. Matrix products and all other
//! loops use it.

use std::sync::OnceLock;

use crate::{Error, ErrorKind, Result};

/// The environment variable that selects a [`Unit`].
pub(super) const VARIABLE: &str = "LLARA_CPU";

/// A set of vector instructions for which kernels are compiled, best first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// AVX-512 with products of bf16 pairs (`vdpbf16ps`).
    Avx512Bf16,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
    /// AVX2 and FMA.
    Avx2,
    /// Plain loops, compiled for the target's baseline.
    Portable,
}

impl Unit {
    /// All units, best first.
    pub const ALL: [Unit; 4] = [Unit::Avx512Bf16, Unit::Avx512, Unit::Avx2, Unit::Portable];

    /// The best unit of this processor.
    pub fn best() -> Unit {
        // The standard library caches the detected features.
        Self::ALL.into_iter().find(|unit| unit.is_available()).unwrap_or(Unit::Portable)
    }

    /// The unit that `LLARA_CPU` names, or else the best. Read once per process.
    ///
    /// # Errors
    /// If the variable names no unit, or one that this processor does not have.
    pub fn selected() -> Result<Unit> {
        match selection() {
            Ok(selection) => Ok(selection.unit),
            Err(rejected) => Err(rejected.error()),
        }
    }

    /// [`selected`](Unit::selected) for kernels, which cannot fail; the best unit if the variable is
    /// invalid, in which case no tensor can be allocated and no kernel runs.
    pub(super) fn active() -> Unit {
        match selection() {
            Ok(selection) => selection.unit,
            Err(_) => Unit::best(),
        }
    }

    /// Whether `LLARA_CPU` named the unit.
    pub(super) fn is_forced() -> bool {
        matches!(selection(), Ok(Selection { forced: true, .. }))
    }

    /// The value of `LLARA_CPU` that selects the unit.
    pub fn name(self) -> &'static str {
        match self {
            Unit::Avx512Bf16 => "avx512bf16",
            Unit::Avx512 => "avx512",
            Unit::Avx2 => "avx2",
            Unit::Portable => "portable",
        }
    }

    /// Whether this processor has the instructions.
    pub fn is_available(self) -> bool {
        // Miri does not support AVX-512; it is used to check the portable kernels.
        #[cfg(all(target_arch = "x86_64", not(miri)))]
        {
            use std::arch::is_x86_feature_detected as has;
            let avx512 =
                || has!("avx512f") && has!("avx512bw") && has!("avx512dq") && has!("avx512vl");
            match self {
                Unit::Avx512Bf16 => avx512() && has!("avx512bf16"),
                Unit::Avx512 => avx512(),
                Unit::Avx2 => has!("avx2") && has!("fma"),
                Unit::Portable => true,
            }
        }
        #[cfg(not(all(target_arch = "x86_64", not(miri))))]
        {
            self == Unit::Portable
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq)]
struct Selection {
    unit: Unit,
    forced: bool,
}

/// An invalid value of the variable.
#[derive(Debug, Clone, PartialEq)]
struct Rejected {
    value: String,
    /// The unit that it names, if any.
    unit: Option<Unit>,
}

impl Rejected {
    fn error(&self) -> Error {
        let what = match self.unit {
            Some(_) => format!("{VARIABLE} names vector instructions that this processor lacks"),
            None => format!("{VARIABLE} names no vector instructions"),
        };
        let names: Vec<&str> =
            Unit::ALL.into_iter().filter(|unit| unit.is_available()).map(Unit::name).collect();
        Error::new(ErrorKind::Argument, what)
            .expected(format!("one of {}", names.join(", ")))
            .got(format!("{:?}", self.value))
            .hint(format!("unset {VARIABLE} to use the best instructions of this processor"))
    }
}

fn selection() -> &'static Result<Selection, Rejected> {
    static SELECTION: OnceLock<Result<Selection, Rejected>> = OnceLock::new();
    SELECTION.get_or_init(|| {
        parse(std::env::var_os(VARIABLE).map(|value| value.to_string_lossy().into_owned()))
    })
}

fn parse(value: Option<String>) -> Result<Selection, Rejected> {
    match value {
        None => Ok(Selection { unit: Unit::best(), forced: false }),
        Some(value) if value.is_empty() => Ok(Selection { unit: Unit::best(), forced: false }),
        Some(value) => match Unit::ALL.into_iter().find(|unit| unit.name() == value) {
            Some(unit) if unit.is_available() => Ok(Selection { unit, forced: true }),
            unit => Err(Rejected { value, unit }),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_selects_its_unit() {
        for unit in Unit::ALL {
            let parsed = parse(Some(unit.name().to_owned()));
            if unit.is_available() {
                assert_eq!(parsed, Ok(Selection { unit, forced: true }));
            } else {
                let error = parsed.expect_err("not available").error().to_string();
                assert!(error.contains("lacks") && error.contains(unit.name()), "{error}");
            }
        }
        for none in [None, Some(String::new())] {
            assert_eq!(parse(none), Ok(Selection { unit: Unit::best(), forced: false }));
        }
        let error = parse(Some("sse\u{1b}[2J".to_owned())).expect_err("unknown").error();
        assert_eq!(error.kind(), ErrorKind::Argument);
        let text = error.to_string();
        assert!(text.contains("portable") && text.contains("\\u{1b}[2J"), "{text}");
    }
}
