//! Preparation of a run before the weights are read: settings, model configuration, tokenizer, data.

use std::path::{Path, PathBuf};

use llara::backend::{Backend, Dtype};
use llara::data::{PieceLength, PretrainingData, first_characters};
use llara::model::{DecoderConfig, LoraConfig};
use llara::text::PromptEncoder;
use llara::train::{
    Checkpoint, Evaluation, PretrainingEncoder, PretrainingOptions, PretrainingSample,
    SetObjective, TrainConfig,
};
use llara::{BiEncoderModel, Error, ErrorKind, FolderLock, Outline, Recipe, Result};

use super::args::Args;
use crate::processes::Processes;
use crate::talk::say;
use crate::trained_model::MAX_LEN;
use crate::training::{
    Adapter, CheckedArgs, Claimed, Purpose, attach_adapter, check_evaluated_texts, check_loop,
    check_probes, loader, missing, require, starting_recipe,
};

/// Characters of the first texts on which the length of tokens is measured.
const MEASURED_CHARACTERS: usize = 1 << 18;
/// Share of the room for a text that a piece of average tokens takes, so that most pieces fit.
const FILLED: f64 = 0.9;
/// Rows whose lengths and targets are looked at before the run.
const SAMPLED_ROWS: usize = 2_000;

/// A run before its weights are read.
pub(crate) struct Prepared<B: Backend> {
    pub(crate) model_name: String,
    pub(crate) config: TrainConfig,
    pub(super) options: PretrainingOptions,
    pub(super) adapter: Adapter,
    pub(crate) data: PretrainingData,
    pub(crate) sample: PretrainingSample,
    pub(super) evaluation: Option<Evaluation>,
    pub(super) recipe: Recipe,
    pub(crate) outline: Outline,
    pub(super) backend: B,
    pub(super) checkpoint: Option<Checkpoint>,
    pub(super) precision: Dtype,
    /// The model's folder.
    dir: PathBuf,
    /// The lock of the output folder; the first process has it.
    lock: Option<FolderLock>,
    /// Number of processes.
    pub(super) ranks: usize,
    /// Number of processes on this host.
    pub(super) local_processes: usize,
}

/// The options that were checked without reading a model or data.
struct Checked {
    common: CheckedArgs,
    options: PretrainingOptions,
}

impl<B: Backend> Prepared<B> {
    /// Checks the options, then the model's configuration and tokenizer, then the data. Every process does; an error of
    /// one is an error of all.
    pub(crate) fn new(
        args: &Args,
        purpose: Purpose,
        backend: B,
        processes: &Processes,
    ) -> anyhow::Result<Self> {
        let checked = processes.agree(Checked::of(args, purpose.output_dir()))?;
        let given = (&args.model, &args.common);
        let claimed = purpose.claim(&checked.common.model_name, given, &backend, processes)?;
        processes.agree(Self::read(args, &purpose, backend, checked, claimed, processes))
    }

    /// Reads and checks configuration, tokenizer and data.
    fn read(
        args: &Args,
        purpose: &Purpose,
        backend: B,
        checked: Checked,
        claimed: Claimed,
        processes: &Processes,
    ) -> anyhow::Result<Self> {
        let Checked { common: CheckedArgs { model_name, template, adapter }, options } = checked;
        let Claimed { output_dir, lock, checkpoint, precision } = claimed;
        let ranks = processes.size();

        let dir = purpose.find_model(&model_name, &args.model)?;
        let mut recipe = starting_recipe(&dir, &adapter, template.as_ref())?;
        recipe.normalized = args.model.normalized.unwrap_or(recipe.normalized);
        let outline = outline(args.model.add_special_tokens, &dir, &recipe, &adapter)?;
        recipe.make_room(&outline.prompts);
        let encoder = PretrainingEncoder::new(outline.prompts.clone(), &options)?;

        let data = open_data(args, &outline.prompts, encoder.text_tokens())?;
        let dataset = data.dataset();
        checkpoint.iter().try_for_each(|checkpoint| checkpoint.check_data(dataset))?;
        let mut config = args.train_config(output_dir, &recipe, 0);
        let steps_per_epoch = config.sampler(dataset, ranks)?.steps_per_epoch();
        config.saving = args.common.output.saving(steps_per_epoch);
        let evaluation = args.common.evaluation.open(&args.common.output, steps_per_epoch)?;
        check_vocabulary(&data, &encoder, &outline)?;
        evaluation.iter().try_for_each(|e| check_evaluated_texts(&config, e, &outline))?;
        let sample = PretrainingSample::of(&data, &encoder, SAMPLED_ROWS)?;
        check_targets(&sample, &options)?;
        Ok(Prepared {
            model_name,
            config,
            options,
            adapter,
            data,
            sample,
            evaluation,
            recipe,
            outline,
            backend,
            checkpoint,
            precision,
            dir,
            lock,
            ranks,
            local_processes: processes.placement().local_processes,
        })
    }

