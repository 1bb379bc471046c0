//! AdamW with clipping by the global norm.

use crate::backend::{AdamWStep, Backend, Dtype, Shape};
use crate::model::Decoder;
use crate::{Error, ErrorKind, Result};

/// Settings of AdamW that stay the same during a run. The defaults are PyTorch's with no decay.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWConfig {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// Decoupled weight decay, on every parameter but norms and biases ([`is_decayed`]).
    pub weight_decay: f64,
    /// Largest global norm of the gradients; `None`: not clipped.
    pub max_grad_norm: Option<f32>,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        AdamWConfig {
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.0,
            max_grad_norm: Some(1.0),
        }
    }
}

impl AdamWConfig {
    fn check(&self) -> Result<()> {
        let share = |x: f64| (0.0..1.0).contains(&x);
        let settings = [
            ("beta1", self.beta1, share(self.beta1), "at least 0 and below 1"),
            ("beta2", self.beta2, share(self.beta2), "at least 0 and below 1"),
            ("epsilon", self.epsilon, self.epsilon > 0.0 && self.epsilon < 1.0, "above 0, below 1"),
            (
                "the weight decay",
                self.weight_decay,
                self.weight_decay.is_finite() && self.weight_decay >= 0.0,
                "0 or a positive number",
            ),
        ];
        for (name, value, fits, expected) in settings {
            if !fits {
                return Err(Error::new(ErrorKind::Argument, format!("{name} is out of range"))
                    .expected(expected)
                    .got(value));
            }
        }
        match self.max_grad_norm {
            Some(norm) if !(norm.is_finite() && norm > 0.0) => {
                Err(Error::new(ErrorKind::Argument, "the largest gradient norm is out of range")
                    .expected("a positive number; 0 on the command line turns clipping off")
                    .got(norm))
            }
            _ => Ok(()),
        }
    }
}

/// Whether weight decay applies to a parameter of this name: to all but norms and biases, as in
/// `transformers.Trainer.get_decay_parameter_names` (names that contain `bias`, `layernorm` or
/// `rmsnorm`, or a part that is `norm` or ends in `_norm`).
pub fn is_decayed(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    let is_norm = |part: &str| part == "norm" || part.ends_with("_norm");
    !["bias", "layernorm", "rmsnorm"].iter().any(|word| name.contains(word))
        && !name.split('.').any(is_norm)
}

/// AdamW (Loshchilov and Hutter 2019): the moments of every trainable parameter and the step count.
pub struct AdamW<B: Backend> {
    config: AdamWConfig,
    steps: u64,
    /// First and second moments, in the order of the trainable parameters.
    moments: Vec<(B::Tensor, B::Tensor)>,
}

impl<B: Backend> AdamW<B> {
    /// Zero moments for every trainable parameter of `decoder`, and memory for the gradients.
    ///
    /// # Errors
    /// When a setting is out of its range, or the device has no memory left.
    pub fn new(backend: &B, decoder: &mut Decoder<B>, config: AdamWConfig) -> Result<Self> {
        config.check()?;
        decoder.parameters_mut().try_for_each(|parameter| parameter.reserve_grad(backend))?;
        let moments = decoder
            .trainable_parameters()
            .map(|parameter| {
                let (rows, cols) = parameter.values().shape();
                let zeros = || backend.zeros(rows, cols, Dtype::F32);
                Ok((zeros()?, zeros()?))
            })
            .collect::<Result<_>>()?;
        Ok(AdamW { config, steps: 0, moments })
    }

    /// One update from the gradients in `decoder`, which are then cleared.
    ///
    /// Returns `[norm, factor]` `[1, 2]` on the device: the global norm before clipping and what the
    /// gradients were multiplied by. When the norm is not finite the weights stay as they were.
    ///
    /// # Errors
    /// When a parameter has received no gradient.
    pub fn step(
        &mut self,
        backend: &B,
        decoder: &mut Decoder<B>,
        learning_rate: f64,
    ) -> Result<B::Tensor> {
        let mut sum = backend.zeros(1, 1, Dtype::F32)?;
        for parameter in decoder.trainable_parameters() {
            let grad = parameter.grad()?;
            backend.add_sum_of_squares(grad, 0..grad.rows() * grad.cols(), &mut sum)?;
        }
        let clip = backend.clip_factor(&sum, self.config.max_grad_norm)?;
        self.steps += 1;
        let update = AdamWStep {
            learning_rate,
            beta1: self.config.beta1,
            beta2: self.config.beta2,
            epsilon: self.config.epsilon,
            weight_decay: self.config.weight_decay,
            step: self.steps,
        };
        for (parameter, (first, second)) in
            decoder.trainable_parameters_mut().zip(&mut self.moments)
        {
            let weight_decay = if is_decayed(parameter.name()) { update.weight_decay } else { 0.0 };
            let update = AdamWStep { weight_decay, ..update };
            let (weight, grad) = parameter.weight_mut_and_grad()?;
            let all = 0..grad.rows() * grad.cols();
            backend.adamw(weight, all, grad, (first, second), &clip, &update)?;
        }
        decoder.clear_gradients();
        Ok(clip)
    }
}

#[cfg(test)]
mod tests {
    use super::is_decayed;

    #[test]
    fn norms_and_biases_are_not_decayed() {
        for name in [
            "layers.0.input_layernorm.weight",
            "layers.1.post_attention_layernorm.weight",
            "layers.0.self_attn.q_norm.weight",
            "layers.0.self_attn.k_norm.weight",
            "layers.0.self_attn.q_proj.bias",
            "norm.weight",
            "model.norm.weight",
        ] {
            assert!(!is_decayed(name), "{name}");
        }
        for name in [
            "embed_tokens.weight",
            "layers.0.self_attn.q_proj.weight",
            "layers.0.mlp.down_proj.weight",
            "layers.0.self_attn.q_proj.lora_A.weight",
        ] {
            assert!(is_decayed(name), "{name}");
        }
    }
}
