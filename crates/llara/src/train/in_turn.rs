//! The parts of several processes, computed by one.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Map, Value};

use super::config::TrainConfig;
use super::finetuning::Finetuning;
use super::step::Chunking;
use super::step_input::StepInput;
use super::task::{Task, TaskInput};
use crate::backend::{Backend, Dtype, Shape};
use crate::biencoder::BiEncoderModel;
use crate::data::{Dataset, Draw};
use crate::dist::{Collective, ThreadGroup};
use crate::model::GradientsReady;
use crate::{Error, ErrorKind, Result};

/// Fine-tuning as several processes with negatives of their own do it, in one process that computes their parts one
/// after the other. It needs no communication, so it is what runs on several processes are compared with.
pub struct FinetuningInTurn<'r, B: Backend> {
    parts: Vec<Finetuning<'r, B>>,
}

impl<'r, B: Backend> FinetuningInTurn<'r, B> {
    /// The task of `processes` processes, each with the batch size of `config`.
    ///
    /// # Errors
    /// As for [`Finetuning::new`], and for a model whose queries are scored against the passages of all processes.
    pub fn new(
        model: &mut BiEncoderModel<B>,
        dataset: &'r Dataset,
        config: &'r TrainConfig,
        processes: usize,
    ) -> Result<Self> {
        if processes == 0 || model.options().negatives_cross_device {
            return Err(Error::new(ErrorKind::Argument, "this cannot be computed part by part")
                .expected("1 process or more, each with negatives of its own")
                .got(format!("{processes} processes, or negatives of all processes")));
        }
        // Ranks for their numbers: with negatives of their own, no part calls an operation of the group.
        let ranks = ThreadGroup::ranks(processes, model.backend(), Duration::ZERO);
        let mut part = |collective: Arc<dyn Collective<B>>| {
            Finetuning::new(model, dataset, config, &collective)
        };
        let parts = ranks.into_iter().map(|rank| part(Arc::new(rank))).collect::<Result<_>>()?;
        Ok(FinetuningInTurn { parts })
    }
}

/// The inputs of all parts of a step.
pub struct InputsInTurn {
    parts: Vec<StepInput>,
    /// The rows of all parts.
    rows: Vec<Draw>,
}

impl<B: Backend> Task<B> for FinetuningInTurn<'_, B> {
    type Input = InputsInTurn;

    const TERMS: &'static [&'static str] = &[];

    fn dataset(&self) -> &Dataset {
        self.parts[0].dataset()
    }

    fn steps_per_epoch(&self) -> u64 {
        self.parts[0].steps_per_epoch()
    }

    fn settings(&self, model: &BiEncoderModel<B>) -> Map<String, Value> {
        let mut settings = self.parts[0].settings(model);
        settings.insert("parts in turn".into(), self.parts.len().into());
        settings
    }

    fn input(&self, step: u64) -> Result<InputsInTurn> {
        let parts: Vec<_> =
            self.parts.iter().map(|part| part.input(step)).collect::<Result<_>>()?;
        let rows = parts.iter().flat_map(|part| part.rows().iter().cloned()).collect();
        Ok(InputsInTurn { parts, rows })
    }

    fn accumulate_gradients(
        &self,
        model: &mut BiEncoderModel<B>,
        input: &InputsInTurn,
        chunking: &Chunking,
        _: &mut dyn GradientsReady<B>,
    ) -> Result<B::Tensor> {
        let backend = model.backend().clone();
        let mut total = backend.zeros(1, 1, Dtype::F32)?;
        for (rank, (part, input)) in self.parts.iter().zip(&input.parts).enumerate() {
            // Without rows, the gradients so far would be replaced by zeros.
            if input.rows().is_empty() {
                continue;
            }
            let loss = part.accumulate_gradients(model, input, chunking, &mut ())?;
            assert_eq!(loss.cols(), 1, "fine-tuning has one loss");
            backend.add_scaled(loss.view(), input.loss_weight(rank) as f32, total.view_mut())?;
        }
        Ok(total)
    }
}

impl TaskInput for InputsInTurn {
    fn rows(&self) -> &[Draw] {
        &self.rows
    }

    fn tokens(&self) -> u64 {
        self.parts.iter().map(TaskInput::tokens).sum()
    }

    fn loss_weight(&self, _: usize) -> f64 {
        1.0
    }
}
