//! One process of a run: trains, and writes losses, gradients and weights.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::Path;
use std::sync::Arc;

use llara::backend::{Backend, Dtype};
use llara::dist::Collective;
use llara::model::Parameter;
use llara::train::{
    Finetuning, FinetuningInTurn, Observer, RunLength, Saving, StepRecord, Task, TrainConfig,
    Trainer,
};
use llara::{BiEncoderModel, Error, ErrorKind, Result};
use serde::{Deserialize, Serialize};

use super::case::Computation;
use crate::compute::on_device;
use crate::finetune::{self, Prepared};
use crate::processes::Processes;
use crate::training::{Purpose, smallest_chunking};

/// The file that describes the results of a run; it is written last.
pub(super) const DESCRIPTION: &str = "results.json";
/// Gradients of the first step: f32, little-endian, parameter after parameter.
pub(super) const GRADIENTS: &str = "gradients.f32";
/// Weights after the last step, likewise.
pub(super) const WEIGHTS: &str = "weights.f32";

/// The results of a run.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Results {
    /// Of each step.
    pub(super) losses: Vec<f64>,
    /// The number format of activations, f32 or bf16.
    pub(super) precision: String,
    /// Number of processes.
    pub(super) processes: usize,
    /// The trained parameters with their numbers of elements, in the order of the files.
    pub(super) parameters: Vec<(String, usize)>,
}

/// Computes one run, or one process of it. The first process writes the results.
pub(super) fn run(
    mut args: finetune::Args,
    steps: u64,
    computation: Computation,
    results: &Path,
) -> anyhow::Result<()> {
    let processes = Processes::start(args.common.processes.collective.collective_timeout)?;
    args.common.compute.set_default_threads(processes.placement().threads);
    let computed = compute(&args, steps, computation, results, &processes);
    processes.end(computed)
}

fn compute(
    args: &finetune::Args,
    steps: u64,
    computation: Computation,
    results: &Path,
    processes: &Processes,
) -> anyhow::Result<()> {
    on_device!(args.common.compute, backend => train(args, steps, computation, results, backend, processes))
}

fn train<B: Backend>(
    args: &finetune::Args,
    steps: u64,
    computation: Computation,
    results: &Path,
    backend: B,
    processes: &Processes,
) -> anyhow::Result<()> {
    let mut prepared = Prepared::new(args, Purpose::Compare, backend, processes)?;
    let chunking = processes.agree(chunking(args, &prepared, processes.size()))?;
    prepared.config.chunking = smallest_chunking(chunking, processes)?;
    prepared.config.length = RunLength::Steps(steps);
    prepared.config.saving = Saving { every: None, keep: None, ..Saving::default() };
    let mut model = processes.agree(prepared.load(args).map_err(Into::into))?;

    let Prepared { config, dataset, .. } = &prepared;
    let collective = processes.collective(model.backend());
    let run = OneRun { config, results, processes, precision: prepared.precision() };
    match computation {
        Computation::Run => {
            let task = Finetuning::new(&mut model, dataset, config, &collective);
            run.complete(model, task, collective)
        }
        Computation::InTurn(parts) => {
            let task = FinetuningInTurn::new(&mut model, dataset, config, parts.get());
            run.complete(model, task, collective)
        }
    }
}

/// The chunks of a step within the memory.
fn chunking(
    args: &finetune::Args,
    prepared: &Prepared<impl Backend>,
    processes: usize,
) -> anyhow::Result<llara::train::Chunking> {
    let forecast = finetune::forecast(args, prepared, processes)?;
    forecast.refuse_if_too_large()?;
    Ok(forecast.plan.chunks.chunking)
}

struct OneRun<'r> {
    config: &'r TrainConfig,
    results: &'r Path,
    processes: &'r Processes,
    precision: Dtype,
}

