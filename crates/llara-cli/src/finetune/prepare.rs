//! Preparation of a run before the weights are read: settings, data, model configuration, tokenizer.

use std::path::{Path, PathBuf};

use clap::error::ErrorKind as Usage;
use llara::backend::{Backend, Dtype};
use llara::data::{BadRows, DataSources, Dataset};
use llara::loss::{ObjectiveContext, ObjectiveOptions};
use llara::model::{LoraConfig, SavedTokens};
use llara::retrieval::BLOCK_TEXTS;
use llara::text::Template;
use llara::train::plan::TextLengths;
use llara::train::{Checkpoint, Evaluation, TrainConfig};
use llara::{
    BiEncoderModel, BiEncoderOptions, Error, ErrorKind, FolderLock, Loader, Outline, Probes,
    Recipe, Role,
};

use super::flag_table::OwnSettings;
use super::lora_args::Adapter;
use super::ranges;
use super::resume::Claimed;
use super::{Args, ModelArgs};
use crate::processes::Processes;
use crate::talk::{counted, say};
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

    /// The folder of a model, or for a plan one that may lack the weights. Downloads what is missing.
    pub(crate) fn find_model(&self, name: &str, args: &ModelArgs) -> llara::Result<PathBuf> {
        let find = match self {
            Purpose::Run(_) | Purpose::Compare => trained_model::find,
            Purpose::Plan => trained_model::find_outline,
        };
        find(name, args.cache_dir.as_deref(), "--from-peft")
    }
}

/// A run before its weights are read.
pub(crate) struct Prepared<B: Backend> {
    pub(crate) model_name: String,
    pub(crate) config: TrainConfig,
    pub(super) adapter: Adapter,
    pub(crate) dataset: Dataset,
    /// The evaluation during the run, if there is one.
    pub(crate) evaluation: Option<Evaluation>,
    /// The model's folder.
    dir: PathBuf,
    /// The recipe of the trained model.
    pub(super) recipe: Recipe,
    pub(crate) outline: Outline,
    pub(super) backend: B,
    /// The lock of the output folder; the first process has it.
    lock: Option<FolderLock>,
    /// The checkpoint that the run continues from.
    pub(super) checkpoint: Option<Checkpoint>,
    /// The number format of activations.
    pub(super) precision: Dtype,
    /// Number of processes.
    pub(super) ranks: usize,
    /// Number of processes on this host.
    pub(super) local_processes: usize,
}

impl<B: Backend> Prepared<B> {
    /// Checks the options, then the data, then the model's configuration and tokenizer. Every process does; an
    /// error of one is an error of all.
    pub(crate) fn new(
        args: &Args,
        purpose: Purpose,
        backend: B,
        processes: &Processes,
    ) -> anyhow::Result<Self> {
        let options = processes.agree(Options::check(args, purpose.output_dir()))?;
        let dtype = (&args.training, &args.precision);
        let output = (&args.output, purpose.output_dir().map(Path::to_owned));
        let claimed = Claimed::by_first(output, dtype, &backend, processes)?;
        if !matches!(purpose, Purpose::Plan) {
            let cache = args.model.cache_dir.as_deref();
            trained_model::download_once(&options.model_name, cache, "--from-peft", processes)?;
        }
        processes.agree(Self::read(args, &purpose, backend, options, claimed, processes))
    }

