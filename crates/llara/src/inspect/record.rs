//! Records of texts and rows for the search for duplicates: hashes in place of texts.

use crate::data::TrainingRow;

/// Bytes of a record in a file.
pub(super) const RECORD_BYTES: usize = 32;

/// Where a row starts: the number of bytes before it, over all files. Ascending in the order of the data.
pub(super) type Place = u64;

/// Whether a passage is a positive or a negative.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Side {
    Pos,
    Neg,
}

/// An occurrence of a text or of a row. The order is that of the fields: equal texts are adjacent, within
/// them those of rows with equal queries, within them those of the same row, positives first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Record {
    /// 128 bits of the BLAKE3 hash of the text or row. Two of 10¹² different texts have the same with a
    /// probability of about 10⁻¹⁵.
    pub(super) hash: u128,
    /// 64 bits of the hash of the row's query and `prompt`.
    pub(super) query: u64,
    /// Twice the place of the row, plus 1 for a negative.
    place_and_side: u64,
}

impl Record {
    pub(super) fn new(hash: u128, query: u64, place: Place, side: Side) -> Self {
        Record { hash, query, place_and_side: place << 1 | u64::from(side == Side::Neg) }
    }

    pub(super) fn place(&self) -> Place {
        self.place_and_side >> 1
    }

    pub(super) fn side(&self) -> Side {
        if self.place_and_side & 1 == 1 { Side::Neg } else { Side::Pos }
    }

    pub(super) fn to_bytes(self) -> [u8; RECORD_BYTES] {
        let mut bytes = [0; RECORD_BYTES];
        bytes[..16].copy_from_slice(&self.hash.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.query.to_le_bytes());
        bytes[24..].copy_from_slice(&self.place_and_side.to_le_bytes());
        bytes
    }

    pub(super) fn from_bytes(bytes: &[u8; RECORD_BYTES]) -> Self {
        let word = |at: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[at..at + 8]);
            u64::from_le_bytes(word)
        };
        Record {
            hash: u128::from(word(0)) | u128::from(word(8)) << 64,
            query: word(16),
            place_and_side: word(24),
        }
    }
}

/// The records of one row.
pub(super) struct RowRecords {
    pub(super) row: Record,
    pub(super) query: Record,
    /// Positives, then negatives.
    pub(super) passages: Vec<Record>,
}

impl RowRecords {
    pub(super) fn new(row: &TrainingRow, place: Place) -> Self {
        let query = query_hash(row);
        let short = query as u64;
        let side = |texts: &[String], side| -> Vec<Record> {
            texts.iter().map(|text| Record::new(text_hash(text), short, place, side)).collect()
        };
        let mut passages = side(&row.pos, Side::Pos);
        passages.extend(side(&row.neg, Side::Neg));
        let mut hasher = blake3::Hasher::new();
        hasher.update(&query.to_le_bytes());
        for list in [&passages[..row.pos.len()], &passages[row.pos.len()..]] {
            hasher.update(&(list.len() as u64).to_le_bytes());
            list.iter().for_each(|passage| {
                hasher.update(&passage.hash.to_le_bytes());
            });
        }
        let whole = half(hasher.finalize());
        RowRecords {
            row: Record::new(whole, short, place, Side::Pos),
            query: Record::new(query, short, place, Side::Pos),
            passages,
        }
    }
}

/// The hash of a query and its `prompt`.
pub(super) fn query_hash(row: &TrainingRow) -> u128 {
    let mut hasher = blake3::Hasher::new();
    // An absent prompt differs from an empty one, which replaces the instruction for all queries.
    hasher.update(&[u8::from(row.prompt.is_some())]);
    let prompt = row.prompt.as_deref().unwrap_or_default();
    hasher.update(&(prompt.len() as u64).to_le_bytes());
    hasher.update(prompt.as_bytes());
    hasher.update(row.query.as_bytes());
    half(hasher.finalize())
}

/// The hash of a passage.
pub(super) fn text_hash(text: &str) -> u128 {
    half(blake3::hash(text.as_bytes()))
}

fn half(hash: blake3::Hash) -> u128 {
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&hash.as_bytes()[..16]);
    u128::from_le_bytes(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_give_the_record_back() {
        let record = Record::new(u128::MAX / 3, u64::MAX / 5, 1 << 40, Side::Neg);
        assert_eq!(Record::from_bytes(&record.to_bytes()), record);
        assert_eq!((record.place(), record.side()), (1 << 40, Side::Neg));
    }

    #[test]
    fn a_row_is_its_query_prompt_and_passages_in_their_lists() {
        let row = |line: &str| {
            let row = TrainingRow::parse(line.as_bytes(), "r", 1).unwrap();
            RowRecords::new(&row, 0).row.hash
        };
        let lines = [
            r#"{"query": "q", "pos": ["a", "b"], "neg": ["c"]}"#,
            r#"{"query": "q", "pos": ["a"], "neg": ["b", "c"]}"#,
            r#"{"query": "q", "pos": ["b", "a"], "neg": ["c"]}"#,
            r#"{"query": "q", "pos": ["a", "b"], "neg": ["c"], "prompt": ""}"#,
            r#"{"query": "x", "pos": ["a", "b"], "neg": ["c"]}"#,
        ];
        for (i, line) in lines.iter().enumerate() {
            assert!(lines[..i].iter().all(|other| row(other) != row(line)), "{line}");
        }
        assert_eq!(row(lines[0]), row(r#"{"id": 7, "neg":["c"], "pos":["a","b"], "query":"q"}"#));
    }
}
