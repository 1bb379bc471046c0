//! The sum of the gradients over processes, bucket by bucket, while the backward pass goes on.

use std::collections::HashMap;

use super::flat_layout::FlatLayout;
use crate::backend::Backend;
use crate::dist::{Bucket, Collective, FlatPart, GradientSum};
use crate::model::{Decoder, GradientsReady, Parameter};
use crate::{Error, ErrorKind, Result};

/// Elements of a bucket: 25 MB of f32, as PyTorch's DistributedDataParallel has.
pub(super) const BUCKET_ELEMENTS: usize = 25 * (1 << 20) / 4;

/// Receives gradients of the last chunk of a step and starts the sum of each bucket as soon as its
/// gradients are complete.
pub(super) struct GradientReduction<'r, B: Backend> {
    layout: &'r FlatLayout,
    /// Numbers of the trainable parameters by name.
    numbers: HashMap<String, usize>,
    /// The last ones first.
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
    /// Begins the sums of all buckets.
    ///
    /// # Errors
    /// As the group fails.
    pub(super) fn new(
        layout: &'r FlatLayout,
        decoder: &Decoder<B>,
        collective: &dyn Collective<B>,
        bucket_elements: usize,
    ) -> Result<Self> {
        let buckets = layout.buckets(bucket_elements).into_iter().map(|bucket| {
            let sum = collective.gradient_sum(&bucket)?;
            Ok(OpenBucket { missing: bucket.range.len(), bucket, sum, started: false })
        });
        let names = decoder.trainable_parameters().map(|parameter| parameter.name().to_owned());
        let numbers = names.enumerate().map(|(number, name)| (name, number)).collect();
        Ok(GradientReduction { layout, numbers, buckets: buckets.collect::<Result<_>>()? })
    }

    /// Waits for all sums. The decoder's gradients then hold the sum over ranks in the range that this
    /// rank owns.
    ///
    /// # Errors
    /// When a gradient was never reported as complete, or the group fails.
    pub(super) fn finish(self, decoder: &mut Decoder<B>) -> Result<()> {
        for OpenBucket { bucket, sum, missing, .. } in self.buckets {
            if missing > 0 {
                return Err(Error::new(
                    ErrorKind::Numeric,
                    "a backward pass left gradients incomplete",
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
                let Some(piece) = self.layout.piece(number, &open.bucket.range) else { continue };
                open.missing -= piece.elements.len();
                open.sum.add(FlatPart {
                    tensor: parameter.grad_mut()?,
                    elements: piece.elements,
                    start: piece.start,
                })?;
            }
        }
        // In the order of the buckets, which is the same on every rank.
        for open in self.buckets.iter_mut().filter(|open| open.missing == 0 && !open.started) {
            open.sum.start()?;
            open.started = true;
        }
        Ok(())
    }
}

/// The parts of a bucket: gradients or weights of the decoder, as `tensor` takes them.
pub(super) fn parts<'d, B: Backend>(
    layout: &FlatLayout,
    bucket: &Bucket,
    decoder: &'d mut Decoder<B>,
    mut tensor: impl FnMut(&'d mut Parameter<B>) -> Result<&'d mut B::Tensor>,
) -> Result<Vec<FlatPart<'d, B>>> {
    let in_bucket =
        decoder.trainable_parameters_mut().enumerate().filter_map(|(number, parameter)| {
            layout.piece(number, &bucket.range).map(|piece| (piece, parameter))
        });
    in_bucket
        .map(|(piece, parameter)| {
            Ok(FlatPart {
                tensor: tensor(parameter)?,
                elements: piece.elements,
                start: piece.start,
            })
        })
        .collect()
}
