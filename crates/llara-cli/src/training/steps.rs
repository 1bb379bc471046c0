//! The parser of options that are a number of steps.

/// Parses a number of steps. The reference's trainer also accepts a fraction of the run below 1.
pub(super) fn whole_steps(text: &str) -> Result<u64, String> {
    if let Ok(steps) = text.parse() {
        return Ok(steps);
    }
    match text.parse::<f64>() {
        Ok(steps) if steps >= 0.0 && steps < u64::MAX as f64 && steps.fract() == 0.0 => {
            Ok(steps as u64)
        }
        Ok(fraction) if fraction > 0.0 && fraction < 1.0 => Err("a fraction of the run is not \
             supported: give a number of steps (for the warm-up, use --warmup-ratio)"
            .into()),
        _ => Err("expected a number of steps, 0 or more".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_integers() {
        assert_eq!(["0", "7", "500.0", "1e3"].map(whole_steps), [0, 7, 500, 1000].map(Ok));
        assert!(whole_steps("0.1").unwrap_err().contains("--warmup-ratio"));
        for text in ["-1", "1.5", "nan", "inf", "", "x"] {
            assert!(whole_steps(text).is_err(), "{text}");
        }
    }
}
