//! Test collections in BEIR's format: a folder with `corpus.jsonl`, `queries.jsonl` and `qrels/*.tsv`.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::Qrels;
use super::lines::{Line, Lines, join_title};
use crate::{Error, ErrorKind, Result};

/// Texts and their ids: `texts[i]` has the id `ids[i]`. Ids are unique.
///
/// Ids are reference-counted, so that a run over a large corpus does not copy them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TextTable {
    /// The ids, in the order of the file.
    pub ids: Arc<[String]>,
    /// The texts, as they are embedded.
    pub texts: Vec<String>,
}

impl TextTable {
    /// Reads a corpus: a file of JSON lines (`_id`, optional `title`, `text`), or the `corpus.jsonl` of a
    /// folder.
    ///
    /// # Errors
    /// The errors of [`BeirDataset::open`] about the corpus.
    pub fn read_corpus(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let in_folder = path.join("corpus.jsonl");
        read_table(if path.is_dir() { &in_folder } else { path }, |_, _, title, text| {
            Ok(Some(join_title(title.as_deref(), &text)))
        })
    }

    /// The number of texts.
    pub fn len(&self) -> usize {
        self.texts.len()
    }

    /// Whether there are no texts.
    pub fn is_empty(&self) -> bool {
        self.texts.is_empty()
    }
}

/// What to do with a judgment whose query or document is not in the collection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum UnknownIds {
    /// Fail with an error that lists the ids.
    #[default]
    Error,
    /// Ignore the judgment and count it.
    Skip,
}

/// One split of a BEIR dataset.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BeirDataset {
    /// The passages: title, one space and text, or only the text; trimmed. A passage may be empty, as in
    /// some published collections.
    pub corpus: TextTable,
    /// The queries with judgments in the split.
    pub queries: TextTable,
    /// The judgments of the split.
    pub qrels: Qrels,
}

impl BeirDataset {
    /// Reads a folder with `corpus.jsonl` (`_id`, optional `title`, `text`), `queries.jsonl` (`_id`, `text`)
    /// and `qrels/<split>.tsv`. Ids may be strings or integers.
    ///
    /// # Errors
    /// [`ErrorKind::Io`]: a file cannot be read; [`ErrorKind::Data`] with file and line: invalid JSON, a
    /// field that is missing or has the wrong type, a duplicate id, a judged query without text, a malformed
    /// judgment; [`ErrorKind::Data`] with the file: an empty file, judgments of unknown queries or documents;
    /// [`ErrorKind::Argument`]: the folder has no such split.
    pub fn open(folder: impl AsRef<Path>, split: &str) -> Result<Self> {
        Self::open_with(folder, split, UnknownIds::Error).map(|(dataset, _)| dataset)
    }

