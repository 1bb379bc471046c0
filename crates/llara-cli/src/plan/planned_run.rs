//! What a plan says of a run, whatever the run trains for.

use llara::data::Lengths;
use llara::model::DecoderConfig;
use serde_json::{Map, Value, json};

use super::network::NetworkPlan;
use super::picture;
use crate::talk::{count, counted, print, say};
use crate::training::Forecast;

/// Lengths of the texts of one kind in tokens, before truncation.
pub(super) struct PlannedTexts {
    /// The key in the result.
    pub(super) name: &'static str,
    pub(super) plural: &'static str,
    /// Whether the tokens of the template are counted.
    pub(super) template_included: bool,
    pub(super) lengths: Lengths,
    /// Maximum length in tokens.
    pub(super) max_len: usize,
    /// The fraction of texts that are truncated.
    pub(super) truncated_share: f64,
}

impl PlannedTexts {
    fn json(&self) -> Value {
        let mut summary = json!(self.lengths.summary());
        summary["max_len"] = self.max_len.into();
        summary["cut_share"] = self.truncated_share.into();
        summary
    }
}

/// A planned run.
pub(super) struct PlannedRun<'p> {
    /// The verb of the run.
    pub(super) verb: &'static str,
    /// The model's name and configuration.
    pub(super) model: (&'p str, &'p DecoderConfig),
    pub(super) texts: &'p [PlannedTexts],
    /// What is noteworthy about the texts.
    pub(super) notes: Vec<String>,
    /// What the batch consists of, in words.
    pub(super) batch: String,
    /// The same as an object.
    pub(super) batch_sizes: Value,
    pub(super) forecast: &'p Forecast,
    /// Memory and traffic of one of several processes.
    pub(super) network: Option<NetworkPlan>,
}

impl PlannedRun<'_> {
    /// Prints pictures and lines for people, then the result as JSON.
    pub(super) fn print(self) -> anyhow::Result<()> {
        let refusal = self.forecast.refusal()?;
        let mut lines: Vec<String> = self.texts.iter().flat_map(picture::lengths).collect();
        lines.extend(self.notes.iter().cloned());
        lines.push(String::new());
        lines.extend(picture::memory(&self.forecast.plan));
        lines.push(String::new());
        lines.extend(self.lines());
        lines.extend(refusal.iter().map(|error| format!("{} would refuse: {error}", self.verb)));
        for line in lines {
            say!("{line}");
        }
        Ok(print(self.json(refusal.is_some()))?)
    }

    /// Model, batch, work, memory, chunks and network.
    fn lines(&self) -> Vec<String> {
        let (forecast, batch) = (self.forecast, &self.forecast.batch);
        let (name, config) = self.model;
        let mut lines = vec![
            format!(
                "model     {name}: {}, hidden {}, vocabulary {}",
                counted(config.num_hidden_layers, "layer"),
                config.hidden_size,
                count(config.vocab_size)
            ),
            format!(
                "batch     {}, {} encoded tokens; the largest expected batch of {}, {} sampled",
                self.batch,
                count(forecast.plan.chunks.tokens),
                counted(batch.steps as usize, "step"),
                count(batch.sampled_steps as usize)
            ),
            format!("work      {} per step", forecast.work()),
        ];
        lines.extend(forecast.lines());
        lines.extend(self.network.iter().flat_map(NetworkPlan::lines));
        lines
    }

    fn json(&self, refused: bool) -> Value {
        let Forecast { plan, batch, budget, .. } = self.forecast;
        let lengths = self.texts.iter().map(|texts| (texts.name.to_owned(), texts.json()));
        let mut sizes = self.batch_sizes.clone();
        sizes["steps"] = batch.steps.into();
        sizes["sampled_steps"] = batch.sampled_steps.into();
        let mut result = json!({
            "peak_bytes": plan.peak_bytes(),
            "peak_phase": plan.peak_phase(),
            "budget_bytes": budget,
            "fits": self.forecast.fits(),
            "refused": refused,
            "plan": plan,
            "batch": sizes,
            "lengths": lengths.collect::<Map<_, _>>(),
        });
        if let Some(network) = &self.network {
            result["network"] = network.json();
        }
        result
    }
}
