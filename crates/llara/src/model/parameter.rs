//! A parameter: its names in the weight files, its values on the device and its gradient.

use std::ops::Range;

use half::bf16;
use rayon::prelude::*;

use crate::backend::{Accumulate, Backend, Dtype, PreparedWeight, Shape, View, ViewMut, WeightUse};
use crate::{Error, ErrorKind, Result};

/// Values of a tensor of the weight files, in row-major order.
pub enum ParameterValues<'v> {
    /// Single precision.
    F32(Vec<f32>),
    /// bfloat16.
    Bf16(Vec<bf16>),
    /// Zeros, which need no host memory.
    Zeros(Dtype),
    /// Consecutive whole rows, which are rounded to the dtype. One part is in host memory at a time.
    Parts(Dtype, Box<dyn Iterator<Item = Result<Vec<f32>>> + 'v>),
}

impl ParameterValues<'_> {
    /// The values, rounded to `dtype`.
    pub fn rounded(values: Vec<f32>, dtype: Dtype) -> Self {
        match dtype {
            Dtype::F32 => ParameterValues::F32(values),
            Dtype::Bf16 => {
                ParameterValues::Bf16(values.par_iter().map(|&x| bf16::from_f32(x)).collect())
            }
        }
    }

    fn dtype(&self) -> Dtype {
        match self {
            ParameterValues::F32(_) => Dtype::F32,
            ParameterValues::Bf16(_) => Dtype::Bf16,
            ParameterValues::Zeros(dtype) | ParameterValues::Parts(dtype, _) => *dtype,
        }
    }
}

/// The layout of the tensors of a parameter in its matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Matrices `[out, in]`, stacked by rows; products multiply by them.
    Stacked,
    /// An embedding table `[rows, d]`, for lookups of rows; products multiply by it too if it is also the
    /// language-model head.
    Table,
    /// Vectors `[n]`, concatenated in one row.
    Vector,
}

/// One tensor of the weight files within a [`Parameter`].
#[derive(Debug, Clone)]
struct Part {
    /// Name within the bare decoder, such as `layers.0.mlp.up_proj.weight`.
    name: String,
    /// Shape in the file: `[out, in]` for a matrix, `[n]` for a vector.
    shape: Vec<usize>,
    /// Its rows in the matrix; its columns if the parts are vectors.
    range: Range<usize>,
    /// Whether a backward pass has reached it since the gradients were last cleared.
    reached: bool,
}

/// One or several tensors of the weight files, stored as one matrix on the device and multiplied together:
/// `q_proj`, `k_proj` and `v_proj` are one parameter of three parts.
pub struct Parameter<B: Backend> {
    kind: Kind,
    parts: Vec<Part>,
    weight: B::Weight,
    /// How the weight is used.
    purpose: WeightUse,
    /// A frozen parameter has no gradient and no optimizer state.
    trainable: bool,
    /// Whether products multiply by the values.
    multiplied: bool,
    /// Allocated once; before the first step if there is an optimizer.
    grad: Option<B::Tensor>,
}

/// A view of one tensor of the weight files in memory.
pub struct NamedTensor<'p, B: Backend> {
    parameter: &'p Parameter<B>,
    part: &'p Part,
}

impl<'p, B: Backend> NamedTensor<'p, B> {
    /// Name within the bare decoder, such as `layers.0.mlp.up_proj.weight`.
    pub fn name(&self) -> &'p str {
        &self.part.name
    }

    /// Shape as stored in files: `[out, in]` or `[n]`.
    pub fn shape(&self) -> &[usize] {
        &self.part.shape
    }

    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.part.shape.iter().product()
    }

    /// The values, `[out, in]` or `[1, n]`.
    pub fn values(&self) -> View<'_, B::Tensor> {
        self.parameter.range_of(self.parameter.values().view(), self.part.range.clone())
    }

    /// Whether it is trainable.
    pub fn is_trainable(&self) -> bool {
        self.parameter.trainable
    }

    /// The gradient accumulated since it was last cleared, with the shape of the values.
    ///
    /// # Errors
    /// As for [`Parameter::grad`].
    pub fn grad(&self) -> Result<View<'_, B::Tensor>> {
        let grad = self.parameter.grad()?;
        Ok(self.parameter.range_of(grad.view(), self.part.range.clone()))
    }
}

