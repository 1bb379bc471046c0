//! Differences between the results of two runs.

use std::fs::{self, File};
use std::io::{BufReader, Read};

use llara::{Error, ErrorKind, Result};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::case::{Case, Computation};
use super::process::{DESCRIPTION, GRADIENTS, Results, WEIGHTS};

/// A run that has ended, with its files.
pub(super) struct Finished {
    folder: TempDir,
    results: Results,
}

impl Finished {
    /// Reads the description of a run of so many processes.
    pub(super) fn read(folder: TempDir, processes: usize) -> Result<Self> {
        let path = folder.path().join(DESCRIPTION);
        let text = fs::read(&path).map_err(|e| {
            Error::io("read", &path, e).hint(
                "the first process of each run must be on a host that has this folder: see --work-dir",
            )
        })?;
        let results: Results = serde_json::from_slice(&text).map_err(|e| {
            Error::new(ErrorKind::Io, "the results of a run").file(&path).because(e)
        })?;
        if results.processes != processes {
            return Err(Error::new(
                ErrorKind::Distributed,
                "the launcher has started another number of processes",
            )
            .expected(processes)
            .got(results.processes)
            .hint("--launcher must pass the number {} on, and start one run"));
        }
        Ok(Finished { folder, results })
    }

    /// The number format of activations.
    pub(super) fn precision(&self) -> &str {
        &self.results.precision
    }

    fn open(&self, name: &str) -> Result<BufReader<File>> {
        let path = self.folder.path().join(name);
        let file = File::open(&path).map_err(|e| Error::io("open", &path, e))?;
        Ok(BufReader::with_capacity(1 << 20, file))
    }
}

/// The largest relative differences that rounding may cause.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bounds {
    first_loss: f64,
    gradients: f64,
    loss: f64,
    weights: f64,
}

/// How much more than one process with other chunks, several processes may differ after AdamW's updates.
const MORE_THAN_CHUNKS: f64 = 10.0;

impl Bounds {
    /// Those of a number format of activations.
    pub(super) fn of(precision: &str) -> Self {
        match precision {
            "bf16" => Bounds { first_loss: 1e-2, gradients: 5e-2, loss: 1e-2, weights: 1e-2 },
            _ => Bounds { first_loss: 1e-5, gradients: 1e-4, loss: 1e-5, weights: 1e-4 },
        }
    }

    /// These bounds, with what the rounding of one process in chunks, `control`, has become after updates: AdamW divides
    /// by the size of a gradient, so that a rounding error of a gradient near zero changes a weight as much as a large
    /// gradient. The loss of the first step and the gradients are not affected.
    pub(super) fn after_updates(self, control: &Differences) -> Self {
        Bounds {
            loss: self.loss.max(MORE_THAN_CHUNKS * control.loss),
            weights: self.weights.max(MORE_THAN_CHUNKS * control.weights.relative),
            ..self
        }
    }
}

/// Relative differences between two runs.
pub(super) struct Differences {
    /// Of the loss of the first step.
    first_loss: f64,
    /// The largest of the loss of a step.
    loss: f64,
    gradients: NormDifference,
    weights: NormDifference,
}

/// The norm of a difference of two lists of tensors, divided by the norm of the expected one.
struct NormDifference {
    relative: f64,
    /// The tensor that contributes most to it.
    largest: String,
}

impl Differences {
    /// The first line of the table.
    pub(super) const HEADER: &str = "                                                                loss  gradients    weights";

    /// Whether all are within the bounds.
    pub(super) fn are_within(&self, bounds: &Bounds) -> bool {
        // False for NaN.
        self.first_loss <= bounds.first_loss
            && self.loss <= bounds.loss
            && self.gradients.relative <= bounds.gradients
            && self.weights.relative <= bounds.weights
    }

    /// A line of the table.
    pub(super) fn line(&self, case: &Case, within: bool) -> String {
        let Differences { loss, gradients, weights, .. } = self;
        let text = format!(
            "  {:56}{loss:10.1e} {:10.1e} {:10.1e}",
            case.to_string(),
            gradients.relative,
            weights.relative
        );
        match within {
            true => text,
            false => format!("{text}  DIFFERENT, most in {}", gradients.largest),
        }
    }

    pub(super) fn json(&self, case: &Case, baseline: &Case, within: bool) -> Value {
        json!({
            "processes": case.processes,
            "negatives": case.negatives(),
            "divided_optimizer": case.sharded,
            "chunks_of_sequences": case.chunk,
            "compared_with": match baseline.computation {
                Computation::Run => "one process".to_owned(),
                Computation::InTurn(parts) => format!("one process, {parts} parts in turn"),
            },
            "first_loss": self.first_loss,
            "loss": self.loss,
            "gradients": self.gradients.relative,
            "weights": self.weights.relative,
            "largest_difference_of_gradients": self.gradients.largest,
            "equal": within,
        })
    }
}