impl OneRun<'_> {
    /// Computes the gradients of the first step, then all steps, and writes both.
    fn complete<B: Backend, T: Task<B>>(
        &self,
        mut model: BiEncoderModel<B>,
        task: Result<T>,
        collective: Arc<dyn Collective<B>>,
    ) -> anyhow::Result<()> {
        let OneRun { config, results, processes, precision } = *self;
        let task = processes.agree(task.map_err(Into::into))?;
        let made = Trainer::with_task(&mut model, task, config, collective, None);
        let (mut trainer, _) = processes.agree(made.map_err(Into::into))?;

        let file = processes.first(|| Ok(TensorFile::create(results, GRADIENTS)?))?;
        let mut gradients = Tensors { file, parameters: Vec::new() };
        let backend = trainer.backend().clone();
        let visited = trainer
            .visit_gradients(0, |parameter, gradient| gradients.add(&backend, parameter, gradient));
        processes.agree(visited.and_then(|()| gradients.finish()).map_err(Into::into))?;

        let mut losses = Losses::default();
        trainer.run(&mut losses)?;
        drop(trainer);
        processes.first(|| {
            let file = Some(TensorFile::create(results, WEIGHTS)?);
            let mut weights = Tensors { file, parameters: Vec::new() };
            for parameter in model.decoder().trainable_parameters() {
                weights.add(&backend, parameter, parameter.values())?;
            }
            weights.finish()?;
            let precision = if precision == Dtype::Bf16 { "bf16" } else { "f32" }.to_owned();
            let description = Results {
                losses: losses.0,
                precision,
                processes: processes.size(),
                parameters: weights.parameters,
            };
            let path = results.join(DESCRIPTION);
            let text = serde_json::to_vec(&description)?;
            Ok(fs::write(&path, text).map_err(|e| Error::io("write", &path, e))?)
        })?;
        Ok(())
    }
}

/// Tensors that the first process writes to a file.
struct Tensors {
    /// `None` on the other processes.
    file: Option<TensorFile>,
    parameters: Vec<(String, usize)>,
}

impl Tensors {
    fn add<B: Backend>(
        &mut self,
        backend: &B,
        parameter: &Parameter<B>,
        tensor: &B::Tensor,
    ) -> Result<()> {
        let Some(file) = &mut self.file else { return Ok(()) };
        let values = backend.download(tensor)?;
        self.parameters.push((parameter.name().to_owned(), values.len()));
        file.write(&values)
    }

    fn finish(&mut self) -> Result<()> {
        self.file.as_mut().map_or(Ok(()), TensorFile::flush)
    }
}

struct TensorFile {
    file: BufWriter<File>,
    path: std::path::PathBuf,
}

impl TensorFile {
    fn create(folder: &Path, name: &str) -> Result<Self> {
        let path = folder.join(name);
        let file = File::create(&path).map_err(|e| {
            let error = Error::io("create", &path, e);
            error
                .hint("--work-dir must be a folder that the first process of each run can write to")
        })?;
        Ok(TensorFile { file: BufWriter::new(file), path })
    }

    fn write(&mut self, values: &[f32]) -> Result<()> {
        if let Some(value) = values.iter().find(|value| !value.is_finite()) {
            return Err(
                Error::new(ErrorKind::Numeric, "a gradient or a weight is not finite").got(value)
            );
        }
        let write = |file: &mut BufWriter<File>| {
            values.iter().try_for_each(|value| file.write_all(&value.to_le_bytes()))
        };
        write(&mut self.file).map_err(|e| Error::io("write", &self.path, e))
    }

    fn flush(&mut self) -> Result<()> {
        self.file.flush().map_err(|e| Error::io("write", &self.path, e))
    }
}

/// The loss of each step.
#[derive(Default)]
struct Losses(Vec<f64>);

impl Observer for Losses {
    fn on_step(&mut self, record: &StepRecord) -> Result<()> {
        self.0.push(f64::from(record.loss));
        Ok(())
    }

    fn on_log(&mut self, _: &StepRecord) -> Result<()> {
        Ok(())
    }

    fn on_save(&mut self, _: &Path) -> Result<()> {
        Ok(())
    }
}
