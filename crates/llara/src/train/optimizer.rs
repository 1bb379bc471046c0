//! AdamW with clipping by the global gradient norm.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use super::flat_layout::{FlatLayout, ParameterSlice, bucket_elements};
use crate::backend::{AdamWStep, Backend, Dtype};
use crate::dist::{Collective, FlatPart, Solo};
use crate::model::Decoder;
use crate::{Error, ErrorKind, Result};

/// Settings of AdamW that stay the same during a run. The defaults are PyTorch's with no decay.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWConfig {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the square root of the second moment.
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
/// `rmsnorm`, or a component that is `norm` or ends in `_norm`).
pub fn is_decayed(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    let is_norm = |part: &str| part == "norm" || part.ends_with("_norm");
    !["bias", "layernorm", "rmsnorm"].iter().any(|word| name.contains(word))
        && !name.split('.').any(is_norm)
}

/// AdamW (Loshchilov and Hutter 2019): the step count, and the moments of the elements that this rank
/// owns. With one rank that is every trainable parameter.
pub struct AdamW<B: Backend> {
    config: AdamWConfig,
    steps: u64,
    layout: FlatLayout,
    owned: Vec<Owned<B>>,
}

/// The moments of a slice of a parameter, `[1, n]` for `n` elements.
pub(super) struct Owned<B: Backend> {
    pub(super) slice: ParameterSlice,
    pub(super) first: B::Tensor,
    pub(super) second: B::Tensor,
}

impl<B: Backend> AdamW<B> {
    /// Zero moments for every trainable parameter of `decoder`, and memory for the gradients.
    ///
    /// # Errors
    /// If a setting is out of range, or the device is out of memory.
    pub fn new(backend: &B, decoder: &mut Decoder<B>, config: AdamWConfig) -> Result<Self> {
        let layout = FlatLayout::of(decoder, 1, bucket_elements(1));
        Self::sharded(backend, decoder, config, layout, 0)
    }

    /// The optimizer of a rank: moments for the elements that it owns by `layout`, and memory for all gradients.
    ///
    /// # Errors
    /// As for [`new`](AdamW::new).
    pub fn sharded(
        backend: &B,
        decoder: &mut Decoder<B>,
        config: AdamWConfig,
        layout: FlatLayout,
        rank: usize,
    ) -> Result<Self> {
        config.check()?;
        decoder.parameters_mut().try_for_each(|parameter| parameter.reserve_grad(backend))?;
        let zeros = |slice: ParameterSlice| {
            let length = slice.elements.len();
            let (first, second) =
                (backend.zeros(1, length, Dtype::F32)?, backend.zeros(1, length, Dtype::F32)?);
            Ok(Owned { slice, first, second })
        };
        let slices = layout.owned(rank).into_iter().flat_map(|range| layout.slices(range));
        let owned = slices.map(zeros).collect::<Result<_>>()?;
        Ok(AdamW { config, steps: 0, layout, owned })
    }

    /// The layout of the parameters.
    pub fn layout(&self) -> &FlatLayout {
        &self.layout
    }

    /// Number of parameters' elements whose moments this rank has; each takes 8 bytes.
    pub fn elements(&self) -> usize {
        self.owned.iter().map(|owned| owned.slice.elements.len()).sum()
    }

    /// Number of updates so far.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Sets the number of updates, to resume a run.
    pub(super) fn set_steps(&mut self, steps: u64) {
        self.steps = steps;
    }

    /// The moments that this rank has, in the order of the flat layout.
    pub(super) fn owned(&self) -> &[Owned<B>] {
        &self.owned
    }

    /// The same, mutable, to restore them.
    pub(super) fn owned_mut(&mut self) -> &mut [Owned<B>] {
        &mut self.owned
    }

    /// One update from the gradients in `decoder`, which are then cleared.
    ///
    /// Returns `[norm, factor]` `[1, 2]` on the device: the global norm before clipping and the factor by which
    /// the gradients were multiplied. If the norm is not finite, the weights do not change.
    ///
    /// # Errors
    /// When a parameter has received no gradient.
    pub fn step(
        &mut self,
        backend: &B,
        decoder: &mut Decoder<B>,
        learning_rate: f64,
    ) -> Result<B::Tensor> {
        self.step_in_group(backend, decoder, learning_rate, &Solo)
    }

