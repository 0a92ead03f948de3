//! [`Train`] for [`Tch`].
//!
//! Sums go into the memory of what they are added to, and parameters are written in place. On the CPU, loops for
//! which tch has no function, or LibTorch none that passes memory once, are those of [`opt_kernels::gradient`].

mod attention;
mod eight_bits;
mod elements;
mod losses;
mod norms;
mod optimizers;
mod products;

use crate::{
    Linear, Norm, Table, Tch, Tensor,
    activation::activate,
    backend::sum,
    error::{Tried, torch},
    tensor::sizes,
    weights::{Dense, Kept},
};
use opt_backend::{
    Activation, AdamW, Attend, Clip, DType, Dropout, Layout, Moments8, Result, Sgd, Smoothing, Train, check,
};
use tch::Kind;

pub(crate) use eight_bits::Maps;

/// Changes `x` in place, in f32.
fn changed(
    op: &'static str,
    x: Tensor,
    change: impl FnOnce(&mut tch::Tensor) -> Tried<tch::Tensor>,
) -> Result<Tensor> {
    let shape = x.shape();
    let mut x = x.into_own(op)?;
    let _ = change(&mut x).map_err(torch(op))?;
    Ok(Tensor::new(x, Kind::Float, shape))
}

impl Train for Tch {
    fn linear_of(&self, weight: &Tensor, bias: Option<&Tensor>, dtype: DType) -> Result<Linear> {
        const OP: &str = "linear_of";
        let _at_work = self.at_work();
        if let Some(bias) = bias {
            check::same_shape(OP, bias.shape(), [1, weight.shape()[0]])?;
        }
        Dense::of(OP, weight, bias, dtype).map(|dense| Linear(Kept::Dense(dense)))
    }

    fn norm_of(&self, weight: &Tensor, bias: &Tensor, eps: f32) -> Result<Norm> {
        const OP: &str = "norm_of";
        let _at_work = self.at_work();
        for vector in [weight, bias] {
            check::same_shape(OP, vector.shape(), [1, weight.shape()[1]])?;
        }
        Norm::of(OP, [weight, bias], eps)
    }

    fn zeros(&self, shape: [usize; 2]) -> Result<Tensor> {
        let _at_work = self.at_work();
        let [rows, width] = shape.map(|n| i64::try_from(n).unwrap_or(i64::MAX));
        let data =
            tch::Tensor::f_zeros([rows, width], (Kind::Float, self.device())).map_err(torch("zeros"))?;
        Ok(Tensor::new(data, Kind::Float, shape))
    }

    /// Nothing is copied until one of the two is written to.
    fn copy(&self, x: &Tensor) -> Result<Tensor> {
        Ok(x.share())
    }

    fn matmul(
        &self,
        a: &Tensor,
        b: &Tensor,
        layout: Layout,
        dtype: DType,
        into: Option<Tensor>,
    ) -> Result<Tensor> {
        let _at_work = self.at_work();
        products::matmul(self, a, b, layout, dtype, into)
    }

    fn linear_grad(&self, dy: &Tensor, linear: &Linear, into: Option<Tensor>) -> Result<Tensor> {
        const OP: &str = "linear_grad";
        let _at_work = self.at_work();
        let [outputs, inputs] = linear.shape();
        check::width(OP, dy.shape()[1], outputs)?;
        if let Some(into) = &into {
            check::same_shape(OP, into.shape(), [dy.shape()[0], inputs])?;
        }
        products::through(OP, self, dy, linear.rows(OP)?, inputs, into)
    }

    fn logits_grad(&self, dy: &Tensor, head: &Table) -> Result<Tensor> {
        const OP: &str = "logits_grad";
        let _at_work = self.at_work();
        let [entries, width] = head.shape;
        check::width(OP, dy.shape()[1], entries)?;
        products::through(OP, self, dy, head.rows(OP)?, width, None)
    }

    fn layer_norm_grad(&self, x: &Tensor, norm: &Norm, dy: &Tensor) -> Result<Tensor> {
        let _at_work = self.at_work();
        norms::input(self, x, norm, dy)
    }

    fn layer_norm_grad_params(&self, x: &Tensor, norm: &Norm, dy: &Tensor) -> Result<[Tensor; 2]> {
        let _at_work = self.at_work();
        norms::params(self, x, norm, dy)
    }

    fn attend_grad(&self, qkv: [&Tensor; 3], dy: &Tensor, attend: Attend<'_>) -> Result<[Tensor; 3]> {
        let _at_work = self.at_work();
        attention::attend_grad(self, qkv, dy, attend)
    }

    fn activate(&self, x: Tensor, activation: Activation) -> Result<Tensor> {
        const OP: &str = "activate";
        let _at_work = self.at_work();
        let shape = x.shape();
        let (x, kind) = x.into_kind(OP)?;
        let (y, kind) = activate(OP, activation, x, kind)?;
        Ok(Tensor::new(y, kind, shape))
    }

    fn activate_grad(&self, x: &Tensor, dy: Tensor, activation: Activation) -> Result<Tensor> {
        let _at_work = self.at_work();
        elements::activate_grad(x, dy, activation)
    }

    fn cross_entropy(&self, logits: Tensor, targets: &[u32], smoothing: Smoothing) -> Result<[Tensor; 2]> {
        let _at_work = self.at_work();
        losses::cross_entropy(self, logits, targets, smoothing)
    }

