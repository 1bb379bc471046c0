//! Retrieval metrics as defined by trec_eval: nDCG, reciprocal rank, recall, average precision.

use std::collections::HashMap;

use serde::Serialize;

use super::{Qrels, Ranking, Run};

/// Means of metrics over the judged queries of a run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Metrics {
    /// Normalized discounted cumulative gain of the first 10, gain = grade (`ndcg_cut_10`).
    #[serde(rename = "ndcg@10")]
    pub ndcg_at_10: f64,
    /// Reciprocal rank of the first relevant document among the first 10.
    #[serde(rename = "mrr@10")]
    pub mrr_at_10: f64,
    /// Fraction of the relevant documents that are among the first 10 (`recall_10`).
    #[serde(rename = "recall@10")]
    pub recall_at_10: f64,
    /// Fraction of the relevant documents that are among the first 100 (`recall_100`).
    #[serde(rename = "recall@100")]
    pub recall_at_100: f64,
    /// Mean average precision over all retrieved documents (`map`).
    pub map: f64,
    /// The number of queries in the means.
    pub queries: usize,
}

/// Computes the metrics of a run.
///
/// The means are over the queries that are in the run and in the judgments; other queries are ignored. As in
/// trec_eval, all metrics of a query are 0 if none of its judged documents is relevant or nothing was
/// retrieved for it. If the run and the judgments have no common query, `queries` and all metrics are 0.
///
/// Documents with a grade below 1 and documents without a judgment are not relevant; their gain is 0.
pub fn evaluate(run: &Run, qrels: &Qrels) -> Metrics {
    let mut sum = Metrics::default();
    evaluate_each(run, qrels).into_iter().flatten().for_each(|metrics| sum.add(metrics));
    sum.mean()
}

/// The metrics of each ranking of a run, in order; `None` for a query without judgments.
pub fn evaluate_each(run: &Run, qrels: &Qrels) -> Vec<Option<Metrics>> {
    let metrics =
        |ranking: &Ranking| Some(evaluate_query(run, ranking, qrels.get(&ranking.query)?));
    run.rankings().iter().map(metrics).collect()
}

/// The metrics of one query.
fn evaluate_query(run: &Run, ranking: &Ranking, judged: &HashMap<String, i32>) -> Metrics {
    let mut ideal: Vec<i32> = judged.values().copied().filter(|&grade| grade > 0).collect();
    ideal.sort_unstable_by(|a, b| b.cmp(a));
    let mut metrics = Metrics { queries: 1, ..Metrics::default() };
    if ideal.is_empty() {
        return metrics;
    }
    let (mut dcg, mut found, mut found_at_10, mut found_at_100, mut precisions) =
        (0.0, 0, 0, 0, 0.0);
    for (position, hit) in ranking.hits.iter().enumerate() {
        let Some(&grade) = judged.get(run.id(hit)).filter(|&&grade| grade > 0) else { continue };
        found += 1;
        precisions += f64::from(found) / (position + 1) as f64;
        if position < 100 {
            found_at_100 = found;
        }
        if position < 10 {
            found_at_10 = found;
            dcg += discounted(grade, position);
            if found == 1 {
                metrics.mrr_at_10 = 1.0 / (position + 1) as f64;
            }
        }
    }
    let relevant = ideal.len() as f64;
    let ideal_dcg: f64 = ideal.iter().take(10).zip(0..).map(|(&g, p)| discounted(g, p)).sum();
    metrics.ndcg_at_10 = dcg / ideal_dcg;
    metrics.recall_at_10 = f64::from(found_at_10) / relevant;
    metrics.recall_at_100 = f64::from(found_at_100) / relevant;
    metrics.map = precisions / relevant;
    metrics
}

/// The contribution of a document of this grade to the DCG. `position` is counted from 0.
fn discounted(grade: i32, position: usize) -> f64 {
    f64::from(grade) / ((position + 2) as f64).log2()
}

