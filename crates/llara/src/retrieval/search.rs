//! Exact search: the passages with the greatest inner products with each query.

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;
use std::sync::Arc;

use ndarray::{Array2, ArrayView1, ArrayView2, s};
use rayon::prelude::*;

use super::{Hit, Ranking, Run};
use crate::{Error, ErrorKind, Result};

/// Queries and passages of a block of scores: 16 MiB, enough for the full speed of the products.
const QUERY_BLOCK: usize = 256;
const PASSAGE_BLOCK: usize = 16 * 1024;

/// Computes inner products of two blocks of embeddings, usually with a backend's matrix product.
pub trait Similarity {
    /// The scores `(queries, passages)` of embeddings `(queries, d)` and `(passages, d)`.
    fn block(&self, queries: ArrayView2<f32>, passages: ArrayView2<f32>) -> Result<Array2<f32>>;
}

/// Options of a search.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SearchOptions {
    /// Number of passages that are retrieved per query, at least 1.
    pub top_k: usize,
    /// Exclude the passage with the query's id, as BEIR does for collections whose queries are passages of
    /// the corpus (ArguAna, Quora).
    pub ignore_identical_ids: bool,
}

impl Default for SearchOptions {
    fn default() -> Self {
        SearchOptions { top_k: 1000, ignore_identical_ids: false }
    }
}

/// Searches passages that are all in memory. Row i of `queries` (queries, d) and of `passages` (passages, d)
/// belongs to id i. [`Searcher`] searches passages block by block.
///
/// # Errors
/// Those of [`Searcher`].
pub fn search(
    similarity: &(impl Similarity + ?Sized),
    queries: (&[String], ArrayView2<f32>),
    passages: (&Arc<[String]>, ArrayView2<f32>),
    options: SearchOptions,
) -> Result<Run> {
    let mut searcher = Searcher::new(queries.0, queries.1, passages.0, options)?;
    searcher.add(similarity, passages.1)?;
    searcher.finish()
}

/// A search to which passages are added block by block, so that they need not all be in memory.
///
/// The result does not depend on the blocks if [`Similarity`] gives a pair the same score in every block.
/// Ties are ordered as in trec_eval, also at rank `top_k`.
pub struct Searcher<'a> {
    queries: ArrayView2<'a, f32>,
    query_ids: &'a [String],
    documents: Arc<[String]>,
    /// The documents by increasing id; `precedence[document]` is the position of a document in it.
    by_id: Vec<u32>,
    precedence: Vec<u32>,
    /// The best documents of each query.
    best: Vec<Best>,
    added: usize,
}

impl<'a> Searcher<'a> {
    /// Prepares to search `documents` with the embeddings `queries` (queries, d).
    ///
    /// # Errors
    /// [`ErrorKind::Argument`]: `top_k` is 0, ids and rows differ in number, an id is not unique, or there
    /// are 2³² documents or more.
    pub fn new(
        query_ids: &'a [String],
        queries: ArrayView2<'a, f32>,
        documents: &Arc<[String]>,
        options: SearchOptions,
    ) -> Result<Self> {
        let invalid = |what: &str| Error::new(ErrorKind::Argument, what);
        if options.top_k == 0 {
            return Err(invalid("`top_k` is 0").expected("at least 1"));
        }
        if query_ids.len() != queries.nrows() {
            return Err(invalid("query ids and query embeddings differ in number")
                .expected(query_ids.len())
                .got(queries.nrows()));
        }
        let by_id = ascending(documents)?;
        ascending(query_ids)?;
        let mut precedence = vec![0; documents.len()];
        for (position, &document) in (0..).zip(&by_id) {
            precedence[document as usize] = position;
        }
        let own = |query: &String| {
            let position = by_id.binary_search_by(|&d| documents[d as usize].cmp(query)).ok()?;
            Some(by_id[position])
        };
        let best = query_ids
            .iter()
            .map(|query| Best {
                heap: BinaryHeap::new(),
                top_k: options.top_k,
                ignored: own(query).filter(|_| options.ignore_identical_ids),
            })
            .collect();
        let documents = documents.clone();
        Ok(Searcher { queries, query_ids, documents, by_id, precedence, best, added: 0 })
    }

