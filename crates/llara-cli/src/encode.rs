//! `llara encode`: embed a file of texts.

use std::cell::Cell;
use std::path::{Path, PathBuf};

use clap::ArgAction;
use clap::builder::BoolishValueParser;
use llara::backend::Backend;
use llara::retrieval::{
    BLOCK_TEXTS, Embedder, EmbeddingWriter, SharedEmbedder, TextEmbedder, TextFile,
    begins_like_embeddings, encode_stream, take_part_in_encoding, verify_embeddings,
};
use llara::{BiEncoderModel, OutputLock, Result, Role};

use super::compute::on_device;
use super::interrupt;
use super::paths::{check_apart, check_replaceable};
use super::processes::{CollectiveArgs, Processes};
use super::progress::TextProgress;
use super::talk::{count, counted, print, say};
use super::trained_model::{TrainedModel, check_max_len, warn_if_too_long};

/// Embed a file of texts: row i of the output is the embedding of text i.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  llara encode --model tuned --input corpus.jsonl --role passage --output passages.safetensors
  llara encode --model tuned --input questions.txt --role query --output queries.npy
  llara encode --model tuned --input corpus.jsonl --role passage --output passages.npy --resume

If a run over more than 4,096 texts is interrupted, the embeddings so far remain in OUTPUT.partial
and OUTPUT.partial.json. The same command with --resume continues from there and gives the same
bytes; damaged embeddings are recomputed. If OUTPUT is complete, --resume only verifies it.

OUTPUT must not be an input or be in the model's folder. An earlier file of embeddings is replaced;
another file only with --overwrite. Only one run can write OUTPUT at a time.

With mpirun or srun, each process encodes a part of the texts, and the first one writes OUTPUT.

Prints one JSON object: rows, dimension, output.")]
pub(super) struct Args {
    #[command(flatten)]
    model: TrainedModel,
    /// Texts: JSONL with `text`, or with `title` and `text` (joined by a space); or one text per line
    #[arg(long, value_name = "FILE", help_heading = "Data")]
    input: PathBuf,
    /// Role of the texts: query or passage
    #[arg(long, value_name = "ROLE", value_parser = crate::values::role(), hide_possible_values = true)]
    #[arg(help_heading = "Data")]
    role: Role,
    /// Output file of the embeddings, f32 (n, d): .safetensors (tensor `embeddings`) or .npy
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    output: PathBuf,
    /// Resume an interrupted run with the same model, texts and options
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    #[arg(default_value = "false", action = ArgAction::Set)]
    #[arg(value_parser = BoolishValueParser::new())]
    #[arg(hide_possible_values = true, help_heading = "Output")]
    resume: bool,
    /// Replace OUTPUT even if it is not a file of embeddings
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    #[arg(default_value = "false", action = ArgAction::Set)]
    #[arg(value_parser = BoolishValueParser::new())]
    #[arg(hide_possible_values = true, help_heading = "Output")]
    overwrite: bool,
    /// Maximum length of a text in tokens, template included [default: as the model was trained, or 32
    /// for queries and 128 for passages]
    #[arg(long, value_name = "N", help_heading = "Encoding")]
    max_len: Option<usize>,
    /// Use the instruction of a task that the model was trained on; its README.md lists them
    #[arg(long, value_name = "NAME", help_heading = "Encoding", conflicts_with = "instruction")]
    task: Option<String>,
    /// Instruction that is prepended to every text [default: as the model was trained, or none]
    #[arg(long, value_name = "TEXT", help_heading = "Encoding")]
    instruction: Option<String>,
    #[command(flatten)]
    collective: CollectiveArgs,
}

pub(super) fn run(mut args: Args) -> anyhow::Result<()> {
    let processes = Processes::start(args.collective.collective_timeout)?;
    args.model.compute.set_default_threads(processes.placement().threads);
    let result = check_and_encode(&args, &processes);
    processes.end(result)
}

fn check_and_encode(args: &Args, processes: &Processes) -> anyhow::Result<()> {
    processes.agree(args.model.check().map_err(Into::into))?;
    // The lock of the first process, which writes.
    let _lock = processes.first(|| {
        check_output(args)?;
        Ok(OutputLock::acquire(&args.output)?)
    })?;
    let texts = processes.agree(TextFile::open(&args.input).map_err(Into::into))?;
    on_device!(args.model.compute, backend => encode(args, &texts, backend, processes))
}

/// Encodes the texts: every process a part of each block, which the first one writes.
fn encode(
    args: &Args,
    texts: &TextFile,
    backend: impl Backend,
    processes: &Processes,
) -> anyhow::Result<()> {
    let collective = processes.collective(&backend);
    let model = processes.agree(args.model.load_on(backend, processes))?;
    let mut embedder = processes.agree(embedder(args, &model).map_err(Into::into))?;
    let dimension = embedder.dimension();

    processes.check_same("model or input", || Ok(embedder.origin(args.role, texts)?.hash()))?;
    let output = processes.first(|| match is_complete(args, &embedder, texts)? {
        true => Ok(None),
        false => Ok(Some(open_output(args, &embedder, texts)?)),
    })?;
    let output = output.flatten();
    // All processes start with the same text.
    let first = match &output {
        Some(output) => output.written(),
        None => texts.len(),
    };
    let [first] = processes.smallest([first])?;
    if first < texts.len() {
        let progress = TextProgress::new(texts.len() - first);
        let (done, stopped) = (Cell::new(0), Cell::new(false));
        let on_batch = |texts| {
            done.set(done.get() + texts);
            progress.set(done.get());
            Ok(())
        };
        embedder.on_batch = Some(&on_batch);
        say_what_is_kept_when_stopped(args, texts.len())?;
        let shared = SharedEmbedder {
            inner: &embedder,
            collective: collective.as_ref(),
            stopped: &stopped,
            done: &done,
        };
        let encoded = match output {
            Some(output) => {
                encode_stream(&shared, args.role, texts, output, &mut |_| progress.set(done.get()))
            }
            None => take_part_in_encoding(&shared, args.role, texts, first),
        };
        encoded.inspect_err(|_| say_what_is_kept(args, texts.len()))?;
        drop(embedder);
        progress.finish();
        let (path, embeddings) = (args.output.display(), counted(texts.len(), "embedding"));
        say!("{path}: {embeddings}, dimension {dimension}");
    }
    report(args, texts.len(), dimension)
}

