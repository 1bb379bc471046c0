//! The decoder: embeddings, layers, final norm.

use super::attention::Attention;
use super::block::{Block, SavedBlock};
use super::config::DecoderConfig;
use super::gradients_ready::GradientsReady;
use super::head::Head;
use super::input::Input;
use super::linear::{Linear, Projection};
use super::lora::PROJECTIONS;
use super::mlp::Mlp;
use super::norm::{RmsNorm, SavedNorm};
use super::parameter::{NamedTensor, Parameter, ParameterValues, Values};
use super::pass::{Dropout, Pass};
use super::rope::Rope;
use super::trained_tokens::{TRAINED_TOKENS, TrainedTokens};
use crate::Result;
use crate::backend::{AttentionShape, Backend, CountingBackend, Cpu, Dtype, Shape};
use crate::data::BatchView;

/// A decoder: token ids in, hidden states out. For pretraining it has a language-model head too.
pub struct Decoder<B: Backend> {
    config: DecoderConfig,
    pub(super) embed_tokens: Parameter<B>,
    /// Tokens whose embeddings are not those of the table.
    trained_tokens: Option<TrainedTokens<B>>,
    blocks: Vec<Block<B>>,
    norm: RmsNorm<B>,
    /// Attached for pretraining only.
    pub(super) head: Option<Head<B>>,
    rope: Rope<B>,
    last_block_at_pooled_rows: bool,
    activations: Dtype,
}

/// The state that the backward pass of the decoder needs.
pub struct SavedDecoder<B: Backend> {
    blocks: Vec<SavedBlock<B>>,
    /// Last residual stream at the pooled rows, before the final norm. `[R, d]`
    pooled: B::Tensor,
    norm: SavedNorm<B>,
    /// The dropout state of the adapters, to recompute the same masks.
    dropout: Option<Dropout>,
}

impl<B: Backend> Decoder<B> {
    /// Builds the decoder that `config` describes. `values` returns the values of each tensor for its name and
    /// its shape in files. Names are those of the bare decoder, without the prefix `model.`.
    pub fn build(backend: &B, config: DecoderConfig, values: &mut Values<'_>) -> Result<Self> {
        let mut builder = Builder { backend, config: &config, values };
        let embed_tokens = builder.embed_tokens()?;
        let blocks = (0..config.num_hidden_layers)
            .map(|layer| builder.block(layer))
            .collect::<Result<_>>()?;
        let norm = builder.norm("norm", config.hidden_size)?;
        let rope = Rope::new(config.inverse_frequencies());
        let last_block_at_pooled_rows = true;
        let activations = Dtype::F32;
        Ok(Decoder {
            config,
            embed_tokens,
            trained_tokens: None,
            blocks,
            norm,
            head: None,
            rope,
            last_block_at_pooled_rows,
            activations,
        })
    }

    /// The configuration that the decoder was built from.
    pub fn config(&self) -> &DecoderConfig {
        &self.config
    }

    /// Last hidden states after the final norm, at the pooled rows of the input. `[R, d]`
    pub fn forward(
        &self,
        backend: &B,
        input: &Input<B>,
        dropout: Option<Dropout>,
    ) -> Result<B::Tensor> {
        Ok(self.run(backend, input, dropout, &mut drop)?.0)
    }

    /// [`forward`](Decoder::forward), also returning the state that [`backward`](Decoder::backward) needs.
    pub fn forward_saving(
        &self,
        backend: &B,
        input: &Input<B>,
        dropout: Option<Dropout>,
    ) -> Result<(B::Tensor, SavedDecoder<B>)> {
        let mut blocks = Vec::with_capacity(self.blocks.len());
        let (hidden, pooled, norm) =
            self.run(backend, input, dropout, &mut |saved| blocks.push(saved))?;
        Ok((hidden, SavedDecoder { blocks, pooled, norm, dropout }))
    }

