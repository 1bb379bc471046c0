//! Keys of the texts of a batch, and from them the passages that are known to answer a query although they stand
//! in another place of the batch.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Range;

use crate::{Error, ErrorKind, Result};

/// Hashes of the token ids of the texts of some rows. Equal texts have equal keys.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TextKeys {
    /// One key a query. `[B]`
    pub queries: Vec<u64>,
    /// One key a passage, query by query, the positive first. `[B·G]`
    pub passages: Vec<u64>,
    /// The positives of each row, whether they are in the batch or not. `[B]`
    pub positives: Vec<Vec<u64>>,
}

/// Columns of each row of a matrix of scores: those of row `i` are `starts[i]..starts[i + 1]` of `columns`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ColumnLists {
    pub(super) starts: Vec<u32>,
    pub(super) columns: Vec<u32>,
}

impl ColumnLists {
    fn new(rows: impl Iterator<Item = Vec<u32>>) -> Self {
        let mut lists = ColumnLists { starts: vec![0], columns: Vec::new() };
        for mut columns in rows {
            columns.sort_unstable();
            columns.dedup();
            lists.columns.extend(columns);
            lists.starts.push(lists.columns.len() as u32);
        }
        lists
    }
}

impl TextKeys {
    /// Passages of a row.
    fn group_size(&self) -> usize {
        self.passages.len() / self.queries.len().max(1)
    }

    /// Everything as one list, for [`from_words`](Self::from_words): of each row its query, the number of its
    /// positives, these, and its passages.
    pub(super) fn to_words(&self) -> Vec<u64> {
        let mut words = Vec::new();
        let groups = self.passages.chunks(self.group_size().max(1));
        for ((query, positives), group) in self.queries.iter().zip(&self.positives).zip(groups) {
            words.extend([*query, positives.len() as u64]);
            words.extend(positives);
            words.extend(group);
        }
        words
    }

    /// The rows of several lists, one after another.
    ///
    /// # Errors
    /// A list was not made by [`to_words`](Self::to_words) with the same group size.
    pub(super) fn from_words(lists: &[Vec<u64>], group_size: usize) -> Result<Self> {
        let mut keys = TextKeys::default();
        for list in lists {
            let mut rest = list.as_slice();
            while !rest.is_empty() {
                let head = take(&mut rest, 2)?;
                let count = usize::try_from(head[1]).unwrap_or(usize::MAX);
                keys.queries.push(head[0]);
                keys.positives.push(take(&mut rest, count)?.to_vec());
                keys.passages.extend(take(&mut rest, group_size)?);
            }
        }
        Ok(keys)
    }

    /// The known positives of each distinct query: those of every row that has it.
    fn known_positives(&self) -> HashMap<u64, BTreeSet<u64>> {
        let mut known: HashMap<u64, BTreeSet<u64>> = HashMap::new();
        let groups = self.passages.chunks(self.group_size().max(1));
        for ((query, positives), group) in self.queries.iter().zip(&self.positives).zip(groups) {
            let of_query = known.entry(*query).or_default();
            of_query.extend(positives);
            of_query.extend(group.first());
        }
        known
    }

    /// For each row of `rows`, the passages that are known positives of its query, without its own positive.
    pub(super) fn false_negatives(&self, rows: Range<usize>) -> ColumnLists {
        let known = self.known_positives();
        let mut places: HashMap<u64, Vec<u32>> = HashMap::new();
        for (place, &passage) in (0..).zip(&self.passages) {
            places.entry(passage).or_default().push(place);
        }
        let group_size = self.group_size();
        ColumnLists::new(rows.map(|row| {
            let passages = known.get(&self.queries[row]).into_iter().flatten();
            let columns = passages.filter_map(|passage| places.get(passage)).flatten().copied();
            columns.filter(|&column| column as usize != row * group_size).collect()
        }))
    }

