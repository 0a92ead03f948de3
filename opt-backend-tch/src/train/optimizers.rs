//! Optimizers, and what clips their gradients.
//!
//! On the CPU one pass over memory, where LibTorch's ops would take ten; elsewhere its ops.

use crate::{
    Tch,
    error::{Tried, torch},
    quant::{changeable, contiguous, numbers},
    tensor::Tensor,
};
use opt_backend::{AdamW, Clip, Result, Sgd, check, oracle};
use opt_kernels::gradient;
use tch::Kind;

/// Elements of a task of the CPU's threads.
const ELEMENTS: usize = 1 << 15;

/// What gradients are multiplied by: on the CPU a number, elsewhere a tensor that nobody waits for.
pub(super) enum Factor {
    One,
    Number(f32),
    Tensor(tch::Tensor),
}

impl Factor {
    pub(super) fn new(tch: &Tch, clip: Option<Clip<'_, Tensor>>) -> Result<Self> {
        const OP: &str = "clip";
        let Some(Clip { sum_squares, max_norm }) = clip else { return Ok(Self::One) };
        check::same_shape(OP, sum_squares.shape(), [1, 1])?;
        if tch.host_kernels() {
            let sum = contiguous(OP, sum_squares)?;
            let sum = numbers(OP, &sum)?.first().copied().unwrap_or(0.0);
            return Ok(Self::Number(oracle::gradient::clip_factor(sum, max_norm)));
        }
        let sum = sum_squares.matrix_as(OP, Kind::Float)?;
        let factor = || -> Tried<tch::Tensor> {
            let mut norm = sum.f_sqrt()?;
            let _ = norm.f_add_scalar_(1e-6)?;
            let _ = norm.f_reciprocal_()?;
            let _ = norm.f_mul_scalar_(f64::from(max_norm))?;
            let _ = norm.f_clamp_max_(1.0)?;
            norm.f_reshape([1, 1])
        };
        factor().map(Self::Tensor).map_err(torch(OP))
    }

    pub(super) fn number(&self) -> f32 {
        if let Self::Number(factor) = self { *factor } else { 1.0 }
    }

    /// A gradient times the factor, in memory of its own.
    fn times(&self, gradient: &tch::Tensor) -> Tried<tch::Tensor> {
        match self {
            Self::Tensor(factor) => gradient.f_mul(factor),
            _ => gradient.f_mul_scalar(f64::from(self.number())),
        }
    }
}

/// See [`opt_backend::Train::sum_squares`].
pub(crate) fn sum_squares(tch: &Tch, parts: &[&Tensor]) -> Result<Tensor> {
    const OP: &str = "sum_squares";
    let sum = if tch.host_kernels() {
        let parts = parts.iter().map(|part| contiguous(OP, part)).collect::<Result<Vec<_>>>()?;
        let mut chunks = Vec::new();
        for part in &parts {
            chunks.extend(numbers(OP, part)?.chunks(ELEMENTS));
        }
        let mut sums = vec![0.0; chunks.len()];
        let tasks = chunks.into_iter().zip(&mut sums).collect();
        tch.host.each(tasks, |(chunk, sum)| *sum = gradient::sum_squares(chunk))?;
        tch::Tensor::f_from_slice(&[sums.iter().sum::<f64>() as f32])
    } else {
        let square = |part: &&Tensor| -> Result<tch::Tensor> {
            let part = part.matrix_as(OP, Kind::Float)?;
            part.f_square().and_then(|squares| squares.f_sum(Kind::Float)).map_err(torch(OP))
        };
        let sums = parts.iter().map(square).collect::<Result<Vec<_>>>()?;
        if sums.is_empty() {
            tch::Tensor::f_zeros([1], (Kind::Float, tch.device()))
        } else {
            tch::Tensor::f_stack(&sums, 0).and_then(|sums| sums.f_sum(Kind::Float))
        }
    };
    let sum = sum.and_then(|sum| sum.f_reshape([1, 1])).map_err(torch(OP))?;
    Ok(Tensor::new(sum, Kind::Float, [1, 1]))
}

