//! Texts that nearly equal an earlier one, among a bounded sample of texts.
//!
//! Texts are sampled by their key (see [`Signature::key`]), not at random: two texts of similarity s have the
//! same key, and thus are sampled together, with probability s. If all texts fit, all are searched. Two texts
//! are compared if the slots of their signatures are equal in one of 16 bands of 4: for s = 0.8 this has the
//! probability 1 − (1 − s⁴)¹⁶ > 0.999. A text is compared with at most 32 earlier ones of a band. What is
//! reported has a similarity of at least 0.8: the exact one of texts with at most 128 shingles, the estimated one
//! of longer texts, whose standard error is 0.05.

use std::collections::HashSet;

use super::example::{Example, Found, Subject};
use super::minhash::{BANDS, Signature};
use super::record::Place;

/// The smallest similarity of texts that nearly equal each other.
pub(super) const NEAR: f64 = 0.8;

/// Number of different texts in a sample.
const CAPACITY: usize = 1 << 16;

/// The largest number of earlier texts in a band that a text is compared with.
const MAX_COMPARED: usize = 32;

/// A text of the sample.
#[derive(Debug, Clone)]
pub(super) struct Candidate {
    pub(super) place: Place,
    pub(super) subject: Subject,
    /// A hash of the text. Of equal texts only the first is in the sample.
    pub(super) hash: u64,
    pub(super) signature: Signature,
}

/// A sample of different texts.
#[derive(Debug)]
pub(super) struct NearSample {
    candidates: Vec<Candidate>,
    hashes: HashSet<u64>,
    capacity: usize,
    /// Texts with smaller keys are in the sample.
    end_key: u64,
}

impl NearSample {
    pub(super) fn new() -> Self {
        Self::with_capacity(CAPACITY)
    }

    fn with_capacity(capacity: usize) -> Self {
        let (candidates, hashes) = (Vec::new(), HashSet::new());
        NearSample { candidates, hashes, capacity, end_key: 1 << 32 }
    }

    /// Keys below this are in the sample.
    pub(super) fn end_key(&self) -> u64 {
        self.end_key
    }

    /// Adds texts in the order of the data.
    pub(super) fn add(&mut self, candidates: Vec<Candidate>) {
        for candidate in candidates {
            let is_sampled = u64::from(candidate.signature.key()) < self.end_key;
            if is_sampled && self.hashes.insert(candidate.hash) {
                self.candidates.push(candidate);
            }
            while self.candidates.len() > self.capacity {
                self.end_key /= 2;
                let end = self.end_key;
                self.candidates.retain(|kept| u64::from(kept.signature.key()) < end);
                self.hashes = self.candidates.iter().map(|kept| kept.hash).collect();
            }
        }
    }

    /// The number of different texts in the sample.
    pub(super) fn len(&self) -> usize {
        self.candidates.len()
    }

    /// The expected fraction of all texts that are in the sample; 1 if all are.
    pub(super) fn fraction(&self) -> f64 {
        self.end_key as f64 / (1u64 << 32) as f64
    }

    /// The texts of the sample that nearly equal an earlier one.
    pub(super) fn search(&self) -> Found {
        let mut earlier: Vec<Option<(usize, f64)>> = vec![None; self.candidates.len()];
        let mut keys: Vec<(u64, usize)> = Vec::with_capacity(self.candidates.len());
        for band in 0..BANDS {
            keys.clear();
            let of_band = self.candidates.iter().map(|c| c.signature.band(band));
            keys.extend(of_band.zip(0..));
            keys.sort_unstable();
            for group in keys.chunk_by(|a, b| a.0 == b.0).filter(|group| group.len() > 1) {
                for (n, &(_, i)) in group.iter().enumerate() {
                    let compared = &group[n.saturating_sub(MAX_COMPARED)..n];
                    if earlier[i].is_none() {
                        earlier[i] = compared.iter().find_map(|&(_, j)| self.near(i, j));
                    }
                }
            }
        }
        let mut found = Found::default();
        for (candidate, earlier) in self.candidates.iter().zip(earlier) {
            if let Some((j, similarity)) = earlier {
                let example = Example::new(candidate.place, candidate.subject);
                let example = example.with(self.candidates[j].place);
                found.add(example.detail(format!("similarity {similarity:.2}")));
            }
        }
        found
    }

    fn near(&self, i: usize, j: usize) -> Option<(usize, f64)> {
        let similarity = self.candidates[i].signature.similarity(&self.candidates[j].signature);
        (similarity >= NEAR).then_some((j, similarity))
    }
}

#[cfg(test)]
mod tests {
    use super::super::minhash::{Shingles, mix};
    use super::*;

    fn candidate(place: Place, text: &str) -> Candidate {
        let signature = Shingles::new(text).unwrap().signature();
        let hash = super::super::record::text_hash(text) as u64;
        Candidate { place, subject: Subject::Query, hash, signature }
    }

    /// 40 pseudo-random words.
    fn text(i: u64) -> String {
        (0..40).map(|k| format!("{:x} ", mix(i * 40 + k) >> 40)).collect()
    }

    /// `text(i)` with a few characters more. The similarity is about 0.93: four standard errors above the limit.
    fn altered(i: u64) -> String {
        text(i).replacen(' ', " un", 2)
    }

    #[test]
    fn every_planted_pair_is_found_and_nothing_else() {
        let mut sample = NearSample::new();
        sample.add((0..2000).map(|i| candidate(i, &text(i))).collect());
        sample.add((0..500).map(|i| candidate(2000 + i, &altered(i))).collect());
        // An equal text is not a near duplicate.
        sample.add(vec![candidate(9000, &text(7))]);
        let found = sample.search();
        assert_eq!((sample.fraction(), sample.len()), (1.0, 2500));
        assert!((495..=500).contains(&found.count), "{}", found.count);
        let first = &found.examples[0];
        assert_eq!((first.place, first.other), (2000, Some(0)));
    }

    #[test]
    fn short_texts_with_a_small_change_are_found() {
        let mut sample = NearSample::new();
        let name = |i: u64| format!("{:x} {:x}", mix(i), mix(i + 99_999));
        sample.add((0..400).map(|i| candidate(i, &name(i))).collect());
        sample.add((0..400).map(|i| candidate(400 + i, &(name(i) + "s"))).collect());
        let found = sample.search().count;
        assert!((396..=400).contains(&found), "{found}");
    }

    #[test]
    fn a_sample_keeps_similar_texts_together() {
        let mut sample = NearSample::with_capacity(1000);
        for i in 0..4000 {
            sample.add(vec![candidate(2 * i, &text(i)), candidate(2 * i + 1, &altered(i))]);
        }
        assert!(sample.len() <= 1000 && sample.len() > 300, "{}", sample.len());
        let estimate = sample.search().count as f64 / sample.fraction();
        // Pairs of similarity s are sampled together with probability s.
        assert!((2500.0..4000.0).contains(&estimate), "{estimate}");
    }
}
