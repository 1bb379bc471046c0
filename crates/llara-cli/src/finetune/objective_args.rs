//! Options of `llara finetune` about the training objective: which scores are compared, and further terms.

use clap::ArgAction;
use clap::builder::BoolishValueParser;
use clap::builder::PossibleValuesParser;
use llara::loss::{
    Distillation, DistillationKind, FalseNegatives, MatryoshkaPrefix, ObjectiveOptions,
};
use llara::{Error, ErrorKind, Result};

#[derive(clap::Args)]
#[command(next_help_heading = "Objective")]
pub(super) struct ObjectiveArgs {
    /// Use the passages of the other rows of the batch as negatives; false: only those of the own row
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    #[arg(default_value = "true", action = ArgAction::Set)]
    #[arg(value_parser = BoolishValueParser::new(), hide_possible_values = true)]
    in_batch_negatives: bool,
    /// Passages that are not negatives of a query: equal (to a known positive of the query), margin:X (more
    /// similar than its positive, by more than X), or both: equal,margin:0.1 [default: none]
    #[arg(long, value_name = "RULES", value_delimiter = ',', value_parser = mask_rule)]
    mask_false_negatives: Vec<MaskRule>,
    /// Also score each positive against the queries of the batch (symmetric InfoNCE)
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    #[arg(default_value = "false", action = ArgAction::Set)]
    #[arg(value_parser = BoolishValueParser::new(), hide_possible_values = true)]
    symmetric: bool,
    /// Train the first N features of the embeddings as embeddings of their own, for each N, such as
    /// 64,128,256 (Matryoshka); give the whole dimension as well
    #[arg(long, value_name = "N", value_delimiter = ',', num_args = 1..)]
    matryoshka_dims: Vec<usize>,
    /// Weights of the losses of --matryoshka-dims [default: 1 for each]
    #[arg(long, value_name = "X", value_delimiter = ',', num_args = 1..)]
    matryoshka_weights: Vec<f32>,
    /// Learn from the `pos_scores` and `neg_scores` of the rows, which a teacher gave: kl (the distribution
    /// over the passages of a row) or margin-mse (the margins between positive and negatives)
    #[arg(long, value_name = "LOSS", value_parser = PossibleValuesParser::new(["kl", "margin-mse"]))]
    #[arg(hide_possible_values = true)]
    distill: Option<String>,
    /// Factor on the loss of --distill [default: 1]
    #[arg(long, value_name = "X")]
    distill_weight: Option<f32>,
    /// Divisor of the teacher's scores [default: 1]
    #[arg(long, value_name = "X")]
    distill_temperature: Option<f32>,
}

/// A rule of `--mask-false-negatives`.
#[derive(Debug, Clone, Copy, PartialEq)]
enum MaskRule {
    Nothing,
    Equal,
    Margin(f32),
}

fn mask_rule(text: &str) -> std::result::Result<MaskRule, String> {
    match (text, text.strip_prefix("margin:").map(str::parse)) {
        ("none", _) => Ok(MaskRule::Nothing),
        ("equal", _) => Ok(MaskRule::Equal),
        (_, Some(Ok(margin))) => Ok(MaskRule::Margin(margin)),
        _ => Err("expected equal, margin:X with a number such as margin:0.1, or none".into()),
    }
}

impl ObjectiveArgs {
    /// The settings of the objective. Their ranges are checked by the library.
    ///
    /// # Errors
    /// Options that need another one, or lists that differ in length.
    pub(super) fn objective(&self) -> Result<ObjectiveOptions> {
        let mut false_negatives = FalseNegatives::default();
        for rule in &self.mask_false_negatives {
            match *rule {
                MaskRule::Nothing => false_negatives = FalseNegatives::default(),
                MaskRule::Equal => false_negatives.mask_equal = true,
                MaskRule::Margin(margin) => false_negatives.margin = Some(margin),
            }
        }
        Ok(ObjectiveOptions {
            in_batch_negatives: self.in_batch_negatives,
            false_negatives,
            symmetric: self.symmetric,
            matryoshka: self.matryoshka()?,
            distillation: self.distillation()?,
            ..ObjectiveOptions::default()
        })
    }

