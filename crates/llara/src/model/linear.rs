//! Linear layers with the same input, fused into one: `y = x · Wᵀ (+ b)`, each with an optional adapter.

use std::ops::Range;

use super::lora::{Lora, SavedLora};
use super::parameter::Parameter;
use super::pass::Pass;
use crate::Result;
use crate::backend::{Backend, Epilogue, Shape, View};

/// One or several projections of the same input. Their weights are one matrix `[out, in]`, one below the
/// other, so that one product computes all of them.
pub(crate) struct Linear<B: Backend> {
    /// `[Σ out, in]`
    pub(crate) weight: Parameter<B>,
    /// `[Σ out]`
    pub(crate) bias: Option<Parameter<B>>,
    pub(crate) projections: Vec<Projection<B>>,
}

/// One of the projections of a [`Linear`].
pub(crate) struct Projection<B: Backend> {
    /// Name in adapter configurations, such as `q_proj`.
    pub(crate) name: &'static str,
    /// Its features among the features of all projections.
    pub(crate) features: Range<usize>,
    pub(crate) lora: Option<Lora<B>>,
}

/// The state that the backward passes of adapters need; the layer itself needs only its input.
pub(crate) struct SavedLinear<B: Backend>(Vec<Option<SavedLora<B>>>);

/// Gradients inside the adapters, `[n, r]` each.
pub(crate) struct InnerGradients<B: Backend>(Vec<Option<B::Tensor>>);

impl<B: Backend> Linear<B> {
    /// The indices of all projections.
    pub(crate) fn all(&self) -> Range<usize> {
        0..self.projections.len()
    }

    /// Features of some projections among the features of all.
    fn features(&self, which: &Range<usize>) -> Range<usize> {
        self.projections[which.start].features.start..self.projections[which.end - 1].features.end
    }

    /// `x · Wᵀ (+ b) (+ residual)` of some projections, concatenated by columns: x `[n, in]`, result `[n, out]`.
    pub(crate) fn forward(
        &self,
        pass: &Pass<'_, B>,
        x: &B::Tensor,
        which: Range<usize>,
        residual: Option<&B::Tensor>,
    ) -> Result<(B::Tensor, SavedLinear<B>)> {
        let features = self.features(&which);
        let bias = self.bias.as_ref().map(|b| b.values().view().with_cols(features.clone()));
        let weight = self.weight.weight().view().with_rows(features.clone());
        let epilogue = Epilogue { bias, residual };
        let mut y = pass.backend.linear(x.view(), weight, 1.0, epilogue)?;
        let mut saved = Vec::with_capacity(which.len());
        for projection in &self.projections[which] {
            let Projection { features: own, lora, .. } = projection;
            let columns = own.start - features.start..own.end - features.start;
            let add = |lora: &Lora<B>| lora.forward(pass, x, y.view_mut().with_cols(columns));
            saved.push(lora.as_ref().map(add).transpose()?);
        }
        Ok((y, SavedLinear(saved)))
    }

    /// From the gradient dy `[n, out]` by the result of [`forward`](Self::forward): `dx = dy · W
    /// (+ onto)`, and the state that [`backward_weights`](Self::backward_weights) needs.
    pub(crate) fn backward_input(
        &self,
        pass: &Pass<'_, B>,
        dy: &B::Tensor,
        which: Range<usize>,
        onto: Option<B::Tensor>,
    ) -> Result<(B::Tensor, InnerGradients<B>)> {
        let weight = self.weight.weight().view().with_rows(self.features(&which));
        let mut dx = pass.backend.linear_input_grad(dy.view(), weight, 1.0, onto)?;
        let inner = self.inner_gradients(pass, dy, which.clone())?;
        for (projection, g) in self.projections[which].iter().zip(&inner.0) {
            if let (Some(lora), Some(g)) = (&projection.lora, g) {
                dx = lora.backward_input(pass, g, dx)?;
            }
        }
        Ok((dx, inner))
    }

    /// What [`backward_weights`](Self::backward_weights) needs, if the gradient with respect to x is not needed.
    pub(crate) fn inner_gradients(
        &self,
        pass: &Pass<'_, B>,
        dy: &B::Tensor,
        which: Range<usize>,
    ) -> Result<InnerGradients<B>> {
        let columns = self.columns(dy, &which);
        let inner = self.projections[which].iter().zip(columns).map(|(projection, dy)| {
            projection.lora.as_ref().map(|lora| lora.inner_gradient(pass, dy)).transpose()
        });
        Ok(InnerGradients(inner.collect::<Result<_>>()?))
    }

    /// `dW += dyᵀ · x`, `db += Σ dy` if trainable, and the same for adapters.
    pub(crate) fn backward_weights(
        &mut self,
        pass: &Pass<'_, B>,
        dy: &B::Tensor,
        x: &B::Tensor,
        which: Range<usize>,
        (saved, inner): (SavedLinear<B>, InnerGradients<B>),
    ) -> Result<()> {
        let backend = pass.backend;
        if let Some((dw, accumulate)) = self.weight.grad_of_parts(backend, which.clone())? {
            backend.linear_weight_grad(dy.view(), x.view(), dw, accumulate)?;
        }
        if let Some(bias) = &mut self.bias
            && let Some((db, accumulate)) = bias.grad_of_parts(backend, which.clone())?
        {
            backend.linear_bias_grad(dy.view(), db, accumulate)?;
        }
        let columns = self.columns(dy, &which);
        let states = saved.0.into_iter().zip(inner.0).zip(columns);
        for (projection, ((saved, g), dy)) in self.projections[which].iter_mut().zip(states) {
            if let (Some(lora), Some(saved), Some(g)) = (&mut projection.lora, saved, g) {
                lora.backward_weights(pass, dy, x, saved, &g)?;
            }
        }
        Ok(())
    }

    /// The columns of each projection in a gradient of some.
    fn columns<'t>(&self, dy: &'t B::Tensor, which: &Range<usize>) -> Vec<View<'t, B::Tensor>> {
        let first = self.features(which).start;
        let columns = |p: &Projection<B>| p.features.start - first..p.features.end - first;
        self.projections[which.clone()].iter().map(|p| dy.view().with_cols(columns(p))).collect()
    }

    pub(crate) fn parameters(&self) -> impl Iterator<Item = &Parameter<B>> {
        std::iter::once(&self.weight)
            .chain(&self.bias)
            .chain(self.projections.iter().flat_map(|p| &p.lora).flat_map(Lora::parameters))
    }

    pub(crate) fn parameters_mut(&mut self) -> impl Iterator<Item = &mut Parameter<B>> {
        let adapters = self.projections.iter_mut().flat_map(|p| &mut p.lora);
        std::iter::once(&mut self.weight)
            .chain(&mut self.bias)
            .chain(adapters.flat_map(Lora::parameters_mut))
    }
}