    /// Returns the pooled rows after the final norm, the same before it, and the state of the norm.
    fn run(
        &self,
        backend: &B,
        input: &Input<B>,
        dropout: Option<Dropout>,
        keep: &mut dyn FnMut(SavedBlock<B>),
    ) -> Result<(B::Tensor, B::Tensor, SavedNorm<B>)> {
        let rope = self.rope.table(backend, input.all.layout.longest)?;
        let activations = self.activations;
        let branches = input.branches.as_ref();
        let pass = Pass { backend, rows: &input.all, branches, rope: &rope, activations, dropout };
        let pooled_pass = Pass { rows: &input.pooled, ..pass };
        let selected = input.selected(&pooled_pass);
        let mut x = self.embed(backend, input)?;
        for (layer, block) in self.blocks.iter().enumerate() {
            let selected = self.ends_at_pooled_rows(layer, input).then_some(&selected);
            let (y, saved) = block.forward(&pass, x, selected)?;
            keep(saved);
            x = y;
        }
        let pooled = match self.last_block_at_pooled_rows {
            true => x,
            false => backend.gather_rows(&x, &input.pooled_rows)?,
        };
        let (hidden, norm) = self.norm.forward(backend, pooled.view(), Dtype::F32)?;
        Ok((hidden, pooled, norm))
    }

    /// The embeddings of all tokens, f32. `[T, d]`
    pub(super) fn embed(&self, backend: &B, input: &Input<B>) -> Result<B::Tensor> {
        let table = self.embed_tokens.values();
        if let (Some(trained), Some(lookup)) = (&self.trained_tokens, &input.lookup) {
            return trained.embed(backend, table, lookup);
        }
        let x = backend.gather_rows(table, &input.ids)?;
        // A frozen table may be bf16; the residual stream is f32.
        if x.dtype() == Dtype::F32 { Ok(x) } else { backend.cast(&x, Dtype::F32) }
    }

    /// Accumulates the gradient of every trainable parameter, from the gradient with respect to the hidden states
    /// `[R, d]` that [`forward_saving`](Decoder::forward_saving) returned for the same input. `ready`
    /// receives the parameters of each layer when their gradients are complete.
    pub fn backward(
        &mut self,
        backend: &B,
        input: &Input<B>,
        dhidden: &B::Tensor,
        saved: SavedDecoder<B>,
        ready: &mut dyn GradientsReady<B>,
    ) -> Result<()> {
        let rope = self.rope.table(backend, input.all.layout.longest)?;
        let (activations, dropout) = (self.activations, saved.dropout);
        let branches = input.branches.as_ref();
        let pass = Pass { backend, rows: &input.all, branches, rope: &rope, activations, dropout };
        let pooled_pass = Pass { rows: &input.pooled, ..pass };
        let selected = input.selected(&pooled_pass);
        let mut dx = self.norm.backward(backend, dhidden, &saved.pooled, &saved.norm, None)?;
        ready.ready(&mut std::iter::once(&mut self.norm.weight))?;
        if !self.last_block_at_pooled_rows {
            let rows = input.all.layout.rows();
            let mut all = backend.zeros(rows, self.config.hidden_size, Dtype::F32)?;
            backend.scatter_add_rows(&dx, &input.pooled_scatter, &mut all)?;
            dx = all;
        }
        let embeddings_learn = self.embed_tokens.is_trainable() || self.trained_tokens.is_some();
        for (layer, saved) in saved.blocks.into_iter().enumerate().rev() {
            let selected = self.ends_at_pooled_rows(layer, input).then_some(&selected);
            let below_learns = layer > 0 || embeddings_learn;
            let below = self.blocks[layer].backward(&pass, dx, saved, selected, below_learns)?;
            ready.ready(&mut self.blocks[layer].parameters_mut())?;
            match below {
                Some(below) => dx = below,
                None => return Ok(()),
            }
        }
        if let Some(trained) = &mut self.trained_tokens {
            trained.backward(backend, &dx, input.lookup.as_ref())?;
            return ready.ready(&mut std::iter::once(&mut trained.rows));
        }
        if let (_, Some(dtable)) = self.embed_tokens.values_and_grad(backend)? {
            backend.scatter_add_rows(&dx, &input.ids_scatter, dtable)?;
        }
        ready.ready(&mut std::iter::once(&mut self.embed_tokens))
    }

