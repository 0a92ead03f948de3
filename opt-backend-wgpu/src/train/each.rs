//! Ops that do the same to each element.

use super::{Each, Training, bound, groups_of};
use crate::{
    gpu::Gpu,
    kernels::Variant,
    tensor::{Tensor, ranges},
};
use opt_backend::Result;
use std::sync::Arc;

/// What `each.wgsl` is told.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Numbers {
    /// Of an activation.
    pub(super) kind: u32,
    pub(super) factor: f32,
    /// Of dropout.
    pub(super) threshold: u32,
    pub(super) seed: [u32; 2],
}

impl Gpu {
    /// `x` with `each` done to it; `y` is of its shape or one row.
    pub(super) fn each(
        self: &Arc<Self>,
        op: &'static str,
        each: Each,
        mut x: Tensor,
        y: Option<&Tensor>,
        numbers: Numbers,
    ) -> Result<Tensor> {
        if x.is_empty() {
            return Ok(x);
        }
        x.own(self, op)?;
        let one_row = matches!(each, Each::AddRow | Each::MulRow);
        let mut operands = vec![&x];
        operands.extend(y.filter(|_| !one_row));
        let ranges = ranges(&operands);
        let mut recorder = self.record(op, 0, ranges.len())?;
        for rows in &ranges {
            let count = rows.len() * x.quads();
            let uniforms = [
                count as u32,
                x.quads() as u32,
                x.width() as u32,
                numbers.kind,
                numbers.factor.to_bits(),
                numbers.threshold,
                numbers.seed[0],
                numbers.seed[1],
                rows.start as u32,
            ];
            let mut buffers = vec![Some(bound(op, x.slice(rows))?)];
            if let Some(y) = y {
                let rows = if one_row { &(0..1) } else { rows };
                buffers.push(Some(bound(op, y.slice(rows))?));
            }
            let variant = Variant::Train(Training::Each(each));
            recorder.dispatch(self, op, variant, &uniforms, &buffers, groups_of(count))?;
        }
        drop(recorder);
        Ok(x)
    }

    /// Zeros.
    pub(super) fn zeros(self: &Arc<Self>, op: &'static str, shape: [usize; 2]) -> Result<Tensor> {
        self.each(op, Each::Zero, Tensor::new(self, op, shape)?, None, Numbers::default())
    }
}