    /// Whether the output folder was created for this run.
    pub(super) fn created_output_dir(&self) -> bool {
        self.lock.as_ref().is_some_and(FolderLock::created_folder)
    }

    /// Reads the weights, with the language-model head, and attaches the adapter.
    pub(super) fn load(&self, args: &Args) -> Result<BiEncoderModel<B>> {
        let mut loader = loader(&self.dir, &self.recipe, &self.adapter)?;
        if !matches!(self.adapter, Adapter::None) {
            loader = loader.matrices(self.precision);
        }
        let (backend, options) = (self.backend.clone(), args.model_options(&self.recipe));
        let mut model = loader.language_model_head(true).load_weights(
            self.outline.clone(),
            backend,
            options,
        )?;
        let added = &self.outline.added_tokens;
        attach_adapter(&mut model, &self.adapter, added, self.config.seed)?;
        model.set_precision(self.precision)?;
        check_probes(&self.dir, &self.adapter, &model)?;
        Ok(model)
    }
}

impl Checked {
    fn of(args: &Args, output_dir: Option<&Path>) -> anyhow::Result<Self> {
        let data = &args.data;
        if data.train_data.is_empty() && data.text.is_empty() {
            return Err(missing("--train-data or --text").into());
        }
        let common = CheckedArgs::new(&args.model, &args.common)?;
        check_ranges(args)?;
        let options = args.options()?;
        if let Some(output_dir) = output_dir {
            let texts = data.train_data.iter().chain(&data.text);
            let texts = texts.map(|path| ("training data", path.as_path()));
            let words =
                args.objective.stop_words.iter().map(|path| ("the stop words", path.as_path()));
            common.check_apart(output_dir, &args.common, texts.chain(words))?;
        }
        Ok(Checked { common, options })
    }
}

/// Reads configuration and tokenizer. Adding tokens is refused with an adapter: the language-model head would have no
/// rows for them.
fn outline(add: bool, dir: &Path, recipe: &Recipe, adapter: &Adapter) -> Result<Outline> {
    let read = |add| loader(dir, recipe, adapter)?.add_special_tokens(add).outline();
    if !add || matches!(adapter, Adapter::None) {
        return read(add);
    }
    let refused = || {
        Error::new(
            ErrorKind::Argument,
            "pretraining with an adapter needs a model that has all tokens of the template",
        )
        .hint(
            "train all weights with --use-lora false, or do so in a first run and train an adapter on its \
             model",
        )
    };
    let outline = read(false).map_err(|error| match read(true) {
        Ok(_) => refused(),
        Err(_) => error,
    })?;
    // An adapter may have embeddings of its own for tokens that the model lacks.
    let rows = DecoderConfig::from_file(&dir.join("config.json"))?.vocab_size;
    match outline.decoder.vocab_size > rows {
        true => Err(refused()
            .expected(format!("{rows} tokens, as the model"))
            .got(format!("{} tokens with the adapter", outline.decoder.vocab_size))),
        false => Ok(outline),
    }
}

/// The settings of an adapter, if there is one.
pub(super) fn lora_config(adapter: &Adapter) -> Result<Option<LoraConfig>> {
    Ok(match adapter {
        Adapter::None => None,
        Adapter::New(lora) => Some(lora.clone()),
        Adapter::From(dir) => Some(LoraConfig::from_peft(dir)?),
    })
}

