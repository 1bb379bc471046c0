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

/// Loss and every gradient of one batch. In f32 they must be those of the CPU. In bf16 they must not be
/// further from the CPU's f32 than twice as far as the CPU's bf16 is: the rounding of both differs, and the
/// updates before this batch turn it into other weights.
pub(crate) fn gradients<B: Backend>(backend: &B, folder: &str, report: &mut Report) -> Result<()> {
    for lora in [false, true] {
        let setting = |precision| Setting { precision, lora };
        let exact = gradients_on(&Cpu::new(), folder, setting(Dtype::F32))?;
        let got = gradients_on(backend, folder, setting(Dtype::F32))?;
        let errors = exact.errors(&got);
        let allowed = errors.iter().map(|_| 1e-4).collect();
        judge(setting(Dtype::F32), &errors, allowed, report);

        let rounded = gradients_on(&Cpu::new(), folder, setting(Dtype::Bf16))?;
        let got = gradients_on(backend, folder, setting(Dtype::Bf16))?;
        let allowed = exact.errors(&rounded).iter().map(|(_, error)| 2.0 * error + 1e-2).collect();
        judge(setting(Dtype::Bf16), &exact.errors(&got), allowed, report);
    }
    Ok(())
}

/// A loss and all gradients.
struct Gradients {
    loss: f32,
    by_parameter: Vec<(String, Vec<f32>)>,
}

impl Gradients {
    /// How far another loss and other gradients are from these, relatively.
    fn errors(&self, other: &Gradients) -> Vec<(String, f64)> {
        let loss = f64::from((other.loss - self.loss).abs() / self.loss.abs().max(0.1));
        let pairs = self.by_parameter.iter().zip(&other.by_parameter);
        let gradients =
            pairs.map(|((name, want), (_, got))| (name.clone(), relative_norm(got, want)));
        std::iter::once(("loss".to_owned(), loss)).chain(gradients).collect()
    }
}

/// After a few updates, because fresh adapters give their inner matrices a gradient of zero.
fn gradients_on<B: Backend>(backend: &B, folder: &str, setting: Setting) -> Result<Gradients> {
    let mut training = Training::new(backend, folder, setting)?;
    for _ in 0..2 {
        training.step(1e-3)?;
    }
    let loss = training.gradients()?;
    Ok(Gradients { loss, by_parameter: training.downloaded()? })
}

/// Reports the loss, and the gradient that is closest to its bound or furthest beyond it.
fn judge(setting: Setting, errors: &[(String, f64)], allowed: Vec<f64>, report: &mut Report) {
    let name = setting.name();
    let mut worst: Option<(&str, f64, f64)> = None;
    for ((parameter, error), allowed) in errors.iter().zip(allowed) {
        if parameter == "loss" {
            report.within(&format!("{name}: loss"), *error, allowed);
            continue;
        }
        let ratio = error / allowed;
        if ratio.is_nan() || worst.is_none_or(|(_, worst, bound)| ratio > worst / bound) {
            worst = Some((parameter, *error, allowed));
        }
    }
    match worst {
        Some((parameter, error, allowed)) => {
            report.within(&format!("{name}: gradients, worst in {parameter}"), error, allowed);
        }
        None => report.holds(&format!("{name}: gradients"), false, "there are none"),
    }
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
