//! Bar charts in text.

use llara::data::Histogram;

use crate::talk::count;

/// Width of the longest bar in characters.
const WIDTH: usize = 40;

/// One line for each bin. The bin of `max_len`, if it is given, is marked with the share of truncated texts.
pub(crate) fn lines(histogram: &Histogram, max_len: Option<(usize, f64)>) -> Vec<String> {
    let Histogram { first, width, counts } = histogram;
    let most = counts.iter().copied().max().unwrap_or(0);
    let last = counts.len() - 1;
    let mut lines = Vec::with_capacity(counts.len());
    for (bin, &texts) in counts.iter().enumerate() {
        let (from, to) = (first + bin * width, first + (bin + 1) * width - 1);
        let range = if bin == last { format!("{from} …") } else { format!("{from} – {to}") };
        let mark = match max_len {
            // The mark of a maximum length above all bins is in the last bin.
            Some((max_len, truncated_share))
                if (bin == 0 || max_len >= from) && (bin == last || max_len <= to) =>
            {
                let percent = 100.0 * truncated_share;
                format!("  ← maximum length {max_len}: {percent:.1} % are truncated")
            }
            _ => String::new(),
        };
        let bar = bar(texts as f64, most as f64);
        lines.push(format!("{range:>14}  {:>7}  {bar}{mark}", count(texts as usize)));
    }
    lines
}

/// A bar for the fraction `part / total`, rounded up to an eighth of a character.
pub(crate) fn bar(part: f64, total: f64) -> String {
    const EIGHTHS: [&str; 8] = ["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"];
    if total <= 0.0 || part <= 0.0 {
        return String::new();
    }
    let eighths = ((part / total).min(1.0) * (8 * WIDTH) as f64).ceil() as usize;
    "█".repeat(eighths / 8) + EIGHTHS[eighths % 8]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_are_proportional_and_zero_has_none() {
        assert_eq!(bar(1.0, 1.0).chars().count(), WIDTH);
        assert_eq!(bar(0.5, 1.0), "█".repeat(WIDTH / 2));
        assert_eq!(bar(1e-9, 1.0), "▏");
        assert_eq!((bar(0.0, 1.0), bar(1.0, 0.0)), (String::new(), String::new()));
    }
}