    /// Like [`open`](Self::open). `on_unknown` selects what to do with judgments of unknown queries or
    /// documents. Also returns the number of ignored judgments.
    ///
    /// # Errors
    /// Those of [`open`](Self::open). With [`UnknownIds::Skip`], unknown ids are an error only if no judgment
    /// remains.
    pub fn open_with(
        folder: impl AsRef<Path>,
        split: &str,
        on_unknown: UnknownIds,
    ) -> Result<(Self, usize)> {
        let folder = folder.as_ref();
        // The small files first: their errors are reported before a large corpus is read.
        let qrels_path = find_split(folder, split)?;
        let mut qrels = Qrels::read_tsv(&qrels_path)?;

        let queries_path = folder.join("queries.jsonl");
        let queries = read_table(&queries_path, |line, id, _, text| {
            if qrels.get(id).is_none() {
                return Ok(None);
            }
            if text.trim().is_empty() {
                return Err(line.error(format!("query `{id}` has no text")));
            }
            Ok(Some(text))
        })?;
        let known: HashSet<&str> = queries.ids.iter().map(String::as_str).collect();
        let mut skipped = 0;
        match on_unknown {
            UnknownIds::Error => {
                require_known(&qrels_path, "queries", &queries_path, qrels.queries(), &known)?;
            }
            UnknownIds::Skip => skipped += qrels.retain(|query, _| known.contains(query)),
        }

        let corpus_path = folder.join("corpus.jsonl");
        let corpus = TextTable::read_corpus(&corpus_path)?;
        let known: HashSet<&str> = corpus.ids.iter().map(String::as_str).collect();
        match on_unknown {
            UnknownIds::Error => {
                let judged = qrels.queries().filter_map(|query| qrels.get(query));
                let judged = judged.flat_map(|documents| documents.keys().map(String::as_str));
                require_known(&qrels_path, "documents", &corpus_path, judged, &known)?;
            }
            UnknownIds::Skip => skipped += qrels.retain(|_, document| known.contains(document)),
        }
        if qrels.is_empty() {
            return Err(Error::new(
                ErrorKind::Data,
                "no judgment has a known query and a known document",
            )
            .file(&qrels_path)
            .expected(format!("ids of {} and {}", queries_path.display(), corpus_path.display()))
            .hint("check that the judgments belong to this collection"));
        }
        Ok((BeirDataset { corpus, queries: judged_only(queries, &qrels), qrels }, skipped))
    }
}

/// The queries that have judgments.
fn judged_only(queries: TextTable, qrels: &Qrels) -> TextTable {
    if queries.ids.iter().all(|id| qrels.get(id).is_some()) {
        return queries;
    }
    let pairs = queries.ids.iter().cloned().zip(queries.texts);
    let (ids, texts): (Vec<_>, Vec<_>) = pairs.filter(|(id, _)| qrels.get(id).is_some()).unzip();
    TextTable { ids: ids.into(), texts }
}

/// The judgment file of a split; if there is none, the error lists the splits that exist.
fn find_split(folder: &Path, split: &str) -> Result<PathBuf> {
    let qrels = folder.join("qrels");
    let entries = std::fs::read_dir(&qrels).map_err(|e| {
        Error::io("list the judgments", &qrels, e)
            .hint("a BEIR folder has corpus.jsonl, queries.jsonl and qrels/<split>.tsv")
    })?;
    let mut splits = Vec::new();
    for entry in entries {
        let path = entry.map_err(|e| Error::io("list the judgments", &qrels, e))?.path();
        if path.extension().is_some_and(|extension| extension == "tsv")
            && let Some(name) = path.file_stem().and_then(|stem| stem.to_str())
        {
            if name == split {
                return Ok(path);
            }
            splits.push(name.to_owned());
        }
    }
    splits.sort_unstable();
    let exist =
        if splits.is_empty() { "none, there is no *.tsv".into() } else { splits.join(", ") };
    Err(Error::new(ErrorKind::Argument, format!("there is no split `{split}`"))
        .file(&qrels)
        .expected(format!("one of the splits in the folder: {exist}")))
}

