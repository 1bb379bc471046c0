//! LoRA adapters of a decoder: attaching, merging into the weights, and their names in PEFT.

use rand::{RngExt, SeedableRng, rngs::ChaCha8Rng};

use super::block::Block;
use super::decoder::Decoder;
use super::lora::{Lora, LoraConfig, PROJECTIONS};
use super::parameter::{NamedTensor, Parameter, ParameterValues, Values};
use super::trained_tokens::{TRAINED_TOKENS, TrainedTokens, check_gaps};
use crate::backend::{Backend, Dtype, PreparedWeight, Shape};
use crate::{Error, ErrorKind, Result};

/// Names of the two matrices of an adapter, appended to the name of its projection.
const NAMES: [&str; 2] = ["lora_A.weight", "lora_B.weight"];

/// Adapters that were removed from a decoder.
pub(crate) struct Detached<B: Backend> {
    /// One for each projection of the model.
    lora: Vec<Option<Lora<B>>>,
    tokens: Option<TrainedTokens<B>>,
}

impl LoraConfig {
    /// # Errors
    /// If a number is out of range or a target is not a projection of the decoder.
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
            return Err(invalid("the adapter targets match no projection")
                .expected(format!("some of {}", PROJECTIONS.join(", ")))
                .got(if unknown.is_empty() {
                    "no target".to_owned()
                } else {
                    unknown.join(", ")
                }));
        }
        if let Some(pair) = self.trained_tokens.windows(2).find(|pair| pair[0] >= pair[1]) {
            return Err(invalid("the ids of the trained tokens are not in order")
                .expected("ascending ids, each once")
                .got(format!("{} before {}", pair[0], pair[1])));
        }
        Ok(())
    }
}

impl<B: Backend> Decoder<B> {
    /// Freezes all weights and attaches an adapter to every projection that `config` names, and embeddings of
    /// the tokens that it trains. `values` returns A `[r, in]`, B `[out, r]` and, for the name
    /// [`TRAINED_TOKENS`], the embeddings `[tokens, d]`, for a name and shape.
    pub(crate) fn attach_adapters(
        &mut self,
        backend: &B,
        config: &LoraConfig,
        values: &mut Values<'_>,
    ) -> Result<()> {
        config.check()?;
        self.parameters_mut().for_each(Parameter::freeze);
        let tokens = match config.trained_tokens.as_slice() {
            [] => None,
            ids => {
                let table = self.embeddings().values().shape();
                Some(TrainedTokens::new(backend, ids, table, values)?)
            }
        };
        self.replace_trained_tokens(tokens);
        let mut module = 0;
        for linear in self.blocks_mut().flat_map(Block::linears_mut) {
            let input = linear.weight.values().cols();
            let names: Vec<String> = linear.weight.tensors().map(|t| t.name().to_owned()).collect();
            for (projection, weight) in linear.projections.iter_mut().zip(names) {
                let number = module;
                module += 1;
                if !config.target_modules.iter().any(|target| target == projection.name) {
                    continue;
                }
                let base = weight.strip_suffix("weight").unwrap_or(&weight);
                let output = projection.features.len();
                let mut matrix = |part: &str, shape: [usize; 2]| {
                    Parameter::stacked(backend, vec![(format!("{base}{part}"), shape)], values)
                };
                projection.lora = Some(Lora {
                    a: matrix(NAMES[0], [config.rank, input])?,
                    b: matrix(NAMES[1], [output, config.rank])?,
                    scale: config.scale(),
                    dropout: config.dropout,
                    module: number,
                });
            }
        }
        self.set_activations(backend, self.activations(), false)
    }

    /// Attaches new adapters, initialized as in PEFT: A uniform within `±1/√in`, B zero, so that they do not
    /// change the output before training. The same seed gives the same adapters. The embeddings of trained tokens
    /// are initially their rows of the table, or those with which the vocabulary would grow.
    pub(crate) fn attach_new_adapters(
        &mut self,
        backend: &B,
        config: &LoraConfig,
        seed: u64,
    ) -> Result<()> {
        let mut generator = ChaCha8Rng::seed_from_u64(seed);
        check_gaps(&config.trained_tokens, self.embeddings().values().rows())?;
        let mut embeddings = self.initial_embeddings(backend, &config.trained_tokens)?;
        self.attach_adapters(backend, config, &mut |name, shape| {
            let [rows, cols] = [shape[0], shape[1]];
            if name == TRAINED_TOKENS {
                return Ok(ParameterValues::F32(std::mem::take(&mut embeddings)));
            }
            if name.ends_with(NAMES[1]) {
                return Ok(ParameterValues::Zeros(Dtype::F32));
            }
            let bound = 1.0 / (cols as f32).sqrt();
            let draws = (0..rows * cols).map(|_| generator.random_range(-bound..bound));
            Ok(ParameterValues::F32(draws.collect()))
        })
    }