    /// Whether the last layer is computed only at the pooled rows, except for keys and values. On by default.
    /// Only pooling reads its output, so this changes results by rounding errors at most.
    pub fn set_last_block_at_pooled_rows(&mut self, on: bool) {
        self.last_block_at_pooled_rows = on;
    }

    /// Sets the dtype of activations and their gradients (f32 by default), and prepares the weights for it. In
    /// bf16, products multiply bf16 and accumulate in f32; the residual stream, trainable parameters and the
    /// result stay f32. `round_frozen` stores every frozen matrix as bf16, which halves its memory and is exact
    /// if it was loaded from a bf16 file; trained token embeddings stay f32, as they are in training.
    pub(crate) fn set_activations(
        &mut self,
        backend: &B,
        dtype: Dtype,
        round_frozen: bool,
    ) -> Result<()> {
        self.activations = dtype;
        for parameter in self.parameters_mut() {
            let is_rounded = parameter.is_matrix() && parameter.name() != TRAINED_TOKENS;
            if round_frozen && !parameter.is_trainable() && is_rounded {
                parameter.round(backend)?;
            }
            parameter.prepare(backend, dtype)?;
        }
        Ok(())
    }

    /// The dtype of activations and their gradients.
    pub fn activations(&self) -> Dtype {
        self.activations
    }

    /// Makes all parameters not trainable, for a model that only encodes or trains adapters.
    pub fn freeze(&mut self, backend: &B) -> Result<()> {
        self.parameters_mut().for_each(Parameter::freeze);
        self.set_activations(backend, self.activations, false)
    }

    /// Whether a layer is computed only at the pooled rows. If these are all rows, there is nothing to select.
    fn ends_at_pooled_rows(&self, layer: usize, input: &Input<B>) -> bool {
        let some_rows = input.pooled.layout.rows() < input.all.layout.rows();
        self.last_block_at_pooled_rows && layer + 1 == self.blocks.len() && some_rows
    }

    pub(crate) fn blocks_mut(&mut self) -> impl Iterator<Item = &mut Block<B>> {
        self.blocks.iter_mut()
    }

    /// The trainable parameters, in the order of the model.
    pub fn trainable_parameters(&self) -> impl Iterator<Item = &Parameter<B>> {
        self.parameters().filter(|p| p.is_trainable())
    }

    /// The trainable parameters, mutable.
    pub(crate) fn trainable_parameters_mut(&mut self) -> impl Iterator<Item = &mut Parameter<B>> {
        self.parameters_mut().filter(|p| p.is_trainable())
    }

    /// All parameters, in the order of the model.
    pub fn parameters(&self) -> impl Iterator<Item = &Parameter<B>> {
        std::iter::once(&self.embed_tokens)
            .chain(self.trained_tokens.iter().map(|tokens| &tokens.rows))
            .chain(self.blocks.iter().flat_map(Block::parameters))
            .chain(std::iter::once(&self.norm.weight))
            .chain(self.head.iter().filter_map(Head::untied))
    }

    /// All parameters, mutable.
    pub fn parameters_mut(&mut self) -> impl Iterator<Item = &mut Parameter<B>> {
        std::iter::once(&mut self.embed_tokens)
            .chain(self.trained_tokens.iter_mut().map(|tokens| &mut tokens.rows))
            .chain(self.blocks.iter_mut().flat_map(Block::parameters_mut))
            .chain(std::iter::once(&mut self.norm.weight))
            .chain(self.head.iter_mut().filter_map(Head::untied_mut))
    }

