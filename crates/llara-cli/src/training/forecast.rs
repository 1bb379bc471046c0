//! The estimated memory of a run, printed before it starts, and the error for a run that does not fit.

use std::fmt::Write;

use llara::backend::{Backend, Dtype};
use llara::model::LoraConfig;
use llara::train::plan::{
    ChunkPolicy, DryRun, EvaluationShape, GroupShape, LargestBatch, MachineMemory, Plan, RunShape,
};
use llara::train::{Checkpoint, Chunking, TrainConfig};
use llara::{Error, ErrorKind, Result};

use super::resume;
use super::training_args::TrainingArgs;
use crate::talk::{bytes, count, counted, operations};

/// A plan, its batch and run, and the available memory.
pub(crate) struct Forecast {
    pub(crate) plan: Plan,
    pub(crate) batch: LargestBatch,
    /// The memory limit in bytes; `None`: unknown.
    pub(crate) budget: Option<u64>,
    /// Whether the limit was given as an option; otherwise it is the usable memory.
    is_given: bool,
    machine: MachineMemory,
    shape: RunShape,
    policy: ChunkPolicy,
    remedies: Remedies,
}

/// Settings of a run by which it could need less memory.
pub(crate) struct Remedies {
    /// The option of the maximum length of the longest sequences.
    pub(crate) max_len_option: &'static str,
    /// Its value.
    pub(crate) max_len: usize,
    /// The smallest valid value.
    pub(crate) smallest_max_len: usize,
    /// Whether the run could train an adapter instead of all weights.
    pub(crate) adapter: bool,
}

/// Chunks of one sequence and no kept activations: the minimum of memory.
const SMALLEST: Chunking = Chunking { max_tokens: 1, max_sequences: 1, kept_tokens: 0 };

/// Tokens of a batch of an evaluation that needs little memory.
const SMALL_BATCH_TOKENS: usize = 512;

/// The processes of a run, if there are several.
pub(crate) fn group_shape(
    config: &TrainConfig,
    processes: usize,
    negatives_cross_device: bool,
) -> Option<GroupShape> {
    (processes > 1).then_some(GroupShape {
        ranks: processes,
        shard_optimizer: config.shard_optimizer,
        negatives_cross_device,
        batch_size: config.batch_size,
        group_size: config.group_size,
    })
}

impl Forecast {
    /// Plans a step of `batch`, with the data of the run in memory; the shape's process memory is set here. The memory
    /// of the machine is shared by `local_processes` processes.
    pub(crate) fn new(
        mut shape: RunShape,
        batch: LargestBatch,
        (training, checkpoint): (&TrainingArgs, Option<&Checkpoint>),
        remedies: Remedies,
        (backend, local_processes): (&impl Backend, usize),
    ) -> Result<Self> {
        // Read here, with tokenizer and data in memory.
        let machine = MachineMemory::of(backend)?;
        // Processes share the memory of their host; each has a GPU of its own.
        let (machine, process_bytes) = match backend.free_and_total_bytes()? {
            None => {
                let machine = machine.shared_by(local_processes);
                (machine, machine.process_in_training())
            }
            Some(_) => (machine, 0),
        };
        shape.process_bytes = process_bytes;
        let given = training.memory_budget;
        let budget = match given {
            Some(budget) => Some(budget.bytes(machine.total.unwrap_or(u64::MAX))),
            None => machine.usable(),
        };
        let policy = resume::chunk_policy(training.chunk_policy(), checkpoint);
        let limit = budget.unwrap_or(u64::MAX);
        let plan = DryRun::new(shape.clone())?.choose(&batch, policy, limit)?;
        let is_given = given.is_some();
        Ok(Forecast { plan, batch, budget, is_given, machine, shape, policy, remedies })
    }

    /// Whether the peak memory is within the limit.
    pub(crate) fn fits(&self) -> bool {
        self.budget.is_none_or(|budget| self.plan.peak_bytes() <= budget)
    }

    /// The plan in a few lines: memory and chunks.
    pub(crate) fn lines(&self) -> Vec<String> {
        let plan = &self.plan;
        let of = match (self.budget, self.is_given) {
            (Some(budget), true) => format!(" of {}", bytes(budget)),
            (Some(budget), false) => format!(" of {} usable", bytes(budget)),
            (None, _) => String::new(),
        };
        let mut lines = vec![
            format!("memory    peak {}{of}, while {}", bytes(plan.peak_bytes()), plan.peak_phase()),
            format!("chunks    {}", self.chunks()),
        ];
        if !self.fits() && !self.is_given {
            lines.push(
                "warning: this exceeds the free memory; other programs may be affected".into(),
            );
        }
        lines
    }