    /// Adds the embeddings `(any number, d)` of the next documents, in the order of their ids.
    ///
    /// # Errors
    /// [`ErrorKind::Argument`]: the dimension differs from that of the queries, or there are more rows than
    /// documents; [`ErrorKind::Numeric`]: a score is not finite; and the errors of `similarity`.
    pub fn add(
        &mut self,
        similarity: &(impl Similarity + ?Sized),
        passages: ArrayView2<f32>,
    ) -> Result<()> {
        if passages.ncols() != self.queries.ncols() {
            return Err(Error::new(
                ErrorKind::Argument,
                "query and passage embeddings differ in dimension",
            )
            .expected(self.queries.ncols())
            .got(passages.ncols()));
        }
        if passages.nrows() > self.documents.len() - self.added {
            return Err(Error::new(
                ErrorKind::Argument,
                "there are more passage embeddings than ids",
            )
            .expected(self.documents.len())
            .got(self.added + passages.nrows()));
        }
        for start in (0..passages.nrows()).step_by(PASSAGE_BLOCK) {
            let end = (start + PASSAGE_BLOCK).min(passages.nrows());
            let block = passages.slice(s![start..end, ..]);
            for first in (0..self.queries.nrows()).step_by(QUERY_BLOCK) {
                self.add_block(similarity, first, block)?;
            }
            self.added += end - start;
        }
        Ok(())
    }

    /// Adds a block of passages to a block of queries that starts at `first`.
    fn add_block(
        &mut self,
        similarity: &(impl Similarity + ?Sized),
        first: usize,
        passages: ArrayView2<f32>,
    ) -> Result<()> {
        let last = (first + QUERY_BLOCK).min(self.queries.nrows());
        let scores = similarity.block(self.queries.slice(s![first..last, ..]), passages)?;
        if scores.dim() != (last - first, passages.nrows()) {
            return Err(Error::new(ErrorKind::Backend, "the scores have the wrong shape")
                .expected(format!("{:?}", (last - first, passages.nrows())))
                .got(format!("{:?}", scores.dim())));
        }
        let (added, precedence) = (self.added as u32, &self.precedence);
        let bad: Vec<Option<usize>> = self.best[first..last]
            .par_iter_mut()
            .enumerate()
            .map(|(row, best)| best.offer_all(scores.row(row), added, precedence))
            .collect();
        let bad = bad.iter().enumerate().find_map(|(row, bad)| bad.map(|column| (row, column)));
        match bad {
            None => Ok(()),
            Some((row, column)) => {
                let query = &self.query_ids[first + row];
                let document = &self.documents[self.added + column];
                let what =
                    format!("the score of query `{query}` and passage `{document}` is not finite");
                Err(Error::new(ErrorKind::Numeric, what)
                    .got(scores[(row, column)])
                    .hint("the embeddings are too large or not finite: check the model's weights"))
            }
        }
    }

    /// Returns the rankings after all documents were added.
    ///
    /// # Errors
    /// [`ErrorKind::Argument`]: not all documents were added.
    pub fn finish(self) -> Result<Run> {
        if self.added != self.documents.len() {
            return Err(Error::new(
                ErrorKind::Argument,
                "there are fewer passage embeddings than ids",
            )
            .expected(self.documents.len())
            .got(self.added));
        }
        let by_id = &self.by_id;
        let rankings = self
            .best
            .into_par_iter()
            .zip(self.query_ids)
            .map(|(best, query)| {
                // Candidates are wrapped in `Reverse`, so the ascending order is best first.
                let candidates = best.heap.into_sorted_vec().into_iter();
                let hits = candidates.map(|Reverse(candidate)| Hit {
                    document: by_id[candidate.precedence as usize],
                    score: candidate.score,
                });
                Ranking { query: query.clone(), hits: hits.collect() }
            })
            .collect();
        Ok(Run::from_ordered(self.documents, rankings))
    }
}

