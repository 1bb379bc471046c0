//! What every training verb prepares before weights are read.

use std::path::{Path, PathBuf};

use clap::error::ErrorKind as Usage;
use llara::backend::Backend;
use llara::model::LoraConfig;
use llara::retrieval::BLOCK_TEXTS;
use llara::text::Template;
use llara::train::{Evaluation, TrainConfig};
use llara::{BiEncoderModel, Loader, Outline, Probes, Recipe, Result, Role};

use super::args::{CommonArgs, ModelArgs};
use super::flag_table::OwnSettings;
use super::lora_args::Adapter;
use super::resume::Claimed;
use crate::processes::Processes;
use crate::talk::say;
use crate::{paths, trained_model};

/// The purpose of a preparation.
pub(crate) enum Purpose {
    /// A training run with this output folder.
    Run(PathBuf),
    /// An estimate: no weights are read and nothing is saved.
    Plan,
    /// A comparison of runs: nothing is saved.
    Compare,
}

impl Purpose {
    /// The output folder, if the run saves a model.
    pub(crate) fn output_dir(&self) -> Option<&Path> {
        match self {
            Purpose::Run(output_dir) => Some(output_dir),
            Purpose::Plan | Purpose::Compare => None,
        }
    }

    /// Claims the output folder and chooses the number format, the first process for all; then downloads the model,
    /// unless the run is only planned. Every process calls it.
    pub(crate) fn claim(
        &self,
        model_name: &str,
        (model, common): (&ModelArgs, &CommonArgs),
        backend: &impl Backend,
        processes: &Processes,
    ) -> anyhow::Result<Claimed> {
        let dtype = (&common.training, &common.precision);
        let output = (&common.output, self.output_dir().map(Path::to_owned));
        let claimed = Claimed::by_first(output, dtype, backend, processes)?;
        if !matches!(self, Purpose::Plan) {
            let cache = model.cache_dir.as_deref();
            trained_model::download_once(model_name, cache, "--from-peft", processes)?;
        }
        Ok(claimed)
    }

    /// The folder of a model, or for a plan one that may lack the weights. Downloads what is missing.
    pub(crate) fn find_model(&self, name: &str, args: &ModelArgs) -> llara::Result<PathBuf> {
        let find = match self {
            Purpose::Run(_) | Purpose::Compare => trained_model::find,
            Purpose::Plan => trained_model::find_outline,
        };
        find(name, args.cache_dir.as_deref(), "--from-peft")
    }
}

/// The options of every training verb, checked without reading a model or data.
pub(crate) struct CheckedArgs {
    pub(crate) model_name: String,
    pub(crate) template: Option<Template>,
    pub(crate) adapter: Adapter,
}

impl CheckedArgs {
    /// Checks the options, and prints notes about those that mean something else here.
    ///
    /// # Errors
    /// A usage error without a model, and the first option that cannot be used.
    pub(crate) fn new(model: &ModelArgs, common: &CommonArgs) -> anyhow::Result<Self> {
        let model_name = model.model.clone().ok_or_else(|| missing("--model"))?;
        let own = OwnSettings {
            model: &model_name,
            seed: common.training.seed,
            evaluates: common.evaluation.evaluates(),
        };
        let mut notes = common.trainer_flags.check(&own)?;
        notes.extend(common.evaluation.check()?);
        for line in notes {
            say!("note: {line}");
        }
        let template = model.template.as_deref().map(trained_model::template).transpose()?;
        let adapter = common.lora.adapter()?;
        Ok(CheckedArgs { model_name, template, adapter })
    }

    /// Refuses an output folder that contains an input or is inside one. `others` are the inputs that not every
    /// training verb has, each with what it is.
    pub(crate) fn check_apart<'p>(
        &'p self,
        output_dir: &Path,
        common: &'p CommonArgs,
        others: impl IntoIterator<Item = (&'p str, &'p Path)>,
    ) -> Result<()> {
        let mut inputs = vec![("the model", Path::new(&self.model_name))];
        if let Adapter::From(dir) = &self.adapter {
            inputs.push(("the adapter", dir));
        }
        inputs.extend(others);
        inputs.extend(common.evaluation.folders().map(|path| ("the evaluation data", path)));
        paths::check_apart(output_dir, &inputs)
    }
}

