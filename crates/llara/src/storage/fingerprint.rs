//! A 64-bit hash that detects accidental changes; it is not cryptographic.

use std::fmt;

/// An odd number whose bits are evenly spread.
const MULTIPLIER: u64 = 0x9e37_79b9_7f4a_7c15;

/// The hash of a sequence of byte strings. Their lengths are part of it. It is the same on every
/// machine.
///
/// Eight bytes at a time go through a 64 × 64 → 128 bit product whose halves are combined (as in
/// wyhash): nearly as fast as reading memory, since weights are gigabytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Fingerprint(u64);

impl Fingerprint {
    pub(crate) fn new() -> Self {
        Fingerprint(MULTIPLIER)
    }

    /// Adds a byte string.
    pub(crate) fn add(&mut self, bytes: &[u8]) {
        self.word(bytes.len() as u64);
        let (words, rest) = bytes.as_chunks();
        words.iter().for_each(|&word| self.word(u64::from_le_bytes(word)));
        let mut last = [0; 8];
        last[..rest.len()].copy_from_slice(rest);
        self.word(u64::from_le_bytes(last));
    }

    /// Adds numbers, bit by bit.
    pub(crate) fn add_numbers(&mut self, numbers: &[f32]) {
        self.word(numbers.len() as u64);
        let (pairs, rest) = numbers.as_chunks();
        for [a, b] in pairs {
            self.word(u64::from(a.to_bits()) << 32 | u64::from(b.to_bits()));
        }
        rest.iter().for_each(|x| self.word(u64::from(x.to_bits())));
    }

    fn word(&mut self, word: u64) {
        let product = u128::from(self.0.rotate_left(23) ^ word) * u128::from(MULTIPLIER);
        self.0 = (product as u64 ^ (product >> 64) as u64).wrapping_add(MULTIPLIER);
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn of(parts: &[&[u8]]) -> Fingerprint {
        let mut fingerprint = Fingerprint::new();
        parts.iter().for_each(|part| fingerprint.add(part));
        fingerprint
    }

    #[test]
    fn seams_and_lengths_count() {
        let different = [
            of(&[]),
            of(&[b""]),
            of(&[b"", b""]),
            of(&[b"ab", b"c"]),
            of(&[b"a", b"bc"]),
            of(&[b"abc"]),
            of(&[b"abc\0"]),
        ];
        for (i, a) in different.iter().enumerate() {
            assert!(different[..i].iter().all(|b| a != b), "{i}");
        }
    }

    #[test]
    fn it_is_the_same_everywhere() {
        // Manifests of runs on other machines hold it.
        assert_eq!(of(&[b"otter", b"heron by the river"]).to_string(), "5d80ad0a5aa9ad26");
        assert_eq!(of(&[]).to_string().len(), 16);
    }

    proptest! {
        #[test]
        fn flipped_bits_are_noticed(
            bytes in prop::collection::vec(any::<u8>(), 1..80), flips in prop::collection::btree_set(0usize..640, 1..4),
        ) {
            let mut changed = bytes.clone();
            for bit in flips {
                changed[bit / 8 % bytes.len()] ^= 1 << (bit % 8);
            }
            prop_assert_eq!(of(&[&bytes]) == of(&[&changed]), bytes == changed);
        }

        #[test]
        fn signs_and_order_of_numbers_are_noticed(
            numbers in prop::collection::vec(-9f32..9.0, 2..20), a: prop::sample::Index, b: prop::sample::Index,
        ) {
            let of = |numbers: &[f32]| {
                let mut fingerprint = Fingerprint::new();
                fingerprint.add_numbers(numbers);
                fingerprint
            };
            let (a, b) = (a.index(numbers.len()), b.index(numbers.len()));
            let (mut turned, mut swapped) = (numbers.clone(), numbers.clone());
            turned[a] = -turned[a];
            turned[b] = -turned[b];
            swapped.swap(a, b);
            prop_assert_eq!(of(&turned) == of(&numbers), a == b);
            prop_assert_eq!(of(&swapped) == of(&numbers), numbers[a].to_bits() == numbers[b].to_bits());
        }
    }
}
