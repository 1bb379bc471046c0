//! Gradients and training runs of a model folder against those of the CPU.

use std::path::Path;
use std::sync::Arc;

use llara::backend::{Backend, Cpu, Dtype};
use llara::data::Batch;
use llara::dist::Solo;
use llara::model::{Dropout, LoraConfig};
use llara::train::{AdamW, AdamWConfig, Chunking, StepInput, accumulate_gradients};
use llara::{BiEncoderModel, BiEncoderOptions, Loader, Result};
use rand::{RngExt, SeedableRng, rngs::ChaCha8Rng};

use super::Report;
use super::attention::relative_norm;

/// What is trained, and how.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Setting {
    pub(crate) precision: Dtype,
    pub(crate) lora: bool,
}

impl Setting {
    fn name(self) -> String {
        format!("{} {}", if self.lora { "LoRA" } else { "full" }, self.precision)
    }
}

/// A model, its optimizer and the batches that it meets.
struct Training<B: Backend> {
    model: BiEncoderModel<B>,
    optimizer: AdamW<B>,
    chunking: Chunking,
    step: u64,
}

impl<B: Backend> Training<B> {
    fn new(backend: &B, folder: &str, setting: Setting) -> Result<Self> {
        let loader = Loader::new(Path::new(folder))?;
        let mut model = loader.load(backend.clone(), BiEncoderOptions::default())?;
        if setting.lora {
            model.attach_new_adapter(&LoraConfig::default(), 3)?;
        }
        model.set_precision(setting.precision)?;
        model.train();
        let optimizer = AdamW::new(backend, model.decoder_mut(), AdamWConfig::default())?;
        Ok(Training { model, optimizer, chunking: Chunking::default(), step: 0 })
    }

    /// Forward and backward on the batch of this step; the loss.
    fn gradients(&mut self) -> Result<f32> {
        let vocabulary = self.model.decoder().config().vocab_size as u32;
        let mut generator = ChaCha8Rng::seed_from_u64(100 + self.step % 8);
        let mut batch = |lengths: &[usize]| {
            let mut token = || generator.random_range(0..vocabulary);
            let sequences = lengths.iter().map(|&length| (0..length).map(|_| token()).collect());
            Batch::from_sequences(sequences.collect::<Vec<Vec<u32>>>())
        };
        let query = batch(&[20, 9, 31, 14])?;
        let lengths: Vec<usize> = (0..4 * 4).map(|i| 10 + i * 37 % 50).collect();
        let passage = batch(&lengths)?;
        let has_dropout = self.model.adapter().is_some_and(LoraConfig::has_dropout);
        let dropout = has_dropout.then_some(Dropout { seed: 42, step: self.step });
        let input = StepInput::from_batches(&query, &passage, true, dropout)?;
        let objective = self.model.objective(Arc::new(Solo))?;
        let loss = accumulate_gradients(&mut self.model, &objective, &input, &self.chunking)?;
        Ok(self.model.backend().download(&loss)?[0])
    }

    fn step(&mut self, learning_rate: f64) -> Result<f32> {
        let loss = self.gradients()?;
        let backend = self.model.backend().clone();
        self.optimizer.step(&backend, self.model.decoder_mut(), learning_rate)?;
        self.step += 1;
        Ok(loss)
    }

    /// Names and gradients of all trainable parameters.
    fn downloaded(&self) -> Result<Vec<(String, Vec<f32>)>> {
        let parameters = self.model.decoder().trainable_parameters();
        parameters
            .map(|p| Ok((p.name().to_owned(), self.model.backend().download(p.grad()?)?)))
            .collect()
    }
}

const SETTINGS: [Setting; 4] = [
    Setting { precision: Dtype::F32, lora: false },
    Setting { precision: Dtype::F32, lora: true },
    Setting { precision: Dtype::Bf16, lora: false },
    Setting { precision: Dtype::Bf16, lora: true },
];

/// Loss and every gradient of one batch, in f32 against the CPU in f32, in bf16 against the CPU in bf16.
pub(crate) fn gradients<B: Backend>(backend: &B, folder: &str, report: &mut Report) -> Result<()> {
    for setting in SETTINGS {
        // Both roundings to bf16 differ from the exact gradient by as much.
        let bound = if setting.precision == Dtype::F32 { 1e-4 } else { 6e-2 };
        let mut here = Training::new(&Cpu::new(), folder, setting)?;
        let mut there = Training::new(backend, folder, setting)?;
        // A few updates first: fresh adapters give their inner matrices a gradient of zero.
        for _ in 0..2 {
            here.step(1e-3)?;
            there.step(1e-3)?;
        }
        let (want, got) = (here.gradients()?, there.gradients()?);
        let name = setting.name();
        let error = f64::from((got - want).abs() / want.abs().max(0.1));
        report.within(&format!("{name}: loss"), error, bound);
        let mut worst = (0.0, "no gradient".to_owned());
        for ((name, want), (_, got)) in here.downloaded()?.iter().zip(there.downloaded()?) {
            let error = relative_norm(&got, want);
            if error > worst.0 || error.is_nan() {
                worst = (error, name.clone());
            }
        }
        report.within(&format!("{name}: gradients, worst in {}", worst.1), worst.0, bound);
    }
    Ok(())
}

/// Losses of a run: f32 within 1e-3 of the CPU in f32, bf16 within 2 % of it.
pub(crate) fn losses<B: Backend>(
    backend: &B,
    folder: &str,
    steps: usize,
    report: &mut Report,
) -> Result<()> {
    for lora in [false, true] {
        let rate = if lora { 1e-3 } else { 2e-4 };
        let f32 = Setting { precision: Dtype::F32, lora };
        let want = run(&Cpu::new(), folder, f32, steps, rate)?;
        for (precision, bound) in [(Dtype::F32, 1e-3), (Dtype::Bf16, 2e-2)] {
            let setting = Setting { precision, lora };
            let got = run(backend, folder, setting, steps, rate)?;
            let error = |(got, want): (&f32, &f32)| f64::from((got - want).abs() / want.max(0.5));
            let worst = got.iter().zip(&want).map(error).fold(0.0, |worst: f64, error| {
                if worst.is_nan() || error <= worst { worst } else { error }
            });
            let last = |losses: &[f32]| losses.last().copied().unwrap_or(f32::NAN);
            let what = format!(
                "{}: {steps} steps, loss {:.4} to {:.4}, CPU f32 to {:.4}",
                setting.name(),
                got.first().copied().unwrap_or(f32::NAN),
                last(&got),
                last(&want),
            );
            report.within(&what, worst, bound);
        }
    }
    Ok(())
}

fn run<B: Backend>(
    backend: &B,
    folder: &str,
    setting: Setting,
    steps: usize,
    learning_rate: f64,
) -> Result<Vec<f32>> {
    let mut training = Training::new(backend, folder, setting)?;
    (0..steps).map(|_| training.step(learning_rate)).collect()
}
