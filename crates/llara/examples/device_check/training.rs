//! Compares gradients and training runs of a model folder with those of the CPU.

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
    fn gradients(&mut self) -> Result<B::Tensor> {
        let has_dropout = self.model.adapter().is_some_and(LoraConfig::has_dropout);
        let dropout = has_dropout.then_some(Dropout { seed: 42, step: self.step });
        let input = step_input(&self.model, self.step, dropout)?;
        let objective = self.model.objective(Arc::new(Solo))?;
        accumulate_gradients(&mut self.model, &objective, &input, &self.chunking)
    }

    fn step(&mut self, learning_rate: f64) -> Result<f32> {
        let loss = self.gradients()?;
        let backend = self.model.backend().clone();
        self.optimizer.step(&backend, self.model.decoder_mut(), learning_rate)?;
        self.step += 1;
        Ok(backend.download(&loss)?[0])
    }
}

/// A batch of random tokens: four queries, each with four passages.
pub(crate) fn step_input<B: Backend>(
    model: &BiEncoderModel<B>,
    step: u64,
    dropout: Option<Dropout>,
) -> Result<StepInput> {
    let vocabulary = model.decoder().config().vocab_size as u32;
    let mut generator = ChaCha8Rng::seed_from_u64(100 + step % 8);
    let mut batch = |lengths: &[usize]| {
        let mut token = || generator.random_range(0..vocabulary);
        let sequences = lengths.iter().map(|&length| (0..length).map(|_| token()).collect());
        Batch::from_sequences(sequences.collect::<Vec<Vec<u32>>>())
    };
    let query = batch(&[20, 9, 31, 14])?;
    let lengths: Vec<usize> = (0..4 * 4).map(|i| 10 + i * 37 % 50).collect();
    let passage = batch(&lengths)?;
    StepInput::from_batches(&query, &passage, true, dropout)
}

/// A loss, and the gradient of every trainable parameter by its name.
pub(crate) struct Gradients {
    pub(crate) loss: f32,
    pub(crate) by_name: Vec<(String, Vec<f32>)>,
}

impl Gradients {
    /// Of a model whose gradients have been accumulated.
    pub(crate) fn of<B: Backend>(model: &BiEncoderModel<B>, loss: &B::Tensor) -> Result<Self> {
        let backend = model.backend();
        let tensors = model.decoder().tensors().filter(|tensor| tensor.is_trainable());
        let by_name = tensors
            .map(|t| Ok((t.name().to_owned(), backend.download_view(t.grad()?)?)))
            .collect::<Result<_>>()?;
        Ok(Gradients { loss: backend.download(loss)?[0], by_name })
    }
}

/// A computation of gradients that every backend can do.
pub(crate) trait Differentiated {
    fn gradients<B: Backend>(&self, backend: &B, precision: Dtype) -> Result<Gradients>;
}

/// Compares a loss and its gradients with the CPU in f32. In bf16, the bound is twice the difference between the
/// CPU in bf16 and in f32, or 4e-2 if that is larger; for gradients, twice the largest difference of a tensor, because
/// the difference of a small tensor is as random as the rounding of its few numbers.
pub(crate) fn compare<B: Backend>(
    backend: &B,
    what: &str,
    computed: &impl Differentiated,
    report: &mut Report,
) -> Result<()> {
    let on_cpu = |precision| computed.gradients(&Cpu::new(), precision);
    let (exact, rounded) = (on_cpu(Dtype::F32)?, on_cpu(Dtype::Bf16)?);
    for precision in [Dtype::F32, Dtype::Bf16] {
        let there = computed.gradients(backend, precision)?;
        let bound = |rounded: f64| match precision {
            Dtype::F32 => 1e-4,
            Dtype::Bf16 => 2.0 * rounded.max(2e-2),
        };
        let name = format!("{what} {precision}");
        let of_loss = |loss: f32| f64::from((loss - exact.loss).abs() / exact.loss.abs().max(0.1));
        report.within(&format!("{name}: loss"), of_loss(there.loss), bound(of_loss(rounded.loss)));
        let (error, tensor) = worst(&there, &exact);
        let bound = bound(worst(&rounded, &exact).0);
        report.within(&format!("{name}: gradients, worst in {tensor}"), error, bound);
    }
    Ok(())
}

/// The largest relative difference of a gradient, and its tensor; NaN if one is.
fn worst<'g>(got: &'g Gradients, want: &Gradients) -> (f64, &'g str) {
    let mut worst = (f64::NEG_INFINITY, "no gradient");
    for ((name, got), (_, want)) in got.by_name.iter().zip(&want.by_name) {
        let error = relative_norm(got, want);
        if error.is_nan() {
            return (error, name);
        }
        if error > worst.0 {
            worst = (error, name);
        }
    }
    worst
}

/// The gradients of the first batch of a training run.
struct FirstBatch<'f> {
    folder: &'f str,
    adapter: Adapter,
}

impl Differentiated for FirstBatch<'_> {
    fn gradients<B: Backend>(&self, backend: &B, precision: Dtype) -> Result<Gradients> {
        let setting = Setting { precision, adapter: self.adapter };
        let mut training = Training::new(backend, self.folder, setting)?;
        let loss = training.gradients()?;
        Gradients::of(&training.model, &loss)
    }
}

/// Compares the loss and every gradient of one batch with the CPU, for all weights and for the adapter of the folder.
pub(crate) fn gradients<B: Backend>(backend: &B, folder: &str, report: &mut Report) -> Result<()> {
    for (name, adapter) in [("full", Adapter::None), ("LoRA", Adapter::Trained)] {
        compare(backend, name, &FirstBatch { folder, adapter }, report)?;
    }
    Ok(())
}

/// Compares the losses of a run with the CPU in f32: f32 within 1e-5, or 1e-3 after more than 20 steps, because rounding
/// errors grow with them; bf16 within 2 %, or within 1.5 times the difference between the CPU in bf16 and in f32 if that
/// is larger.
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
        let exact = if steps <= 20 { 1e-5 } else { 1e-3 };
        for (precision, bound) in
            [(Dtype::F32, exact), (Dtype::Bf16, f64::max(2e-2, 1.5 * worst(&rounded)))]
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
