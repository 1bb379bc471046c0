//! Relevance judgments ("qrels"): the relevance grades of documents for queries.

use std::collections::{BTreeMap, HashMap};
use std::num::{IntErrorKind, ParseIntError};
use std::path::Path;

use super::lines::{Line, Lines, excerpt};
use crate::{Error, ErrorKind, Result};

/// Relevance grades of documents, by query. A document is relevant if its grade is 1 or more.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Qrels {
    // Ordered, so that errors and sums over queries are deterministic.
    queries: BTreeMap<String, HashMap<String, i32>>,
}

impl Qrels {
    /// Reads a BEIR judgment file: tab-separated query id, document id and integer grade. The header
    /// `query-id⇥corpus-id⇥score` is optional.
    ///
    /// # Errors
    /// [`ErrorKind::Data`] with file and line: a wrong number of columns, a grade that is not an integer,
    /// two different grades for one pair; or no judgment in the file.
    pub fn read_tsv(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let mut lines = Lines::open(path)?;
        let mut qrels = Qrels::default();
        let mut first = true;
        while let Some(line) = lines.next_line()? {
            let header = std::mem::take(&mut first) && is_header(line.text);
            if header || line.is_blank() {
                continue;
            }
            let (query, document, grade) = parse_judgment(line)?;
            if let Some(before) = qrels.insert(query, document, grade)
                && before != grade
            {
                return Err(line
                    .error(format!(
                        "query `{query}` and document `{document}` have two different grades"
                    ))
                    .expected(format!("the grade {before} of the earlier line"))
                    .got(grade));
            }
        }
        if qrels.is_empty() {
            return Err(Error::new(ErrorKind::Data, "the file contains no judgments").file(path));
        }
        Ok(qrels)
    }

    /// Sets the grade of a document for a query and returns the previous grade.
    pub fn insert(&mut self, query: &str, document: &str, grade: i32) -> Option<i32> {
        // Not `entry`, which would copy the query's id for every judgment.
        let documents = match self.queries.get_mut(query) {
            Some(documents) => documents,
            None => self.queries.entry(query.to_owned()).or_default(),
        };
        documents.insert(document.to_owned(), grade)
    }

    /// Keeps the judgments for which `keep(query, document)` is true, and returns the number of removed ones.
    /// Queries without judgments are removed too.
    pub fn retain(&mut self, keep: impl Fn(&str, &str) -> bool) -> usize {
        let mut removed = 0;
        self.queries.retain(|query, documents| {
            let before = documents.len();
            documents.retain(|document, _| keep(query, document));
            removed += before - documents.len();
            !documents.is_empty()
        });
        removed
    }

    /// The judged documents of a query with their grades; `None` if the query has no judgments.
    pub fn get(&self, query: &str) -> Option<&HashMap<String, i32>> {
        self.queries.get(query)
    }

    /// The ids of the judged queries, ascending.
    pub fn queries(&self) -> impl Iterator<Item = &str> {
        self.queries.keys().map(String::as_str)
    }

    /// The number of judged queries.
    pub fn len(&self) -> usize {
        self.queries.len()
    }

    /// Whether there are no judgments.
    pub fn is_empty(&self) -> bool {
        self.queries.is_empty()
    }
}

fn is_header(line: &str) -> bool {
    let mut columns = line.split('\t').map(str::trim);
    let (first, last) = (columns.next(), columns.next_back());
    last == Some("score")
        || first == Some("query-id") && last.is_none_or(|grade| grade.parse::<i32>().is_err())
}

fn parse_judgment<'a>(line: Line<'a>) -> Result<(&'a str, &'a str, i32)> {
    const COLUMNS: &str = "query id, document id and grade, separated by tabs";
    let mut columns = line.text.split('\t').map(str::trim);
    let (Some(query), Some(document), Some(grade), None) =
        (columns.next(), columns.next(), columns.next(), columns.next())
    else {
        let got = line.text.split('\t').count();
        return Err(line
            .error("a judgment has three columns")
            .expected(COLUMNS)
            .got(format!("{got} in `{}`", excerpt(line.text))));
    };
    if query.is_empty() || document.is_empty() {
        return Err(line.error("an id is empty").expected(COLUMNS));
    }
    let grade = grade.parse().map_err(|e: ParseIntError| match e.kind() {
        IntErrorKind::PosOverflow | IntErrorKind::NegOverflow => line
            .error("the grade is not a 32-bit integer")
            .expected(format!("{} to {}", i32::MIN, i32::MAX))
            .got(excerpt(grade)),
        _ => line.error("the grade is not an integer").expected(COLUMNS).got(excerpt(grade)),
    })?;
    Ok((query, document, grade))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(bytes: &[u8]) -> Result<Qrels> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("test.tsv");
        std::fs::write(&path, bytes).unwrap();
        Qrels::read_tsv(path)
    }

    #[test]
    fn header_is_optional() {
        let rows = "1\tMED-10\t2\n1\tMED-11\t-1\r\n\n2\tMED 12\t0";
        let bare = read(rows.as_bytes()).unwrap();
        let headed = read(format!("query-id\tcorpus-id\tscore\n{rows}").as_bytes()).unwrap();
        assert_eq!(bare, headed);
        assert_eq!(bare.queries().collect::<Vec<_>>(), ["1", "2"]);
        assert_eq!(bare.get("1").unwrap()["MED-11"], -1);
        assert_eq!(bare.get("2").unwrap()["MED 12"], 0);
        assert!(bare.get("3").is_none());
    }

    #[test]
    fn errors_name_the_line() {
        for (text, expected) in [
            ("1\ta\t1\n1\tb\t1.5\n", ":2: the grade is not an integer"),
            ("1\ta\tx\n", ":1: the grade is not an integer"),
            ("1\ta\t99999999999\n", ":1: the grade is not a 32-bit integer"),
            ("1\ta\t-1000000000000\n", ":1: the grade is not a 32-bit integer"),
            ("1 0 a 1\n", ":1: a judgment has three columns"),
            ("1\t0\ta\t1\n", ":1: a judgment has three columns"),
            ("1\t\t1\n", ":1: an id is empty"),
            (
                "1\ta\t1\n1\ta\t1\n1\ta\t2\n",
                ":3: query `1` and document `a` have two different grades",
            ),
            ("query-id\tcorpus-id\tscore\n", ": the file contains no judgments"),
            ("", ": the file contains no judgments"),
        ] {
            let error = read(text.as_bytes()).unwrap_err().to_string();
            assert!(error.contains(&format!("test.tsv{expected}")), "{error}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Err(e) = read(&bytes) {
                prop_assert_eq!(e.kind(), ErrorKind::Data);
            }
        }

        #[test]
        fn judgments_come_back(rows in prop::collection::btree_map(("[a-z]{1,3}", "[a-z0-9]{1,3}"), any::<i32>(), 1..30)) {
            let text: String = rows.iter().map(|((q, d), g)| format!("{q}\t{d}\t{g}\n")).collect();
            let qrels = read(text.as_bytes()).unwrap();
            for ((query, document), grade) in &rows {
                prop_assert_eq!(qrels.get(query).unwrap()[document], *grade);
            }
        }
    }
}
