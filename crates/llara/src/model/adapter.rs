//! Adapters of a whole decoder: attaching, merging into the weights, and their names in PEFT.

use rand::{RngExt, SeedableRng, rngs::ChaCha8Rng};

use super::decoder::{Decoder, Values};
use super::lora::{Lora, LoraConfig, PROJECTIONS};
use super::parameter::Parameter;
use crate::backend::{Backend, Dtype, Shape};
use crate::{Error, ErrorKind, Result};

/// Names of the two matrices of an adapter, after the name of its projection.
const NAMES: [&str; 2] = ["lora_A.weight", "lora_B.weight"];

impl LoraConfig {
    /// # Errors
    /// When a number is out of its range or a target is not a projection of the decoder.
    pub fn check(&self) -> Result<()> {
        let invalid = |what: &str| Error::new(ErrorKind::Argument, what);
        if self.rank == 0 {
            return Err(invalid("the adapter's rank is 0").expected("1 or more, such as 64"));
        }
        if !(self.alpha.is_finite() && self.alpha > 0.0) {
            return Err(invalid("the adapter's alpha is out of range")
                .expected("a positive number, such as 16")
                .got(self.alpha));
        }
        if !(0.0..1.0).contains(&self.dropout) {
            return Err(invalid("the adapter's dropout is out of range")
                .expected("at least 0 and below 1")
                .got(self.dropout));
        }
        let known = |target: &&String| PROJECTIONS.contains(&target.as_str());
        let unknown: Vec<_> = self.target_modules.iter().filter(|t| !known(t)).cloned().collect();
        if self.target_modules.is_empty() || !unknown.is_empty() {
            return Err(invalid("adapter targets that match nothing")
                .expected(format!("some of {}", PROJECTIONS.join(", ")))
                .got(if unknown.is_empty() {
                    "no target".to_owned()
                } else {
                    unknown.join(", ")
                }));
        }
        Ok(())
    }
}

impl<B: Backend> Decoder<B> {
    /// Freezes all weights and puts an adapter on every projection that `config` names, asking `value`
    /// for A `[r, in]` and B `[out, r]` by name and shape.
    pub(crate) fn attach_adapters(
        &mut self,
        config: &LoraConfig,
        value: &mut Values<'_, B>,
    ) -> Result<()> {
        config.check()?;
        self.freeze();
        let projections = self.blocks_mut().flat_map(|block| block.projections_mut());
        for (module, (name, linear)) in (0..).zip(projections) {
            if !config.target_modules.iter().any(|target| target == name) {
                continue;
            }
            let weight = linear.weight.name();
            let base = weight.strip_suffix("weight").unwrap_or(weight).to_owned();
            let (output, input) = linear.weight.value().shape();
            let mut matrix = |part: &str, shape: [usize; 2]| {
                let name = format!("{base}{part}");
                let value = value(&name, &shape)?;
                Ok::<_, Error>(Parameter::new(name, &shape, value))
            };
            linear.lora = Some(Lora {
                a: matrix(NAMES[0], [config.rank, input])?,
                b: matrix(NAMES[1], [output, config.rank])?,
                scale: config.scale(),
                dropout: config.dropout,
                module,
            });
        }
        Ok(())
    }

    /// New adapters as PEFT begins them: A uniform within `±1/√in`, B zero, so that at first the model
    /// is unchanged. The same seed gives the same adapters.
    pub(crate) fn attach_new_adapters(
        &mut self,
        backend: &B,
        config: &LoraConfig,
        seed: u64,
    ) -> Result<()> {
        let mut generator = ChaCha8Rng::seed_from_u64(seed);
        self.attach_adapters(config, &mut |name, shape| {
            let [rows, cols] = [shape[0], shape[1]];
            if name.ends_with(NAMES[1]) {
                return backend.zeros(rows, cols);
            }
            let bound = 1.0 / (cols as f32).sqrt();
            let values: Vec<f32> =
                (0..rows * cols).map(|_| generator.random_range(-bound..bound)).collect();
            backend.upload(&values, rows, cols)
        })
    }

    /// Adds every adapter's product to its weight, `W += scale · B · A`, and removes it. `exact` gives
    /// a weight that is stored as bf16 as unrounded f32; when it fails, nothing has changed.
    pub(crate) fn merge_adapters(
        &mut self,
        backend: &B,
        exact: &mut dyn FnMut(&Parameter<B>) -> Result<B::Tensor>,
    ) -> Result<()> {
        // Before the first weight is replaced: any of these can be refused.
        let mut unrounded = Vec::new();
        for (_, linear) in self.blocks_mut().flat_map(|block| block.projections_mut()) {
            let rounded = linear.lora.is_some() && linear.weight.value().dtype() == Dtype::Bf16;
            unrounded.push(if rounded { Some(exact(&linear.weight)?) } else { None });
        }
        let projections = self.blocks_mut().flat_map(|block| block.projections_mut());
        for ((_, linear), unrounded) in projections.zip(unrounded) {
            let Some(lora) = linear.lora.take() else { continue };
            let mut b = backend.slice_rows(lora.b.value(), 0, lora.b.value().rows())?;
            backend.scale(&mut b, lora.scale)?;
            let weight = match unrounded {
                Some(weight) => weight,
                None => linear.weight.take_value(backend)?,
            };
            let merged = backend.linear_input_grad(&b, lora.a.value(), Some(weight))?;
            linear.weight.set_value(merged);
        }
        Ok(())
    }

    /// Takes all adapters off, to be [put back](Decoder::put_back_adapters).
    pub(crate) fn detach_adapters(&mut self) -> Vec<Option<Lora<B>>> {
        let projections = self.blocks_mut().flat_map(|block| block.projections_mut());
        projections.map(|(_, linear)| linear.lora.take()).collect()
    }

    /// Replaces all adapters.
    pub(crate) fn put_back_adapters(&mut self, adapters: Vec<Option<Lora<B>>>) {
        let projections = self.blocks_mut().flat_map(|block| block.projections_mut());
        projections.zip(adapters).for_each(|((_, linear), adapter)| linear.lora = adapter);
    }

    /// The adapters' matrices; all parameters that learn, where adapters are attached.
    pub fn adapter_parameters(&self) -> impl Iterator<Item = &Parameter<B>> {
        self.parameters().filter(|p| NAMES.iter().any(|name| p.name().ends_with(name)))
    }
}
