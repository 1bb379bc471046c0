//! The settings of the training objective, and which of them can be combined.

use crate::backend::DistillationLoss;
use crate::{Error, ErrorKind, Result};

/// The terms of the training objective. The default is InfoNCE with in-batch negatives. `docs/objectives.md`
/// has the formulas.
#[derive(Debug, Clone, PartialEq)]
pub struct ObjectiveOptions {
    /// Whether the passages of other rows are negatives; otherwise a query is scored against its own group
    /// only.
    pub in_batch_negatives: bool,
    /// Passages that are left out of the denominator because they may answer the query.
    pub false_negatives: FalseNegatives,
    /// Adds the loss of each positive passage against all queries; both directions have weight 1/2.
    pub symmetric: bool,
    /// The loss on prefixes of the embeddings; empty: on whole embeddings.
    pub matryoshka: Vec<MatryoshkaPrefix>,
    /// Adds the distance to a teacher's scores.
    pub distillation: Option<Distillation>,
    /// Divides gradients by the number of processes where negatives are cross-device, as in the reference: it
    /// averages over processes the gradients of the whole loss by the rows of each. For comparisons with it; the
    /// default is the gradient of the loss.
    pub reference_gradient_scale: bool,
}

/// Which passages are left out of the denominator of a query. Its positive never is.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct FalseNegatives {
    /// Passages with the same token ids as a known positive: one of `pos` of the query's row, or the positive
    /// of another row of the batch with the same query.
    pub mask_equal: bool,
    /// Passages whose similarity, before the temperature, is larger than that of the positive by more than
    /// this.
    pub margin: Option<f32>,
}

/// A prefix of the embeddings that is trained as an embedding of its own.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MatryoshkaPrefix {
    /// Number of features.
    pub dimension: usize,
    /// Weight of its loss in the sum.
    pub weight: f32,
}

/// Distillation from a teacher that has scored the passages of each row.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Distillation {
    /// The distance to the teacher's scores.
    pub kind: DistillationKind,
    /// Factor on the distance; the weight of the other terms is 1.
    pub weight: f32,
    /// Divides the teacher's scores.
    pub temperature: f32,
}

/// The distance between the scores of a group of passages and those of a teacher.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DistillationKind {
    /// Kullback–Leibler divergence of the distributions over the group (Hinton et al. 2015).
    Kl,
    /// Squared error of the margins between positive and negatives (Hofstätter et al. 2020).
    MarginMse,
}

impl DistillationKind {
    /// The loss of scores that were divided by `temperature`: margins are those of similarities.
    pub(super) fn loss(self, temperature: f32) -> DistillationLoss {
        match self {
            DistillationKind::Kl => DistillationLoss::KlDivergence,
            DistillationKind::MarginMse => DistillationLoss::MarginMse { scale: temperature },
        }
    }
}

impl Default for ObjectiveOptions {
    fn default() -> Self {
        ObjectiveOptions {
            in_batch_negatives: true,
            false_negatives: FalseNegatives::default(),
            symmetric: false,
            matryoshka: Vec::new(),
            distillation: None,
            reference_gradient_scale: false,
        }
    }
}

/// What the options are combined with.
#[derive(Debug, Clone, Copy)]
pub struct ObjectiveContext {
    /// Features of an embedding.
    pub dimension: usize,
    /// Passages of a row.
    pub group_size: usize,
    /// Whether queries are scored against the passages of other processes.
    pub negatives_cross_device: bool,
}

/// A combination that is refused.
struct Refused {
    options: &'static str,
    why: &'static str,
    applies: fn(&ObjectiveOptions, &ObjectiveContext) -> bool,
}

/// All combinations that are refused; all others are possible. `docs/objectives.md` repeats this table.
const REFUSED: [Refused; 5] = [
    Refused {
        options: "--in-batch-negatives false with --negatives-cross-device",
        why: "a query is scored against its own group only, so other processes have no negatives for it",
        applies: |options, context| !options.in_batch_negatives && context.negatives_cross_device,
    },
    Refused {
        options: "--in-batch-negatives false with --symmetric",
        why: "a passage is scored by its own query only, so it has no other query to compare with",
        applies: |options, _| !options.in_batch_negatives && options.symmetric,
    },
    Refused {
        options: "--in-batch-negatives false with --train-group-size 1",
        why: "a group of one positive has no negatives",
        applies: |options, context| !options.in_batch_negatives && context.group_size == 1,
    },
    Refused {
        options: "--distill with --train-group-size 1",
        why: "a group of one positive has no scores to compare with the teacher's",
        applies: |options, context| options.distillation.is_some() && context.group_size == 1,
    },
    Refused {
        options: "--matryoshka-dims with a number above the dimension of the embeddings",
        why: "a prefix has at most as many features as the embedding",
        applies: |options, context| {
            options.matryoshka.iter().any(|prefix| prefix.dimension > context.dimension)
        },
    },
];

impl ObjectiveOptions {
    /// Checks every number, and the combination.
    ///
    /// # Errors
    /// [`ErrorKind::Argument`] with the option that is out of range, or the options that cannot be combined.
    pub fn check(&self, context: &ObjectiveContext) -> Result<()> {
        self.check_numbers()?;
        match REFUSED.iter().find(|refused| (refused.applies)(self, context)) {
            None => Ok(()),
            Some(Refused { options, why, .. }) => {
                let error = Error::new(ErrorKind::Argument, format!("{options} is not possible"))
                    .expected(format!("another combination: {why}"));
                let largest = self.matryoshka.iter().map(|prefix| prefix.dimension).max();
                Err(match largest.filter(|&dimension| dimension > context.dimension) {
                    Some(dimension) => error.got(format!(
                        "{dimension}; embeddings have {} features",
                        context.dimension
                    )),
                    None => error,
                })
            }
        }
    }

