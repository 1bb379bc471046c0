//! Repeated training steps: the computation of `llara finetune` between reading texts and logging.

use std::sync::Arc;

use llara::backend::{Backend, Cpu};
use llara::data::Batch;
use llara::dist::Solo;
use llara::model::{Dropout, LoraConfig};
use llara::train::{AdamW, AdamWConfig, Chunking, StepInput, accumulate_gradients};
use llara::{BiEncoderModel, Result};

/// A model, its optimizer, and the batch of every step.
pub(crate) struct Training {
    model: BiEncoderModel<Cpu>,
    optimizer: AdamW<Cpu>,
    query: Batch,
    passage: Batch,
    chunking: Chunking,
    steps: u64,
}

impl Training {
    /// A new optimizer with zero moments.
    pub(crate) fn new(
        mut model: BiEncoderModel<Cpu>,
        (query, passage): (Batch, Batch),
        chunking: Chunking,
    ) -> Result<Self> {
        let backend = model.backend().clone();
        let optimizer = AdamW::new(&backend, model.decoder_mut(), AdamWConfig::default())?;
        model.train();
        Ok(Training { model, optimizer, query, passage, chunking, steps: 0 })
    }

    /// Tokens of a step.
    pub(crate) fn tokens(&self) -> usize {
        self.query.tokens() + self.passage.tokens()
    }

    /// Forward, backward and update; returns the loss. The update is computed with a learning rate of 0, so that every
    /// step does the same work; otherwise the model would fit the batch and its gradients would become zero.
    pub(crate) fn step(&mut self) -> Result<f32> {
        let backend = self.model.backend().clone();
        let has_dropout = self.model.adapter().is_some_and(LoraConfig::has_dropout);
        let dropout = has_dropout.then_some(Dropout { seed: 42, step: self.steps });
        self.steps += 1;
        let input = StepInput::from_batches(&self.query, &self.passage, true, dropout)?;
        let objective = self.model.objective(Arc::new(Solo))?;
        let loss = accumulate_gradients(&mut self.model, &objective, &input, &self.chunking)?;
        self.optimizer.step(&backend, self.model.decoder_mut(), 0.0)?;
        Ok(backend.download(&loss)?[0])
    }
}