/// Indices by increasing id. A duplicate id is an error.
fn ascending(ids: &[String]) -> Result<Vec<u32>> {
    let count = u32::try_from(ids.len()).map_err(|_| {
        Error::new(ErrorKind::Argument, "too many ids").expected("fewer than 2^32").got(ids.len())
    })?;
    let mut indices: Vec<u32> = (0..count).collect();
    indices.par_sort_unstable_by_key(|&index| &ids[index as usize]);
    match indices.windows(2).find(|pair| ids[pair[0] as usize] == ids[pair[1] as usize]) {
        None => Ok(indices),
        Some(pair) => {
            let what = format!("duplicate id `{}`", ids[pair[0] as usize]);
            Err(Error::new(ErrorKind::Argument, what))
        }
    }
}

/// The best passages of one query so far: a heap of at most `top_k` candidates with the worst on top.
struct Best {
    heap: BinaryHeap<Reverse<Candidate>>,
    top_k: usize,
    ignored: Option<u32>,
}

impl Best {
    /// Adds consecutive documents starting at `first`; returns the first column whose score is not finite.
    fn offer_all(
        &mut self,
        scores: ArrayView1<f32>,
        first: u32,
        precedence: &[u32],
    ) -> Option<usize> {
        for (column, (&score, document)) in scores.iter().zip(first..).enumerate() {
            if !score.is_finite() {
                return Some(column);
            }
            if self.ignored != Some(document) {
                let precedence = precedence[document as usize];
                // For trec_eval -0.0 and 0.0 are equal; the sum is 0.0 for both.
                self.offer(Candidate { score: score + 0.0, precedence });
            }
        }
        None
    }

    fn offer(&mut self, candidate: Candidate) {
        if self.heap.len() < self.top_k {
            self.heap.push(Reverse(candidate));
        } else if let Some(mut worst) = self.heap.peek_mut()
            && candidate > worst.0
        {
            *worst = Reverse(candidate);
        }
    }
}

/// Ordered by score, then by the position of the document's id: greater is better.
#[derive(PartialEq)]
struct Candidate {
    score: f32,
    precedence: u32,
}

impl Eq for Candidate {}

impl PartialOrd for Candidate {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Candidate {
    fn cmp(&self, other: &Self) -> Ordering {
        self.score.total_cmp(&other.score).then(self.precedence.cmp(&other.precedence))
    }
}

#[cfg(test)]
mod tests {
    use ndarray::{Axis, array, concatenate};
    use proptest::prelude::*;

    use super::*;

    struct Dot;
    impl Similarity for Dot {
        fn block(&self, q: ArrayView2<f32>, p: ArrayView2<f32>) -> Result<Array2<f32>> {
            Ok(q.dot(&p.t()))
        }
    }

    fn ids(prefix: &str, n: usize) -> Arc<[String]> {
        (0..n).map(|i| format!("{prefix}{i}")).collect()
    }

    fn options(top_k: usize) -> SearchOptions {
        SearchOptions { top_k, ..SearchOptions::default() }
    }

    fn found(run: &Run, query: usize) -> Vec<&str> {
        run.rankings()[query].hits.iter().map(|hit| run.id(hit)).collect()
    }

    #[test]
    fn cut_keeps_the_greater_id_among_ties() {
        let passages = Array2::ones((12, 1));
        let run = search(
            &Dot,
            (&ids("q", 1), array![[2.0]].view()),
            (&ids("d", 12), passages.view()),
            options(4),
        )
        .unwrap();
        assert_eq!(found(&run, 0), ["d9", "d8", "d7", "d6"]);
        assert!(run.rankings()[0].hits.iter().all(|hit| hit.score == 2.0));
    }

    #[test]
    fn own_passage_is_left_out_on_request() {
        let names: Arc<[String]> = ["a".into(), "b".into()].into();
        let vectors = array![[1.0, 0.0], [0.0, 1.0]];
        let run = |ignore_identical_ids| {
            let options = SearchOptions { top_k: 1, ignore_identical_ids };
            search(&Dot, (&names, vectors.view()), (&names, vectors.view()), options).unwrap()
        };
        assert_eq!((found(&run(false), 0), found(&run(false), 1)), (vec!["a"], vec!["b"]));
        assert_eq!((found(&run(true), 0), found(&run(true), 1)), (vec!["b"], vec!["a"]));
    }

