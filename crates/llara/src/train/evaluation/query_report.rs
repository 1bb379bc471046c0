//! `eval_queries.json`: the queries that a model answers best and worst, with what it found and missed.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;

use serde::Serialize;

use super::history::EvalRecord;
use super::settings::EvalSet;
use crate::retrieval::{BeirDataset, Ranking, Run, evaluate_each};
use crate::storage::OutputFile;
use crate::{Error, Result};

/// Queries at either end.
const QUERIES: usize = 10;
/// Passages shown of those that were found.
const FOUND: usize = 5;
/// A relevant passage behind this rank is missed: it does not count in nDCG@10.
const FIRST: usize = 10;
/// Passages shown of those that were missed.
const MISSED: usize = 3;
/// Characters of a passage that are shown.
const CHARACTERS: usize = 300;

/// The best and the worst queries of one set.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SetReport {
    /// Steps after which the model was evaluated; 0: the starting model.
    pub step: u64,
    /// The set's split.
    pub split: String,
    /// The 10 queries with the greatest nDCG@10, the best first.
    pub best: Vec<QueryReport>,
    /// The 10 queries with the smallest nDCG@10, the worst first. Of fewer than 20 queries, some are in both.
    pub worst: Vec<QueryReport>,
}

/// One query and its passages.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct QueryReport {
    /// The query's id.
    pub id: String,
    /// The query's text.
    pub text: String,
    /// nDCG of the first 10 passages.
    #[serde(rename = "ndcg@10")]
    pub ndcg_at_10: f64,
    /// The first 5 passages, by decreasing score.
    pub found: Vec<FoundPassage>,
    /// Up to 3 relevant passages that are not among the first 10, the most relevant first.
    pub missed: Vec<MissedPassage>,
}

/// A passage that was found.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct FoundPassage {
    /// The passage's id.
    pub id: String,
    /// The first 300 characters of its text.
    pub text: String,
    /// Its similarity to the query.
    pub score: f32,
    /// Its grade, if it was judged.
    pub relevance: Option<i32>,
}

/// A relevant passage that was not found.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct MissedPassage {
    /// The passage's id.
    pub id: String,
    /// The first 300 characters of its text.
    pub text: String,
    /// Its rank, from 11 to 100; `None`: it is behind that.
    pub rank: Option<usize>,
}

impl SetReport {
    /// The report on a search of `set`. Queries without a relevant passage are left out: their nDCG is 0 for
    /// every model. Queries with the same nDCG are in the order of their ids.
    pub(super) fn new(set: &EvalSet, run: &Run, step: u64) -> Self {
        let BeirDataset { corpus, queries, qrels } = &set.dataset;
        let has_relevant = |query: &str| {
            qrels.get(query).is_some_and(|judged| judged.values().any(|&grade| grade > 0))
        };
        let mut scored: Vec<(f64, &Ranking)> = evaluate_each(run, qrels)
            .into_iter()
            .zip(run.rankings())
            .filter(|(_, ranking)| has_relevant(&ranking.query))
            .filter_map(|(metrics, ranking)| Some((metrics?.ndcg_at_10, ranking)))
            .collect();
        scored.sort_by(|(a, first), (b, second)| {
            a.total_cmp(b).then_with(|| first.query.cmp(&second.query))
        });
        let worst = &scored[..scored.len().min(QUERIES)];
        let best = &scored[scored.len().saturating_sub(QUERIES)..];

        // Only the passages of these queries are looked up: a corpus may have millions.
        let shown = || worst.iter().chain(best);
        let judged: HashSet<&str> = shown()
            .filter_map(|(_, ranking)| qrels.get(&ranking.query))
            .flat_map(|judged| judged.keys().map(String::as_str))
            .collect();
        let texts: HashMap<&str, &str> = corpus
            .ids
            .iter()
            .zip(&corpus.texts)
            .filter(|(id, _)| judged.contains(id.as_str()))
            .map(|(id, text)| (id.as_str(), text.as_str()))
            .collect();
        let asked: HashSet<&str> = shown().map(|(_, ranking)| ranking.query.as_str()).collect();
        let questions: HashMap<&str, &str> = queries
            .ids
            .iter()
            .zip(&queries.texts)
            .filter(|(id, _)| asked.contains(id.as_str()))
            .map(|(id, text)| (id.as_str(), text.as_str()))
            .collect();
        let query = |&(ndcg_at_10, ranking): &(f64, &Ranking)| {
            let id = ranking.query.as_str();
            QueryReport {
                id: id.to_owned(),
                text: questions.get(id).copied().unwrap_or_default().to_owned(),
                ndcg_at_10,
                found: found(set, run, ranking),
                missed: missed(set, run, ranking, &texts),
            }
        };
        SetReport {
            step,
            split: set.split.clone(),
            best: best.iter().rev().map(query).collect(),
            worst: worst.iter().map(query).collect(),
        }
    }

    /// Writes the reports of all sets by their names, atomically. `records` are those of the same sets.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub(in crate::train) fn write(
        reports: &[SetReport],
        records: &[EvalRecord],
        path: &Path,
    ) -> Result<()> {
        let by_name: BTreeMap<&str, &SetReport> =
            records.iter().map(|record| record.dataset.as_str()).zip(reports).collect();
        let mut json =
            serde_json::to_vec_pretty(&by_name).map_err(|e| Error::io("write", path, e.into()))?;
        json.push(b'\n');
        let mut file = OutputFile::create(path)?;
        file.write(&json)?;
        file.commit()
    }
}