/// The embedder with the options applied.
fn embedder<'m, B: Backend>(
    args: &Args,
    model: &'m BiEncoderModel<B>,
) -> Result<TextEmbedder<'m, B>> {
    let mut embedder = args.model.embedder(model);
    if let Some(task) = &args.task {
        embedder.use_instructions(model.recipe().task(task)?.clone());
    }
    let (max_len, instruction) = match args.role {
        Role::Query => (&mut embedder.query_max_len, &mut embedder.query_instruction),
        Role::Passage => (&mut embedder.passage_max_len, &mut embedder.passage_instruction),
    };
    *max_len = args.max_len.unwrap_or(*max_len);
    if let Some(given) = &args.instruction {
        instruction.clone_from(given);
    }
    check_max_len(model, args.role, "--max-len", *max_len)?;
    warn_if_too_long(model, args.role, *max_len);
    Ok(embedder)
}

/// Whether the output of an earlier run is complete, and to be kept: it is verified then.
fn is_complete(
    args: &Args,
    embedder: &TextEmbedder<'_, impl Backend>,
    texts: &TextFile,
) -> Result<bool> {
    if !args.resume || !args.output.exists() || EmbeddingWriter::kept(&args.output).is_some() {
        return Ok(false);
    }
    let checked = verify_embeddings(embedder, args.role, texts, &args.output)?;
    say!(
        "{}: already complete; {} recomputed for verification, all equal",
        args.output.display(),
        counted(checked, "embedding")
    );
    Ok(true)
}

/// Makes a signal print what is kept of the output.
fn say_what_is_kept_when_stopped(args: &Args, all: usize) -> Result<()> {
    let (path, resumable) = (args.output.clone(), all > BLOCK_TEXTS.get());
    interrupt::stop_at_once(move || match EmbeddingWriter::kept(&path).filter(|_| resumable) {
        Some(kept) => format!(
            "{} of {} are kept; the same command with --resume continues after them",
            count(kept),
            counted(all, "embedding")
        ),
        None => format!("{} was not written", path.display()),
    })
}

/// Prints what is kept of the output after an error.
fn say_what_is_kept(args: &Args, all: usize) {
    if let Some(kept) = EmbeddingWriter::kept(&args.output) {
        let (kept, all) = (count(kept), counted(all, "embedding"));
        say!("note: {kept} of {all} are kept; the same command with --resume continues after them");
    }
}

fn report(args: &Args, rows: usize, dimension: usize) -> anyhow::Result<()> {
    let output = args.output.to_string_lossy();
    Ok(print(serde_json::json!({"rows": rows, "dimension": dimension, "output": output}))?)
}

/// Refuses an output that cannot be written, or that would overwrite an input or a file of another program.
/// Also checks the paths of the partial file and its manifest.
fn check_output(args: &Args) -> Result<()> {
    let mut inputs = args.model.inputs();
    inputs.push(("the input", &args.input));
    let with_ending = |ending: &str| {
        let mut path = args.output.clone().into_os_string();
        path.push(ending);
        PathBuf::from(path)
    };
    let partial = with_ending(".partial");
    for path in [&args.output, &partial, &with_ending(".partial.json")] {
        check_apart(path, &inputs)?;
    }
    EmbeddingWriter::check_path(&args.output)?;
    for path in [&args.output, &partial] {
        let own = ("a file of embeddings", |path: &Path| begins_like_embeddings(path));
        check_replaceable(path, own, args.overwrite)?;
    }
    Ok(())
}

/// Opens the output. A run of a single block cannot be resumed.
fn open_output(
    args: &Args,
    embedder: &TextEmbedder<'_, impl Backend>,
    texts: &TextFile,
) -> Result<EmbeddingWriter> {
    let (path, rows, cols) = (&args.output, texts.len(), embedder.dimension());
    if rows <= BLOCK_TEXTS.get() {
        return EmbeddingWriter::create(path, rows, cols);
    }
    let origin = embedder.origin(args.role, texts)?;
    if !args.resume {
        if let Some(kept) = EmbeddingWriter::kept(path) {
            let kept = counted(kept, "embedding");
            say!(
                "note: starting over; --resume would continue after the {kept} of an interrupted run"
            );
        }
        return EmbeddingWriter::begin(path, rows, cols, origin);
    }
    let output = EmbeddingWriter::resume(path, rows, cols, origin)?;
    if output.discarded() > 0 {
        say!(
            "warning: {} of the interrupted run were damaged and are recomputed",
            counted(output.discarded(), "embedding")
        );
    }
    match output.written() {
        0 if output.discarded() > 0 => {}
        0 => say!("note: there is no interrupted run; starting with the first text"),
        done => say!("continuing after {} of {}", count(done), counted(rows, "text")),
    }
    Ok(output)
}