    /// How the batch is divided into chunks.
    fn chunks(&self) -> String {
        let chunks = &self.plan.chunks;
        if chunks.count == 1 && chunks.recomputed_share == 0.0 {
            return format!("one pass over {} tokens", count(chunks.tokens));
        }
        let mut text = format!(
            "{} of at most {} tokens",
            counted(chunks.count, "chunk"),
            count(chunks.largest_tokens)
        );
        if chunks.recomputed_share == 0.0 {
            return text;
        }
        if chunks.kept > 0 {
            let _ = write!(text, ", activations of {} kept", count(chunks.kept));
        }
        // The forward pass is a third of the work.
        let percent = 100.0 * chunks.recomputed_share;
        let _ = write!(
            text,
            "; the forward pass of {percent:.0} % of the tokens is computed twice, {:.0} % more work",
            percent / 3.0
        );
        text
    }

    /// Refuses a run that exceeds the given memory limit or the machine's memory.
    pub(crate) fn refuse_if_too_large(&self) -> Result<()> {
        match self.refusal()? {
            Some(refusal) => Err(refusal),
            None => Ok(()),
        }
    }

    /// The error for a run that does not fit, with settings that would fit.
    pub(crate) fn refusal(&self) -> Result<Option<Error>> {
        let limit = if self.is_given { self.budget } else { self.machine.total };
        let Some(limit) = limit.filter(|&limit| self.plan.peak_bytes() > limit) else {
            return Ok(None);
        };
        let plan = &self.plan;
        let parts: Vec<String> = plan
            .training
            .named()
            .into_iter()
            .filter(|&(_, part)| part >= plan.training.total() / 100)
            .map(|(name, part)| format!("{name} {}", bytes(part)))
            .collect();
        let smallest = match self.policy {
            ChunkPolicy::Auto if plan.peak_phase() == "training" => " with the smallest chunks",
            _ => "",
        };
        let remedies = self.remedies(limit)?;
        let hint = match remedies.as_slice() {
            [] => "use a smaller model or a machine with more memory".to_owned(),
            remedies => remedies.join("; "),
        };
        Ok(Some(
            Error::new(
                ErrorKind::Backend,
                format!("this run does not fit in {} of memory", bytes(limit)),
            )
            .expected(format!("{} or more", bytes(plan.peak_bytes())))
            .got(format!(
                "{} while {}{smallest}; a step needs {}",
                bytes(plan.peak_bytes()),
                plan.peak_phase(),
                parts.join(", ")
            ))
            .hint(hint),
        ))
    }

    /// Settings with which the run would fit, each with its peak memory.
    fn remedies(&self, limit: u64) -> Result<Vec<String>> {
        let mut remedies = Vec::new();
        let mut consider = |option: &str, shape: &RunShape, batch: &LargestBatch, policy| {
            let peak = DryRun::new(shape.clone())?.choose(batch, policy, limit)?.peak_bytes();
            if peak <= limit {
                remedies.push(format!("{option} needs {}", bytes(peak)));
            }
            Ok::<bool, Error>(peak <= limit)
        };
        let smallest = ChunkPolicy::Fixed(SMALLEST);
        if let ChunkPolicy::Fixed(_) | ChunkPolicy::FixedSize(_) = self.policy {
            let option = "--chunk-tokens auto without --sub-batch-size";
            consider(option, &self.shape, &self.batch, ChunkPolicy::Auto)?;
        }
        if let Some(evaluation) = self.shape.evaluation
            && evaluation.batch_tokens > SMALL_BATCH_TOKENS
        {
            let evaluation = EvaluationShape { batch_tokens: SMALL_BATCH_TOKENS, ..evaluation };
            let shape = RunShape { evaluation: Some(evaluation), ..self.shape.clone() };
            let option = format!("--eval-batch-tokens {SMALL_BATCH_TOKENS}");
            consider(&option, &shape, &self.batch, self.policy)?;
        }
        if self.shape.lora.is_none() && self.remedies.adapter {
            let lora = Some(LoraConfig::default());
            let shape = RunShape { lora, ..self.shape.clone() };
            consider("--use-lora true", &shape, &self.batch, smallest)?;
        }
        if self.shape.precision == Dtype::F32 {
            let shape = RunShape { precision: Dtype::Bf16, ..self.shape.clone() };
            consider("--dtype bf16", &shape, &self.batch, smallest)?;
        }
        // Shorter texts do not reduce the memory of the weights.
        let fixed = self.plan.training.without_activations();
        let Remedies { max_len_option, smallest_max_len, .. } = self.remedies;
        let mut max_len = self.remedies.max_len / 2;
        while max_len >= smallest_max_len && fixed.max(self.plan.saving_bytes) < limit {
            let batch = self.batch.with_passages_truncated(max_len)?;
            let option = format!("{max_len_option} {max_len}");
            if consider(&option, &self.shape, &batch, smallest)? {
                break;
            }
            max_len /= 2;
        }
        Ok(remedies)
    }

    /// The work of a step.
    pub(crate) fn work(&self) -> String {
        let work = self.plan.work;
        format!(
            "{} needed, {} executed ({:.2} ×)",
            operations(work.needed_flops),
            operations(work.done_flops),
            work.done_flops as f64 / work.needed_flops.max(1) as f64
        )
    }
}
