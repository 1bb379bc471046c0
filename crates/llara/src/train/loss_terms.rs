//! The terms of a loss, for the log.

/// Named terms of the loss of some steps.
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

    /// The mean over steps with the same terms.
    pub(super) fn mean<'t>(terms: impl ExactSizeIterator<Item = &'t LossTerms> + Clone) -> Self {
        let names = terms.clone().next().map_or(&[][..], |terms| terms.names);
        let count = terms.len().max(1) as f64;
        let mut values = [0.0; Self::MAX];
        for (at, value) in values.iter_mut().enumerate() {
            let sum: f64 = terms.clone().map(|terms| f64::from(terms.values[at])).sum();
            *value = (sum / count) as f32;
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
    }
}