impl Metrics {
    /// The metrics that are defined for a search of the best `top_k` of `documents` documents: display name,
    /// JSON key and value. A metric at a cutoff of 10 or 100 is omitted if `top_k` is smaller than the
    /// cutoff, unless all documents were retrieved. MAP is over the retrieved documents.
    pub fn measured(
        &self,
        top_k: usize,
        documents: usize,
    ) -> Vec<(&'static str, &'static str, f64)> {
        let all = [
            (10, "nDCG@10", "ndcg@10", self.ndcg_at_10),
            (10, "MRR@10", "mrr@10", self.mrr_at_10),
            (10, "Recall@10", "recall@10", self.recall_at_10),
            (100, "Recall@100", "recall@100", self.recall_at_100),
            (0, "MAP", "map", self.map),
        ];
        all.into_iter()
            .filter(|(cutoff, ..)| top_k >= *cutoff.min(&documents))
            .map(|(_, name, key, value)| (name, key, value))
            .collect()
    }

    fn add(&mut self, other: Metrics) {
        self.ndcg_at_10 += other.ndcg_at_10;
        self.mrr_at_10 += other.mrr_at_10;
        self.recall_at_10 += other.recall_at_10;
        self.recall_at_100 += other.recall_at_100;
        self.map += other.map;
        self.queries += other.queries;
    }

