//! Weights made of tensors.

use super::{Training, bound, groups_of};
use crate::{
    gpu::Gpu,
    kernels::Variant,
    pool::Buffer,
    recorder::Recorder,
    tensor::{Tensor, quads, ranges},
    weights::{Bias, DTYPES, Held, Linear, Matrix, MatrixPart, Norm, Parameters},
};
use opt_backend::{DType, Error, ErrorKind, Result, check};
use std::{ops::Range, sync::Arc};

/// Where quads go.
struct To<'a> {
    buffer: &'a Buffer,
    dtype: DType,
    at: usize,
    /// Quads that are written; those beyond what they are taken from are zero.
    count: usize,
}

impl Gpu {
    /// A linear of weight and bias, held as `dtype`.
    pub(super) fn linear_of(
        self: &Arc<Self>,
        weight: &Tensor,
        bias: Option<&Tensor>,
        dtype: DType,
    ) -> Result<Linear> {
        let op = "linear_of";
        if !DTYPES.contains(&dtype) {
            return Err(Error::new(ErrorKind::Unsupported, op, format_args!("no weights held as {dtype}")));
        }
        let [rows, width] = weight.shape();
        if let Some(bias) = bias {
            check::same_shape(op, bias.shape(), [1, rows])?;
        }
        let row = quads(width);
        let quad_bytes = 4 * dtype.size();
        let most = Matrix::rows_most(self, op, weight.shape(), dtype, bias.is_some())?;
        let mut parts = Vec::with_capacity(1);
        let sources = ranges(&[weight]);
        for first in (0..rows).step_by(most.max(1)) {
            let end = rows.min(first.saturating_add(most));
            let padded = (end - first).next_multiple_of(4);
            let held = padded * row + if bias.is_some() { padded / 4 } else { 0 };
            // From the pool: such weights live as long as a step.
            let buffer = self.scratch(op, (held * quad_bytes) as u64)?;
            let mut recorder = self.record(op, 0, sources.len() + 1)?;
            for source in sources.iter().filter(|_| row > 0) {
                let (start, stop) = (source.start.max(first), source.end.min(end));
                if start >= stop {
                    continue;
                }
                let count = if stop == end { padded + first - start } else { stop - start } * row;
                let to = To { buffer: &buffer, dtype, at: (start - first) * row, count };
                let taken = (start - source.start) * row..(stop - source.start) * row;
                self.hold(&mut recorder, op, weight, source, &taken, to)?;
            }
            let mut bias_at = u32::MAX;
            if let Some(bias) = bias {
                let to = To { buffer: &buffer, dtype, at: padded * row, count: padded / 4 };
                self.hold(&mut recorder, op, bias, &(0..1), &(first / 4..end.div_ceil(4)), to)?;
                bias_at = (padded * row) as u32;
            }
            drop(recorder);
            parts.push(MatrixPart { buffer, parameters: None, rows: first..end, bias_at });
        }
        let weight = Matrix { held: Held::Plain(dtype), shape: weight.shape(), parts, order: None };
        Ok(Linear { weight, bias: bias.map(|bias| Bias::Device(bias.clone(), dtype)) })
    }

    /// A LayerNorm of weight and bias.
    pub(super) fn norm_of(self: &Arc<Self>, weight: &Tensor, bias: &Tensor, eps: f32) -> Result<Norm> {
        let op = "norm_of";
        let width = weight.width();
        for vector in [weight, bias] {
            check::same_shape(op, vector.shape(), [1, width])?;
        }
        let row = quads(width);
        let buffer = self.scratch(op, 32 * row as u64)?;
        if row > 0 {
            let mut recorder = self.record(op, 0, 2)?;
            for (vector, at) in [(weight, 0), (bias, row)] {
                let to = To { buffer: &buffer, dtype: DType::F32, at, count: row };
                self.hold(&mut recorder, op, vector, &(0..1), &(0..row), to)?;
            }
        }
        Ok(Norm { width, eps, parameters: Parameters::Device, buffer })
    }

    /// Records that quads `taken` of the rows `rows` of `x`, which lie in one buffer, go to a weight.
    fn hold(
        &self,
        recorder: &mut Recorder,
        op: &'static str,
        x: &Tensor,
        rows: &Range<usize>,
        taken: &Range<usize>,
        to: To<'_>,
    ) -> Result<()> {
        let uniforms = [to.count, taken.len(), taken.start, to.at].map(|number| number as u32);
        let buffers = [to.buffer.whole(), bound(op, x.slice(rows))?].map(Some);
        let variant = Variant::Train(Training::Hold(to.dtype));
        recorder.dispatch(self, op, variant, &uniforms, &buffers, groups_of(to.count))
    }
}