impl<B: Backend> Parameter<B> {
    /// Matrices of the same number of columns, stacked by rows: names and shapes `[out, in]`, and
    /// the function that returns the values of each.
    pub(crate) fn stacked(
        backend: &B,
        parts: Vec<(String, [usize; 2])>,
        values: &mut Values<'_>,
    ) -> Result<Self> {
        let parts = parts.into_iter().map(|(name, shape)| (name, shape.to_vec())).collect();
        Self::new(backend, Kind::Stacked, parts, values)
    }

    /// An embedding table. `[rows, d]`
    pub(crate) fn table(
        backend: &B,
        name: String,
        shape: [usize; 2],
        values: &mut Values<'_>,
    ) -> Result<Self> {
        Self::new(backend, Kind::Table, vec![(name, shape.to_vec())], values)
    }

    /// Concatenated vectors: names and lengths.
    pub(crate) fn vector(
        backend: &B,
        parts: Vec<(String, usize)>,
        values: &mut Values<'_>,
    ) -> Result<Self> {
        let parts = parts.into_iter().map(|(name, length)| (name, vec![length])).collect();
        Self::new(backend, Kind::Vector, parts, values)
    }

    fn new(
        backend: &B,
        kind: Kind,
        named: Vec<(String, Vec<usize>)>,
        values: &mut Values<'_>,
    ) -> Result<Self> {
        let mut parts: Vec<Part> = Vec::with_capacity(named.len());
        for (name, shape) in named {
            let start = parts.last().map_or(0, |part| part.range.end);
            parts.push(Part { name, range: start..start + shape[0], shape, reached: false });
        }
        let total = parts.last().map_or(0, |part| part.range.end);
        let (rows, cols) = match kind {
            Kind::Vector => (1, total),
            Kind::Stacked | Kind::Table => (total, parts[0].shape[1]),
        };
        let mut matrix: Option<B::Tensor> = None;
        for part in &parts {
            let values = values(&part.name, &part.shape)?;
            let whole = parts.len() == 1;
            let matrix = match (&mut matrix, &values) {
                (Some(matrix), _) => matrix,
                (none, ParameterValues::F32(values)) if whole => {
                    *none = Some(backend.upload(values, rows, cols)?);
                    continue;
                }
                (none, values) => none.insert(backend.zeros(rows, cols, values.dtype())?),
            };
            // Rows of a matrix, or elements of a vector.
            let mut copy = |values: ParameterValues<'_>, range: Range<usize>| {
                let to = match kind {
                    Kind::Vector => matrix.view_mut().with_cols(range),
                    Kind::Stacked | Kind::Table => matrix.view_mut().with_rows(range),
                };
                match &values {
                    ParameterValues::F32(values) => backend.upload_into(values, to),
                    ParameterValues::Bf16(values) => backend.upload_into(&values[..], to),
                    ParameterValues::Zeros(_) | ParameterValues::Parts(..) => Ok(()),
                }
            };
            let ParameterValues::Parts(dtype, of_file) = values else {
                copy(values, part.range.clone())?;
                continue;
            };
            let unit = if kind == Kind::Vector { 1 } else { cols.max(1) };
            let mut start = part.range.start;
            for values in of_file {
                let values = values?;
                let end = start + values.len() / unit;
                copy(ParameterValues::rounded(values, dtype), start..end)?;
                start = end;
            }
            assert_eq!(start, part.range.end, "{}: the parts are the whole tensor", part.name);
        }
        let Some(matrix) = matrix else { unreachable!("a parameter has a part") };
        let purpose = match kind {
            Kind::Stacked => WeightUse::Frozen(matrix.dtype()),
            Kind::Table | Kind::Vector => WeightUse::Elementwise,
        };
        let weight = backend.prepare(matrix, purpose)?;
        Ok(Parameter {
            kind,
            parts,
            weight,
            purpose,
            trainable: true,
            multiplied: kind == Kind::Stacked,
            grad: None,
        })
    }

    /// A view of some rows of the matrix, or of some columns if the parts are vectors.
    fn range_of<'t>(
        &self,
        matrix: View<'t, B::Tensor>,
        range: Range<usize>,
    ) -> View<'t, B::Tensor> {
        match self.kind {
            Kind::Vector => matrix.with_cols(range),
            Kind::Stacked | Kind::Table => matrix.with_rows(range),
        }
    }

    /// Name of the first of its tensors.
    pub fn name(&self) -> &str {
        &self.parts[0].name
    }

    /// The tensors of the weight files that it consists of.
    pub fn tensors(&self) -> impl Iterator<Item = NamedTensor<'_, B>> {
        self.parts.iter().map(|part| NamedTensor { parameter: self, part })
    }

    /// Whether it is trainable.
    pub fn is_trainable(&self) -> bool {
        self.trainable
    }

    /// Whether it is a matrix and not a vector.
    pub(crate) fn is_matrix(&self) -> bool {
        self.kind != Kind::Vector
    }

    /// The values, `[out, in]` or `[1, n]`.
    pub fn values(&self) -> &B::Tensor {
        self.weight.values()
    }

    /// The weight, prepared for products. `[out, in]`
    pub(crate) fn weight(&self) -> &B::Weight {
        &self.weight
    }

    /// The gradient accumulated since it was last cleared, with the shape of the values.
    ///
    /// # Errors
    /// If no backward pass has reached this parameter, so that a part of the model that is not trained by
    /// mistake is detected.
    pub fn grad(&self) -> Result<&B::Tensor> {
        match (&self.grad, self.parts.iter().find(|part| !part.reached)) {
            (Some(grad), None) => Ok(grad),
            (_, unreached) => Err(Error::new(
                ErrorKind::Numeric,
                format!(
                    "parameter `{}` received no gradient",
                    unreached.unwrap_or(&self.parts[0]).name
                ),
            )
            .expected("a gradient for every trainable parameter")
            .hint("run a forward and backward pass in training mode first")),
        }
    }

    /// The gradient of some parts for a backward pass, and whether to add to it; `None` if the
    /// parameter is frozen.
    pub(crate) fn grad_of_parts(
        &mut self,
        backend: &B,
        parts: Range<usize>,
    ) -> Result<Option<(ViewMut<'_, B::Tensor>, Accumulate)>> {
        if !self.trainable {
            return Ok(None);
        }
        self.reserve_grad(backend)?;
        let reached = self.parts[parts.start].reached;
        let range = self.parts[parts.start].range.start..self.parts[parts.end - 1].range.end;
        for part in &mut self.parts[parts] {
            assert_eq!(
                part.reached, reached,
                "{}: parts differ in whether a backward pass has reached them",
                part.name
            );
            part.reached = true;
        }
        let accumulate = if reached { Accumulate::Add } else { Accumulate::Overwrite };
        let Some(grad) = &mut self.grad else { unreachable!("it was reserved") };
        let grad = match self.kind {
            Kind::Vector => grad.view_mut().with_cols(range),
            Kind::Stacked | Kind::Table => grad.view_mut().with_rows(range),
        };
        Ok(Some((grad, accumulate)))
    }

    /// [`grad`](Self::grad), mutable, for a sum over processes.
    ///
    /// # Errors
    /// As for [`grad`](Self::grad).
    pub(crate) fn grad_mut(&mut self) -> Result<&mut B::Tensor> {
        self.grad()?;
        match &mut self.grad {
            Some(grad) => Ok(grad),
            None => unreachable!("grad() has just found it"),
        }
    }

    /// Sets the gradient to zero, for a process that has no sequence in a step.
    pub(crate) fn set_zero_grad(&mut self, backend: &B) -> Result<()> {
        self.reserve_grad(backend)?;
        if let Some(grad) = &mut self.grad {
            backend.clear(grad)?;
            self.parts.iter_mut().for_each(|part| part.reached = true);
        }
        Ok(())
    }

    /// The values to read and, if trainable, the whole gradient to add to: it is zero if no backward
    /// pass has reached it before.
    pub(crate) fn values_and_grad(
        &mut self,
        backend: &B,
    ) -> Result<(&B::Tensor, Option<&mut B::Tensor>)> {
        let all = 0..self.parts.len();
        if let Some((grad, Accumulate::Overwrite)) = self.grad_of_parts(backend, all)? {
            backend.clear(grad.tensor)?;
        }
        Ok((self.weight.values(), self.grad.as_mut()))
    }

    /// Allocates the gradient in advance, so that it is not allocated between activations.
    pub(crate) fn reserve_grad(&mut self, backend: &B) -> Result<()> {
        if self.trainable && self.grad.is_none() {
            let (rows, cols) = self.values().shape();
            self.grad = Some(backend.zeros(rows, cols, Dtype::F32)?);
        }
        Ok(())
    }

    /// The weight, mutable, and its gradient, for an optimizer.
    ///
    /// # Errors
    /// As for [`grad`](Self::grad).
    pub(crate) fn weight_mut_and_grad(&mut self) -> Result<(&mut B::Weight, &B::Tensor)> {
        self.grad()?;
        match &self.grad {
            Some(grad) => Ok((&mut self.weight, grad)),
            None => unreachable!("grad() has just found it"),
        }
    }

    /// Marks the gradient as zero for the next backward pass.
    pub(crate) fn clear_grad(&mut self) {
        self.parts.iter_mut().for_each(|part| part.reached = false);
    }

    /// Frees the gradient's memory.
    pub(crate) fn drop_grad(&mut self) {
        self.grad = None;
        self.clear_grad();
    }

    /// Makes the parameter not trainable.
    pub(crate) fn freeze(&mut self) {
        self.trainable = false;
        self.drop_grad();
    }

    /// Makes [`prepare`](Self::prepare) prepare a table for products.
    pub(crate) fn set_multiplied(&mut self) {
        self.multiplied = true;
    }

    /// Prepares the weight for products with activations of this dtype.
    pub(crate) fn prepare(&mut self, backend: &B, activations: Dtype) -> Result<()> {
        let purpose = match (self.multiplied, self.trainable) {
            (false, _) => WeightUse::Elementwise,
            (true, true) => WeightUse::Trainable(activations),
            (true, false) => WeightUse::Frozen(activations),
        };
        if purpose == self.purpose {
            return Ok(());
        }
        self.purpose = purpose;
        self.replace_values(backend, Ok)
    }

    /// Stores the values as bf16.
    pub(crate) fn round(&mut self, backend: &B) -> Result<()> {
        if self.values().dtype() == Dtype::Bf16 {
            return Ok(());
        }
        self.replace_values(backend, |values| backend.cast(&values, Dtype::Bf16))
    }

    /// Replaces the values by others of the same shape. If `change` fails, the parameter is left without values.
    pub(crate) fn replace_values(
        &mut self,
        backend: &B,
        change: impl FnOnce(B::Tensor) -> Result<B::Tensor>,
    ) -> Result<()> {
        let values = self.take_values(backend)?;
        self.set_values(backend, change(values)?)
    }

    /// Replaces the values by others of the same shape, in row-major order, as f32.
    ///
    /// # Errors
    /// If the device is out of memory.
    ///
    /// # Panics
    /// If the number of values differs.
    pub fn write_values(&mut self, backend: &B, values: &[f32]) -> Result<()> {
        let (rows, cols) = self.values().shape();
        let values = backend.upload(values, rows, cols)?;
        self.set_values(backend, values)
    }

    /// Takes the values, which [`set_values`](Self::set_values) must replace.
    pub(crate) fn take_values(&mut self, backend: &B) -> Result<B::Tensor> {
        let nothing = backend.prepare(backend.zeros(0, 0, Dtype::F32)?, WeightUse::Elementwise)?;
        Ok(std::mem::replace(&mut self.weight, nothing).into_values())
    }

    /// Sets values of the same shape, and prepares the weight from them.
    pub(crate) fn set_values(&mut self, backend: &B, values: B::Tensor) -> Result<()> {
        self.weight = backend.prepare(values, self.purpose)?;
        Ok(())
    }

    /// Replaces the values of a parameter of one matrix by one of `rows` rows.
    pub(crate) fn grow(&mut self, backend: &B, rows: usize, values: &[f32]) -> Result<()> {
        let table = backend.upload(values, rows, self.values().cols())?;
        self.weight = backend.prepare(table, self.purpose)?;
        self.parts[0].shape[0] = rows;
        self.parts[0].range = 0..rows;
        self.drop_grad();
        Ok(())
    }
}

/// A source of the values of a decoder's tensors, by name and shape in files.
pub type Values<'v> = dyn FnMut(&str, &[usize]) -> Result<ParameterValues<'v>> + 'v;