    /// The tensors of the weight files, in the order of the model.
    pub fn tensors(&self) -> impl Iterator<Item = NamedTensor<'_, B>> {
        self.parameters().flat_map(Parameter::tensors)
    }

    /// Resets all gradients to zero.
    pub fn clear_gradients(&mut self) {
        self.parameters_mut().for_each(Parameter::clear_grad);
    }

    /// Sets all gradients to zero, for a process that has no sequence in a step.
    pub(crate) fn set_zero_gradients(&mut self, backend: &B) -> Result<()> {
        self.trainable_parameters_mut().try_for_each(|parameter| parameter.set_zero_grad(backend))
    }

    /// Frees the memory of all gradients.
    pub fn drop_gradients(&mut self) {
        self.parameters_mut().for_each(Parameter::drop_grad);
    }

    /// Replaces the token embeddings, and the weight of an untied head if `head` has its values, by matrices with
    /// more rows. `[vocab_size, d]`
    pub(crate) fn replace_vocabulary(
        &mut self,
        backend: &B,
        vocab_size: usize,
        table: &[f32],
        head: Option<&[f32]>,
    ) -> Result<()> {
        self.embed_tokens.grow(backend, vocab_size, table)?;
        if let (Some(values), Some(weight)) = (head, self.untied_head_mut()) {
            weight.grow(backend, vocab_size, values)?;
        }
        self.config.vocab_size = vocab_size;
        Ok(())
    }

    /// The weight of an untied head that is attached. `[vocab_size, d]`
    pub(crate) fn untied_head(&self) -> Option<&B::Tensor> {
        self.head.as_ref().and_then(Head::untied).map(Parameter::values)
    }

    fn untied_head_mut(&mut self) -> Option<&mut Parameter<B>> {
        self.head.as_mut().and_then(Head::untied_mut)
    }

    /// The token embeddings, without trained ones of single tokens. `[vocab_size, d]`
    pub(crate) fn embeddings(&self) -> &Parameter<B> {
        &self.embed_tokens
    }

    /// Tokens whose embeddings are not those of the table.
    pub(crate) fn trained_tokens(&self) -> Option<&TrainedTokens<B>> {
        self.trained_tokens.as_ref()
    }

    /// Replaces them; returns the earlier ones. The vocabulary then has all tokens with an embedding.
    pub(crate) fn replace_trained_tokens(
        &mut self,
        tokens: Option<TrainedTokens<B>>,
    ) -> Option<TrainedTokens<B>> {
        let last = tokens.as_ref().and_then(|tokens| tokens.ids().last().copied());
        let rows = self.embed_tokens.values().rows();
        self.config.vocab_size = last.map_or(rows, |last| rows.max(last as usize + 1));
        std::mem::replace(&mut self.trained_tokens, tokens)
    }

    /// A batch of this model's token ids on the device. [`forward`](Self::forward) returns the hidden states of the
    /// last `counts[s]` positions of each sequence (all, if it has fewer). `sequence_numbers` are the indices of the
    /// sequences in the whole step, on which dropout depends.
    ///
    /// # Errors
    /// If the device is out of memory.
    pub fn input(
        &self,
        backend: &B,
        batch: BatchView<'_>,
        counts: impl IntoIterator<Item = usize>,
        sequence_numbers: &[u32],
    ) -> Result<Input<B>> {
        let trained = self.trained_tokens.as_ref().map_or(&[][..], TrainedTokens::ids);
        Input::new(backend, batch, counts, sequence_numbers, trained)
    }
}

/// A parameter's name and its shape in files.
pub(crate) type NamedShape = (String, Vec<usize>);

impl DecoderConfig {
    /// The names and shapes in files of all parameters, in the order of the model.
    ///
    /// # Errors
    /// If no decoder can be built from the configuration.
    pub(crate) fn parameter_shapes(&self) -> Result<Vec<NamedShape>> {
        let mut shapes = Vec::new();
        let counting = CountingBackend::new(Cpu::new().memory());
        Decoder::build(&counting, self.clone(), &mut |name, shape| {
            shapes.push((name.to_owned(), shape.to_vec()));
            Ok(ParameterValues::Zeros(Dtype::F32))
        })?;
        Ok(shapes)
    }
}