    /// For each row of `rows`, the other rows whose queries have its positive passage as a known positive.
    pub(super) fn false_negative_queries(&self, rows: Range<usize>) -> ColumnLists {
        let mut rows_of: BTreeMap<u64, Vec<u32>> = BTreeMap::new();
        for (row, &query) in (0..).zip(&self.queries) {
            rows_of.entry(query).or_default().push(row);
        }
        let mut queries_of: HashMap<u64, Vec<u64>> = HashMap::new();
        for (query, positives) in self.known_positives() {
            for positive in positives {
                queries_of.entry(positive).or_default().push(query);
            }
        }
        let group_size = self.group_size();
        ColumnLists::new(rows.map(|row| {
            let queries = queries_of.get(&self.passages[row * group_size]).into_iter().flatten();
            let others = queries.filter_map(|query| rows_of.get(query)).flatten().copied();
            others.filter(|&other| other as usize != row).collect()
        }))
    }
}

/// Removes the first `count` words.
fn take<'l>(rest: &mut &'l [u64], count: usize) -> Result<&'l [u64]> {
    let (taken, after) = rest.split_at_checked(count).ok_or_else(|| {
        Error::new(ErrorKind::Distributed, "the text keys of another process are incomplete")
            .expected(format!("{count} more words"))
            .got(rest.len())
    })?;
    *rest = after;
    Ok(taken)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Small numbers, so that many are equal.
    fn keys() -> impl Strategy<Value = TextKeys> {
        (1usize..6, 1usize..4).prop_flat_map(|(rows, group_size)| {
            (
                prop::collection::vec(0u64..4, rows),
                prop::collection::vec(0u64..7, rows * group_size),
                prop::collection::vec(prop::collection::vec(0u64..7, 0..3), rows),
            )
                .prop_map(|(queries, passages, positives)| TextKeys {
                    queries,
                    passages,
                    positives,
                })
        })
    }

    fn lists(lists: &ColumnLists) -> Vec<Vec<u32>> {
        let of = |w: &[u32]| lists.columns[w[0] as usize..w[1] as usize].to_vec();
        lists.starts.windows(2).map(of).collect()
    }

    proptest! {
        #[test]
        fn masks_are_those_of_the_definition(keys in keys(), first: prop::sample::Index) {
            let (rows, group_size) = (keys.queries.len(), keys.group_size());
            let range = first.index(rows)..rows;
            let positive_of = |row: usize| keys.passages[row * group_size];
            let knows = |query: u64, passage: u64| (0..rows).any(|row| {
                keys.queries[row] == query
                    && (keys.positives[row].contains(&passage) || positive_of(row) == passage)
            });
            let passages = lists(&keys.false_negatives(range.clone()));
            let queries = lists(&keys.false_negative_queries(range.clone()));
            prop_assert_eq!((passages.len(), queries.len()), (range.len(), range.len()));
            for ((row, passages), queries) in range.zip(passages).zip(queries) {
                let want: Vec<u32> = (0..rows * group_size)
                    .filter(|&j| j != row * group_size && knows(keys.queries[row], keys.passages[j]))
                    .map(|j| j as u32).collect();
                prop_assert_eq!(passages, want);
                let want: Vec<u32> = (0..rows)
                    .filter(|&k| k != row && knows(keys.queries[k], positive_of(row)))
                    .map(|k| k as u32).collect();
                prop_assert_eq!(queries, want);
            }
        }

        #[test]
        fn what_several_processes_send_is_the_whole_batch(keys in keys(), cut: prop::sample::Index) {
            let (cut, group_size) = (cut.index(keys.queries.len() + 1), keys.group_size());
            let part = |rows: Range<usize>| TextKeys {
                queries: keys.queries[rows.clone()].to_vec(),
                passages: keys.passages[rows.start * group_size..rows.end * group_size].to_vec(),
                positives: keys.positives[rows].to_vec(),
            };
            let parts = [part(0..cut), part(cut..keys.queries.len())].map(|part| part.to_words());
            prop_assert_eq!(&TextKeys::from_words(&parts, group_size).unwrap(), &keys);
        }

        #[test]
        fn arbitrary_words_never_panic(list in prop::collection::vec(0u64..5, 0..20), group_size in 1usize..4) {
            let _ = TextKeys::from_words(&[list.clone(), vec![u64::MAX]], group_size);
            let _ = TextKeys::from_words(&[list], group_size);
        }
    }
}
