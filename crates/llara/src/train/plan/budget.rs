//! Parses amounts of memory such as `8GiB`, `800MB` or `50%`.

use std::str::FromStr;

use crate::{Error, ErrorKind};

/// The memory limit of a run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum MemoryBudget {
    /// A number of bytes.
    Bytes(u64),
    /// A fraction of the machine's memory, above 0 and at most 1.
    Share(f64),
}

/// Units and their sizes in bytes. A unit that ends in another one is before it.
const UNITS: [(&str, u64); 13] = [
    ("kib", 1 << 10),
    ("mib", 1 << 20),
    ("gib", 1 << 30),
    ("tib", 1 << 40),
    ("kb", 1000),
    ("mb", 1_000_000),
    ("gb", 1_000_000_000),
    ("tb", 1_000_000_000_000),
    ("k", 1 << 10),
    ("m", 1 << 20),
    ("g", 1 << 30),
    ("t", 1 << 40),
    ("b", 1),
];

impl MemoryBudget {
    /// The limit in bytes on a machine with `total` bytes of memory.
    pub fn bytes(self, total: u64) -> u64 {
        match self {
            MemoryBudget::Bytes(bytes) => bytes,
            MemoryBudget::Share(share) => (share * total as f64) as u64,
        }
    }
}

impl FromStr for MemoryBudget {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let wrong = || {
            Error::new(ErrorKind::Argument, "not an amount of memory")
                .expected("such as 8GiB, 8GB, 800MB, or 50% of the machine's")
                .got(format!("{text:?}"))
        };
        let lower = text.trim().to_ascii_lowercase();
        let number = |digits: &str| {
            let number: f64 = digits.trim_end().parse().map_err(|_| wrong())?;
            if number.is_finite() && number > 0.0 { Ok(number) } else { Err(wrong()) }
        };
        if let Some(digits) = lower.strip_suffix('%') {
            let share = number(digits)? / 100.0;
            return if share <= 1.0 { Ok(MemoryBudget::Share(share)) } else { Err(wrong()) };
        }
        let unit = UNITS.iter().find_map(|&(unit, bytes)| Some((lower.strip_suffix(unit)?, bytes)));
        let (digits, unit) = unit.unwrap_or((&lower, 1));
        let bytes = number(digits)? * unit as f64;
        if (1.0..1e18).contains(&bytes) {
            Ok(MemoryBudget::Bytes(bytes as u64))
        } else {
            Err(wrong())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn common_spellings_are_parsed() {
        for (text, bytes) in [
            ("8GiB", 8 << 30),
            ("8 gb", 8_000_000_000),
            ("800MB", 800_000_000),
            ("1.5G", 3 << 29),
            ("4096", 4096),
            ("512 KiB", 512 << 10),
        ] {
            assert_eq!(text.parse::<MemoryBudget>().unwrap(), MemoryBudget::Bytes(bytes), "{text}");
        }
        assert_eq!("50%".parse::<MemoryBudget>().unwrap().bytes(1000), 500);
        for text in ["", "GiB", "-1GB", "0", "101%", "nan", "inf GB", "1e30GB", "8XB", "%"] {
            assert!(text.parse::<MemoryBudget>().is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn no_text_panics(text in any::<String>()) {
            let _ = text.parse::<MemoryBudget>();
        }
    }
}
