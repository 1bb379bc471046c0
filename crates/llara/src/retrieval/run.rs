//! Runs: the ranked documents of each query, in trec_eval's order.

use std::collections::HashSet;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use crate::storage::{OutputFile, check_output_path, open_file};
use crate::{Error, ErrorKind, Result};

/// One retrieved document.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Hit {
    /// Index of the document in [`Run::documents`].
    pub document: u32,
    /// Similarity to the query; finite.
    pub score: f32,
}

/// The retrieved documents of one query.
#[derive(Debug, Clone, PartialEq)]
pub struct Ranking {
    /// The query's id.
    pub query: String,
    /// The documents by decreasing score; documents with equal scores by decreasing id.
    pub hits: Vec<Hit>,
}

/// The rankings of a set of queries over one collection.
///
/// Rankings are always in trec_eval's order: by decreasing score, and for equal scores by decreasing id,
/// compared as bytes. Therefore ranks here, in a run file and in trec_eval are the same.
#[derive(Debug, Clone, PartialEq)]
pub struct Run {
    documents: Arc<[String]>,
    rankings: Vec<Ranking>,
}

impl Run {
    /// Creates a run from rankings in any order, and sorts them.
    ///
    /// # Errors
    /// [`ErrorKind::Data`]: a duplicate query, a duplicate document of a query, or an index out of the range
    /// of `documents`; [`ErrorKind::Numeric`]: a score that is not finite.
    pub fn new(documents: Arc<[String]>, mut rankings: Vec<Ranking>) -> Result<Self> {
        let mut queries = HashSet::new();
        for ranking in &mut rankings {
            let fail = |kind, what: String| Error::new(kind, format!("invalid run: {what}"));
            let Ranking { query, hits } = ranking;
            if !queries.insert(query.clone()) {
                return Err(fail(ErrorKind::Data, format!("query `{query}` occurs twice")));
            }
            let mut seen = HashSet::with_capacity(hits.len());
            for hit in hits.iter_mut() {
                let id = documents.get(hit.document as usize).ok_or_else(|| {
                    fail(ErrorKind::Data, format!("query `{query}` has an unknown document"))
                        .expected(format!("an index below {}", documents.len()))
                        .got(hit.document)
                })?;
                if !seen.insert(id) {
                    let what = format!("query `{query}` has document `{id}` twice");
                    return Err(fail(ErrorKind::Data, what));
                }
                if !hit.score.is_finite() {
                    let what =
                        format!("query `{query}`: the score of document `{id}` is not finite");
                    return Err(fail(ErrorKind::Numeric, what).got(hit.score));
                }
                hit.score += 0.0; // -0.0, which total_cmp orders before 0.0, becomes 0.0
            }
            hits.sort_unstable_by(|a, b| {
                let id = |hit: &Hit| &documents[hit.document as usize];
                b.score.total_cmp(&a.score).then_with(|| id(b).cmp(id(a)))
            });
        }
        Ok(Run { documents, rankings })
    }

    /// A run from rankings that are valid and sorted already.
    pub(super) fn from_ordered(documents: Arc<[String]>, rankings: Vec<Ranking>) -> Self {
        Run { documents, rankings }
    }

    /// The ids of all documents of the collection.
    pub fn documents(&self) -> &[String] {
        &self.documents
    }

    /// The rankings, in the order of the queries.
    pub fn rankings(&self) -> &[Ranking] {
        &self.rankings
    }

    /// The id of a retrieved document.
    pub fn id(&self, hit: &Hit) -> &str {
        &self.documents[hit.document as usize]
    }
}

/// Writes a run in trec_eval's format: `query Q0 document rank score tag`, ranks from 1.
///
/// Scores have as many digits as are needed to read the same `f32` back. The file is written atomically.
///
/// # Errors
/// [`ErrorKind::Data`]: an id or the tag is empty or contains white space, which the format does not
/// allow; [`ErrorKind::Io`]: a failed write.
pub fn write_trec_run(path: impl AsRef<Path>, run: &Run, tag: &str) -> Result<()> {
    let mut file = OutputFile::create(path.as_ref())?;
    let tag = one_word("run tag", tag, file.path())?;
    for ranking in run.rankings() {
        let query = one_word("query id", &ranking.query, file.path())?;
        for (hit, rank) in ranking.hits.iter().zip(1u32..) {
            let document = one_word("document id", run.id(hit), file.path())?;
            // `{}` prints the shortest decimal that reads back as the same f32.
            let line = format!("{query} Q0 {document} {rank} {} {tag}\n", hit.score);
            file.write(line.as_bytes())?;
        }
    }
    file.commit()
}

/// Checks that ids can be written to a run file and that a file can be written to `path`, so that
/// [`write_trec_run`] does not fail after a long evaluation.
///
/// # Errors
/// Those of [`write_trec_run`].
pub fn check_trec_run<'a>(
    path: impl AsRef<Path>,
    ids: impl IntoIterator<Item = &'a String>,
) -> Result<()> {
    let path = path.as_ref();
    check_output_path(path)?;
    ids.into_iter().try_for_each(|id| one_word("id of a query or document", id, path).map(drop))
}