    fn soft_targets(
        &self,
        student: Tensor,
        teacher: &Tensor,
        temperature: f32,
        scale: f32,
    ) -> Result<[Tensor; 2]> {
        let _at_work = self.at_work();
        losses::soft_targets(self, student, teacher, temperature, scale)
    }

    fn scatter_add(&self, into: Tensor, rows: &[usize], dy: &Tensor) -> Result<Tensor> {
        const OP: &str = "scatter_add";
        let _at_work = self.at_work();
        let [entries, width] = into.shape();
        check::rows(OP, rows, entries)?;
        check::same_shape(OP, dy.shape(), [rows.len(), width])?;
        let dy = dy.matrix_as(OP, Kind::Float)?;
        let first = rows.first().copied().unwrap_or(0);
        if rows.iter().enumerate().all(|(i, row)| *row == first + i) {
            return changed(OP, into, |into| into.f_narrow(0, first as i64, rows.len() as i64)?.f_add_(&dy));
        }
        let rows = self.indices(OP, rows.iter().map(|row| *row as i64))?;
        changed(OP, into, |into| into.f_index_add_(0, &rows, &dy))
    }

    fn concat(&self, parts: &[&Tensor]) -> Result<Tensor> {
        const OP: &str = "concat";
        let _at_work = self.at_work();
        let width = parts.first().map_or(0, |part| part.shape()[1]);
        for part in parts {
            check::width(OP, part.shape()[1], width)?;
        }
        let shape = [parts.iter().map(|part| part.shape()[0]).sum(), width];
        let kind = match parts {
            [first, rest @ ..] if rest.iter().all(|part| part.kind() == first.kind()) => first.kind(),
            _ => Kind::Float,
        };
        if parts.is_empty() {
            let empty = tch::Tensor::f_zeros(sizes(shape), (kind, self.device())).map_err(torch(OP))?;
            return Ok(Tensor::new(empty, kind, shape));
        }
        let parts = parts.iter().map(|part| part.matrix_as(OP, kind)).collect::<Result<Vec<_>>>()?;
        let all = tch::Tensor::f_cat(&parts, 0).map_err(torch(OP))?;
        Ok(Tensor::new(all, kind, shape))
    }

    fn sum_rows(&self, x: &Tensor) -> Result<Tensor> {
        const OP: &str = "sum_rows";
        let _at_work = self.at_work();
        let sum = x.matrix(OP)?.f_sum_dim_intlist(&[0i64][..], true, Kind::Float).map_err(torch(OP))?;
        Ok(Tensor::new(sum, Kind::Float, [1, x.shape()[1]]))
    }

    fn add_row(&self, x: Tensor, row: &Tensor) -> Result<Tensor> {
        const OP: &str = "add_row";
        let _at_work = self.at_work();
        check::same_shape(OP, row.shape(), [1, x.shape()[1]])?;
        sum(OP, x, &*row.matrix(OP)?)
    }

    fn mul_row(&self, x: Tensor, row: &Tensor) -> Result<Tensor> {
        const OP: &str = "mul_row";
        let _at_work = self.at_work();
        check::same_shape(OP, row.shape(), [1, x.shape()[1]])?;
        let row = row.matrix(OP)?;
        changed(OP, x, |x| x.f_mul_(&row))
    }

    fn mul(&self, x: Tensor, y: &Tensor) -> Result<Tensor> {
        const OP: &str = "mul";
        let _at_work = self.at_work();
        check::same_shape(OP, y.shape(), x.shape())?;
        let y = y.matrix(OP)?;
        changed(OP, x, |x| x.f_mul_(&y))
    }

    fn scale(&self, x: Tensor, factor: f32) -> Result<Tensor> {
        let _at_work = self.at_work();
        changed("scale", x, |x| x.f_mul_scalar_(f64::from(factor)))
    }

    fn dropout(&self, x: Tensor, dropout: Dropout) -> Result<Tensor> {
        let _at_work = self.at_work();
        elements::dropout(self, x, dropout)
    }

    fn sum_squares(&self, parts: &[&Tensor]) -> Result<Tensor> {
        let _at_work = self.at_work();
        optimizers::sum_squares(self, parts)
    }

    fn adamw(
        &self,
        param: &mut Tensor,
        gradient: &Tensor,
        moments: &mut [Tensor; 2],
        adam: AdamW,
        clip: Option<Clip<'_, Tensor>>,
    ) -> Result<()> {
        let _at_work = self.at_work();
        optimizers::adamw(self, param, gradient, moments, adam, clip)
    }

    fn adamw8(
        &self,
        param: &mut Tensor,
        gradient: &Tensor,
        moments: &mut Moments8<Tensor>,
        adam: AdamW,
        clip: Option<Clip<'_, Tensor>>,
    ) -> Result<()> {
        let _at_work = self.at_work();
        eight_bits::adamw8(self, param, gradient, moments, adam, clip)
    }

    fn sgd(
        &self,
        param: &mut Tensor,
        gradient: &Tensor,
        velocity: Option<&mut Tensor>,
        sgd: Sgd,
        clip: Option<Clip<'_, Tensor>>,
    ) -> Result<()> {
        let _at_work = self.at_work();
        optimizers::sgd(self, param, gradient, velocity, sgd, clip)
    }
}
