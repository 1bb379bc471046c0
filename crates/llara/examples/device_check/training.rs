//! Compares gradients and training runs of a model folder with those of the CPU.

use std::path::Path;
use std::sync::Arc;

use llara::backend::{Backend, Cpu, Dtype};
use llara::data::Batch;
use llara::dist::Solo;
use llara::model::{Dropout, LoraConfig};
use llara::train::{AdamW, AdamWConfig, Chunking, StepInput, accumulate_gradients};
use llara::{BiEncoderModel, BiEncoderOptions, Error, Loader, Result};
use rand::{RngExt, SeedableRng, rngs::ChaCha8Rng};

use super::Report;
use super::attention::relative_norm;

/// A training setup.
#[derive(Debug, Clone, Copy)]
struct Setting {
    precision: Dtype,
    adapter: Adapter,
}

/// The adapter that is trained; the weights are then frozen.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Adapter {
    None,
    /// With dropout; its product is zero at first.
    New,
    /// The adapter in `lora` of the model folder. The gradients of a new adapter cannot be compared: half of them are
    /// zero, and AdamW turns their rounding errors into steps of full size.
    Trained,
}

impl Setting {
    fn name(self) -> String {
        let adapter = if self.adapter == Adapter::None { "full" } else { "LoRA" };
        format!("{adapter} {}", self.precision)
    }
}

/// A model, its optimizer and its batches.
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
        match setting.adapter {
            Adapter::None => {}
            Adapter::New => model.attach_new_adapter(&LoraConfig::default(), 3)?,
            Adapter::Trained => model.attach_adapter(&Path::new(folder).join("lora"))?,
        }
        model.set_precision(setting.precision)?;
        model.train();
        let optimizer = AdamW::new(backend, model.decoder_mut(), AdamWConfig::default())?;
        Ok(Training { model, optimizer, chunking: Chunking::default(), step: 0 })
    }

    /// Forward and backward pass for the batch of this step; returns the loss.
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
        let tensors = self.model.decoder().tensors().filter(|tensor| tensor.is_trainable());
        tensors
            .map(|t| Ok((t.name().to_owned(), self.model.backend().download_view(t.grad()?)?)))
            .collect()
    }
}

/// Compares the loss and every gradient of one batch with the CPU in f32. In bf16, the bound is 1.5 times the
/// difference between the CPU in bf16 and in f32, or 1.5e-2 if that is larger.
pub(crate) fn gradients<B: Backend>(backend: &B, folder: &str, report: &mut Report) -> Result<()> {
    for adapter in [Adapter::None, Adapter::Trained] {
        let computed = |precision| {
            let mut training = Training::new(&Cpu::new(), folder, Setting { precision, adapter })?;
            Ok::<_, Error>((training.gradients()?, training.downloaded()?))
        };
        let (exact, rounded) = (computed(Dtype::F32)?, computed(Dtype::Bf16)?);
        for precision in [Dtype::F32, Dtype::Bf16] {
            let setting = Setting { precision, adapter };
            let mut there = Training::new(backend, folder, setting)?;
            let loss = there.gradients()?;
            let bound = |rounded: f64| match precision {
                Dtype::F32 => 1e-4,
                Dtype::Bf16 => 1.5 * rounded.max(1e-2),
            };
            let name = setting.name();
            let of_loss = |loss: f32| f64::from((loss - exact.0).abs() / exact.0.abs().max(0.1));
            report.within(&format!("{name}: loss"), of_loss(loss), bound(of_loss(rounded.0)));
            // The gradient that is closest to its bound, or that exceeds it the most.
            let mut worst = (0.0, 1.0, "no gradient".to_owned());
            for (((name, want), (_, rounded)), (_, got)) in
                exact.1.iter().zip(&rounded.1).zip(there.downloaded()?)
            {
                let error = relative_norm(&got, want);
                let bound = bound(relative_norm(rounded, want));
                if error / bound > worst.0 / worst.1 || error.is_nan() {
                    worst = (error, bound, name.clone());
                }
            }
            report.within(&format!("{name}: gradients, worst in {}", worst.2), worst.0, worst.1);
        }
    }
    Ok(())
}

/// Compares the losses of a run with the CPU in f32: f32 within 1e-3; bf16 within 2 %, or within 1.5 times the
/// difference between the CPU in bf16 and in f32 if that is larger.
pub(crate) fn losses<B: Backend>(
    backend: &B,
    folder: &str,
    steps: usize,
    report: &mut Report,
) -> Result<()> {
    for adapter in [Adapter::None, Adapter::New] {
        let rate = if adapter == Adapter::None { 2e-4 } else { 1e-3 };
        let losses =
            |precision| run(&Cpu::new(), folder, Setting { precision, adapter }, steps, rate);
        let (want, rounded) = (losses(Dtype::F32)?, losses(Dtype::Bf16)?);
        let worst = |losses: &[f32]| {
            let error = |(got, want): (&f32, &f32)| f64::from((got - want).abs() / want.max(0.5));
            losses.iter().zip(&want).map(error).fold(0.0, |worst: f64, error| {
                if worst.is_nan() || error <= worst { worst } else { error }
            })
        };
        for (precision, bound) in
            [(Dtype::F32, 1e-3), (Dtype::Bf16, f64::max(2e-2, 1.5 * worst(&rounded)))]
        {
            let setting = Setting { precision, adapter };
            let got = run(backend, folder, setting, steps, rate)?;
            let last = |losses: &[f32]| losses.last().copied().unwrap_or(f32::NAN);
            let what = format!(
                "{}: {steps} steps, loss {:.4} to {:.4}, CPU f32 to {:.4}",
                setting.name(),
                got.first().copied().unwrap_or(f32::NAN),
                last(&got),
                last(&want),
            );
            report.within(&what, worst(&got), bound);
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
