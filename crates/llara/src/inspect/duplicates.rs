//! Equal queries, rows and passages, and positives among negatives, from sorted records.

use super::example::{Example, Found, Subject};
use super::record::{Place, Record, Side};

/// The smallest `N` numbers, ascending.
#[derive(Debug, Clone, Copy)]
struct First<const N: usize>([Option<Place>; N]);

impl<const N: usize> First<N> {
    const NONE: Self = First([None; N]);

    fn add(&mut self, place: Place) {
        let mut place = place;
        for slot in &mut self.0 {
            match slot {
                Some(kept) if *kept <= place => {}
                Some(kept) => std::mem::swap(kept, &mut place),
                None => {
                    *slot = Some(place);
                    return;
                }
            }
        }
    }

    fn iter(&self) -> impl Iterator<Item = Place> {
        self.0.iter().flatten().copied()
    }

    /// The smallest one that is not `place`.
    fn other_than(&self, place: Place) -> Option<Place> {
        self.iter().find(|&other| other != place)
    }
}

/// Counts records whose hash an earlier row has: equal rows, or equal queries.
#[derive(Debug)]
pub(super) struct Repeated {
    subject: Subject,
    pub(super) distinct: u64,
    pub(super) repeated: Found,
    /// Hash and place of the first record of the current group.
    group: Option<(u128, Place)>,
}

impl Repeated {
    pub(super) fn new(subject: Subject) -> Self {
        Repeated { subject, distinct: 0, repeated: Found::default(), group: None }
    }

    /// Adds a record, in ascending order.
    pub(super) fn add(&mut self, record: Record) {
        match self.group {
            Some((hash, first)) if hash == record.hash => {
                self.repeated.add(Example::new(record.place(), self.subject).with(first));
            }
            _ => {
                self.distinct += 1;
                self.group = Some((record.hash, record.place()));
            }
        }
    }
}

/// Findings about equal passages. Each text counts once per row.
#[derive(Debug, Default)]
pub(super) struct Passages {
    pub(super) distinct: u64,
    /// Passages that an earlier row has.
    pub(super) in_rows: Found,
    /// Repetitions within `pos` or within `neg` of a row.
    pub(super) in_row: Found,
    /// Negatives that are positives of the same row, ...
    pub(super) same_row: Found,
    /// ... of another row with the same query, ...
    pub(super) equal_query: Found,
    /// ... or of a row with another query.
    pub(super) other_query: Found,
    current: Option<Current>,
}

/// The occurrences of the current passage so far.
#[derive(Debug)]
struct Current {
    hash: u128,
    /// All rows with the passage.
    rows: u64,
    first_rows: First<6>,
    /// Number of queries that have the passage as a positive, and a positive's row of the first two.
    queries_with_pos: u64,
    pos_of_queries: [Option<(u64, Place)>; 2],
    /// Number of rows that have the passage as a negative.
    neg_rows: u64,
    /// The same for the first query that has it as a positive.
    neg_rows_of_pos_query: u64,
    /// Rows whose query is not that one, and all of them.
    first_neg_rows: Vec<(Place, u64)>,
    query: Query,
}

/// The rows of the current query that have the current passage.
#[derive(Debug)]
struct Query {
    hash: u64,
    pos_rows: u64,
    neg_rows: u64,
    both_rows: u64,
    first_pos: First<2>,
    first_neg: First<6>,
    row: Row,
}

/// The occurrences of the current passage in the current row.
#[derive(Debug)]
struct Row {
    place: Place,
    pos: u64,
    neg: u64,
}

/// Number of rows with the passage as a negative that are kept for examples.
const KEPT_ROWS: usize = 6;

impl Passages {
    /// Adds a record, in ascending order.
    pub(super) fn add(&mut self, record: Record) {
        let current = match self.current.take() {
            Some(current) if current.hash == record.hash => current,
            previous => {
                previous.into_iter().for_each(|passage| self.end_passage(passage));
                Current::new(&record)
            }
        };
        let mut current = current;
        let is_new_query = current.query.hash != record.query;
        if is_new_query || current.query.row.place != record.place() {
            self.end_row(&mut current);
            if is_new_query {
                self.end_query(&mut current);
                current.query = Query::new(&record);
            }
            current.query.row = Row { place: record.place(), pos: 0, neg: 0 };
        }
        match record.side() {
            Side::Pos => current.query.row.pos += 1,
            Side::Neg => current.query.row.neg += 1,
        }
        self.current = Some(current);
    }

    /// Ends the last passage.
    pub(super) fn finish(mut self) -> Self {
        self.current.take().into_iter().for_each(|passage| self.end_passage(passage));
        self
    }