    fn mean(self) -> Metrics {
        let n = self.queries.max(1) as f64;
        Metrics {
            ndcg_at_10: self.ndcg_at_10 / n,
            mrr_at_10: self.mrr_at_10 / n,
            recall_at_10: self.recall_at_10 / n,
            recall_at_100: self.recall_at_100 / n,
            map: self.map / n,
            queries: self.queries,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;
    use crate::retrieval::Hit;

    /// `judged` and `retrieved` as `document:number` words.
    fn one(judged: &str, retrieved: &str) -> Metrics {
        evaluate_all(&[("q", judged, retrieved)])
    }

    fn evaluate_all(queries: &[(&str, &str, &str)]) -> Metrics {
        let (mut qrels, mut documents, mut rankings) = (Qrels::default(), Vec::new(), Vec::new());
        for (query, judged, retrieved) in queries {
            for (document, grade) in judged.split_whitespace().filter_map(|w| w.split_once(':')) {
                qrels.insert(query, document, grade.parse().unwrap());
            }
            let mut hits = Vec::new();
            for (document, score) in retrieved.split_whitespace().filter_map(|w| w.split_once(':'))
            {
                hits.push(Hit { document: documents.len() as u32, score: score.parse().unwrap() });
                documents.push(document.to_owned());
            }
            rankings.push(Ranking { query: query.to_string(), hits });
        }
        evaluate(&Run::new(documents.into(), rankings).unwrap(), &qrels)
    }

    #[test]
    fn metrics_at_cutoffs_above_top_k_are_omitted() {
        let names = |top_k, documents| -> Vec<&str> {
            let measured = Metrics::default().measured(top_k, documents);
            measured.into_iter().map(|(name, ..)| name).collect()
        };
        assert_eq!(names(1, 1000), ["MAP"]);
        assert_eq!(names(99, 1000), ["nDCG@10", "MRR@10", "Recall@10", "MAP"]);
        assert_eq!(names(5, 5).len(), 5);
        assert_eq!(names(100, 1000).len(), 5);
    }

    fn assert_close(metrics: Metrics, expected: [f64; 5]) {
        let m = metrics;
        let got = [m.ndcg_at_10, m.mrr_at_10, m.recall_at_10, m.recall_at_100, m.map];
        for (got, expected) in got.into_iter().zip(expected) {
            assert!((got - expected).abs() < 1e-12, "{metrics:?}, expected {expected}");
        }
    }

    // Random judgments and scores with ties and negative grades. The expected values are from
    // pytrec_eval-terrier 0.5.11 (reciprocal rank on runs truncated at 10).
    const Q0: (&str, &str) = (
        "d20:-1 d9:-1 d25:2 d3:2 d4:-1 d34:0 d6:-1 d23:3 d36:2 d29:-1 d16:3 d33:-1",
        "d14:4 d37:5 d3:0 d36:4 d25:0 d38:4 d39:1 d2:3 d8:5 d9:4 d13:3 d4:6 d17:2 d34:3 d18:4 d30:3 \
         d27:2 d21:2 d5:1 d26:6 d35:1 d19:5 d6:6 d11:1 d20:0",
    );
    const Q1: (&str, &str) = (
        "d36:1 d19:0 d33:2 d31:2 d21:-1 d28:-1 d18:3 d4:3 d7:1 d16:1 d13:1 d5:3",
        "d31:3 d37:0 d29:1 d4:6 d5:2 d17:1 d30:5 d36:1 d3:3 d23:3 d22:6 d9:3 d20:0 d18:1 d21:3 d14:3 \
         d28:4 d38:2 d12:1 d11:6 d0:3 d24:6 d27:4 d35:2 d39:5",
    );
    const Q2: (&str, &str) = (
        "d26:2 d22:3 d24:0 d14:1 d9:1 d5:-1 d11:0 d35:2 d36:3 d21:1 d7:3 d0:3",
        "d20:4 d8:0 d32:2 d3:4 d29:0 d25:0 d34:6 d33:1 d37:4 d36:3 d15:1 d39:5 d12:2 d1:2 d6:4 d2:2 \
         d31:3 d14:0 d5:0 d30:6 d10:3 d26:3 d28:3 d0:3 d4:2",
    );

    #[test]
    fn agrees_with_trec_eval() {
        let expected_0 = [0.07997770305953969, 0.1111111111111111, 0.2, 0.6, 0.0646135265700483];
        let expected_1 =
            [0.3833484419448086, 1.0, 0.2222222222222222, 0.5555555555555556, 0.2040135059871902];
        let expected_2 = [
            0.09351016758480024,
            0.125,
            0.1111111111111111,
            0.4444444444444444,
            0.07750971250971252,
        ];
        for ((judged, retrieved), expected) in
            [(Q0, expected_0), (Q1, expected_1), (Q2, expected_2)]
        {
            assert_close(one(judged, retrieved), expected);
        }
        // A query without a relevant document is in the mean, a query without judgments is not.
        let nothing_relevant = ("d1:0 d2:-1", "d1:2 d2:1");
        let all = evaluate_all(&[
            ("q0", Q0.0, Q0.1),
            ("q1", Q1.0, Q1.1),
            ("q2", Q2.0, Q2.1),
            ("q3", nothing_relevant.0, nothing_relevant.1),
            ("unjudged", "", "d1:1"),
        ]);
        assert_eq!(all.queries, 4);
        assert_close(
            all,
            [
                0.13920907814728714,
                0.3090277777777778,
                0.13333333333333333,
                0.4,
                0.08653418626673776,
            ],
        );
    }

    #[test]
    fn negative_grades_have_no_gain() {
        let metrics = one("a:-1 b:2 c:1 z:-2", "a:1 b:0.5 c:0.2");
        assert_close(metrics, [0.66967181649423, 0.5, 1.0, 1.0, 0.5833333333333333]);
    }

    #[test]
    fn ties_are_ordered_by_decreasing_id() {
        assert_close(one("d9:1", "d10:1 d9:1"), [1.0; 5]);
        assert_close(one("d10:1", "d10:1 d9:1"), [1.0 / 3f64.log2(), 0.5, 1.0, 1.0, 0.5]);
    }

    #[test]
    fn no_common_query_gives_zero_not_nan() {
        let run = Run::new(Arc::from([]), Vec::new()).unwrap();
        assert_eq!(evaluate(&run, &Qrels::default()), Metrics::default());
        assert_eq!(one("a:1", ""), Metrics { queries: 1, ..Metrics::default() });
    }

    #[test]
    fn json_keys_are_the_usual_names() {
        let json = serde_json::to_value(Metrics::default()).unwrap();
        let names: Vec<&str> = json.as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(names, ["ndcg@10", "mrr@10", "recall@10", "recall@100", "map", "queries"]);
    }

    proptest! {
        #[test]
        fn metrics_stay_within_bounds(
            grades in prop::collection::vec(-2..4i32, 1..30),
            scores in prop::collection::vec(0..5u8, 0..130),
        ) {
            let judged: String = grades.iter().zip(0..).map(|(g, i)| format!("{i}:{g} ")).collect();
            let retrieved: String = scores.iter().zip(0..).map(|(s, i)| format!("{i}:{s} ")).collect();
            let m = one(&judged, &retrieved);
            for value in [m.ndcg_at_10, m.mrr_at_10, m.recall_at_10, m.recall_at_100, m.map] {
                prop_assert!((0.0..=1.0 + 1e-12).contains(&value), "{:?}", m);
            }
            prop_assert!(m.recall_at_10 <= m.recall_at_100);
        }
    }
}