    /// Adds the product of every adapter to its weight, `W += scale · B · A`, writes trained token embeddings to
    /// the table, which grows if it has no rows for them, and removes the adapter. `exact`
    /// returns the unrounded f32 values of a weight that is stored as bf16; if it fails, nothing has changed.
    pub(crate) fn merge_adapters(
        &mut self,
        backend: &B,
        exact: &mut dyn FnMut(&NamedTensor<'_, B>) -> Result<Vec<f32>>,
    ) -> Result<()> {
        // Before the first weight is replaced, because any of these can fail.
        let mut unrounded = Vec::new();
        for linear in self.blocks_mut().flat_map(Block::linears_mut) {
            let has_adapter = linear.projections.iter().any(|p| p.lora.is_some());
            if has_adapter && linear.weight.values().dtype() == Dtype::Bf16 {
                let (rows, cols) = linear.weight.values().shape();
                let mut matrix = backend.zeros(rows, cols, Dtype::F32)?;
                for (tensor, p) in linear.weight.tensors().zip(&linear.projections) {
                    let to = matrix.view_mut().with_rows(p.features.clone());
                    backend.upload_into(&exact(&tensor)?, to)?;
                }
                unrounded.push(Some(matrix));
            } else {
                unrounded.push(None);
            }
        }
        let table = match (self.trained_tokens(), self.embeddings().tensors().next()) {
            (Some(tokens), Some(table)) => Some(tokens.merged_into(backend, exact(&table)?)?),
            _ => None,
        };
        if let Some(table) = table {
            self.replace_trained_tokens(None);
            let rows = table.len() / self.config().hidden_size;
            self.replace_vocabulary(backend, rows, &table, None)?;
        }
        let linears = self.blocks_mut().flat_map(Block::linears_mut);
        for (linear, unrounded) in linears.zip(unrounded) {
            let adapters: Vec<_> = linear
                .projections
                .iter_mut()
                .filter_map(|p| Some((p.features.clone(), p.lora.take()?)))
                .collect();
            if adapters.is_empty() {
                continue;
            }
            linear.weight.replace_values(backend, |values| {
                let mut values = unrounded.unwrap_or(values);
                for (features, Lora { a, b, scale, .. }) in adapters {
                    let mut part = backend.zeros(features.len(), values.cols(), Dtype::F32)?;
                    let rows = values.view().with_rows(features.clone());
                    backend.copy(rows, part.view_mut())?;
                    let (a, b) = (a.weight(), b.weight().values());
                    let sum = backend.linear_input_grad(b.view(), a.view(), scale, Some(part))?;
                    backend.copy(sum.view(), values.view_mut().with_rows(features))?;
                }
                Ok(values)
            })?;
        }
        Ok(())
    }

    /// Removes all adapters and returns them, for [`restore_adapters`](Decoder::restore_adapters).
    pub(crate) fn detach_adapters(&mut self) -> Detached<B> {
        let tokens = self.replace_trained_tokens(None);
        let linears = self.blocks_mut().flat_map(Block::linears_mut);
        let projections = linears.flat_map(|linear| &mut linear.projections);
        Detached { lora: projections.map(|p| p.lora.take()).collect(), tokens }
    }

    /// Attaches the given adapters in place of all current ones.
    pub(crate) fn restore_adapters(&mut self, adapters: Detached<B>) {
        self.replace_trained_tokens(adapters.tokens);
        let linears = self.blocks_mut().flat_map(Block::linears_mut);
        let projections = linears.flat_map(|linear| &mut linear.projections);
        projections.zip(adapters.lora).for_each(|(projection, adapter)| projection.lora = adapter);
    }

    /// The matrices of the adapters and the embeddings of trained tokens: the only trainable parameters if
    /// adapters are attached.
    pub fn adapter_tensors(&self) -> impl Iterator<Item = NamedTensor<'_, B>> {
        self.tensors().filter(|t| {
            t.name() == TRAINED_TOKENS || NAMES.iter().any(|name| t.name().ends_with(name))
        })
    }
}
