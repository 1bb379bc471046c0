//! The learning rate as a function of the step.

use crate::{Error, ErrorKind, Result};

/// How the learning rate decays after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Decay {
    /// The rate is constant.
    Constant,
    /// Linear decay to 0 at the last step.
    #[default]
    Linear,
    /// Cosine decay to 0 at the last step.
    Cosine,
}

/// The length of the warm-up, in which the rate increases linearly from 0.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Warmup {
    /// A number of steps.
    Steps(u64),
    /// A fraction of all steps, rounded up.
    Ratio(f64),
}

/// Warm-up and decay over a run of known length.
///
/// ```
/// use llara::train::{Decay, Schedule, Warmup};
/// let schedule = Schedule::new(1e-3, Decay::Linear, Warmup::Steps(2), 10)?;
/// let rates: Vec<f64> = (0..4).map(|step| schedule.rate(step)).collect();
/// assert_eq!(rates, [0.0, 5e-4, 1e-3, 8.75e-4]);
/// # Ok::<(), llara::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    peak: f64,
    decay: Decay,
    warmup_steps: u64,
    total_steps: u64,
}

impl Schedule {
    /// A schedule that reaches `peak` after the warm-up, over `total_steps`.
    ///
    /// # Errors
    /// If the rate is negative or not finite, or the warm-up ratio is not within `0..=1`.
    pub fn new(peak: f64, decay: Decay, warmup: Warmup, total_steps: u64) -> Result<Self> {
        if !(peak.is_finite() && peak >= 0.0) {
            return Err(Error::new(ErrorKind::Argument, "the learning rate is out of range")
                .expected("a positive number, such as 5e-5")
                .got(peak));
        }
        let warmup_steps = match warmup {
            Warmup::Steps(steps) => steps,
            Warmup::Ratio(ratio) if (0.0..=1.0).contains(&ratio) => {
                (total_steps as f64 * ratio).ceil() as u64
            }
            Warmup::Ratio(ratio) => {
                return Err(Error::new(ErrorKind::Argument, "the warm-up ratio is out of range")
                    .expected("a fraction of the steps, from 0 to 1")
                    .got(ratio));
            }
        };
        Ok(Schedule { peak, decay, warmup_steps, total_steps })
    }

    /// The rate of a step, counted from 0.
    pub fn rate(&self, step: u64) -> f64 {
        if step < self.warmup_steps {
            return self.peak * step as f64 / self.warmup_steps as f64;
        }
        let length = self.total_steps.saturating_sub(self.warmup_steps).max(1);
        let progress = ((step - self.warmup_steps) as f64 / length as f64).min(1.0);
        self.peak
            * match self.decay {
                Decay::Constant => 1.0,
                Decay::Linear => 1.0 - progress,
                Decay::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()),
            }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ratio_is_rounded_up() {
        let schedule = Schedule::new(1.0, Decay::Constant, Warmup::Ratio(0.1), 15).unwrap();
        assert_eq!(schedule.warmup_steps, 2);
    }

    #[test]
    fn cosine_is_half_way_in_the_middle_and_ends_at_zero() {
        let schedule = Schedule::new(2.0, Decay::Cosine, Warmup::Steps(0), 8).unwrap();
        assert!((schedule.rate(4) - 1.0).abs() < 1e-12);
        assert!(schedule.rate(8).abs() < 1e-12);
    }

    #[test]
    fn impossible_settings_are_refused() {
        assert!(Schedule::new(f64::NAN, Decay::Linear, Warmup::Steps(0), 1).is_err());
        assert!(Schedule::new(-1.0, Decay::Linear, Warmup::Steps(0), 1).is_err());
        assert!(Schedule::new(1.0, Decay::Linear, Warmup::Ratio(1.5), 1).is_err());
    }
}