/// The usage error for a required option that is missing.
pub(crate) fn missing(option: &str) -> clap::Error {
    let text = format!("{option} is required, on the command line or in the run file\n");
    clap::Error::raw(Usage::MissingRequiredArgument, text)
}

/// The initial recipe: that of the adapter, of the model, or the default one.
pub(crate) fn starting_recipe(
    dir: &Path,
    adapter: &Adapter,
    template: Option<&Template>,
) -> Result<Recipe> {
    let of_adapter = match adapter {
        Adapter::From(dir) => Recipe::read(dir)?,
        Adapter::None | Adapter::New(_) => None,
    };
    let mut recipe = match of_adapter {
        Some(recipe) => recipe,
        None => Loader::new(dir)?.recipe().clone(),
    };
    if let Some(template) = template {
        recipe.template = template.clone();
    }
    Ok(recipe)
}

/// The loader of the model that is trained: the embeddings of added tokens are in the adapter, if there is one.
pub(crate) fn loader<'d>(
    dir: &'d Path,
    recipe: &Recipe,
    adapter: &'d Adapter,
) -> Result<Loader<'d>> {
    let loader = Loader::new(dir)?.with_recipe(recipe.clone());
    Ok(match adapter {
        Adapter::None => loader,
        Adapter::New(_) => loader.vocabulary_in_adapter(true),
        Adapter::From(adapter) => loader.with_adapter(adapter),
    })
}

/// The settings of a new adapter, which trains the embeddings of added tokens.
pub(crate) fn with_added_tokens(lora: &LoraConfig, added_tokens: &[u32]) -> LoraConfig {
    LoraConfig { trained_tokens: added_tokens.to_vec(), ..lora.clone() }
}

/// Attaches the adapter that is trained, if there is one.
pub(crate) fn attach_adapter<B: Backend>(
    model: &mut BiEncoderModel<B>,
    adapter: &Adapter,
    added_tokens: &[u32],
    seed: u64,
) -> Result<()> {
    match adapter {
        Adapter::None => Ok(()),
        Adapter::New(lora) => {
            model.attach_new_adapter(&with_added_tokens(lora, added_tokens), seed)
        }
        Adapter::From(dir) => {
            model.attach_adapter(dir).map_err(|e| trained_model::name_recorded_base(e, dir))
        }
    }
}

/// Compares a model, before it is trained, with the probes in its folder or in that of its adapter, as far as this run
/// computes embeddings as they were computed.
pub(crate) fn check_probes<B: Backend>(
    dir: &Path,
    adapter: &Adapter,
    model: &BiEncoderModel<B>,
) -> Result<()> {
    let saved_in = match adapter {
        Adapter::From(adapter) => adapter,
        Adapter::None | Adapter::New(_) => dir,
    };
    let Some(saved) = Recipe::read(saved_in)? else { return Ok(()) };
    let pooled = |recipe: &Recipe| (recipe.template.pooled_tokens, recipe.normalized);
    if pooled(&saved) != pooled(model.recipe()) {
        return Ok(());
    }
    let Some(probes) = Probes::read(saved_in)? else { return Ok(()) };
    probes.check_embeddings(model).map_err(|error| match adapter {
        Adapter::From(adapter) => trained_model::name_recorded_base(error.file(adapter), adapter),
        Adapter::None | Adapter::New(_) => error.file(dir),
    })
}

/// Refuses an evaluation of texts with tokens for which the model has no embedding. They are tokenized for that only if
/// the tokenizer's vocabulary is larger than the model's.
pub(crate) fn check_evaluated_texts(
    config: &TrainConfig,
    evaluation: &Evaluation,
    outline: &Outline,
) -> Result<()> {
    let prompts = &outline.prompts;
    if prompts.tokenizer().vocab_size() <= outline.decoder.vocab_size {
        return Ok(());
    }
    let check = |role, texts: &[String], max_len| {
        let mut blocks = texts.chunks(BLOCK_TEXTS.get());
        blocks.try_for_each(|block| prompts.encode_all(role, block, max_len).map(drop))
    };
    evaluation.sets.iter().try_for_each(|set| {
        check(Role::Query, &set.dataset.queries.texts, config.query_max_len)?;
        check(Role::Passage, &set.dataset.corpus.texts, config.passage_max_len)
    })
}
