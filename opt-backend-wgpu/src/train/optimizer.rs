//! Steps of optimizers, in place.

use super::{Training, bound, groups_of};
use crate::{
    gpu::Gpu,
    kernels::Variant,
    pool::Slice,
    tensor::{Tensor, ranges},
};
use opt_backend::{AdamW, Clip, Result, Sgd, check};
use std::sync::Arc;

/// What clips, as kernels bind it, and the norm that is allowed.
pub(super) fn clipping<'a>(
    op: &'static str,
    clip: Option<&Clip<'a, Tensor>>,
) -> Result<(Option<Slice<'a>>, f32)> {
    let Some(clip) = clip else { return Ok((None, 0.0)) };
    Ok((Some(bound(op, clip.sum_squares.slice(&(0..1)))?), clip.max_norm))
}

pub(super) fn check_clip(clip: Option<&Clip<'_, Tensor>>) -> Result<()> {
    clip.map_or(Ok(()), |clip| check::same_shape("clip", clip.sum_squares.shape(), [1, 1]))
}

impl Gpu {
    /// One step of AdamW.
    pub(super) fn adamw(
        self: &Arc<Self>,
        param: &mut Tensor,
        gradient: &Tensor,
        moments: &mut [Tensor; 2],
        adam: AdamW,
        clip: Option<Clip<'_, Tensor>>,
    ) -> Result<()> {
        let op = "adamw";
        for other in [gradient, &moments[0], &moments[1]] {
            check::same_shape(op, other.shape(), param.shape())?;
        }
        check_clip(clip.as_ref())?;
        if param.is_empty() {
            return Ok(());
        }
        param.own(self, op)?;
        for moment in moments.iter_mut() {
            moment.own(self, op)?;
        }
        let (squares, max_norm) = clipping(op, clip.as_ref())?;
        let (step_size, root) = adam.corrections();
        let [first, second] = &*moments;
        let variant = Variant::Train(Training::AdamW { clip: squares.is_some() });
        let ranges = ranges(&[param, first, second, gradient]);
        let mut recorder = self.record(op, 0, ranges.len())?;
        for rows in &ranges {
            let count = rows.len() * param.quads();
            let floats = [
                1.0 - adam.lr * adam.weight_decay,
                adam.beta1,
                adam.beta2,
                step_size,
                root,
                adam.eps,
                max_norm,
            ];
            let mut uniforms = vec![count as u32, param.quads() as u32, param.width() as u32];
            uniforms.extend(floats.map(f32::to_bits));
            let mut buffers = Vec::with_capacity(5);
            for tensor in [&*param, first, second, gradient] {
                buffers.push(Some(bound(op, tensor.slice(rows))?));
            }
            buffers.extend(squares.map(Some));
            recorder.dispatch(self, op, variant, &uniforms, &buffers, groups_of(count))?;
        }
        Ok(())
    }

    /// One step of gradient descent.
    pub(super) fn sgd(
        self: &Arc<Self>,
        param: &mut Tensor,
        gradient: &Tensor,
        mut velocity: Option<&mut Tensor>,
        sgd: Sgd,
        clip: Option<Clip<'_, Tensor>>,
    ) -> Result<()> {
        let op = "sgd";
        check::same_shape(op, gradient.shape(), param.shape())?;
        if let Some(velocity) = &velocity {
            check::same_shape(op, velocity.shape(), param.shape())?;
        }
        check_clip(clip.as_ref())?;
        if param.is_empty() {
            return Ok(());
        }
        param.own(self, op)?;
        if let Some(velocity) = &mut velocity {
            velocity.own(self, op)?;
        }
        let velocity = velocity.as_deref();
        let (squares, max_norm) = clipping(op, clip.as_ref())?;
        let kernel = Training::Sgd { velocity: velocity.is_some(), clip: squares.is_some() };
        let mut operands = vec![&*param, gradient];
        operands.extend(velocity);
        let ranges = ranges(&operands);
        let mut recorder = self.record(op, 0, ranges.len())?;
        for rows in &ranges {
            let count = rows.len() * param.quads();
            let mut uniforms = vec![count as u32];
            uniforms.extend([sgd.lr, sgd.momentum, sgd.weight_decay, max_norm].map(f32::to_bits));
            let mut buffers = Vec::with_capacity(4);
            for tensor in &operands {
                buffers.push(Some(bound(op, tensor.slice(rows))?));
            }
            buffers.extend(squares.map(Some));
            recorder.dispatch(self, op, Variant::Train(kernel), &uniforms, &buffers, groups_of(count))?;
        }
        Ok(())
    }
}