    /// Reads and checks data, configuration and tokenizer.
    fn read(
        args: &Args,
        purpose: &Purpose,
        backend: B,
        options: Options,
        claimed: Claimed,
        processes: &Processes,
    ) -> anyhow::Result<Self> {
        let Options { model_name, objective, sources, template, adapter } = options;
        let Claimed { output_dir, lock, checkpoint, precision } = claimed;
        let ranks = processes.size();
        let group_size = args.data.train_group_size;
        let mut dataset = Dataset::open_sources(sources, args.data.on_bad_row)?;
        if args.data.on_bad_row == BadRows::Skip {
            dataset.skip_short_groups(group_size)?;
        }
        dataset.check_group(group_size)?;
        checkpoint.iter().try_for_each(|checkpoint| checkpoint.check_data(&dataset))?;

        let dir = purpose.find_model(&model_name, &args.model)?;
        let base = starting_recipe(&dir, &adapter, template.as_ref())?;
        let outline = outline(args, &dir, &base, &adapter)?;
        let recipe = args.recipe(base, dataset.sources())?;
        let mut config = args.train_config(output_dir, &recipe, 0);
        objective.check(&ObjectiveContext {
            dimension: outline.decoder.hidden_size,
            group_size,
            negatives_cross_device: args.model_options(&recipe, ranks).negatives_cross_device,
        })?;
        if let Some(distillation) = &objective.distillation {
            dataset.check_teacher_scores(distillation.temperature)?;
        }
        config.objective = objective;
        config.batching = args.data.batching(&dataset)?;
        // Errors of the sampler are reported before a large model is read.
        let steps_per_epoch = config.sampler(&dataset, ranks)?.steps_per_epoch();
        config.saving = args.train_config(PathBuf::new(), &recipe, steps_per_epoch).saving;
        let evaluation = args.evaluation.open(&args.output, steps_per_epoch)?;
        for (role, option, max_len) in [
            (Role::Query, "--query-max-len", config.query_max_len),
            (Role::Passage, "--passage-max-len", config.passage_max_len),
        ] {
            let checked = outline.prompts.check_max_len(role, max_len);
            checked.map_err(|e| e.got(format!("{option} {max_len}")))?;
        }
        check_vocabulary(&config, &dataset, &outline)?;
        evaluation.iter().try_for_each(|e| check_evaluated_texts(&config, e, &outline))?;
        Ok(Prepared {
            model_name,
            config,
            adapter,
            dataset,
            evaluation,
            dir,
            recipe,
            outline,
            backend,
            lock,
            checkpoint,
            precision,
            ranks,
            local_processes: processes.placement().local_processes,
        })
    }

    /// Whether the output folder was created for this run.
    pub(super) fn created_output_dir(&self) -> bool {
        self.lock.as_ref().is_some_and(FolderLock::created_folder)
    }

    /// The adapter's settings, if there is one.
    pub(super) fn lora(&self) -> llara::Result<Option<LoraConfig>> {
        Ok(match &self.adapter {
            Adapter::None => None,
            Adapter::New(lora) => Some(self.with_added_tokens(lora)),
            Adapter::From(dir) => {
                let mut lora = LoraConfig::from_peft(dir)?;
                if lora.saved_tokens == SavedTokens::ModulesToSave {
                    // Which rows differ from the base model's is known when its weights are read: at most all.
                    lora.trained_tokens = (0..self.outline.decoder.vocab_size as u32).collect();
                }
                Some(lora)
            }
        })
    }

    /// The settings of a new adapter, which trains the embeddings of added tokens.
    fn with_added_tokens(&self, lora: &LoraConfig) -> LoraConfig {
        LoraConfig { trained_tokens: self.outline.added_tokens.clone(), ..lora.clone() }
    }

    /// Lengths of queries and passages, measured on about `texts` texts.
    pub(crate) fn lengths(&self, texts: usize) -> llara::Result<[TextLengths; 2]> {
        TextLengths::sample(&self.dataset, &self.outline.prompts, &self.config, texts)
    }

    /// The number format of activations.
    pub(crate) fn precision(&self) -> Dtype {
        self.precision
    }

