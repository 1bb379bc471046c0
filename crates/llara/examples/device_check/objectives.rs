//! Compares the losses that a run can be configured with, and pretraining, with those of the CPU.

use std::path::Path;
use std::sync::Arc;

use llara::backend::{Backend, Dtype};
use llara::dist::Solo;
use llara::loss::{
    Contrastive, Distillation, DistillationKind, FalseNegatives, MatryoshkaPrefix, ObjectiveOptions,
};
use llara::train::{
    Chunking, LossWeights, PretrainingInput, PretrainingLoss, SetObjective, TrainingSequence,
    accumulate_gradients, accumulate_pretraining_gradients,
};
use llara::{BiEncoderOptions, Loader, Result};
use rand::{RngExt, SeedableRng, rngs::ChaCha8Rng};

use super::Report;
use super::training::{Differentiated, Gradients, compare, step_input};

/// One sequence at a time, each encoded twice: GradCache.
const CHUNKS: Chunking = Chunking { max_sequences: 3, max_tokens: 100, kept_tokens: 0 };

pub(crate) fn check<B: Backend>(backend: &B, folder: &str, report: &mut Report) -> Result<()> {
    let distilled = |kind| {
        let distillation = Some(Distillation { kind, weight: 0.7, temperature: 0.8 });
        ObjectiveOptions { distillation, ..ObjectiveOptions::default() }
    };
    let prefix = |dimension| MatryoshkaPrefix { dimension, weight: 0.5 };
    let combined = ObjectiveOptions {
        symmetric: true,
        matryoshka: vec![prefix(16), prefix(24)],
        false_negatives: FalseNegatives { mask_equal: false, margin: Some(0.05) },
        ..ObjectiveOptions::default()
    };
    let own_group = ObjectiveOptions { in_batch_negatives: false, ..ObjectiveOptions::default() };
    for (name, options, chunking) in [
        ("in chunks", ObjectiveOptions::default(), CHUNKS),
        ("KL divergence", distilled(DistillationKind::Kl), Chunking::default()),
        ("margin MSE, in chunks", distilled(DistillationKind::MarginMse), CHUNKS),
        ("symmetric, prefixes, margin", combined, Chunking::default()),
        ("own group", own_group, Chunking::default()),
    ] {
        compare(backend, name, &Finetuning { folder, options, chunking }, report)?;
    }
    compare(backend, "pretraining", &Pretraining { folder }, report)
}

/// A step of fine-tuning.
struct Finetuning<'f> {
    folder: &'f str,
    options: ObjectiveOptions,
    chunking: Chunking,
}

impl Differentiated for Finetuning<'_> {
    fn gradients<B: Backend>(&self, backend: &B, precision: Dtype) -> Result<Gradients> {
        let loader = Loader::new(Path::new(self.folder))?;
        let mut model = loader.load(backend.clone(), BiEncoderOptions::default())?;
        model.set_precision(precision)?;
        model.train();
        let mut input = step_input(&model, 0, None)?;
        let scores = (0..input.passages.len()).map(|i| (i * 7 % 5) as f32 / 5.0);
        input.teacher_scores = Some(scores.collect());
        let objective = model.objective(Arc::new(Solo))?;
        let objective = Contrastive { options: self.options.clone(), ..objective };
        let loss = accumulate_gradients(&mut model, &objective, &input, &self.chunking)?;
        Gradients::of(&model, &loss)
    }
}

/// A step of pretraining: the language-model loss and both set losses, on random tokens.
struct Pretraining<'f> {
    folder: &'f str,
}

impl Differentiated for Pretraining<'_> {
    fn gradients<B: Backend>(&self, backend: &B, precision: Dtype) -> Result<Gradients> {
        const POOLED: usize = 8;
        let loader = Loader::new(Path::new(self.folder))?.language_model_head(true);
        let mut model = loader.load(backend.clone(), BiEncoderOptions::default())?;
        model.set_precision(precision)?;
        model.train();
        let vocabulary = model.decoder().config().vocab_size as u32;
        let mut generator = ChaCha8Rng::seed_from_u64(17);
        let mut sequence = |length: usize, objective| {
            let mut token = || generator.random_range(0..vocabulary);
            let ids = (0..length).map(|_| token()).collect();
            let mut targets: Vec<u32> = (0..9).map(|_| token()).collect();
            targets.sort_unstable();
            targets.dedup();
            let labels = match objective {
                SetObjective::AutoEncode => 3..length - POOLED,
                SetObjective::AutoRegress => 0..0,
            };
            TrainingSequence { ids, labels, objective, targets }
        };
        let rows: Vec<_> = [30, 21, 44]
            .map(|length| {
                vec![
                    sequence(length, SetObjective::AutoEncode),
                    sequence(length, SetObjective::AutoRegress),
                ]
            })
            .into();
        let input = PretrainingInput::new(&rows, POOLED, None)?;
        let loss = PretrainingLoss { weights: LossWeights::default(), collective: Arc::new(Solo) };
        let chunking = Chunking::default();
        let losses =
            accumulate_pretraining_gradients(&mut model, &loss, &input, &chunking, &mut ())?;
        Gradients::of(&model, &losses)
    }
}
