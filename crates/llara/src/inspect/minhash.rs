//! Similarity of texts by the sequences of five characters that they have in common (MinHash).
//!
//! The similarity of two texts is the Jaccard index of their sets of shingles: the number of shingles that
//! both have, divided by the number that either has. A shingle is five successive characters of the text in
//! lower case, in which everything but letters and digits is one space. MinHash estimates the index from
//! signatures of a fixed size (Broder 1997). One hash function fills all slots of a signature (Li, Owen,
//! Zhang 2012); empty slots copy others (Shrivastava 2017).

/// Number of slots of a signature.
pub(super) const SLOTS: usize = 64;

/// Number of characters of a shingle.
const SHINGLE_CHARS: usize = 5;

/// The largest set of shingles that is kept, so that its similarity is exact. With repetitions there may be
/// twice as many.
const MAX_KEPT: usize = 128;

/// The shingles of a text.
#[derive(Debug, Clone)]
pub(super) struct Shingles {
    /// The smallest hash in each of 64 ranges; [`u32::MAX`] if there is none.
    slots: [u32; SLOTS],
    /// All hashes in ascending order, if there are at most [`MAX_KEPT`].
    all: Option<Vec<u32>>,
}

/// What is kept of a set of shingles to compare it with others.
#[derive(Debug, Clone)]
pub(super) struct Signature {
    slots: [u16; SLOTS],
    all: Option<Box<[u32]>>,
    /// Equal for two texts with the probability of their similarity.
    key: u32,
}

impl Shingles {
    /// The shingles of a text; `None` if it has no letter or digit.
    pub(super) fn new(text: &str) -> Option<Shingles> {
        let mut shingles = Shingles { slots: [u32::MAX; SLOTS], all: Some(Vec::new()) };
        let mut window = Window::default();
        let mut space = false;
        for c in text.chars() {
            let lower = match c {
                'a'..='z' | '0'..='9' => c,
                'A'..='Z' => c.to_ascii_lowercase(),
                _ if !c.is_ascii() && c.is_alphanumeric() => c.to_lowercase().next().unwrap_or(c),
                _ => {
                    space = window.length > 0;
                    continue;
                }
            };
            if std::mem::take(&mut space) {
                window.push(' ').into_iter().for_each(|hash| shingles.add(hash));
            }
            window.push(lower).into_iter().for_each(|hash| shingles.add(hash));
        }
        match window.length {
            0 => return None,
            // The entire text is one shingle.
            1..SHINGLE_CHARS => shingles.add(window.hash()),
            _ => {}
        }
        shingles.sort();
        Some(shingles)
    }

    /// Adds the shingles of `other`.
    pub(super) fn add_all(&mut self, other: &Shingles) {
        for (slot, other) in self.slots.iter_mut().zip(other.slots) {
            *slot = (*slot).min(other);
        }
        self.all = match (self.all.take(), &other.all) {
            (Some(mut all), Some(other)) => {
                all.extend(other);
                Some(all)
            }
            _ => None,
        };
        self.sort();
    }

    pub(super) fn signature(self) -> Signature {
        let mut slots = self.slots;
        for (i, slot) in slots.iter_mut().enumerate().filter(|(_, slot)| **slot == u32::MAX) {
            // The order in which other slots are tried depends only on the slot. One is not empty.
            let mut at = i as u64;
            while *slot == u32::MAX {
                at = mix(at.wrapping_add(0x9e37_79b9_7f4a_7c15));
                *slot = self.slots[at as usize % SLOTS];
            }
        }
        let key = mix(u64::from(slots[0])) as u32;
        // The low bits: minima are small numbers.
        Signature { slots: slots.map(|slot| slot as u16), all: self.all.map(Into::into), key }
    }

    fn add(&mut self, hash: u64) {
        let slot = &mut self.slots[(hash >> 58) as usize];
        // u32::MAX marks an empty slot.
        *slot = (*slot).min((hash as u32).min(u32::MAX - 1));
        if let Some(all) = &mut self.all {
            all.push((hash >> 16) as u32);
            // Sorting the shingles of every long text would take most of the time.
            if all.len() > 2 * MAX_KEPT {
                self.all = None;
            }
        }
    }

    fn sort(&mut self) {
        if let Some(all) = &mut self.all {
            all.sort_unstable();
            all.dedup();
            if all.len() > MAX_KEPT {
                self.all = None;
            }
        }
    }
}

impl Signature {
    /// A number from 0 to 2³² − 1 that is equal for two texts with the probability of their similarity.
    pub(super) fn key(&self) -> u32 {
        self.key
    }

    /// The slots of band `band`, as one number.
    pub(super) fn band(&self, band: usize) -> u64 {
        let slots = &self.slots[band * ROWS..(band + 1) * ROWS];
        slots.iter().fold(0, |key, &slot| key << 16 | u64::from(slot))
    }

    /// The similarity: exact if both texts have at most 128 different shingles (256 with repetitions), otherwise
    /// estimated, with a standard error of at most 1/16.
    pub(super) fn similarity(&self, other: &Signature) -> f64 {
        match (&self.all, &other.all) {
            (Some(a), Some(b)) => jaccard(a, b),
            _ => {
                let equal = self.slots.iter().zip(&other.slots).filter(|(a, b)| a == b).count();
                equal as f64 / SLOTS as f64
            }
        }
    }
}

