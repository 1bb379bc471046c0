//! Preparation of a run before the weights are read: settings, data, model configuration, tokenizer.

use std::path::{Path, PathBuf};

use llara::backend::{Backend, Dtype};
use llara::data::{BadRows, DataSources, Dataset};
use llara::loss::{ObjectiveContext, ObjectiveOptions};
use llara::model::{LoraConfig, SavedTokens};
use llara::train::plan::TextLengths;
use llara::train::{Checkpoint, Evaluation, TrainConfig};
use llara::{
    BiEncoderModel, BiEncoderOptions, Error, ErrorKind, FolderLock, Outline, Recipe, Role,
};

use super::{Args, ranges};
use crate::processes::Processes;
use crate::talk::{counted, say};
use crate::trained_model;
use crate::training::{
    Adapter, CheckedArgs, Claimed, Purpose, attach_adapter, check_evaluated_texts, check_probes,
    loader, missing, starting_recipe, with_added_tokens,
};

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
        let given = (&args.model, &args.common);
        let claimed = purpose.claim(&options.common.model_name, given, &backend, processes)?;
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
        let Options { common: CheckedArgs { model_name, template, adapter }, objective, sources } =
            options;
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
        let evaluation = args.common.evaluation.open(&args.common.output, steps_per_epoch)?;
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
            Adapter::New(lora) => Some(with_added_tokens(lora, &self.outline.added_tokens)),
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
        let added = &self.outline.added_tokens;
        attach_adapter(&mut model, &self.adapter, added, self.config.seed)?;
        model.set_precision(precision)?;
        check_probes(&self.dir, &self.adapter, &model)?;
        Ok(model)
    }
}

/// The options that were checked without reading a model or data.
struct Options {
    common: CheckedArgs,
    objective: ObjectiveOptions,
    sources: DataSources,
}

impl Options {
    fn check(args: &Args, output_dir: Option<&Path>) -> anyhow::Result<Self> {
        required(args)?;
        let common = CheckedArgs::new(&args.model, &args.common)?;
        ranges::check(args)?;
        let mut objective = args.objective.objective()?;
        objective.reference_gradient_scale = args.distributed.reference_gradient_scale;
        let sources = DataSources::read(&args.data.train_data)?;
        if let Some(output_dir) = output_dir {
            let data = args.data.train_data.iter().map(PathBuf::as_path).chain(sources.paths());
            let data = data.map(|path| ("training data", path));
            common.check_apart(output_dir, &args.common, data)?;
        }
        Ok(Options { common, objective, sources })
    }
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
    if args.common.lora.save_tokens_as.is_some() && outline.added_tokens.is_empty() {
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

/// The model's name, and whether there is training data.
pub(crate) fn required(args: &Args) -> Result<String, clap::Error> {
    if args.data.train_data.is_empty() {
        return Err(missing("--train-data"));
    }
    args.model.model.clone().ok_or_else(|| missing("--model"))
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
