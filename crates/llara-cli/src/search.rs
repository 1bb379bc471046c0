//! `llara search`: search a corpus for the best passages.

use std::path::PathBuf;

use clap::ArgAction;
use clap::builder::BoolishValueParser;
use llara::backend::Backend;
use llara::retrieval::{Run, SearchOptions, TextTable, embed_texts, search};
use llara::{Role, escape_controls};
use serde_json::json;

use super::compute::on_device;
use super::progress::TextProgress;
use super::talk::print;
use super::trained_model::{Roles, TrainedModel, check_top_k};

/// Number of characters of a passage that are shown.
const SHOWN: usize = 120;

/// Search a corpus for the passages that are most similar to a query.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  llara search --model tuned --corpus beir/scifact --query 'does zinc shorten a cold?'
  llara search --model tuned --corpus corpus.jsonl --query 'tin' --query 'lead' --top-k 1 --json

Prints each query and its best passages: rank, score, id and text. With --json, prints one JSON
object per query: query and hits (rank, score, id, text).")]
pub(super) struct Args {
    #[command(flatten)]
    model: TrainedModel,
    /// BEIR folder, or a JSONL file with `_id`, `text` and optionally `title`
    #[arg(long, value_name = "DIR|FILE", help_heading = "Data")]
    corpus: PathBuf,
    /// Query; can be given several times
    #[arg(long, value_name = "TEXT", num_args = 1.., required = true, help_heading = "Data")]
    query: Vec<String>,
    /// Number of passages that are shown per query
    #[arg(long, value_name = "N", default_value_t = 3, help_heading = "Output")]
    top_k: usize,
    /// Print one JSON object per query
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    #[arg(default_value = "false", action = ArgAction::Set)]
    #[arg(value_parser = BoolishValueParser::new())]
    #[arg(hide_possible_values = true, help_heading = "Output")]
    json: bool,
    #[command(flatten)]
    roles: Roles,
}

pub(super) fn run(args: &Args) -> anyhow::Result<()> {
    args.model.check()?;
    check_top_k(args.top_k)?;
    let corpus = TextTable::read_corpus(&args.corpus)?;
    let found = on_device!(args.model.compute, backend => find(args, &corpus, backend))?;
    Ok(if args.json {
        print_json(args, &corpus, &found)
    } else {
        print_text(args, &corpus, &found)
    }?)
}

/// Encodes the queries and the corpus, and finds the best passages of each query.
fn find(args: &Args, corpus: &TextTable, backend: impl Backend) -> anyhow::Result<Run> {
    let model = args.model.load(backend)?;
    let mut embedder = args.model.embedder(&model);
    args.roles.apply(&mut embedder)?;

    let progress = TextProgress::new(args.query.len() + corpus.len());
    let on_batch = |texts| {
        progress.add(texts);
        Ok(())
    };
    embedder.on_batch = Some(&on_batch);
    let queries = embed_texts(&embedder, Role::Query, &args.query)?;
    let passages = embed_texts(&embedder, Role::Passage, &corpus.texts)?;
    let ids: Vec<String> = (0..args.query.len()).map(|i| i.to_string()).collect();
    let options = SearchOptions { top_k: args.top_k, ignore_identical_ids: false };
    let found = search(&embedder, (&ids, queries.view()), (&corpus.ids, passages.view()), options)?;
    drop(embedder);
    progress.finish();
    Ok(found)
}

fn print_json(args: &Args, corpus: &TextTable, found: &Run) -> llara::Result<()> {
    for (query, ranking) in args.query.iter().zip(found.rankings()) {
        let hits: Vec<_> = (1..)
            .zip(&ranking.hits)
            .map(|(rank, hit)| {
                let text = &corpus.texts[hit.document as usize];
                json!({"rank": rank, "score": hit.score, "id": found.id(hit), "text": text})
            })
            .collect();
        print(json!({"query": query, "hits": hits}))?;
    }
    Ok(())
}

fn print_text(args: &Args, corpus: &TextTable, found: &Run) -> llara::Result<()> {
    for (query, ranking) in args.query.iter().zip(found.rankings()) {
        print(escape_controls(query))?;
        for (rank, hit) in (1..).zip(&ranking.hits) {
            let text = shortened(&corpus.texts[hit.document as usize]);
            let line = format!("{rank:>3}  {:.4}  [{}] {text}", hit.score, found.id(hit));
            print(escape_controls(&line))?;
        }
    }
    Ok(())
}

/// The start of a text, on one line.
fn shortened(text: &str) -> String {
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    match line.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}…", line[..end].trim_end()),
        None => line,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_texts_are_truncated_between_characters() {
        assert_eq!(shortened(" a\n b "), "a b");
        let long = shortened(&"é".repeat(500));
        assert_eq!((long.chars().count(), long.ends_with("é…")), (SHOWN + 1, true));
    }
}