    /// Reads the weights and attaches the adapter.
    pub(crate) fn load(&self, args: &Args) -> llara::Result<BiEncoderModel<B>> {
        let mut loader = loader(&self.dir, &self.recipe, &self.adapter)?;
        let precision = self.precision;
        if !matches!(self.adapter, Adapter::None) {
            loader = loader.matrices(precision);
        }
        let options = args.model_options(&self.recipe, self.ranks);
        // The loader refuses negatives of all processes, because it knows no group.
        let alone = BiEncoderOptions { negatives_cross_device: false, ..options };
        let mut model = loader.load_weights(self.outline.clone(), self.backend.clone(), alone)?;
        model.set_negatives_cross_device(options.negatives_cross_device);
        match &self.adapter {
            Adapter::None => {}
            Adapter::New(lora) => {
                model.attach_new_adapter(&self.with_added_tokens(lora), self.config.seed)?;
            }
            Adapter::From(dir) => {
                model.attach_adapter(dir).map_err(|e| trained_model::name_recorded_base(e, dir))?
            }
        }
        model.set_precision(precision)?;
        self.check_probes(&model)?;
        Ok(model)
    }

    /// Compares the model, before it is trained, with the probes in its folder or in that of its adapter, as far
    /// as this run computes embeddings as they were computed.
    fn check_probes(&self, model: &BiEncoderModel<B>) -> llara::Result<()> {
        let dir = match &self.adapter {
            Adapter::From(dir) => dir,
            Adapter::None | Adapter::New(_) => &self.dir,
        };
        let Some(saved) = Recipe::read(dir)? else { return Ok(()) };
        let pooled = |recipe: &Recipe| (recipe.template.pooled_tokens, recipe.normalized);
        if pooled(&saved) != pooled(model.recipe()) {
            return Ok(());
        }
        let Some(probes) = Probes::read(dir)? else { return Ok(()) };
        probes.check_embeddings(model).map_err(|error| match &self.adapter {
            Adapter::From(adapter) => trained_model::name_recorded_base(error.file(dir), adapter),
            Adapter::None | Adapter::New(_) => error.file(dir),
        })
    }
}

/// The options that were checked without reading a model or data.
struct Options {
    model_name: String,
    objective: ObjectiveOptions,
    sources: DataSources,
    template: Option<Template>,
    adapter: Adapter,
}

impl Options {
    fn check(args: &Args, output_dir: Option<&Path>) -> anyhow::Result<Self> {
        let model_name = required(args)?;
        let own = OwnSettings {
            model: &model_name,
            seed: args.training.seed,
            evaluates: args.evaluation.evaluates(),
        };
        let mut notes = args.trainer_flags.check(&own)?;
        notes.extend(args.evaluation.check()?);
        for line in notes {
            say!("note: {line}");
        }
        ranges::check(args)?;
        let mut objective = args.objective.objective()?;
        objective.reference_gradient_scale = args.distributed.reference_gradient_scale;
        let sources = DataSources::read(&args.data.train_data)?;
        let template = args.model.template.as_deref().map(trained_model::template).transpose()?;
        let adapter = args.lora.adapter()?;
        if let Some(output_dir) = output_dir {
            check_apart(args, output_dir, &adapter, &model_name, &sources)?;
        }
        Ok(Options { model_name, objective, sources, template, adapter })
    }
}

/// The initial recipe: that of the adapter, of the model, or the default one.
pub(crate) fn starting_recipe(
    dir: &Path,
    adapter: &Adapter,
    template: Option<&Template>,
) -> llara::Result<Recipe> {
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
) -> llara::Result<Loader<'d>> {
    let loader = Loader::new(dir)?.with_recipe(recipe.clone());
    Ok(match adapter {
        Adapter::None => loader,
        Adapter::New(_) => loader.vocabulary_in_adapter(true),
        Adapter::From(adapter) => loader.with_adapter(adapter),
    })
}

