//! [`Train`] for [`Wgpu`].
//!
//! Ops record dispatches as those of [`opt_backend::Backend`] do. What is given away is changed in place: a tensor whose
//! memory something else sees as well (a copy, a weight made of it, the row it was taken from) is copied first, see
//! [`Tensor::own`]. Sums that need more than one workgroup go through partial sums in a fixed order.

mod attention;
mod each;
mod eight_bits;
mod held;
mod kernels;
mod losses;
mod optimizer;
mod product;
mod rows;

pub(crate) use kernels::Training;

use crate::{
    Wgpu,
    pool::Slice,
    tensor::Tensor,
    weights::{Linear, Norm, Table},
};
use each::Numbers;
use kernels::Each;
use opt_backend::{
    Activation, AdamW, Attend, Clip, DType, Dropout, Error, Layout, Moments8, Result, Sgd, Smoothing, Train,
    check,
};

/// Threads of an element-wise kernel.
const THREADS: usize = 256;

/// Workgroups that have a thread for each of so many elements.
fn groups_of(count: usize) -> u64 {
    count.div_ceil(THREADS) as u64
}

/// What a kernel binds of a tensor.
fn bound<'a>(op: &'static str, slice: Option<Slice<'a>>) -> Result<Slice<'a>> {
    slice.ok_or_else(|| Error::shape(op, "expected rows of at least one element"))
}

impl Train for Wgpu {
    fn linear_of(&self, weight: &Tensor, bias: Option<&Tensor>, dtype: DType) -> Result<Linear> {
        self.gpu.linear_of(weight, bias, dtype)
    }

    fn norm_of(&self, weight: &Tensor, bias: &Tensor, eps: f32) -> Result<Norm> {
        self.gpu.norm_of(weight, bias, eps)
    }

    fn zeros(&self, shape: [usize; 2]) -> Result<Tensor> {
        self.gpu.zeros("zeros", shape)
    }

    fn copy(&self, x: &Tensor) -> Result<Tensor> {
        self.gpu.fault.check("copy")?;
        // Whoever changes either of them takes memory of its own first.
        Ok(x.clone())
    }

    fn matmul(
        &self,
        a: &Tensor,
        b: &Tensor,
        layout: Layout,
        _dtype: DType,
        into: Option<Tensor>,
    ) -> Result<Tensor> {
        self.gpu.multiply([a, b], layout, into)
    }

    fn linear_grad(&self, dy: &Tensor, linear: &Linear, into: Option<Tensor>) -> Result<Tensor> {
        self.gpu.times_weight("linear_grad", dy, &linear.weight, into)
    }

    fn logits_grad(&self, dy: &Tensor, head: &Table) -> Result<Tensor> {
        self.gpu.times_weight("logits_grad", dy, &head.0, None)
    }

    fn layer_norm_grad(&self, x: &Tensor, norm: &Norm, dy: &Tensor) -> Result<Tensor> {
        self.gpu.layer_norm_grad(x, norm, dy)
    }

    fn layer_norm_grad_params(&self, x: &Tensor, norm: &Norm, dy: &Tensor) -> Result<[Tensor; 2]> {
        self.gpu.layer_norm_grad_params(x, norm, dy)
    }

    fn attend_grad(&self, qkv: [&Tensor; 3], dy: &Tensor, attend: Attend<'_>) -> Result<[Tensor; 3]> {
        self.gpu.attend_grad(qkv, dy, attend)
    }

    fn activate(&self, x: Tensor, activation: Activation) -> Result<Tensor> {
        let kind = crate::product::number("activate", activation)?;
        self.gpu.each("activate", Each::Activate, x, None, Numbers { kind, ..Numbers::default() })
    }

    fn activate_grad(&self, x: &Tensor, dy: Tensor, activation: Activation) -> Result<Tensor> {
        let op = "activate_grad";
        let kind = crate::product::number(op, activation)?;
        check::same_shape(op, dy.shape(), x.shape())?;
        self.gpu.each(op, Each::ActivateGrad, dy, Some(x), Numbers { kind, ..Numbers::default() })
    }

    fn cross_entropy(&self, logits: Tensor, targets: &[u32], smoothing: Smoothing) -> Result<[Tensor; 2]> {
        self.gpu.cross_entropy(logits, targets, smoothing)
    }

    fn soft_targets(
        &self,
        student: Tensor,
        teacher: &Tensor,
        temperature: f32,
        scale: f32,
    ) -> Result<[Tensor; 2]> {
        self.gpu.soft_targets(student, teacher, temperature, scale)
    }

    fn scatter_add(&self, into: Tensor, rows: &[usize], dy: &Tensor) -> Result<Tensor> {
        self.gpu.scatter_add(into, rows, dy)
    }

    fn concat(&self, parts: &[&Tensor]) -> Result<Tensor> {
        self.gpu.concat(parts)
    }

    fn sum_rows(&self, x: &Tensor) -> Result<Tensor> {
        self.gpu.sum_rows(x)
    }

    fn add_row(&self, x: Tensor, row: &Tensor) -> Result<Tensor> {
        check::same_shape("add_row", row.shape(), [1, x.width()])?;
        self.gpu.each("add_row", Each::AddRow, x, Some(row), Numbers::default())
    }

    fn mul_row(&self, x: Tensor, row: &Tensor) -> Result<Tensor> {
        check::same_shape("mul_row", row.shape(), [1, x.width()])?;
        self.gpu.each("mul_row", Each::MulRow, x, Some(row), Numbers::default())
    }

    fn mul(&self, x: Tensor, y: &Tensor) -> Result<Tensor> {
        check::same_shape("mul", y.shape(), x.shape())?;
        self.gpu.each("mul", Each::Mul, x, Some(y), Numbers::default())
    }

    fn scale(&self, x: Tensor, factor: f32) -> Result<Tensor> {
        self.gpu.each("scale", Each::Scale, x, None, Numbers { factor, ..Numbers::default() })
    }

    fn dropout(&self, x: Tensor, dropout: Dropout) -> Result<Tensor> {
        let numbers = Numbers {
            factor: dropout.scale(),
            threshold: dropout.threshold(),
            seed: dropout.words(),
            ..Numbers::default()
        };
        self.gpu.each("dropout", Each::Dropout, x, None, numbers)
    }

    fn sum_squares(&self, parts: &[&Tensor]) -> Result<Tensor> {
        self.gpu.sum_squares(parts)
    }

    fn adamw(
        &self,
        param: &mut Tensor,
        gradient: &Tensor,
        moments: &mut [Tensor; 2],
        adam: AdamW,
        clip: Option<Clip<'_, Tensor>>,
    ) -> Result<()> {
        self.gpu.adamw(param, gradient, moments, adam, clip)
    }

    fn adamw8(
        &self,
        param: &mut Tensor,
        gradient: &Tensor,
        moments: &mut Moments8<Tensor>,
        adam: AdamW,
        clip: Option<Clip<'_, Tensor>>,
    ) -> Result<()> {
        self.gpu.adamw8(param, gradient, moments, adam, clip)
    }

    fn sgd(
        &self,
        param: &mut Tensor,
        gradient: &Tensor,
        velocity: Option<&mut Tensor>,
        sgd: Sgd,
        clip: Option<Clip<'_, Tensor>>,
    ) -> Result<()> {
        self.gpu.sgd(param, gradient, velocity, sgd, clip)
    }
}
