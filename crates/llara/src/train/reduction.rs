//! The sum of the gradients over processes, in buckets, during the backward pass.

use std::collections::HashMap;

use super::flat_layout::FlatLayout;
use crate::backend::Backend;
use crate::dist::{Bucket, Collective, FlatPart, GradientSum};
use crate::model::{Decoder, GradientsReady, Parameter};
use crate::{Error, ErrorKind, Result};

/// Receives gradients of the last chunk of a step and starts the sum of each bucket as soon as its
/// gradients are complete.
pub(super) struct GradientReduction<'r, B: Backend> {
    layout: &'r FlatLayout,
    /// Indices of the trainable parameters by name.
    numbers: HashMap<String, usize>,
    /// The buckets, from the last to the first.
    buckets: Vec<OpenBucket<B>>,
}

struct OpenBucket<B: Backend> {
    bucket: Bucket,
    sum: Box<dyn GradientSum<B>>,
    /// Elements whose gradient is not complete.
    missing: usize,
    started: bool,
}

impl<'r, B: Backend> GradientReduction<'r, B> {
    /// Creates the sums of all buckets.
    ///
    /// # Errors
    /// Errors of the process group.
    pub(super) fn new(
        layout: &'r FlatLayout,
        decoder: &Decoder<B>,
        collective: &dyn Collective<B>,
    ) -> Result<Self> {
        let buckets = layout.buckets().into_iter().map(|bucket| {
            let sum = collective.gradient_sum(&bucket)?;
            Ok(OpenBucket { missing: bucket.range.len(), bucket, sum, started: false })
        });
        let names = decoder.trainable_parameters().map(|parameter| parameter.name().to_owned());
        let numbers = names.enumerate().map(|(number, name)| (name, number)).collect();
        Ok(GradientReduction { layout, numbers, buckets: buckets.collect::<Result<_>>()? })
    }

    /// Waits for all sums. The decoder's gradients then contain the sum over ranks in the range that this
    /// rank owns.
    ///
    /// # Errors
    /// If a gradient was never reported as complete, or the process group fails.
    pub(super) fn finish(self, decoder: &mut Decoder<B>) -> Result<()> {
        for OpenBucket { bucket, sum, missing, .. } in self.buckets {
            if missing > 0 {
                return Err(Error::new(
                    ErrorKind::Numeric,
                    "the gradients are incomplete after the backward pass",
                )
                .expected("a gradient for every trainable parameter")
                .got(format!("{missing} elements without one")));
            }
            let mut parts = parts(self.layout, &bucket, decoder, Parameter::grad_mut)?;
            sum.finish(&mut parts)?;
        }
        Ok(())
    }
}

impl<B: Backend> GradientsReady<B> for GradientReduction<'_, B> {
    fn ready(&mut self, parameters: &mut dyn Iterator<Item = &mut Parameter<B>>) -> Result<()> {
        for parameter in parameters.filter(|parameter| parameter.is_trainable()) {
            let Some(&number) = self.numbers.get(parameter.name()) else { continue };
            for open in &mut self.buckets {
                let Some(slice) = self.layout.slice(number, &open.bucket.range) else { continue };
                open.missing -= slice.elements.len();
                open.sum.add(FlatPart {
                    tensor: parameter.grad_mut()?,
                    elements: slice.elements,
                    start: slice.start,
                })?;
            }
        }
        // Strictly in the order of the buckets: the ranks must start the same sums one after the other, and a rank without
        // rows completes all gradients at once.
        for open in &mut self.buckets {
            match (open.started, open.missing) {
                (true, _) => {}
                (false, 0) => {
                    open.sum.start()?;
                    open.started = true;
                }
                (false, _) => break,
            }
        }
        Ok(())
    }
}

/// Replaces the gradients by the sums of the ranks that own them, so that every rank has all sums.
///
/// # Errors
/// Errors of the process group.
pub(super) fn all_gather_gradients<B: Backend>(
    layout: &FlatLayout,
    decoder: &mut Decoder<B>,
    collective: &dyn Collective<B>,
) -> Result<()> {
    for bucket in layout.buckets() {
        let mut parts = parts(layout, &bucket, decoder, Parameter::grad_mut)?;
        collective.all_gather_weights(&bucket, &mut parts)?;
    }
    Ok(())
}

/// The parts of a bucket: gradients or weights of the decoder, selected by `tensor`.
pub(super) fn parts<'d, B: Backend>(
    layout: &FlatLayout,
    bucket: &Bucket,
    decoder: &'d mut Decoder<B>,
    mut tensor: impl FnMut(&'d mut Parameter<B>) -> Result<&'d mut B::Tensor>,
) -> Result<Vec<FlatPart<'d, B>>> {
    let in_bucket =
        decoder.trainable_parameters_mut().enumerate().filter_map(|(number, parameter)| {
            layout.slice(number, &bucket.range).map(|slice| (slice, parameter))
        });
    in_bucket
        .map(|(slice, parameter)| {
            Ok(FlatPart {
                tensor: tensor(parameter)?,
                elements: slice.elements,
                start: slice.start,
            })
        })
        .collect()
}
