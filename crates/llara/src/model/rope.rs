//! Frequencies of the rotary position embedding (Su et al. 2021), their scaling, and the table of angles.

use std::sync::{Arc, Mutex, PoisonError};

use crate::Result;
use crate::backend::{Backend, RopeTable};

/// How frequencies are scaled for contexts longer than the original context length of the model.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RopeScaling {
    /// No scaling.
    None,
    /// All frequencies divided by the factor (position interpolation, Chen et al. 2023).
    Linear {
        /// Factor by which the context becomes longer.
        factor: f64,
    },
    /// Low frequencies are divided, high ones kept, those between interpolated (Llama 3.1).
    Llama3 {
        /// Divisor of the low frequencies.
        factor: f64,
        /// Wavelengths above `original_context / low_freq_factor` are low frequencies.
        low_freq_factor: f64,
        /// Wavelengths below `original_context / high_freq_factor` are high frequencies.
        high_freq_factor: f64,
        /// Original context length, in tokens.
        original_context: f64,
    },
}

/// `theta^(-2i / head_dim)` for each pair of features, scaled. `[head_dim / 2]`
///
/// Rounded to f32 at the same places as in PyTorch, so that angles of large positions agree.
pub(crate) fn inverse_frequencies(theta: f64, head_dim: usize, scaling: RopeScaling) -> Vec<f32> {
    (0..head_dim / 2)
        .map(|pair| {
            let exponent = (2 * pair) as f32 / head_dim as f32;
            let frequency = 1.0 / theta.powf(f64::from(exponent)) as f32;
            scale_frequency(frequency, scaling)
        })
        .collect()
}

fn scale_frequency(frequency: f32, scaling: RopeScaling) -> f32 {
    match scaling {
        RopeScaling::None => frequency,
        RopeScaling::Linear { factor } => frequency / factor as f32,
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
            let f = f64::from(frequency);
            let wavelength = 2.0 * std::f64::consts::PI / f;
            if wavelength > original_context / low_freq_factor {
                (f / factor) as f32
            } else if wavelength < original_context / high_freq_factor {
                frequency
            } else {
                let kept = (original_context / wavelength - low_freq_factor)
                    / (high_freq_factor - low_freq_factor);
                ((1.0 - kept) * f / factor + kept * f) as f32
            }
        }
    }
}

/// The angles of positions `0..longest`, computed on first use and kept for later batches.
pub(crate) struct Rope<B: Backend> {
    inverse_frequencies: Vec<f32>,
    /// The table and its number of positions.
    table: Mutex<Option<(usize, Arc<RopeTable<B>>)>>,
}

impl<B: Backend> Rope<B> {
    pub(crate) fn new(inverse_frequencies: Vec<f32>) -> Self {
        Rope { inverse_frequencies, table: Mutex::new(None) }
    }

    /// A table of at least `longest` positions.
    pub(crate) fn table(&self, backend: &B, longest: usize) -> Result<Arc<RopeTable<B>>> {
        let mut cached = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((positions, table)) = &*cached
            && *positions >= longest
        {
            return Ok(Arc::clone(table));
        }
        let positions = longest.next_power_of_two();
        let angles = (0..positions)
            .flat_map(|p| self.inverse_frequencies.iter().map(move |&f| f64::from(p as f32 * f)));
        let (cos, sin): (Vec<f32>, Vec<f32>) =
            angles.map(|angle| (angle.cos() as f32, angle.sin() as f32)).unzip();
        let pairs = self.inverse_frequencies.len();
        let table = Arc::new(RopeTable {
            cos: backend.upload(&cos, positions, pairs)?,
            sin: backend.upload(&sin, positions, pairs)?,
        });
        *cached = Some((positions, Arc::clone(&table)));
        Ok(table)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn llama3_keeps_high_frequencies_and_divides_low_ones() {
        let scaling = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_context: 64.0,
        };
        let plain = inverse_frequencies(500_000.0, 16, RopeScaling::None);
        let scaled = inverse_frequencies(500_000.0, 16, scaling);
        assert_eq!(plain[0], scaled[0]);
        assert_eq!(plain[7] / 8.0, scaled[7]);
        assert!(plain.iter().zip(&scaled).all(|(p, s)| s <= p && *s >= p / 8.0));
    }
}
