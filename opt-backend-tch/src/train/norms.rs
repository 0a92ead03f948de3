//! The gradients of LayerNorm.
//!
//! tch has no function for LibTorch's own, so this is loops over memory on the CPU and composed ops elsewhere.

use crate::{
    Norm, Tch,
    error::{Tried, torch},
    quant::{changeable, contiguous, numbers},
    tensor::{Tensor, sizes},
};
use opt_backend::{Result, check};
use opt_kernels::gradient;
use tch::Kind;

/// Elements of a task of the CPU's threads.
const ELEMENTS: usize = 1 << 14;
/// Rows whose sums one task takes: with few tasks there is little left to add.
const ROWS: usize = 64;

/// See [`opt_backend::Train::layer_norm_grad`].
pub(crate) fn input(tch: &Tch, x: &Tensor, norm: &Norm, dy: &Tensor) -> Result<Tensor> {
    const OP: &str = "layer_norm_grad";
    checked(x, norm, dy)?;
    let shape = x.shape();
    if !tch.host_kernels() {
        let (x, dy) = (x.matrix_as(OP, Kind::Float)?, dy.matrix_as(OP, Kind::Float)?);
        let weight = norm.weight.as_deref();
        let dx = composed(&x, &dy, weight, norm).map_err(torch(OP))?;
        return Ok(Tensor::new(dx, Kind::Float, shape));
    }
    let mut dx = tch::Tensor::f_zeros(sizes(shape), (Kind::Float, tch.device())).map_err(torch(OP))?;
    let (x, dy) = (contiguous(OP, x)?, contiguous(OP, dy)?);
    let (x, dy) = (numbers(OP, &x)?, numbers(OP, &dy)?);
    let weight = norm.weight.as_ref().map(|weight| numbers(OP, weight)).transpose()?;
    let width = norm.width;
    let share = (ELEMENTS / width.max(1)).max(1) * width.max(1);
    let tasks = x.chunks(share).zip(dy.chunks(share)).zip(changeable(OP, &mut dx)?.chunks_mut(share));
    tch.host.each(tasks.collect(), |((x, dy), dx)| {
        gradient::layer_norm(x, weight, norm.eps, dy, dx, width);
    })?;
    Ok(Tensor::new(dx, Kind::Float, shape))
}

/// See [`opt_backend::Train::layer_norm_grad_params`].
pub(crate) fn params(tch: &Tch, x: &Tensor, norm: &Norm, dy: &Tensor) -> Result<[Tensor; 2]> {
    const OP: &str = "layer_norm_grad_params";
    checked(x, norm, dy)?;
    let width = norm.width;
    let tensor = |data| Tensor::new(data, Kind::Float, [1, width]);
    if !tch.host_kernels() {
        let (x, dy) = (x.matrix_as(OP, Kind::Float)?, dy.matrix_as(OP, Kind::Float)?);
        let sums = || -> Tried<[tch::Tensor; 2]> {
            let (mut normal, _) = normalised(&x, norm)?;
            let _ = normal.f_mul_(&dy)?;
            let sum = |x: &tch::Tensor| x.f_sum_dim_intlist(&[0i64][..], true, Kind::Float);
            Ok([sum(&normal)?, sum(&dy)?])
        };
        return Ok(sums().map_err(torch(OP))?.map(tensor));
    }
    let (x, dy) = (contiguous(OP, x)?, contiguous(OP, dy)?);
    let (x, dy) = (numbers(OP, &x)?, numbers(OP, &dy)?);
    let share = (ROWS * width).max(1);
    let mut sums = vec![[vec![0.0; width], vec![0.0; width]]; x.len().div_ceil(share)];
    let tasks = x.chunks(share).zip(dy.chunks(share)).zip(&mut sums);
    tch.host.each(tasks.collect(), |((x, dy), [weight, bias])| {
        gradient::layer_norm_params(x, norm.eps, dy, [weight, bias]);
    })?;
    let total = |which: usize| {
        let mut total = vec![0.0_f64; width];
        for part in &sums {
            total.iter_mut().zip(&part[which]).for_each(|(sum, part)| *sum += part);
        }
        let total: Vec<f32> = total.into_iter().map(|v| v as f32).collect();
        let data = tch::Tensor::f_from_slice(&total).and_then(|data| data.f_reshape([1, width as i64]));
        Ok(tensor(data.map_err(torch(OP))?))
    };
    Ok([total(0)?, total(1)?])
}

fn checked(x: &Tensor, norm: &Norm, dy: &Tensor) -> Result<()> {
    check::same_shape("layer_norm_grad", dy.shape(), x.shape())?;
    check::width("layer_norm_grad", x.shape()[1], norm.width)
}

/// Rows of mean 0 and variance 1, and what each was divided by, inverted.
fn normalised(x: &tch::Tensor, norm: &Norm) -> Tried<(tch::Tensor, tch::Tensor)> {
    let none = Option::<&tch::Tensor>::None;
    let width = norm.width as i64;
    let (normal, _, scale) = x.f_native_layer_norm([width], none, none, f64::from(norm.eps))?;
    Ok((normal, scale.f_reshape([-1, 1])?))
}

fn composed(
    x: &tch::Tensor,
    dy: &tch::Tensor,
    weight: Option<&tch::Tensor>,
    norm: &Norm,
) -> Tried<tch::Tensor> {
    if x.numel() == 0 {
        return x.f_zeros_like();
    }
    let (mut normal, scale) = normalised(x, norm)?;
    let mut inner = match weight {
        Some(weight) => dy.f_mul(weight)?,
        None => dy.f_to_dtype(Kind::Float, false, true)?,
    };
    let mean = |x: &tch::Tensor| x.f_mean_dim(&[1i64][..], true, Kind::Float);
    let product = mean(&inner.f_mul(&normal)?)?;
    let _ = inner.f_sub_(&mean(&inner)?)?;
    let _ = normal.f_mul_(&product)?;
    let _ = inner.f_sub_(&normal)?;
    let _ = inner.f_mul_(&scale)?;
    Ok(inner)
}