/// Checks the numbers of the options, before files are read.
fn check_ranges(args: &Args) -> Result<()> {
    let data = &args.data;
    require(
        (1..=MAX_LEN).contains(&data.cutoff_len),
        ("--cutoff-len", data.cutoff_len),
        "the cutoff is out of range",
        &format!("1 to {MAX_LEN} tokens"),
    )?;
    require(
        data.piece_characters.is_none() || !data.text.is_empty(),
        ("--piece-characters", "without --text"),
        "rows in the reference's form are not cut into pieces",
        "--piece-characters with --text",
    )?;
    if let Some(characters) = data.piece_characters {
        let checked = PieceLength::new(characters);
        checked.map_err(|e| e.got(format!("--piece-characters {characters}")))?;
    }
    let rows = args.common.training.per_device_train_batch_size;
    require(
        rows < 1 << 31,
        ("--per-device-train-batch-size", rows),
        "the batch size is too large",
        "fewer than 2,147,483,648 rows per step",
    )?;
    check_loop(&args.common.training, &args.common.optimizer, &args.common.output)
}

/// Opens the rows, or the texts in pieces that fit `text_tokens` tokens.
fn open_data(args: &Args, prompts: &PromptEncoder, text_tokens: usize) -> Result<PretrainingData> {
    let data = &args.data;
    if data.text.is_empty() {
        return PretrainingData::open_rows(&data.train_data, data.on_bad_row);
    }
    let characters = match data.piece_characters {
        Some(characters) => characters,
        None => {
            let text = first_characters(&data.text, MEASURED_CHARACTERS)?;
            let tokens = prompts.encode_text(&text, usize::MAX)?.len().max(1);
            let of_token = text.chars().count().max(1) as f64 / tokens as f64;
            let room = FILLED * text_tokens as f64 * of_token;
            (room as usize).clamp(1, PieceLength::MAX)
        }
    };
    PretrainingData::open_texts(&data.text, PieceLength::new(characters)?, data.on_bad_row)
}

/// Refuses data with tokens for which the model has no embedding. All texts are tokenized for that only if the
/// tokenizer's vocabulary is larger than the model's.
fn check_vocabulary(
    data: &PretrainingData,
    encoder: &PretrainingEncoder,
    outline: &Outline,
) -> Result<()> {
    if outline.prompts.tokenizer().vocab_size() <= outline.decoder.vocab_size {
        return Ok(());
    }
    (0..data.dataset().len()).try_for_each(|index| {
        let encoded = encoder.encode(&data.row(index)?).map(drop);
        encoded.map_err(|e| match data.dataset().location(index) {
            Some((path, line)) => e.line(path, line),
            None => e,
        })
    })
}

/// Refuses data without targets of the losses that have a weight, and notes how many rows of the sample have none.
fn check_targets(sample: &PretrainingSample, options: &PretrainingOptions) -> Result<()> {
    let weights = &options.weights;
    let terms = [
        (SetObjective::AutoEncode, weights.auto_encode, "of their own text"),
        (SetObjective::AutoRegress, weights.auto_regress, "of a following text"),
    ];
    let counts: Vec<(&str, usize)> = terms
        .into_iter()
        .filter(|(_, weight, _)| *weight > 0.0)
        .map(|(objective, _, what)| (what, sample.with(objective)))
        .collect();
    if !counts.is_empty() && counts.iter().all(|(_, count)| *count == 0) {
        let hint = match options.stop_words {
            Some(_) => "all words were removed as stop words: check the list, or omit it",
            None => "check `output_summarize` and `output_predict`, and the weights of the losses",
        };
        let what: Vec<&str> = counts.into_iter().map(|(what, _)| what).collect();
        return Err(Error::new(ErrorKind::Data, "no row has words to predict")
            .expected(format!("rows with words {}", what.join(" or ")))
            .got(format!("none among {} sampled rows", sample.rows))
            .hint(hint));
    }
    for (what, count) in counts {
        let without = sample.rows - count;
        if without > 0 {
            say!(
                "note: {without} of {} sampled rows have no words {what} to predict; that part of the loss is the \
                 mean over the other rows",
                sample.rows
            );
        }
    }
    Ok(())
}
