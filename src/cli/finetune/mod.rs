//! `llara finetune`: train a model, with everything checked before anything is written.

mod args;
mod lora_args;
mod ranges;
mod trainer_flags;

use std::fs;
use std::path::{Path, PathBuf};

use clap::error::ErrorKind as Usage;
use llara::backend::{Backend, Cpu, Dtype};
use llara::data::{Dataset, Sampler, SamplerConfig, Sampling};
use llara::model::Parameter;
use llara::train::{RunLog, Summary, TrainConfig, Trainer};
use llara::{BiEncoderModel, Error, ErrorKind, Loader, Role};

use super::progress::TrainingProgress;
use super::talk::{count, counted, print, say};
use super::{compute, output_folder, trained_model};
pub(super) use args::Args;
use lora_args::Adapter;
use trainer_flags::OwnSettings;

pub(super) fn run(args: Args) -> anyhow::Result<()> {
    // What the command line alone tells to be wrong, then the data, then the model.
    let (model_name, output_dir) = required(&args)?;
    let run = OwnSettings {
        model: &model_name,
        save_steps: args.output.save_steps,
        seed: args.training.seed,
    };
    for line in args.trainer_flags.check(&run)? {
        say!("note: {line}");
    }
    args.compute.check()?;
    ranges::check(&args)?;
    let template = args.model.template.as_deref().map(trained_model::template).transpose()?;
    let config = args.train_config(output_dir);
    let adapter = args.lora.adapter()?;
    if !matches!(adapter, Adapter::None) && args.model.add_special_tokens {
        return Err(Error::new(
            ErrorKind::Argument,
            "new tokens cannot be saved with an adapter, which leaves their embeddings out",
        )
        .hint(
            "train all weights with --use-lora false, or do that in a first run and train adapters \
             on its model",
        )
        .into());
    }
    check_apart(&args, &config.output_dir, &adapter, &model_name)?;
    output_folder::check(&config.output_dir, args.output.overwrite_output_dir)?;
    let dataset = Dataset::open(&args.data.train_data, args.data.on_bad_row)?;
    check_sampling(&config, &dataset)?;

    let dir = trained_model::find(&model_name, args.model.cache_dir.as_deref(), "--from-peft")?;
    let mut loader = Loader::new(&dir)?.add_special_tokens(args.model.add_special_tokens);
    if let Some(template) = template {
        loader = loader.template(template);
    }
    let precision = args.precision();
    if !matches!(adapter, Adapter::None) {
        loader = loader.matrices(precision);
    }
    let mut model = loader.load(args.compute.start(), args.model_options())?;
    for (role, option, max_len) in [
        (Role::Query, "--query-max-len", config.query_max_len),
        (Role::Passage, "--passage-max-len", config.passage_max_len),
    ] {
        trained_model::check_max_len(&model, role, option, max_len)?;
    }
    check_vocabulary(&config, &dataset, &model)?;

    match adapter {
        Adapter::None => {}
        Adapter::New(lora) => model.attach_new_adapter(&lora, config.seed)?,
        Adapter::From(dir) => model.attach_adapter(&dir)?,
    }
    model.set_precision(precision)?;

    let new = !config.output_dir.exists();
    let trained = train(&args, &config, &dataset, &mut model).and_then(|summary| {
        save(model, &config, args.lora.save_merged_lora_model)?;
        Ok(summary)
    });
    if trained.is_err() && new {
        output_folder::discard_if_nothing_was_logged(&config.output_dir);
    }
    report(&config.output_dir, &trained?)
}

/// Refuses an output folder whose filling would harm what the run reads.
fn check_apart(
    args: &Args,
    output_dir: &Path,
    adapter: &Adapter,
    model: &str,
) -> llara::Result<()> {
    let mut read = vec![("the model", Path::new(model))];
    if let Adapter::From(dir) = adapter {
        read.push(("the adapter", dir));
    }
    read.extend(args.data.train_data.iter().map(|path| ("training data", path.as_path())));
    output_folder::check_apart(output_dir, &read)
}

/// The model, or its adapter and, where asked for, the model with the adapter merged.
fn save(mut model: BiEncoderModel<Cpu>, config: &TrainConfig, merged: bool) -> llara::Result<()> {
    if model.adapter().is_none() {
        return model.save_as(&config.output_dir, config.saving.dtype);
    }
    model.save_adapter(&config.output_dir)?;
    if merged {
        if model.precision() != Dtype::F32
            && let Some(base) = model.source().map(Path::to_owned)
        {
            // The weights in memory were rounded; those that the adapter is added to must not be.
            let (backend, options) = (model.backend().clone(), *model.options());
            drop(model);
            model = Loader::new(&base)?.load(backend, options)?;
            model.attach_adapter(&config.output_dir)?;
        }
        model.merge_adapter()?;
        model.save_as(&config.output_dir.join("merged_model"), config.saving.dtype)?;
    }
    Ok(())
}

/// What a command line or a run file must give.
fn required(args: &Args) -> Result<(String, PathBuf), clap::Error> {
    let missing = |option: &str| {
        let text = format!("{option} is given neither on the command line nor in the run file\n");
        clap::Error::raw(Usage::MissingRequiredArgument, text)
    };
    if args.data.train_data.is_empty() {
        return Err(missing("--train-data"));
    }
    let model = args.model.model.clone().ok_or_else(|| missing("--model"))?;
    let output_dir = args.output.output_dir.clone().ok_or_else(|| missing("--output-dir"))?;
    Ok((model, output_dir))
}