    fn check_numbers(&self) -> Result<()> {
        let wrong = |what: &str, expected: &str, got: f32| {
            Err(Error::new(ErrorKind::Argument, what).expected(expected).got(got))
        };
        let positive = |x: f32| x.is_finite() && x > 0.0;
        if let Some(margin) = self.false_negatives.margin.filter(|margin| !margin.is_finite()) {
            return wrong(
                "the margin of --mask-false-negatives is not finite",
                "such as 0.1",
                margin,
            );
        }
        let mut last = 0;
        for &MatryoshkaPrefix { dimension, weight } in &self.matryoshka {
            if dimension <= last {
                return Err(Error::new(
                    ErrorKind::Argument,
                    "the numbers of --matryoshka-dims are not in order",
                )
                .expected("positive numbers, each once, ascending, such as 64,128,256")
                .got(format!("{dimension} after {last}")));
            }
            if !positive(weight) {
                return wrong(
                    "a weight of --matryoshka-weights is out of range",
                    "above 0",
                    weight,
                );
            }
            last = dimension;
        }
        if let Some(Distillation { weight, temperature, .. }) = self.distillation {
            if !positive(weight) {
                return wrong("--distill-weight is out of range", "above 0, such as 1", weight);
            }
            if !positive(temperature) {
                return wrong("--distill-temperature is out of range", "above 0", temperature);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONTEXT: ObjectiveContext =
        ObjectiveContext { dimension: 64, group_size: 4, negatives_cross_device: false };

    fn prefixes(dimensions: &[usize]) -> Vec<MatryoshkaPrefix> {
        dimensions.iter().map(|&dimension| MatryoshkaPrefix { dimension, weight: 1.0 }).collect()
    }

    fn everything() -> ObjectiveOptions {
        let kind = DistillationKind::Kl;
        ObjectiveOptions {
            in_batch_negatives: true,
            false_negatives: FalseNegatives { mask_equal: true, margin: Some(0.1) },
            symmetric: true,
            matryoshka: prefixes(&[16, 64]),
            distillation: Some(Distillation { kind, weight: 1.0, temperature: 1.0 }),
            reference_gradient_scale: true,
        }
    }

    #[test]
    fn options_combine_unless_the_table_refuses_them() {
        let cross = ObjectiveContext { negatives_cross_device: true, ..CONTEXT };
        let single = ObjectiveContext { group_size: 1, ..CONTEXT };
        let own_group = ObjectiveOptions { in_batch_negatives: false, ..Default::default() };
        let all_but_symmetric = ObjectiveOptions { symmetric: false, ..everything() };
        let own_group_and_all = ObjectiveOptions { in_batch_negatives: false, ..all_but_symmetric };
        let undistilled = ObjectiveOptions { distillation: None, ..everything() };
        for (options, context) in [
            (&ObjectiveOptions::default(), &cross),
            (&everything(), &CONTEXT),
            (&everything(), &cross),
            (&undistilled, &single),
            (&own_group_and_all, &CONTEXT),
        ] {
            options.check(context).unwrap();
        }
        let symmetric = ObjectiveOptions { symmetric: true, ..own_group.clone() };
        let distilled =
            ObjectiveOptions { distillation: everything().distillation, ..Default::default() };
        let long = ObjectiveOptions { matryoshka: prefixes(&[64, 65]), ..Default::default() };
        let refused = [
            (&own_group, &cross),
            (&symmetric, &CONTEXT),
            (&own_group, &single),
            (&distilled, &single),
            (&long, &CONTEXT),
        ];
        for (row, (options, context)) in REFUSED.iter().zip(refused) {
            let error = options.check(context).unwrap_err().to_string();
            assert!(error.contains(row.options) && error.contains(row.why), "{error}");
        }
    }

    #[test]
    fn numbers_out_of_range_are_refused() {
        let with_margin = |margin| ObjectiveOptions {
            false_negatives: FalseNegatives { mask_equal: false, margin: Some(margin) },
            ..Default::default()
        };
        let with_distillation = |weight, temperature| {
            let kind = DistillationKind::MarginMse;
            let distillation = Some(Distillation { kind, weight, temperature });
            ObjectiveOptions { distillation, ..Default::default() }
        };
        let with_prefixes = |matryoshka| ObjectiveOptions { matryoshka, ..Default::default() };
        let weightless = vec![MatryoshkaPrefix { dimension: 8, weight: 0.0 }];
        with_margin(-0.05).check(&CONTEXT).unwrap();
        for (options, part) in [
            (with_margin(f32::NAN), "margin"),
            (with_prefixes(prefixes(&[0])), "ascending"),
            (with_prefixes(prefixes(&[32, 32])), "32 after 32"),
            (with_prefixes(prefixes(&[32, 16])), "16 after 32"),
            (with_prefixes(weightless), "--matryoshka-weights"),
            (with_distillation(0.0, 1.0), "--distill-weight"),
            (with_distillation(1.0, f32::INFINITY), "--distill-temperature"),
        ] {
            let error = options.check(&CONTEXT).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
    }
}
