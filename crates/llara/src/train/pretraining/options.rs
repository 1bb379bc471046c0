//! The settings of pretraining besides those of every run.

use crate::text::StopWords;
use crate::{Error, ErrorKind, Result};

/// Settings of pretraining. The defaults are those of the reference.
#[derive(Debug, Clone, PartialEq)]
pub struct PretrainingOptions {
    /// Maximum number of tokens of a text with its prefix and both suffixes, and of a target text.
    pub cutoff_len: usize,
    /// Words that are left out of the targets.
    pub stop_words: Option<StopWords>,
    /// Factors of the terms of the loss.
    pub weights: LossWeights,
}

/// Factors of the terms of the loss.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LossWeights {
    /// Of the next tokens of the text.
    pub language_model: f32,
    /// Of the words of the text itself (EBAE).
    pub auto_encode: f32,
    /// Of the words of the following text (EBAR).
    pub auto_regress: f32,
}

impl Default for PretrainingOptions {
    fn default() -> Self {
        PretrainingOptions { cutoff_len: 512, stop_words: None, weights: LossWeights::default() }
    }
}

impl Default for LossWeights {
    fn default() -> Self {
        LossWeights { language_model: 1.0, auto_encode: 1.0, auto_regress: 1.0 }
    }
}

impl LossWeights {
    /// Checks that each is a finite number of 0 or more, and that one is positive.
    ///
    /// # Errors
    /// [`ErrorKind::Argument`] with the first one that is not.
    pub fn check(&self) -> Result<()> {
        let LossWeights { language_model, auto_encode, auto_regress } = *self;
        let weights = [
            ("language-model", language_model),
            ("auto-encode", auto_encode),
            ("auto-regress", auto_regress),
        ];
        for (name, weight) in weights {
            if !(weight.is_finite() && weight >= 0.0) {
                let what = format!("the weight of the {name} loss is out of range");
                return Err(Error::new(ErrorKind::Argument, what)
                    .expected("0 or a positive number")
                    .got(weight));
            }
        }
        match weights.iter().any(|&(_, weight)| weight > 0.0) {
            true => Ok(()),
            false => Err(Error::new(ErrorKind::Argument, "all weights of the loss are 0")
                .expected("a positive weight of at least one term")),
        }
    }
}