/// Names and shapes as Hugging Face writes them.
pub(super) struct Builder<'a, 'v, B: Backend> {
    pub(super) backend: &'a B,
    pub(super) config: &'a DecoderConfig,
    pub(super) values: &'a mut Values<'v>,
}

impl<B: Backend> Builder<'_, '_, B> {
    pub(super) fn embed_tokens(&mut self) -> Result<Parameter<B>> {
        let shape = [self.config.vocab_size, self.config.hidden_size];
        Parameter::table(self.backend, "embed_tokens.weight".to_owned(), shape, self.values)
    }

    pub(super) fn norm(&mut self, name: &str, features: usize) -> Result<RmsNorm<B>> {
        let part = vec![(format!("{name}.weight"), features)];
        let weight = Parameter::vector(self.backend, part, self.values)?;
        Ok(RmsNorm { weight, eps: self.config.rms_norm_eps })
    }

    /// Projections of one input, such as `self_attn.q_proj` of 64 features.
    fn linear(
        &mut self,
        layer: usize,
        module: &str,
        (projections, input): (&[(&'static str, usize)], usize),
        bias: bool,
    ) -> Result<Linear<B>> {
        let base = |name: &str| format!("layers.{layer}.{module}.{name}");
        let matrix =
            |&(name, output): &(&str, usize)| (format!("{}.weight", base(name)), [output, input]);
        let vector = |&(name, output): &(&str, usize)| (format!("{}.bias", base(name)), output);
        let matrices = projections.iter().map(matrix).collect();
        let weight = Parameter::stacked(self.backend, matrices, self.values)?;
        let bias = match bias {
            true => {
                let vectors = projections.iter().map(vector).collect();
                Some(Parameter::vector(self.backend, vectors, self.values)?)
            }
            false => None,
        };
        let mut start = 0;
        let projections = projections.iter().map(|&(name, output)| {
            let features = start..start + output;
            start += output;
            Projection { name, features, lora: None }
        });
        Ok(Linear { weight, bias, projections: projections.collect() })
    }

    pub(super) fn block(&mut self, layer: usize) -> Result<Block<B>> {
        let c = self.config;
        let (d, inner) = (c.hidden_size, c.intermediate_size);
        let (q, kv) = (c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim);
        let at = |part: &str| format!("layers.{layer}.{part}");
        let head_norm = |builder: &mut Self, part: &str| {
            c.qk_norm.then(|| builder.norm(&at(part), c.head_dim)).transpose()
        };
        let [q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj] = PROJECTIONS;
        let qkv = ([(q_proj, q), (k_proj, kv), (v_proj, kv)], d);
        let gate_up = ([(gate_proj, inner), (up_proj, inner)], d);
        Ok(Block {
            input_norm: self.norm(&at("input_layernorm"), d)?,
            attention: Attention {
                qkv: self.linear(layer, "self_attn", (&qkv.0, qkv.1), c.qkv_bias)?,
                o: self.linear(layer, "self_attn", (&[(o_proj, d)], q), c.output_bias)?,
                q_norm: head_norm(self, "self_attn.q_norm")?,
                k_norm: head_norm(self, "self_attn.k_norm")?,
                shape: AttentionShape {
                    heads: c.num_attention_heads,
                    kv_heads: c.num_key_value_heads,
                    head_dim: c.head_dim,
                    window: c.windows[layer],
                    scale: (c.head_dim as f32).powf(-0.5),
                },
            },
            post_attention_norm: self.norm(&at("post_attention_layernorm"), d)?,
            mlp: Mlp {
                gate_up: self.linear(layer, "mlp", (&gate_up.0, gate_up.1), c.mlp_bias)?,
                down: self.linear(layer, "mlp", (&[(down_proj, d)], inner), c.mlp_bias)?,
            },
        })
    }
}