    /// [`step`](AdamW::step) of a process of a group. Each process has the sum of the gradients over all
    /// processes in the range that it owns; afterwards all have the updated weights.
    ///
    /// # Errors
    /// As for [`step`](AdamW::step), or when the group fails.
    pub fn step_in_group(
        &mut self,
        backend: &B,
        decoder: &mut Decoder<B>,
        learning_rate: f64,
        collective: &dyn Collective<B>,
    ) -> Result<B::Tensor> {
        for parameter in decoder.trainable_parameters() {
            parameter.grad()?;
        }
        let mut sum = backend.zeros(1, 1, Dtype::F32)?;
        for_each_owned(&mut self.owned, decoder.trainable_parameters(), |owned, parameter| {
            backend.add_sum_of_squares(parameter.grad()?, owned.slice.elements.clone(), &mut sum)
        })?;
        collective.all_reduce(&mut sum)?;
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
        for_each_owned(&mut self.owned, decoder.trainable_parameters_mut(), |owned, parameter| {
            let weight_decay = if is_decayed(parameter.name()) { update.weight_decay } else { 0.0 };
            let update = AdamWStep { weight_decay, ..update };
            let (weight, grad) = parameter.weight_mut_and_grad()?;
            let moments = (&mut owned.first, &mut owned.second);
            backend.adamw(weight, owned.slice.elements.clone(), grad, moments, &clip, &update)
        })?;
        decoder.clear_gradients();
        if collective.size() > 1 {
            self.all_gather_weights(backend, decoder, collective)?;
        }
        Ok(clip)
    }

    /// Replaces the weights that other ranks own by their updated values.
    fn all_gather_weights(
        &self,
        backend: &B,
        decoder: &mut Decoder<B>,
        collective: &dyn Collective<B>,
    ) -> Result<()> {
        let mut parameters: Vec<_> = decoder.trainable_parameters_mut().collect();
        // The parameters of the current bucket. Each is taken and prepared once, however many buckets it is in.
        let mut taken = BTreeMap::new();
        let mut gather = || {
            for bucket in self.layout.buckets() {
                let slices = self.layout.slices(bucket.range.clone());
                for slice in &slices {
                    if let Entry::Vacant(entry) = taken.entry(slice.parameter) {
                        entry.insert(parameters[slice.parameter].take_values(backend)?);
                    }
                }
                let part = |(tensor, slice): (_, &ParameterSlice)| FlatPart {
                    tensor,
                    elements: slice.elements.clone(),
                    start: slice.start,
                };
                // Both are in the order of the parameters.
                let mut parts: Vec<_> = taken.values_mut().zip(&slices).map(part).collect();
                collective.all_gather_weights(&bucket, &mut parts)?;
                // Buckets go from the last element to the first.
                for slice in slices.iter().filter(|slice| slice.elements.start == 0) {
                    if let Some(values) = taken.remove(&slice.parameter) {
                        parameters[slice.parameter].set_values(backend, values)?;
                    }
                }
            }
            Ok(())
        };
        let gathered = gather();
        // After an error, so that the model keeps its weights.
        for (number, values) in taken {
            parameters[number].set_values(backend, values)?;
        }
        gathered
    }
}

/// Calls `f` with each slice and its parameter. Both are in the order of the model.
fn for_each_owned<B: Backend, P>(
    owned: &mut [Owned<B>],
    parameters: impl Iterator<Item = P>,
    mut f: impl FnMut(&mut Owned<B>, &mut P) -> Result<()>,
) -> Result<()> {
    let mut owned = owned.iter_mut().peekable();
    for (number, mut parameter) in parameters.enumerate() {
        while let Some(slice) = owned.next_if(|owned| owned.slice.parameter == number) {
            f(slice, &mut parameter)?;
        }
    }
    Ok(())
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