/// See [`opt_backend::Train::adamw`].
pub(crate) fn adamw(
    tch: &Tch,
    param: &mut Tensor,
    gradient: &Tensor,
    moments: &mut [Tensor; 2],
    adam: AdamW,
    clip: Option<Clip<'_, Tensor>>,
) -> Result<()> {
    const OP: &str = "adamw";
    let shape = param.shape();
    for other in [gradient, &moments[0], &moments[1]] {
        check::same_shape(OP, other.shape(), shape)?;
    }
    let factor = Factor::new(tch, clip)?;
    // All memory is had before anything is written.
    let [first, second] = moments;
    let (p, m, v) = (param.own(OP)?, first.own(OP)?, second.own(OP)?);
    if !tch.host_kernels() {
        let g = gradient.matrix_as(OP, Kind::Float)?;
        return adamw_composed(p, &g, [m, v], adam, &factor).map_err(torch(OP));
    }
    let (g, factor) = (contiguous(OP, gradient)?, factor.number());
    let chunks = changeable(OP, p)?.chunks_mut(ELEMENTS).zip(numbers(OP, &g)?.chunks(ELEMENTS));
    let moments = changeable(OP, m)?.chunks_mut(ELEMENTS).zip(changeable(OP, v)?.chunks_mut(ELEMENTS));
    tch.host.each(chunks.zip(moments).collect(), |((p, g), (m, v))| {
        gradient::adamw(p, g, [m, v], adam, factor);
    })
}

pub(super) fn adamw_composed(
    p: &mut tch::Tensor,
    g: &tch::Tensor,
    [m, v]: [&mut tch::Tensor; 2],
    adam: AdamW,
    factor: &Factor,
) -> Tried<()> {
    let (step_size, root) = adam.corrections();
    let number = |v: f32| f64::from(v);
    let g = factor.times(g)?;
    let mut scratch = g.f_mul_scalar(number(1.0 - adam.beta2))?;
    let _ = m.f_lerp_(&g, number(1.0 - adam.beta1))?;
    let _ = v.f_mul_scalar_(number(adam.beta2))?;
    let _ = v.f_addcmul_(&g, &scratch)?;
    let _ = v.f_sqrt_out(&scratch)?;
    let _ = scratch.f_div_scalar_(number(root))?;
    let _ = scratch.f_add_scalar_(number(adam.eps))?;
    let _ = m.f_div_out(&g, &scratch)?;
    let mut step = g;
    let _ = step.f_mul_scalar_(number(-step_size))?;
    let _ = p.f_mul_scalar_(number(1.0 - adam.lr * adam.weight_decay))?;
    let _ = p.f_add_(&step)?;
    Ok(())
}

/// See [`opt_backend::Train::sgd`].
pub(crate) fn sgd(
    tch: &Tch,
    param: &mut Tensor,
    gradient: &Tensor,
    velocity: Option<&mut Tensor>,
    sgd: Sgd,
    clip: Option<Clip<'_, Tensor>>,
) -> Result<()> {
    const OP: &str = "sgd";
    check::same_shape(OP, gradient.shape(), param.shape())?;
    if let Some(velocity) = &velocity {
        check::same_shape(OP, velocity.shape(), param.shape())?;
    }
    let factor = Factor::new(tch, clip)?;
    let p = param.own(OP)?;
    let v = velocity.map(|velocity| velocity.own(OP)).transpose()?;
    if !tch.host_kernels() {
        let g = gradient.matrix_as(OP, Kind::Float)?;
        return sgd_composed(p, &g, v, sgd, &factor).map_err(torch(OP));
    }
    let (g, factor) = (contiguous(OP, gradient)?, factor.number());
    let chunks = changeable(OP, p)?.chunks_mut(ELEMENTS).zip(numbers(OP, &g)?.chunks(ELEMENTS));
    match v {
        Some(v) => {
            let tasks = chunks.zip(changeable(OP, v)?.chunks_mut(ELEMENTS)).collect();
            tch.host.each(tasks, |((p, g), v)| gradient::sgd(p, g, Some(v), sgd, factor))
        }
        None => tch.host.each(chunks.collect(), |(p, g)| gradient::sgd(p, g, None, sgd, factor)),
    }
}

fn sgd_composed(
    p: &mut tch::Tensor,
    g: &tch::Tensor,
    v: Option<&mut tch::Tensor>,
    sgd: Sgd,
    factor: &Factor,
) -> Tried<()> {
    let mut step = factor.times(g)?;
    let _ = step.f_add_(&p.f_mul_scalar(f64::from(sgd.weight_decay))?)?;
    let step = match v {
        Some(v) => {
            let _ = v.f_mul_scalar_(f64::from(sgd.momentum))?;
            let _ = v.f_add_(&step)?;
            v.f_mul_scalar(f64::from(-sgd.lr))?
        }
        None => step.f_mul_scalar(f64::from(-sgd.lr))?,
    };
    let _ = p.f_add_(&step)?;
    Ok(())
}