    fn matryoshka(&self) -> Result<Vec<MatryoshkaPrefix>> {
        let (dims, weights) = (&self.matryoshka_dims, &self.matryoshka_weights);
        if !weights.is_empty() && weights.len() != dims.len() {
            return Err(Error::new(
                ErrorKind::Argument,
                "--matryoshka-weights and --matryoshka-dims differ in length",
            )
            .expected(format!("{} weights, one for each of --matryoshka-dims", dims.len()))
            .got(weights.len()));
        }
        let weights = weights.iter().copied().chain(std::iter::repeat(1.0));
        let prefix = |(&dimension, weight)| MatryoshkaPrefix { dimension, weight };
        Ok(dims.iter().zip(weights).map(prefix).collect())
    }

    fn distillation(&self) -> Result<Option<Distillation>> {
        let kind = match self.distill.as_deref() {
            Some("kl") => DistillationKind::Kl,
            Some(_) => DistillationKind::MarginMse,
            None => {
                for (option, value) in [
                    ("--distill-weight", self.distill_weight),
                    ("--distill-temperature", self.distill_temperature),
                ] {
                    if value.is_some() {
                        let what = format!("{option} has no effect without --distill");
                        return Err(Error::new(ErrorKind::Argument, what)
                            .hint("choose a loss: --distill kl or --distill margin-mse"));
                    }
                }
                return Ok(None);
            }
        };
        let weight = self.distill_weight.unwrap_or(1.0);
        let temperature = self.distill_temperature.unwrap_or(1.0);
        Ok(Some(Distillation { kind, weight, temperature }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    #[command(no_binary_name = true)]
    struct Only {
        #[command(flatten)]
        args: ObjectiveArgs,
    }

    fn parse(args: &[&str]) -> Result<ObjectiveOptions> {
        Only::try_parse_from(args).unwrap().args.objective()
    }

    #[test]
    fn the_default_is_info_nce_with_in_batch_negatives() {
        assert_eq!(parse(&[]).unwrap(), ObjectiveOptions::default());
        let none = parse(&["--mask-false-negatives", "equal,none"]).unwrap();
        assert_eq!(none, ObjectiveOptions::default());
    }

    #[test]
    fn all_options_are_parsed() {
        let args = "--in-batch-negatives false --mask-false-negatives equal,margin:-0.05 --symmetric \
                    --matryoshka-dims 8,16 --matryoshka-weights 2 0.5 --distill margin-mse \
                    --distill-weight 3 --distill-temperature 10";
        let args: Vec<&str> = args.split_whitespace().collect();
        let prefix = |dimension, weight| MatryoshkaPrefix { dimension, weight };
        let kind = DistillationKind::MarginMse;
        let expected = ObjectiveOptions {
            in_batch_negatives: false,
            false_negatives: FalseNegatives { mask_equal: true, margin: Some(-0.05) },
            symmetric: true,
            matryoshka: vec![prefix(8, 2.0), prefix(16, 0.5)],
            distillation: Some(Distillation { kind, weight: 3.0, temperature: 10.0 }),
            reference_gradient_scale: false,
        };
        assert_eq!(parse(&args).unwrap(), expected);
        let unweighted = parse(&["--matryoshka-dims", "8,16"]).unwrap();
        assert_eq!(unweighted.matryoshka, [prefix(8, 1.0), prefix(16, 1.0)]);
    }

    #[test]
    fn options_that_do_not_fit_are_refused() {
        for (args, part) in [
            (&["--matryoshka-weights", "1"][..], "differ in length"),
            (&["--matryoshka-dims", "8,16", "--matryoshka-weights", "1"], "2 weights"),
            (&["--distill-weight", "1"], "--distill-weight has no effect"),
            (&["--distill-temperature", "1"], "--distill kl"),
        ] {
            let error = parse(args).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
        for rule in ["equals", "margin:", "margin:x", "margin"] {
            assert!(mask_rule(rule).is_err(), "{rule}");
        }
    }
}
