//! LayerNorm.

use super::Kernels;
use crate::{host, weights::Norm};
use candle_core::Tensor;
use opt_backend::Result;

impl Kernels {
    /// LayerNorm of each row of `x` `[rows, width]`.
    pub(crate) fn layer_norm(&self, x: &Tensor, [rows, width]: [usize; 2], norm: &Norm) -> Result<Tensor> {
        let op = "layer_norm";
        let (storage, layout) = x.storage_and_layout();
        let x = host::numbers::<f32>(op, &storage, layout)?;
        let (storage, layout) = norm.scale.storage_and_layout();
        let scale = host::numbers::<f32>(op, &storage, layout)?;
        let (storage, layout) = norm.shift.storage_and_layout();
        let shift = host::numbers::<f32>(op, &storage, layout)?;
        let mut out = host::zeros(op, x.len())?;
        // Some ten passes' worth of work an element.
        let work = 10 * x.len();
        let share = self.pool.share(rows, work) * width;
        let pieces = x.chunks(share.max(1)).zip(out.chunks_mut(share.max(1))).collect();
        self.pool.each(work, pieces, |(x, out): (&[f32], &mut [f32])| {
            self.arch.dispatch(|| {
                for (x, out) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
                    row(x, scale, shift, norm.eps, out);
                }
            });
        });
        host::tensor(op, out, &[rows, width])
    }
}

/// One row. The mean is summed in f64: rows far from zero lose too much to it otherwise.
#[inline(always)]
fn row(x: &[f32], scale: &[f32], shift: &[f32], eps: f32, out: &mut [f32]) {
    let width = x.len() as f64;
    let mean = (sum(x, |v| f64::from(*v)) / width) as f32;
    out.iter_mut().zip(x).for_each(|(o, x)| *o = x - mean);
    let variance = sum(out, |v| f64::from(*v) * f64::from(*v)) / width;
    let factor = ((variance + f64::from(eps)).sqrt().recip()) as f32;
    for ((o, scale), shift) in out.iter_mut().zip(scale).zip(shift) {
        *o = *o * factor * scale + shift;
    }
}

/// Σ f(x) in eight parts, which the compiler keeps in vectors.
#[inline(always)]
fn sum(x: &[f32], f: impl Fn(&f32) -> f64) -> f64 {
    let mut sums = [0.0; 8];
    let (chunks, rest) = x.as_chunks::<8>();
    for chunk in chunks {
        sums.iter_mut().zip(chunk).for_each(|(sum, v)| *sum += f(v));
    }
    sums.iter().sum::<f64>() + rest.iter().map(f).sum::<f64>()
}