    #[test]
    fn mismatched_inputs_are_refused() {
        let (one, two) = (Array2::ones((1, 2)), Array2::ones((2, 2)));
        let (q, d) = (ids("q", 1), ids("d", 2));
        let kind = |q: &[String], qs: &Array2<f32>, d: &Arc<[String]>, ds: &Array2<f32>, k| {
            search(&Dot, (q, qs.view()), (d, ds.view()), options(k)).unwrap_err().kind()
        };
        assert_eq!(kind(&q, &one, &d, &two, 0), ErrorKind::Argument);
        assert_eq!(kind(&q, &two, &d, &two, 1), ErrorKind::Argument);
        assert_eq!(kind(&q, &one, &d, &one, 1), ErrorKind::Argument);
        assert_eq!(kind(&q, &one, &ids("d", 1), &two, 1), ErrorKind::Argument);
        assert_eq!(kind(&q, &one, &d, &Array2::ones((2, 3)), 1), ErrorKind::Argument);
        assert_eq!(kind(&q, &one, &["d".into(), "d".into()].into(), &two, 1), ErrorKind::Argument);
        let nan = array![[1.0, 1.0], [f32::NAN, 1.0]];
        let error = search(&Dot, (&q, one.view()), (&d, nan.view()), options(1)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Numeric);
        assert!(error.to_string().contains("passage `d1`"), "{error}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn equals_sorting_everything(
            queries in prop::collection::vec(-2..3i8, 2..8),
            passages in prop::collection::vec((-2..3i8, -2..3i8), 1..60),
            (top_k, cut) in (1..70usize, 0..60usize),
        ) {
            // Small integers: many ties, and products that are exact in any order.
            let queries: Vec<[f32; 2]> = queries.windows(2).map(|w| [w[0].into(), w[1].into()]).collect();
            let passages: Vec<[f32; 2]> = passages.iter().map(|&(a, b)| [a.into(), b.into()]).collect();
            let (q, p) = (Array2::from(queries), Array2::from(passages));
            let (query_ids, document_ids) = (ids("q", q.nrows()), ids("d", p.nrows()));
            let everything = (0..q.nrows()).map(|i| Ranking {
                query: query_ids[i].clone(),
                hits: (0..p.nrows())
                    .map(|j| Hit { document: j as u32, score: q.row(i).dot(&p.row(j)) })
                    .collect(),
            });
            let mut rankings =
                Run::new(document_ids.clone(), everything.collect()).unwrap().rankings().to_vec();
            rankings.iter_mut().for_each(|ranking| ranking.hits.truncate(top_k));

            let mut searcher = Searcher::new(&query_ids, q.view(), &document_ids, options(top_k)).unwrap();
            let (head, tail) = p.view().split_at(Axis(0), cut.min(p.nrows()));
            searcher.add(&Dot, head).unwrap();
            searcher.add(&Dot, tail).unwrap();
            let run = searcher.finish().unwrap();
            prop_assert_eq!(run.rankings(), rankings);
        }
    }

    #[test]
    fn blocks_cover_all_queries_and_passages() {
        // More queries and passages than one block has.
        let (n, m) = (QUERY_BLOCK + 3, PASSAGE_BLOCK + 5);
        let passages = Array2::from_shape_fn((m, 1), |(i, _)| i as f32);
        let queries = concatenate![Axis(0), Array2::ones((n - 1, 1)), array![[-1.0]]];
        let documents = ids("d", m);
        let run =
            search(&Dot, (&ids("q", n), queries.view()), (&documents, passages.view()), options(6))
                .unwrap();
        let places = |query: usize| -> Vec<usize> {
            run.rankings()[query].hits.iter().map(|hit| hit.document as usize).collect()
        };
        for query in 0..n - 1 {
            assert_eq!(places(query), (m - 6..m).rev().collect::<Vec<_>>());
        }
        assert_eq!(places(n - 1), (0..6).collect::<Vec<_>>());
    }
}