    fn end_row(&mut self, current: &mut Current) {
        let Row { place, pos, neg } = current.query.row;
        let hash = current.hash;
        current.rows += 1;
        current.first_rows.add(place);
        for (side, count) in [(Side::Pos, pos), (Side::Neg, neg)] {
            if count > 1 {
                self.in_row.count += count - 1;
                self.in_row.keep(Example::new(place, Subject::Hash(side, hash)));
            }
        }
        let query = &mut current.query;
        query.pos_rows += u64::from(pos > 0);
        query.neg_rows += u64::from(neg > 0);
        if pos > 0 {
            query.first_pos.add(place);
        }
        if neg > 0 {
            query.first_neg.add(place);
        }
        if pos > 0 && neg > 0 {
            query.both_rows += 1;
            self.same_row.add(Example::new(place, Subject::Hash(Side::Neg, hash)));
        }
    }

    fn end_query(&mut self, current: &mut Current) {
        let query = &current.query;
        let subject = Subject::Hash(Side::Neg, current.hash);
        // A negative needs a positive in another row: with one such row, that row itself has none.
        self.equal_query.count += match query.pos_rows {
            0 => 0,
            1 => query.neg_rows - query.both_rows,
            _ => query.neg_rows,
        };
        for place in query.first_neg.iter() {
            if let Some(other) = query.first_pos.other_than(place) {
                self.equal_query.keep(Example::new(place, subject).with(other));
            }
        }
        if let Some(place) = query.first_pos.iter().next() {
            if current.queries_with_pos == 0 {
                current.neg_rows_of_pos_query = query.neg_rows;
            }
            if let Some(free) = current.pos_of_queries.iter_mut().find(|slot| slot.is_none()) {
                *free = Some((query.hash, place));
            }
            current.queries_with_pos += 1;
        }
        current.neg_rows += query.neg_rows;
        let kept = &mut current.first_neg_rows;
        kept.extend(query.first_neg.iter().map(|place| (place, query.hash)));
        if kept.len() > 2 * KEPT_ROWS {
            current.trim_first_neg_rows();
        }
    }

    fn end_passage(&mut self, mut current: Current) {
        self.end_row(&mut current);
        self.end_query(&mut current);
        self.distinct += 1;
        let mut rows = current.first_rows.iter();
        if let Some(first) = rows.next() {
            self.in_rows.count += current.rows - 1;
            for place in rows {
                let subject = Subject::Hash(Side::Pos, current.hash);
                self.in_rows.keep(Example::new(place, subject).with(first));
            }
        }
        self.other_query.count += match current.queries_with_pos {
            0 => 0,
            1 => current.neg_rows - current.neg_rows_of_pos_query,
            _ => current.neg_rows,
        };
        for &(place, query) in &current.first_neg_rows {
            let positives = current.pos_of_queries.iter().flatten();
            if let Some(&(_, other)) = { positives }.find(|(of, _)| *of != query) {
                let subject = Subject::Hash(Side::Neg, current.hash);
                self.other_query.keep(Example::new(place, subject).with(other));
            }
        }
    }
}

impl Current {
    /// The passage of `record`, without an occurrence.
    fn new(record: &Record) -> Self {
        Current {
            hash: record.hash,
            rows: 0,
            first_rows: First::NONE,
            queries_with_pos: 0,
            pos_of_queries: [None; 2],
            neg_rows: 0,
            neg_rows_of_pos_query: 0,
            first_neg_rows: Vec::new(),
            query: Query::new(record),
        }
    }

    /// Keeps the first rows that have the passage as a negative: of all queries, and of those other than the
    /// first one with a positive, whose rows are no examples if no further query has a positive.
    fn trim_first_neg_rows(&mut self) {
        let excluded = self.pos_of_queries[0].map(|(query, _)| query);
        self.first_neg_rows.sort_unstable();
        let (mut of_all, mut of_others) = (0, 0);
        self.first_neg_rows.retain(|&(_, query)| {
            let is_other = Some(query) != excluded;
            of_all += 1;
            of_others += usize::from(is_other);
            of_all <= KEPT_ROWS || is_other && of_others <= KEPT_ROWS
        });
    }
}

impl Query {
    /// The query of `record`, without an occurrence.
    fn new(record: &Record) -> Self {
        Query {
            hash: record.query,
            pos_rows: 0,
            neg_rows: 0,
            both_rows: 0,
            first_pos: First::NONE,
            first_neg: First::NONE,
            row: Row { place: record.place(), pos: 0, neg: 0 },
        }
    }
}
