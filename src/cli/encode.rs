//! `llara encode`: a file of texts to a file of vectors.

use std::path::PathBuf;

use llara::Role;
use llara::retrieval::{Embedder, TextFile, VectorWriter, encode_stream};

use super::progress::TextProgress;
use super::talk::{counted, print, say};
use super::trained_model::{TrainedModel, check_max_len, warn_if_too_long};

/// Turn a file of texts into a file of vectors, row i for text i.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  llara encode --model tuned --input corpus.jsonl --role passage --output passages.safetensors
  llara encode --model tuned --input questions.txt --role query --output queries.npy

Prints one JSON object: rows, dimension, output.")]
pub(super) struct Args {
    #[command(flatten)]
    model: TrainedModel,
    /// Texts: JSONL with `text`, or `title` and `text` (joined by a blank); or one text a line
    #[arg(long, value_name = "FILE", help_heading = "Data")]
    input: PathBuf,
    /// Which side of the bi-encoder the texts are on: query or passage
    #[arg(long, value_name = "ROLE", value_enum, hide_possible_values = true)]
    #[arg(help_heading = "Data")]
    role: Role,
    /// Vectors: .safetensors (tensor `embeddings`) or .npy; f32, (n, d)
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    output: PathBuf,
    /// Tokens that a text with its template is cut to [default: as the model was trained, or the
    /// reference's: 32 for queries, 128 for passages]
    #[arg(long, value_name = "N", help_heading = "Encoding")]
    max_len: Option<usize>,
    /// Text put in front of every text [default: none]
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    #[arg(help_heading = "Encoding")]
    instruction: String,
}

pub(super) fn run(args: &Args) -> anyhow::Result<()> {
    args.model.check()?;
    let texts = TextFile::open(&args.input)?;
    let model = args.model.load()?;
    let mut embedder = args.model.embedder(&model);
    let (max_len, instruction) = match args.role {
        Role::Query => (&mut embedder.query_max_len, &mut embedder.query_instruction),
        Role::Passage => (&mut embedder.passage_max_len, &mut embedder.passage_instruction),
    };
    *max_len = args.max_len.unwrap_or(*max_len);
    instruction.clone_from(&args.instruction);
    check_max_len(&model, args.role, "--max-len", *max_len)?;
    warn_if_too_long(&model, args.role, *max_len);

    let output = VectorWriter::create(&args.output, texts.len(), embedder.dimension())?;
    let progress = TextProgress::new(texts.len());
    let on_batch = |texts| progress.add(texts);
    embedder.on_batch = Some(&on_batch);
    encode_stream(&embedder, args.role, &texts, output, &mut |_| ())?;
    let dimension = embedder.dimension();
    drop(embedder);
    progress.finish();
    say!("{}: {} of {dimension}", args.output.display(), counted(texts.len(), "vector"));
    let result = serde_json::json!({
        "rows": texts.len(),
        "dimension": dimension,
        "output": args.output,
    });
    Ok(print(result)?)
}