fn found(set: &EvalSet, run: &Run, ranking: &Ranking) -> Vec<FoundPassage> {
    let judged = set.dataset.qrels.get(&ranking.query);
    let hits = ranking.hits.iter().take(FOUND);
    hits.map(|hit| FoundPassage {
        id: run.id(hit).to_owned(),
        text: cut(&set.dataset.corpus.texts[hit.document as usize]),
        score: hit.score,
        relevance: judged.and_then(|judged| judged.get(run.id(hit)).copied()),
    })
    .collect()
}

/// `texts` has those of all judged passages of the query.
fn missed(
    set: &EvalSet,
    run: &Run,
    ranking: &Ranking,
    texts: &HashMap<&str, &str>,
) -> Vec<MissedPassage> {
    let ranks: HashMap<&str, usize> = ranking.hits.iter().map(|hit| run.id(hit)).zip(1..).collect();
    let judged = set.dataset.qrels.get(&ranking.query).into_iter().flatten();
    let mut relevant: Vec<(&String, &i32)> = judged.filter(|(_, grade)| **grade > 0).collect();
    relevant.sort_unstable_by(|(id, grade), (other, other_grade)| {
        other_grade.cmp(grade).then_with(|| id.cmp(other))
    });
    let rank = |id: &str| ranks.get(id).copied();
    let missed = relevant.into_iter().filter(|(id, _)| rank(id).is_none_or(|rank| rank > FIRST));
    missed
        .take(MISSED)
        .map(|(id, _)| MissedPassage {
            id: id.clone(),
            text: cut(texts.get(id.as_str()).copied().unwrap_or_default()),
            rank: rank(id),
        })
        .collect()
}

/// The first characters of a text.
fn cut(text: &str) -> String {
    text.chars().take(CHARACTERS).collect()
}

#[cfg(test)]
mod tests {
    use super::super::settings::tests::set;
    use super::*;
    use crate::retrieval::Hit;

    /// Query `i` finds the passages in the order of their numbers, after `i` others.
    fn run(set: &EvalSet) -> Run {
        let passages = set.dataset.corpus.len() as u32;
        let ranking = |(i, query): (u32, &String)| {
            let hit = |rank: u32| Hit {
                document: (rank + 2 * i) % passages,
                score: 1.0 - rank as f32 / passages as f32,
            };
            // Passage `i` has the rank `passages - i`.
            Ranking { query: query.clone(), hits: (0..passages.min(100)).map(hit).collect() }
        };
        let rankings = (0..).zip(set.dataset.queries.ids.iter()).map(ranking).collect();
        Run::new(set.dataset.corpus.ids.clone(), rankings).unwrap()
    }

    #[test]
    fn the_best_and_the_worst_queries_are_shown_with_what_was_found_and_missed() {
        let mut set = set("a", 150, 25);
        // Relevant for the first query, and nothing relevant for the second.
        set.dataset.qrels.insert("q0", "d30", 2);
        set.dataset.qrels.insert("q0", "d120", 1);
        set.dataset.qrels.insert("q0", "d1", -1);
        set.dataset.qrels.insert("q1", "d1", 0);
        set.dataset.corpus.texts[0] = "ß".repeat(400);
        let report = SetReport::new(&set, &run(&set), 7);
        assert_eq!((report.step, report.split.as_str()), (7, "dev"));
        assert_eq!((report.best.len(), report.worst.len()), (10, 10));
        let best = &report.best[0];
        assert_eq!((best.id.as_str(), best.text.as_str()), ("q0", "What about 0"));
        assert!(best.ndcg_at_10 > 0.0 && best.ndcg_at_10 < 1.0);
        let found: Vec<_> = best.found.iter().map(|p| (p.id.as_str(), p.relevance)).collect();
        let expected =
            [("d0", Some(1)), ("d1", Some(-1)), ("d2", None), ("d3", None), ("d4", None)];
        assert_eq!(found, expected);
        assert_eq!(best.found[0].text, "ß".repeat(300));
        assert_eq!(best.found[0].score, 1.0);
        let missed: Vec<_> = best.missed.iter().map(|p| (p.id.as_str(), p.rank)).collect();
        assert_eq!(missed, [("d30", Some(31)), ("d120", None)]);
        assert_eq!(best.missed[1].text, "Fact 120");
        let ids: Vec<_> = report.worst.iter().map(|query| query.id.as_str()).collect();
        assert_eq!(ids[..4], ["q10", "q11", "q12", "q13"], "equal ones by id");
        assert!(report.worst.iter().chain(&report.best).all(|query| query.id != "q1"));
    }

    #[test]
    fn few_queries_are_in_both_lists_and_the_file_is_replaced() {
        let set = set("a", 12, 3);
        let report = SetReport::new(&set, &run(&set), 1);
        assert_eq!((report.best.len(), report.worst.len()), (3, 3));
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("eval_queries.json");
        let record = EvalRecord {
            step: 1,
            epoch: 1.0,
            dataset: "a".to_owned(),
            split: "dev".to_owned(),
            ndcg_at_10: 0.0,
            mrr_at_10: 0.0,
            recall_at_100: 0.0,
            queries: 3,
            seconds: 0.0,
        };
        let (reports, records) = ([report], [record]);
        for _ in 0..2 {
            SetReport::write(&reports, &records, &path).unwrap();
            let json: serde_json::Value =
                serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
            let worst = &json["a"]["worst"][0];
            assert_eq!((&worst["id"], &worst["missed"][0]["rank"]), (&"q1".into(), &12.into()));
            assert_eq!(json["a"]["best"][0]["found"][1]["relevance"], serde_json::Value::Null);
            assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        }
    }
}