/// What the trainer would refuse as well, before a large model is read for it.
fn check_sampling(config: &TrainConfig, dataset: &Dataset) -> llara::Result<()> {
    Sampler::new(SamplerConfig {
        seed: config.seed,
        sampling: config.sampling,
        rows: dataset.len(),
        batch_size: config.batch_size,
        group_size: config.group_size,
        drop_last: config.drop_last,
    })
    .map(drop)
}

/// Refuses data with tokens that the model has no embedding for. A tokenizer that fits in the model's
/// vocabulary cannot give any; only where it does not must every text be looked at.
fn check_vocabulary(
    config: &TrainConfig,
    dataset: &Dataset,
    model: &BiEncoderModel<Cpu>,
) -> llara::Result<()> {
    let prompts = model.prompts();
    if prompts.tokenizer().vocab_size() <= model.decoder().config().vocab_size {
        return Ok(());
    }
    (0..dataset.len()).try_for_each(|index| {
        let row = dataset.row(index)?;
        let instruction = row.prompt.as_ref().unwrap_or(&config.query_instruction);
        let query = [format!("{instruction}{}", row.query)];
        let instruction = &config.passage_instruction;
        let passages: Vec<String> =
            row.pos.iter().chain(&row.neg).map(|text| format!("{instruction}{text}")).collect();
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

/// Makes all steps. The optimizer's state is gone when this returns, so that saving has its memory.
fn train(
    args: &Args,
    config: &TrainConfig,
    dataset: &Dataset,
    model: &mut BiEncoderModel<Cpu>,
) -> anyhow::Result<Summary> {
    let about_model = describe(model, args.model.model.as_deref().unwrap_or_default());
    for (role, max_len) in
        [(Role::Query, config.query_max_len), (Role::Passage, config.passage_max_len)]
    {
        trained_model::warn_if_too_long(model, role, max_len);
    }
    let mut trainer = Trainer::new(model, dataset, config)?;
    say!("{about_model}");
    announce(args, config, dataset, trainer.total_steps());

    let log = create_log(&config.output_dir)?;
    let mut progress = TrainingProgress::new(log, trainer.total_steps());
    let result = trainer.run(&mut progress);
    progress.finish();
    Ok(result?)
}

/// Makes the output folder and begins the log.
fn create_log(output_dir: &Path) -> llara::Result<RunLog> {
    fs::create_dir_all(output_dir)
        .map_err(|e| Error::io("create the output folder", output_dir, e))?;
    RunLog::create(output_dir)
}

fn describe(model: &BiEncoderModel<Cpu>, name: &str) -> String {
    let decoder = model.decoder();
    let size = |p: &Parameter<Cpu>| p.shape().iter().product::<usize>();
    let parameters: usize = decoder.parameters().map(size).sum();
    let learning: usize = decoder.trainable_parameters().map(size).sum();
    let learning = match model.adapter() {
        Some(lora) => format!("adapters of rank {}, {} parameters", lora.rank, count(learning)),
        None => "all weights".to_owned(),
    };
    let config = decoder.config();
    let template = model.prompts().template();
    format!(
        "device    {}; {}\nmodel     {name}: {:?}, {}, {}, hidden {}, vocabulary {}\n\
         training  {learning}\ntemplate  {}: mean of the last {}",
        model.backend().description(),
        compute::describe(model.precision()),
        config.family,
        counted(parameters, "parameter"),
        counted(config.num_hidden_layers, "layer"),
        config.hidden_size,
        count(config.vocab_size),
        template.name,
        counted(template.pooled_tokens, "token"),
    )
}

fn announce(args: &Args, config: &TrainConfig, dataset: &Dataset, steps: u64) {
    say!("data      {}, {} skipped", counted(dataset.len(), "row"), dataset.skipped().count);
    say_skipped(dataset);
    let (batch, group) = (config.batch_size, config.group_size);
    let tokens = batch * (config.query_max_len + group * config.passage_max_len);
    say!(
        "steps     {}: {batch} {} of group {group} each, at most {} a step",
        count(steps as usize),
        if batch == 1 { "query" } else { "queries" },
        counted(tokens, "token")
    );
    if config.sampling == Sampling::Random && batch > dataset.len() {
        say!(
            "note: a batch of {batch} is larger than the data: a step has the {} that there {}",
            counted(dataset.len(), "row"),
            if dataset.len() == 1 { "is" } else { "are" },
        );
    }
    if args.lora.are_ignored() {
        say!("note: --use-lora is false, so other options of adapters have no effect");
    }
    if !args.model.normalized {
        say!("note: vectors are not normalised, so the temperature is 1.0");
    }
    if args.optimizer.warmup_is_lost() {
        say!("note: the constant scheduler has no warm-up; constant_with_warmup has");
    }
}

/// Says which rows were left out, the first few.
pub(super) fn say_skipped(dataset: &Dataset) {
    let skipped = dataset.skipped();
    for reason in &skipped.reasons {
        say!("skipped: {reason}");
    }
    let more = skipped.count.saturating_sub(skipped.reasons.len() as u64);
    if more > 0 {
        say!("skipped: {}", counted(more as usize, "more row"));
    }
}

fn report(output_dir: &Path, summary: &Summary) -> anyhow::Result<()> {
    let seconds = summary.elapsed.as_secs_f64();
    let tokens_per_second = summary.tokens as f64 / seconds.max(1e-9);
    say!(
        "{}: {} in {seconds:.1} s, last loss {:.4}, {} tokens/s; saved and checked",
        output_dir.display(),
        counted(summary.steps as usize, "step"),
        summary.loss,
        count(tokens_per_second as usize)
    );
    Ok(print(serde_json::json!({
        "steps": summary.steps,
        "loss": summary.loss,
        "tokens": summary.tokens,
        "tokens_per_second": tokens_per_second,
        "output_dir": output_dir,
    }))?)
}