/// Whether the file at `path` begins like a run in trec_eval's format.
pub fn begins_like_trec_run(path: impl AsRef<Path>) -> std::io::Result<bool> {
    let mut start = Vec::new();
    open_file(path.as_ref())?.take(4096).read_to_end(&mut start)?;
    let line = String::from_utf8_lossy(&start);
    let columns: Vec<&str> = line.lines().next().unwrap_or_default().split_whitespace().collect();
    Ok(columns.len() == 6
        && columns[1] == "Q0"
        && columns[3].parse::<u64>().is_ok()
        && columns[4].parse::<f64>().is_ok())
}

fn one_word<'a>(what: &str, word: &'a str, path: &Path) -> Result<&'a str> {
    if !word.is_empty() && !word.contains(char::is_whitespace) {
        return Ok(word);
    }
    Err(Error::new(ErrorKind::Data, format!("a {what} cannot be written to a run file"))
        .file(path)
        .expected("one word: columns are separated by spaces")
        .got(format!("{word:?}")))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ids(names: &[&str]) -> Arc<[String]> {
        names.iter().map(|name| name.to_string()).collect()
    }

    fn ranking(query: &str, hits: &[(u32, f32)]) -> Ranking {
        let hits = hits.iter().map(|&(document, score)| Hit { document, score }).collect();
        Ranking { query: query.into(), hits }
    }

    #[test]
    fn order_is_that_of_trec_eval() {
        let rankings = vec![ranking("q", &[(0, 0.5), (1, 0.5), (2, 2.0), (3, 0.0), (4, -0.0)])];
        let run = Run::new(ids(&["d10", "d9", "a", "x", "y"]), rankings).unwrap();
        let order: Vec<&str> = run.rankings()[0].hits.iter().map(|hit| run.id(hit)).collect();
        assert_eq!(order, ["a", "d9", "d10", "y", "x"]);
    }

    #[test]
    fn invalid_runs_are_refused() {
        let run = |rankings| Run::new(ids(&["a", "b", "a"]), rankings);
        let kind = |rankings| run(rankings).unwrap_err().kind();
        assert_eq!(kind(vec![ranking("q", &[(3, 1.0)])]), ErrorKind::Data);
        assert_eq!(kind(vec![ranking("q", &[(0, 1.0), (2, 2.0)])]), ErrorKind::Data);
        assert_eq!(kind(vec![ranking("q", &[]), ranking("q", &[])]), ErrorKind::Data);
        assert_eq!(kind(vec![ranking("q", &[(0, f32::NAN)])]), ErrorKind::Numeric);
    }

    #[test]
    fn the_file_has_six_columns_and_ids_with_spaces_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run.txt");
        let rankings = vec![ranking("q1", &[(1, 0.1), (0, 1e-8)]), ranking("q2", &[(0, -3.0)])];
        let run = Run::new(ids(&["a", "b"]), rankings).unwrap();
        write_trec_run(&path, &run, "llara").unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(text, "q1 Q0 b 1 0.1 llara\nq1 Q0 a 2 0.00000001 llara\nq2 Q0 a 1 -3 llara\n");
        assert!(begins_like_trec_run(&path).unwrap());
        for other in ["", "q1\td1\t1\n", "q1 0 d1 1\n", "a b c d e f\n", "\u{1}\n"] {
            let path = dir.path().join("other");
            std::fs::write(&path, other).unwrap();
            assert!(!begins_like_trec_run(path).unwrap(), "{other:?}");
        }
        assert!(check_trec_run(&path, &["q1".to_owned(), "a".to_owned()]).is_ok());
        for bad in ["a b", "", "a\tb", "a\u{a0}b"] {
            let error = check_trec_run(&path, &["q1".to_owned(), bad.to_owned()]).unwrap_err();
            assert!(error.to_string().contains(&format!("{bad:?}")), "{error}");
        }
        assert!(check_trec_run(dir.path().join("no/run"), &[]).is_err());
        assert!(write_trec_run(&path, &run, "two words").is_err());
        let run = Run::new(ids(&["a b"]), vec![ranking("q", &[(0, 1.0)])]).unwrap();
        let error = write_trec_run(&path, &run, "t").unwrap_err().to_string();
        assert!(error.contains("\"a b\""), "{error}");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), text, "the old file was changed");
    }

    proptest! {
        #[test]
        fn any_bytes_are_classified_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..99)) {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("run");
            std::fs::write(&path, bytes).unwrap();
            begins_like_trec_run(path).unwrap();
        }

        #[test]
        fn checked_ids_can_be_written(id in "\\PC{0,6}|[ a\t\n]{0,3}") {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("run");
            let checked = check_trec_run(&path, [&id]).is_ok();
            let run = Run::new(ids(&[&id]), vec![ranking("q", &[(0, 1.0)])]).unwrap();
            prop_assert_eq!(write_trec_run(&path, &run, "t").is_ok(), checked);
            prop_assert_eq!(checked && !begins_like_trec_run(&path).unwrap(), false);
        }

        #[test]
        fn scores_read_back_bit_for_bit(bits: u32) {
            let score = f32::from_bits(bits);
            prop_assume!(score.is_finite());
            prop_assert_eq!(format!("{score}").parse::<f32>().unwrap().to_bits(), bits);
        }
    }
}
