//! What a run will take, told before it begins, and the refusal of one that cannot fit.

use std::fmt::Write;

use llara::backend::Dtype;
use llara::model::LoraConfig;
use llara::train::Chunking;
use llara::train::plan::{Cut, DryRun, LargestBatch, MachineMemory, Plan, RunShape};
use llara::{Error, ErrorKind, Result, Role};

use super::{Args, Prepared, resume};
use crate::talk::{bytes, count, counted, operations};

/// A plan, the batch and run that it is for, and the available memory.
pub(crate) struct Forecast {
    pub(crate) plan: Plan,
    pub(crate) batch: LargestBatch,
    /// The memory limit in bytes; `None`: unknown.
    pub(crate) budget: Option<u64>,
    /// Whether the budget was given; otherwise it is the free memory.
    asked: bool,
    machine: MachineMemory,
    shape: RunShape,
    cut: Cut,
}

/// Chunks of one sequence with no activations kept: the smallest possible memory.
const SMALLEST: Chunking = Chunking { max_tokens: 1, max_sequences: 1, kept_tokens: 0 };

impl Forecast {
    /// Plans a step of the largest batch that is expected from the data.
    pub(crate) fn new(args: &Args, prepared: &Prepared) -> Result<Self> {
        let mut shape = RunShape {
            decoder: prepared.outline.decoder.clone(),
            prompts: prepared.outline.prompts.clone(),
            lora: prepared.lora()?,
            precision: prepared.precision,
            options: args.model_options(&prepared.recipe),
            threads: args.compute.threads(),
            process_bytes: 0,
        };
        let Prepared { dataset, config, .. } = prepared;
        let batch =
            LargestBatch::of_run(dataset, &shape.prompts, config, shape.dedups_sequences())?;
        // Now, with tokenizer and data in memory.
        let machine = MachineMemory::read();
        shape.process_bytes = machine.process_in_training();
        let asked = args.training.memory_budget;
        let budget = match asked {
            Some(budget) => Some(budget.bytes(machine.total.unwrap_or(u64::MAX))),
            None => machine.within_reach(),
        };
        let cut = resume::cut(args.training.cut(), prepared.checkpoint.as_ref());
        let plan = DryRun::new(shape.clone())?.choose(&batch, cut, budget.unwrap_or(u64::MAX))?;
        Ok(Forecast { plan, batch, budget, asked: asked.is_some(), machine, shape, cut })
    }

    /// Whether the run stays within its budget.
    pub(crate) fn fits(&self) -> bool {
        self.budget.is_none_or(|budget| self.plan.peak_bytes() <= budget)
    }

    /// The plan in a few words: memory, pieces.
    pub(crate) fn lines(&self) -> Vec<String> {
        let plan = &self.plan;
        let of = match (self.budget, self.asked) {
            (Some(budget), true) => format!(" of {}", bytes(budget)),
            (Some(budget), false) => format!(" of {} within reach", bytes(budget)),
            (None, _) => String::new(),
        };
        let mut lines = vec![
            format!(
                "memory    {}{of}, at the peak, in {}",
                bytes(plan.peak_bytes()),
                plan.peak_phase()
            ),
            format!("pieces    {}", self.pieces()),
        ];
        if !self.fits() && !self.asked {
            lines.push(
                "warning: that is more than the free memory; other programs may be affected".into(),
            );
        }
        lines
    }

    /// How the batch is divided into chunks.
    pub(crate) fn pieces(&self) -> String {
        let chunks = &self.plan.chunks;
        if chunks.count == 1 && chunks.recomputed_share == 0.0 {
            return format!("one pass over {} tokens", count(chunks.tokens));
        }
        let mut text = format!(
            "{} of at most {} tokens",
            counted(chunks.count, "chunk"),
            count(chunks.largest_tokens)
        );
        if chunks.kept > 0 {
            let _ = write!(text, ", {} kept", count(chunks.kept));
        }
        // A third of what one pass does is forward.
        let percent = 100.0 * chunks.recomputed_share;
        let _ = write!(
            text,
            "; {percent:.0} % of the tokens go forward twice, {:.0} % more work",
            percent / 3.0
        );
        text
    }

    /// Refuses a run that exceeds the budget that it was given, or the machine.
    pub(super) fn refuse_if_too_large(&self, prepared: &Prepared) -> Result<()> {
        match self.refusal(prepared)? {
            Some(refusal) => Err(refusal),
            None => Ok(()),
        }
    }

    /// Why the run would be refused, with what would help.
    pub(crate) fn refusal(&self, prepared: &Prepared) -> Result<Option<Error>> {
        let limit = if self.asked { self.budget } else { self.machine.total };
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
        let smallest = match self.cut {
            Cut::Free if plan.peak_phase() == "training" => ", in the smallest pieces",
            _ => "",
        };
        let remedies = self.remedies(prepared, limit)?;
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
                "{} in {}{smallest}; a step takes {}",
                bytes(plan.peak_bytes()),
                plan.peak_phase(),
                parts.join(", ")
            ))
            .hint(hint),
        ))
    }

    /// Settings with which the run would fit, each with what it would then take.
    fn remedies(&self, prepared: &Prepared, limit: u64) -> Result<Vec<String>> {
        let mut remedies = Vec::new();
        let mut consider = |option: &str, shape: &RunShape, batch: &LargestBatch, cut| {
            let peak = DryRun::new(shape.clone())?.choose(batch, cut, limit)?.peak_bytes();
            if peak <= limit {
                remedies.push(format!("{option} takes {}", bytes(peak)));
            }
            Ok::<bool, Error>(peak <= limit)
        };
        let smallest = Cut::Fixed(SMALLEST);
        if let Cut::Fixed(_) | Cut::Size(_) = self.cut {
            let option = "--chunk-tokens auto without --sub-batch-size";
            consider(option, &self.shape, &self.batch, Cut::Free)?;
        }
        if self.shape.lora.is_none() {
            let lora = Some(LoraConfig::default());
            let shape = RunShape { lora, ..self.shape.clone() };
            consider("--use-lora true", &shape, &self.batch, smallest)?;
        }
        if self.shape.precision == Dtype::F32 {
            let shape = RunShape { precision: Dtype::Bf16, ..self.shape.clone() };
            consider("--dtype bf16", &shape, &self.batch, smallest)?;
        }
        // Shorter texts change nothing about the weights.
        let fixed = self.plan.training.without_activations();
        let mut max_len = prepared.config.passage_max_len / 2;
        let has_room = |max_len| self.shape.prompts.check_max_len(Role::Passage, max_len).is_ok();
        while has_room(max_len) && fixed.max(self.plan.saving_bytes) < limit {
            let batch = self.batch.with_passages_cut(max_len)?;
            let option = format!("--passage-max-len {max_len}");
            if consider(&option, &self.shape, &batch, smallest)? {
                break;
            }
            max_len /= 2;
        }
        Ok(remedies)
    }

    /// Work of a step in words.
    pub(crate) fn work(&self) -> String {
        let work = self.plan.work;
        format!(
            "{} needed, {} done ({:.2} ×)",
            operations(work.needed_flops),
            operations(work.done_flops),
            work.done_flops as f64 / work.needed_flops.max(1) as f64
        )
    }
}