/// Compares a run with the one that it should be equal to.
///
/// # Errors
/// Their files cannot be read, or they have not trained the same parameters for the same steps.
pub(super) fn compare(run: &Finished, expected: &Finished) -> Result<Differences> {
    let (got, want) = (&run.results, &expected.results);
    let shape = |results: &Results| {
        let Results { losses, precision, parameters, processes: _ } = results;
        (losses.len(), precision.clone(), parameters.clone())
    };
    if shape(got) != shape(want) {
        return Err(Error::new(ErrorKind::Distributed, "two runs cannot be compared")
            .expected("the same number of steps, number format and parameters")
            .got(format!(
                "{}, {} and {}, {}",
                got.losses.len(),
                got.precision,
                want.losses.len(),
                want.precision
            ))
            .hint("give --dtype f32 or bf16 instead of auto"));
    }
    let relative =
        |(got, want): (&f64, &f64)| (got - want).abs() / want.abs().max(f64::MIN_POSITIVE);
    let losses: Vec<f64> = got.losses.iter().zip(&want.losses).map(relative).collect();
    let first_loss = losses.first().copied().unwrap_or(f64::NAN);
    let loss = losses.into_iter().fold(0.0, larger);
    let norms = |name| norm_difference(&got.parameters, run.open(name)?, expected.open(name)?);
    let (gradients, weights) = (norms(GRADIENTS)?, norms(WEIGHTS)?);
    Ok(Differences { first_loss, loss, gradients, weights })
}

/// The larger of two numbers; NaN if one is.
fn larger(a: f64, b: f64) -> f64 {
    if a.is_nan() || a > b { a } else { b }
}

/// Compares two files of f32, parameter by parameter.
fn norm_difference(
    parameters: &[(String, usize)],
    mut got: impl Read,
    mut want: impl Read,
) -> Result<NormDifference> {
    let (mut difference, mut norm) = (0.0, 0.0);
    let mut largest = (-1.0, "");
    for (name, elements) in parameters {
        let mut of_tensor = 0.0;
        for _ in 0..*elements {
            let (a, b) = (next(&mut got)?, next(&mut want)?);
            of_tensor += (a - b) * (a - b);
            norm += b * b;
        }
        difference += of_tensor;
        if of_tensor > largest.0 {
            largest = (of_tensor, name);
        }
    }
    let relative = (difference / f64::max(norm, f64::MIN_POSITIVE)).sqrt();
    Ok(NormDifference { relative, largest: largest.1.to_owned() })
}

fn next(file: &mut impl Read) -> Result<f64> {
    let mut bytes = [0; 4];
    file.read_exact(&mut bytes)
        .map_err(|e| Error::new(ErrorKind::Io, "read the results of a run").because(e))?;
    Ok(f64::from(f32::from_le_bytes(bytes)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|value| value.to_le_bytes()).collect()
    }

    #[test]
    fn differences_are_relative_to_the_norm_of_all_parameters() {
        let parameters = [("a".to_owned(), 2), ("b".to_owned(), 1)];
        let of = |got: &[f32]| {
            norm_difference(&parameters, &file(got)[..], &file(&[3.0, 0.0, 4.0])[..]).unwrap()
        };
        assert_eq!(of(&[3.0, 0.0, 4.0]).relative, 0.0);
        let found = of(&[3.0, 0.3, 4.4]);
        assert!((found.relative - 0.1).abs() < 1e-7, "{}", found.relative);
        assert_eq!(found.largest, "b");
    }

    #[test]
    fn what_is_not_a_number_is_not_equal() {
        let nan = NormDifference { relative: f64::NAN, largest: String::new() };
        let zero = || NormDifference { relative: 0.0, largest: String::new() };
        let bounds = Bounds::of("f32");
        let of = |loss| Differences { first_loss: 0.0, loss, gradients: zero(), weights: zero() };
        let differences = of(0.0);
        assert!(differences.are_within(&bounds));
        assert!(!Differences { weights: nan, ..differences }.are_within(&bounds));
        let losses = [0.0, f64::NAN, 1.0].into_iter().fold(0.0, larger);
        assert!(!of(losses).are_within(&bounds));
        assert!(!Differences { first_loss: f64::NAN, ..of(0.0) }.are_within(&bounds));
        // A control that is not a number allows nothing more.
        assert!(!of(1e-4).are_within(&bounds.after_updates(&of(f64::NAN))));
        assert!(of(1e-4).are_within(&bounds.after_updates(&of(2e-5))));
    }

    #[test]
    fn a_short_file_is_an_error() {
        let parameters = [("a".to_owned(), 2)];
        assert!(norm_difference(&parameters, &file(&[1.0])[..], &file(&[1.0, 2.0])[..]).is_err());
    }
}