/// Reads a JSONL file of `_id`, `title` and `text`. `keep` returns the text of a line, or `None` to skip it.
fn read_table(
    path: &Path,
    keep: impl Fn(Line<'_>, &str, Option<String>, String) -> Result<Option<String>>,
) -> Result<TextTable> {
    let mut lines = Lines::open(path)?;
    let (mut ids, mut texts, mut seen) = (Vec::new(), Vec::new(), HashSet::new());
    while let Some(line) = lines.next_line()? {
        if line.is_blank() {
            continue;
        }
        let record = line.json()?;
        let id = line.id("_id", record.id)?;
        let title = line.optional("title", record.title)?;
        let text = line.required("text", record.text)?;
        if !seen.insert(id.clone()) {
            return Err(line
                .error(format!("duplicate `_id` \"{id}\""))
                .hint("give every line a unique id, or remove the duplicate"));
        }
        if let Some(text) = keep(line, &id, title, text)? {
            ids.push(id);
            texts.push(text);
        }
    }
    if seen.is_empty() {
        return Err(Error::new(ErrorKind::Data, "the file contains no record").file(path));
    }
    Ok(TextTable { ids: ids.into(), texts })
}

/// Fails if a judged id is not in the file at `path`. `what` is "queries" or "documents".
fn require_known<'a>(
    qrels: &Path,
    what: &str,
    path: &Path,
    judged: impl Iterator<Item = &'a str>,
    known: &HashSet<&str>,
) -> Result<()> {
    const SHOWN: usize = 5;
    let mut unknown: Vec<&str> = judged.filter(|id| !known.contains(id)).collect();
    unknown.sort_unstable();
    unknown.dedup();
    if unknown.is_empty() {
        return Ok(());
    }
    let mut list = unknown.iter().take(SHOWN).copied().collect::<Vec<_>>().join(", ");
    if unknown.len() > SHOWN {
        list.push_str(", …");
    }
    Err(Error::new(ErrorKind::Data, format!("there are judgments of unknown {what}"))
        .file(qrels)
        .expected(format!("ids of {}", path.display()))
        .got(format!("{} unknown: {list}", unknown.len()))
        .hint(
            "check that the judgments belong to this collection and that no file is truncated; \
             `--on-unknown-id skip` ignores such judgments",
        ))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tempfile::TempDir;

    use super::*;

    const CORPUS: &str = "{\"_id\": \"b1\", \"title\": \"Bees\", \"text\": \"They dance.\", \"metadata\": {}}\n\
        {\"_id\": 2, \"title\": \"\", \"text\": \" Ants carry. \"}\r\n\n\
        {\"_id\": \"3\", \"title\": null, \"text\": \"\"}\n";
    const QUERIES: &str = "{\"_id\": \"q2\", \"text\": \"who dances?\"}\n\
        {\"_id\": \"unjudged\", \"text\": \"\"}\n{\"_id\": 1, \"text\": \"who carries?\"}\n";
    const QRELS: &str = "query-id\tcorpus-id\tscore\n1\t2\t1\nq2\tb1\t2\nq2\t2\t0\n";

    fn folder(corpus: impl AsRef<[u8]>, queries: impl AsRef<[u8]>, qrels: &str) -> TempDir {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("qrels")).unwrap();
        std::fs::write(dir.path().join("corpus.jsonl"), corpus).unwrap();
        std::fs::write(dir.path().join("queries.jsonl"), queries).unwrap();
        std::fs::write(dir.path().join("qrels/test.tsv"), qrels).unwrap();
        std::fs::write(dir.path().join("qrels/dev.tsv"), QRELS).unwrap();
        dir
    }

    fn error(corpus: &str, queries: &str, qrels: &str) -> String {
        BeirDataset::open(folder(corpus, queries, qrels).path(), "test").unwrap_err().to_string()
    }

    #[test]
    fn reads_titles_numbers_and_the_judged_queries() {
        let dataset = BeirDataset::open(folder(CORPUS, QUERIES, QRELS).path(), "test").unwrap();
        assert_eq!(&*dataset.corpus.ids, ["b1", "2", "3"]);
        assert_eq!(dataset.corpus.texts, ["Bees They dance.", "Ants carry.", ""]);
        assert_eq!(&*dataset.queries.ids, ["q2", "1"]);
        assert_eq!(dataset.queries.texts, ["who dances?", "who carries?"]);
        assert_eq!(dataset.qrels.get("q2").unwrap()["b1"], 2);
    }

    #[test]
    fn errors_name_file_and_line() {
        for (corpus, expected) in [
            (
                "{\"_id\": \"a\", \"text\": \"x\"}\n{\"_id\": \"b\" \"text\"}",
                "corpus.jsonl:2: invalid JSON",
            ),
            ("{\"text\": \"x\"}", "corpus.jsonl:1: `_id` is missing"),
            ("{\"_id\": \"a\"}", "corpus.jsonl:1: `text` is missing"),
            ("{\"_id\": \"a\", \"text\": 3}", "corpus.jsonl:1: `text` has the wrong type"),
            ("{\"_id\": \"a\", \"text\": \"x\", \"title\": []}", "corpus.jsonl:1: `title` has the"),
            (
                "{\"_id\": \"7\", \"text\": \"\"}\n{\"_id\": 7, \"text\": \"\"}",
                "corpus.jsonl:2: duplicate `_id` \"7\"",
            ),
            ("\n", "corpus.jsonl: the file contains no record"),
        ] {
            let error = error(corpus, QUERIES, QRELS);
            assert!(error.contains(expected), "{error}");
        }
        let blank = QUERIES.replace("who carries?", " ");
        assert!(error(CORPUS, &blank, QRELS).contains("queries.jsonl:3: query `1` has no text"));
    }

    #[test]
    fn unknown_ids_and_splits_are_listed() {
        let unknown: String = (1..8).map(|i| format!("1\tx{i}\t1\n")).collect();
        let text = error(CORPUS, QUERIES, &unknown);
        assert!(text.contains("unknown documents"), "{text}");
        assert!(text.contains("7 unknown: x1, x2, x3, x4, x5, …"), "{text}");
        let text = error(CORPUS, QUERIES, "1\t2\t1\n9\t2\t1\n");
        assert!(text.contains("unknown queries") && text.contains("1 unknown: 9"), "{text}");
        let dir = folder(CORPUS, QUERIES, QRELS);
        for split in ["train", "../qrels/test", ""] {
            let error = BeirDataset::open(dir.path(), split).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Argument);
            assert!(error.to_string().contains("dev, test"), "{error}");
        }
        let error = BeirDataset::open(dir.path().join("qrels"), "test").unwrap_err().to_string();
        assert!(error.contains("a BEIR folder has"), "{error}");
    }

    #[test]
    fn unknown_ids_are_ignored_with_skip() {
        let open = |qrels: &str| {
            let dir = folder(CORPUS, QUERIES, qrels);
            BeirDataset::open_with(dir.path(), "test", UnknownIds::Skip)
        };
        let (all, none) = open(QRELS).unwrap();
        assert_eq!(none, 0);
        let (dataset, skipped) =
            open(&format!("{QRELS}9\t2\t1\nq2\tnone\t1\n9\tnone\t1\n")).unwrap();
        assert_eq!((&dataset, skipped), (&all, 3));
        // A query whose judgments are all ignored is not evaluated.
        let (dataset, skipped) = open("1\tnone\t1\nq2\tb1\t2\n").unwrap();
        assert_eq!((&*dataset.queries.ids, skipped), (&["q2".to_owned()][..], 1));
        assert_eq!((dataset.queries.texts.len(), dataset.qrels.len()), (1, 1));
        let error = open("9\t2\t1\n").unwrap_err().to_string();
        assert!(error.contains("no judgment has a known query and a known document"), "{error}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn any_corpus_is_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let dir = folder(&bytes, QUERIES, QRELS);
            let error = BeirDataset::open(dir.path(), "test").unwrap_err();
            prop_assert_eq!(error.kind(), ErrorKind::Data);
        }

        #[test]
        fn texts_are_read_back(texts in prop::collection::vec(any::<String>(), 1..8)) {
            let corpus: String = texts
                .iter()
                .enumerate()
                .map(|(id, text)| format!("{}\n", serde_json::json!({"_id": id, "text": text})))
                .collect();
            let dataset =
                BeirDataset::open(folder(corpus, QUERIES, "1\t0\t1\n").path(), "test").unwrap();
            prop_assert_eq!(dataset.corpus.len(), texts.len());
            for (read, text) in dataset.corpus.texts.iter().zip(&texts) {
                prop_assert_eq!(read, text.trim());
            }
        }
    }
}
