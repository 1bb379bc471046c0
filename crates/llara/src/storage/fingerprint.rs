//! The BLAKE3 hash of a sequence of byte strings and numbers.

use std::fmt;

use blake3::Hasher;

/// Numbers that are converted to bytes at a time.
const BLOCK: usize = 1024;

/// A hash of a sequence of byte strings. The lengths of the strings are part of it. It is the same on
/// every machine.
#[derive(Debug, Clone, Default)]
pub(crate) struct Fingerprint(Hasher);

impl Fingerprint {
    pub(crate) fn new() -> Self {
        Fingerprint::default()
    }

    /// Adds a byte string.
    pub(crate) fn add(&mut self, bytes: &[u8]) {
        self.add_length(bytes.len());
        self.0.update(bytes);
    }

    /// Adds the bits of numbers.
    pub(crate) fn add_numbers(&mut self, numbers: &[f32]) {
        self.add_length(numbers.len());
        let mut bytes = [0; BLOCK * size_of::<f32>()];
        for block in numbers.chunks(BLOCK) {
            let bytes = &mut bytes[..size_of_val(block)];
            for (to, number) in bytes.as_chunks_mut().0.iter_mut().zip(block) {
                *to = number.to_le_bytes();
            }
            self.0.update(bytes);
        }
    }

    /// The first 64 bits of the hash, for tables that must be small.
    pub(crate) fn short(&self) -> u64 {
        let hash = self.0.finalize();
        let (words, _) = hash.as_bytes().as_chunks();
        u64::from_le_bytes(words[0])
    }

    fn add_length(&mut self, length: usize) {
        self.0.update(&(length as u64).to_le_bytes());
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0.finalize())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn of(parts: &[&[u8]]) -> String {
        let mut fingerprint = Fingerprint::new();
        parts.iter().for_each(|part| fingerprint.add(part));
        fingerprint.to_string()
    }

    fn of_numbers(numbers: &[f32]) -> String {
        let mut fingerprint = Fingerprint::new();
        fingerprint.add_numbers(numbers);
        fingerprint.to_string()
    }

    #[test]
    fn boundaries_and_lengths_are_part_of_the_hash() {
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
    fn the_hash_is_blake3_of_little_endian_bytes() {
        // Manifests of runs on other machines contain it.
        let bytes = [&2u64.to_le_bytes()[..], b"ab", &1u64.to_le_bytes(), b"c"].concat();
        assert_eq!(of(&[b"ab", b"c"]), blake3::hash(&bytes).to_string());
        let numbers: Vec<f32> = (0..BLOCK + 3).map(|i| i as f32 - 0.5).collect();
        let mut bytes = (numbers.len() as u64).to_le_bytes().to_vec();
        bytes.extend(numbers.iter().flat_map(|x| x.to_le_bytes()));
        assert_eq!(of_numbers(&numbers), blake3::hash(&bytes).to_string());
        let short = u64::from_le_bytes(blake3::hash(b"").as_bytes()[..8].try_into().unwrap());
        assert_eq!(Fingerprint::new().short(), short);
    }

    proptest! {
        #[test]
        fn signs_and_order_of_numbers_change_the_hash(
            numbers in prop::collection::vec(-9f32..9.0, 2..20), a: prop::sample::Index, b: prop::sample::Index,
        ) {
            let (a, b) = (a.index(numbers.len()), b.index(numbers.len()));
            let (mut negated, mut swapped) = (numbers.clone(), numbers.clone());
            negated[a] = -negated[a];
            swapped.swap(a, b);
            prop_assert_ne!(of_numbers(&negated), of_numbers(&numbers));
            let same = numbers[a].to_bits() == numbers[b].to_bits();
            prop_assert_eq!(of_numbers(&swapped) == of_numbers(&numbers), same);
        }
    }
}
