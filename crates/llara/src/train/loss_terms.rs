//! The terms of a loss, for the log.

/// Named terms of the loss of some steps. A term that does not exist in a step is NaN.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LossTerms {
    names: &'static [&'static str],
    values: [f32; LossTerms::MAX],
}

impl LossTerms {
    /// The most terms of a loss.
    pub const MAX: usize = 3;

    /// Terms with their values, in the same order.
    ///
    /// # Panics
    /// If there are more than [`MAX`](Self::MAX) names, or another number of values.
    pub fn new(names: &'static [&'static str], values: &[f32]) -> Self {
        let mut terms = LossTerms { names, values: [0.0; Self::MAX] };
        terms.values[..names.len()].copy_from_slice(values);
        terms
    }

    /// Names and values.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, f32)> {
        self.names.iter().copied().zip(self.values)
    }

    /// The mean of each term over the steps that have it.
    pub(super) fn mean<'t>(terms: impl Iterator<Item = &'t LossTerms> + Clone) -> Self {
        let names = terms.clone().next().map_or(&[][..], |terms| terms.names);
        let mut values = [0.0; Self::MAX];
        for (at, value) in values.iter_mut().enumerate() {
            let of_steps = terms.clone().map(|terms| f64::from(terms.values[at]));
            let existing = of_steps.filter(|value| !value.is_nan());
            let count = existing.clone().count();
            *value = (existing.sum::<f64>() / count as f64) as f32; // 0 / 0: NaN
        }
        LossTerms { names, values }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn terms_have_names_and_means() {
        let names: &[&str] = &["a", "b"];
        let steps = [LossTerms::new(names, &[1.0, 5.0]), LossTerms::new(names, &[2.0, 6.0])];
        let mean: Vec<_> = LossTerms::mean(steps.iter()).iter().collect();
        assert_eq!(mean, [("a", 1.5), ("b", 5.5)]);

        let without = |a, b| LossTerms::new(names, &[a, b]);
        let steps = [without(1.0, f32::NAN), without(f32::NAN, f32::NAN), without(4.0, f32::NAN)];
        let mean: Vec<_> = LossTerms::mean(steps.iter()).iter().collect();
        assert_eq!(mean[0], ("a", 2.5));
        assert!(mean[1].1.is_nan());
    }
}