/// Reads configuration and tokenizer. Adding tokens to an adapter that exists already is refused.
fn outline(args: &Args, dir: &Path, recipe: &Recipe, adapter: &Adapter) -> llara::Result<Outline> {
    let read = |add| loader(dir, recipe, adapter)?.add_special_tokens(add).outline();
    let outline = match (args.model.add_special_tokens, adapter) {
        (add, Adapter::None | Adapter::New(_)) => read(add)?,
        // Its tokenizer may have other tokens without an embedding.
        (add, Adapter::From(dir)) => read(false)
            .or_else(|error| if add { read(true) } else { Err(error) })
            .map_err(|error| trained_model::name_recorded_base(error, dir))?,
    };
    let add = args.model.add_special_tokens;
    if args.lora.save_tokens_as.is_some() && outline.added_tokens.is_empty() {
        say!("note: --save-tokens-as has no effect: no token is added");
    }
    match (outline.added_tokens.len(), adapter) {
        (0, _) if add => say!(
            "note: --add-special-tokens has no effect: the model has all special tokens of template {}",
            recipe.template.name
        ),
        (1.., Adapter::From(dir)) => {
            return Err(Error::new(
                ErrorKind::Argument,
                "tokens cannot be added to an adapter that exists already",
            )
            .file(dir)
            .expected(format!("all special tokens of template `{}`", recipe.template.name))
            .got(counted(outline.added_tokens.len(), "token without an embedding"))
            .hint(
                "merge the adapter into its model (llara merge), and train a new one on the result",
            ));
        }
        _ => {}
    }
    Ok(outline)
}

/// The usage error for a required option that is missing.
pub(crate) fn missing(option: &str) -> clap::Error {
    let text = format!("{option} is required, on the command line or in the run file\n");
    clap::Error::raw(Usage::MissingRequiredArgument, text)
}

/// The model's name, and whether there is training data.
pub(crate) fn required(args: &Args) -> Result<String, clap::Error> {
    if args.data.train_data.is_empty() {
        return Err(missing("--train-data"));
    }
    args.model.model.clone().ok_or_else(|| missing("--model"))
}

/// Refuses an output folder that contains an input or is inside one.
fn check_apart(
    args: &Args,
    output_dir: &Path,
    adapter: &Adapter,
    model: &str,
    sources: &DataSources,
) -> llara::Result<()> {
    let mut inputs = vec![("the model", Path::new(model))];
    if let Adapter::From(dir) = adapter {
        inputs.push(("the adapter", dir));
    }
    inputs.extend(args.data.train_data.iter().map(|path| ("training data", path.as_path())));
    inputs.extend(sources.paths().map(|path| ("training data", path)));
    inputs.extend(args.evaluation.folders().map(|path| ("the evaluation data", path)));
    paths::check_apart(output_dir, &inputs)
}

/// Refuses data with tokens for which the model has no embedding. All texts are tokenized for that only if
/// the tokenizer's vocabulary is larger than the model's.
fn check_vocabulary(
    config: &TrainConfig,
    dataset: &Dataset,
    outline: &Outline,
) -> llara::Result<()> {
    let prompts = &outline.prompts;
    if prompts.tokenizer().vocab_size() <= outline.decoder.vocab_size {
        return Ok(());
    }
    (0..dataset.len()).try_for_each(|index| {
        let row = dataset.row(index)?;
        let query = [config.query_text(row.prompt.as_deref(), &row.query)];
        let of_file = row.passage_instruction.as_deref();
        let passages: Vec<String> =
            row.pos.iter().chain(&row.neg).map(|text| config.passage_text(of_file, text)).collect();
        let check = |role, texts: &[String], max_len| {
            prompts.encode_all(role, texts, max_len).map(drop).map_err(|e| {
                match dataset.location(index) {
                    Some((path, line)) => e.line(path, line),
                    None => e,
                }
            })
        };
        check(Role::Query, &query, config.query_max_len)?;
        check(Role::Passage, &passages, config.passage_max_len)
    })
}

/// The same for the texts of an evaluation.
pub(crate) fn check_evaluated_texts(
    config: &TrainConfig,
    evaluation: &Evaluation,
    outline: &Outline,
) -> llara::Result<()> {
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