/// Number of slots of a band: texts are compared if all of them are equal in one band.
const ROWS: usize = 4;

/// Number of bands.
pub(super) const BANDS: usize = SLOTS / ROWS;

fn jaccard(a: &[u32], b: &[u32]) -> f64 {
    let (mut i, mut j, mut both) = (0, 0, 0usize);
    while let (Some(x), Some(y)) = (a.get(i), b.get(j)) {
        both += usize::from(x == y);
        i += usize::from(x <= y);
        j += usize::from(y <= x);
    }
    both as f64 / (a.len() + b.len() - both).max(1) as f64
}

/// The last characters, with a polynomial hash that each further character updates.
#[derive(Default)]
struct Window {
    chars: [u32; SHINGLE_CHARS],
    length: usize,
    polynomial: u64,
}

impl Window {
    const FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;

    /// Adds a character. Returns the hash of the shingle that it completes.
    fn push(&mut self, c: char) -> Option<u64> {
        const OLDEST: u64 = Window::FACTOR.wrapping_pow(SHINGLE_CHARS as u32);
        let oldest = &mut self.chars[self.length % SHINGLE_CHARS];
        let removed = u64::from(*oldest).wrapping_mul(OLDEST);
        *oldest = u32::from(c);
        self.polynomial = self.polynomial.wrapping_mul(Self::FACTOR).wrapping_add(u64::from(c));
        self.polynomial = self.polynomial.wrapping_sub(removed);
        self.length += 1;
        (self.length >= SHINGLE_CHARS).then(|| self.hash())
    }

    fn hash(&self) -> u64 {
        mix(self.polynomial)
    }
}

/// The finalizer of SplitMix64: a bijection in which every bit depends on every bit.
pub(super) fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn signature(text: &str) -> Signature {
        Shingles::new(text).unwrap().signature()
    }

    /// The index from the definition.
    fn naive(a: &str, b: &str) -> f64 {
        let shingles = |text: &str| -> BTreeSet<Vec<char>> {
            let lower: String = text
                .chars()
                .map(|c| if c.is_alphanumeric() { c.to_lowercase().next().unwrap() } else { ' ' })
                .collect();
            let words: Vec<&str> = lower.split_whitespace().collect();
            let chars: Vec<char> = words.join(" ").chars().collect();
            chars.windows(5.min(chars.len())).map(<[char]>::to_vec).collect()
        };
        let (a, b) = (shingles(a), shingles(b));
        a.intersection(&b).count() as f64 / a.union(&b).count() as f64
    }

    #[test]
    fn case_spaces_and_punctuation_make_no_difference() {
        let a = signature("When does TIN melt?");
        assert_eq!(a.similarity(&signature(" when does\ttin, melt")), 1.0);
        assert!(a.similarity(&signature("when does iron melt")) < 0.8);
        assert!(Shingles::new(" … !").is_none());
        assert_eq!(signature("ab").similarity(&signature("AB.")), 1.0);
    }

    #[test]
    fn estimates_of_long_texts_are_near_the_index() {
        let words = |from: u64, to: u64| -> String {
            (from..to).map(|i| format!("{:x} ", mix(i) >> 44)).collect()
        };
        let mut error = 0.0;
        for i in 0..200 {
            let start = 1000 * i;
            let (a, b) = (words(start, start + 90), words(start + 10, start + 100));
            let (a, b, exact) = (signature(&a), signature(&b), naive(&a, &b));
            assert!((0.7..0.9).contains(&exact), "{exact}");
            assert!((a.similarity(&b) - exact).abs() < 0.25);
            error += a.similarity(&b) - exact;
        }
        // The standard error of the mean is 0.05 / √200.
        assert!((error / 200.0).abs() < 0.015, "{error}");
    }

    proptest! {
        #[test]
        fn short_texts_are_compared_exactly(a in "[a-c É,]{1,60}", b in "[a-c É,]{1,60}", c in "[ab]{9,40}") {
            for (a, b) in [(a.clone(), b.clone()), (c.clone() + &a, c + &b)] {
                if let (Some(x), Some(y)) = (Shingles::new(&a), Shingles::new(&b)) {
                    let (x, y) = (x.signature(), y.signature());
                    prop_assert!((x.similarity(&y) - naive(&a, &b)).abs() < 1e-9);
                }
            }
        }

        #[test]
        fn a_union_has_the_shingles_of_both(a in "[a-z ]{5,900}", b in "[a-z ]{5,90}") {
            if let (Some(mut x), Some(y)) = (Shingles::new(&a), Shingles::new(&b)) {
                let mut again = y.clone();
                again.add_all(&x);
                x.add_all(&y);
                prop_assert_eq!(x.slots, again.slots);
                prop_assert_eq!(&x.all, &again.all);
                let few = x.all.clone();
                prop_assert!(few.is_none_or(|few| y.all.unwrap().iter().all(|h| few.contains(h))));
            }
        }
    }
}
