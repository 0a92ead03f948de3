//! The gradient of causal attention within spans.
//!
//! Work is cut by span and head. The weights of some rows at a time are computed again; what they give is added to the
//! gradients of the keys and values that they see.

use super::{Kernels, Matrix, gemm, gemm_add, simd};
use crate::host;
use candle_core::Tensor;
use opt_backend::{Attend, Result, Span};

/// Rows whose weights are held at a time.
const ROWS: usize = 64;

/// The gradients of one head of one span, `[rows, head_dim]` each.
struct Task {
    span: Span,
    head: usize,
    gradients: [Vec<f32>; 3],
}

impl Kernels {
    /// The gradients of queries, keys and values, zeros in rows of no span.
    pub(crate) fn attend_grad(
        &self,
        all: [&Tensor; 4],
        [rows, width]: [usize; 2],
        attend: Attend<'_>,
    ) -> Result<[Tensor; 3]> {
        let op = "attend_grad";
        let locks = all.map(Tensor::storage_and_layout);
        let [q, k, v, dy] =
            locks.each_ref().map(|(storage, layout)| host::numbers::<f32>(op, storage, layout));
        let all = [q?, k?, v?, dy?];
        let dim = width / attend.heads;
        let mut tasks = Vec::new();
        for &span in attend.spans.iter().filter(|span| span.len > 0 && dim > 0) {
            for head in 0..attend.heads {
                let zeros = || host::zeros(op, span.len * dim);
                tasks.push(Task { span, head, gradients: [zeros()?, zeros()?, zeros()?] });
            }
        }
        let work =
            tasks.iter().map(|task| task.span.len.saturating_mul(task.span.len).saturating_mul(5 * dim));
        let work = work.fold(0, usize::saturating_add);
        self.pool
            .each(work, tasks.iter_mut().collect(), |task: &mut Task| self.head_grad(all, width, dim, task));
        let mut outs = [(); 3].map(|()| host::zeros(op, rows * width));
        for Task { span, head, gradients } in &tasks {
            for (out, gradient) in outs.iter_mut().zip(gradients) {
                let Ok(out) = out else { continue };
                let rows = out[span.start * width..(span.start + span.len) * width].chunks_exact_mut(width);
                for (row, gradient) in rows.zip(gradient.chunks_exact(dim)) {
                    row[head * dim..(head + 1) * dim].copy_from_slice(gradient);
                }
            }
        }
        let [dq, dk, dv] = outs.map(|out| host::tensor(op, out?, &[rows, width]));
        Ok([dq?, dk?, dv?])
    }

    fn head_grad(&self, all: [&[f32]; 4], width: usize, dim: usize, task: &mut Task) {
        let Task { span, head, gradients: [dq, dk, dv] } = task;
        let scale = (dim as f32).sqrt().recip();
        for first in (0..span.len).step_by(ROWS) {
            let count = ROWS.min(span.len - first);
            // The positions that the last of these rows sees.
            let seen = first + count;
            let start = |row: usize| (span.start + row) * width + *head * dim;
            let from = |x: &'_ [f32], row: usize| start(row).min(x.len());
            let [q, k, v, dy] = all;
            let [q, dy] = [q, dy].map(|x| Matrix { data: &x[from(x, first)..], strides: [width, 1] });
            let [k, v] = [k, v].map(|x| Matrix { data: &x[from(x, 0)..], strides: [width, 1] });
            let turned = |m: Matrix<'_>| [m.strides[1], m.strides[0]];
            let mut weights = vec![0.0; count * seen];
            let mut scores = vec![0.0; count * seen];
            gemm(&mut weights, [count, seen], q, Matrix { data: k.data, strides: turned(k) }, dim, scale);
            gemm(&mut scores, [count, seen], dy, Matrix { data: v.data, strides: turned(v) }, dim, 1.0);
            self.arch.dispatch(|| {
                let rows = weights.chunks_exact_mut(seen).zip(scores.chunks_exact_mut(seen));
                for (i, (weights, scores)) in rows.enumerate() {
                    softmax_grad(weights, scores, first + i + 1, scale);
                }
            });
            let of = |data| Matrix { data, strides: [seen, 1] };
            let across = |data| Matrix { data, strides: [1, seen] };
            gemm(&mut dq[first * dim..seen * dim], [count, dim], of(&scores), k, seen, 1.0);
            gemm_add(&mut dk[..seen * dim], [seen, dim], across(&scores), q, count);
            gemm_add(&mut dv[..seen * dim], [seen, dim], across(&weights), dy, count);
        }
    }
}

/// Of scores before softmax and the gradient of what it gives, the first `sees` of which count: the weights, and the
/// gradient of the scores before they were scaled.
#[inline(always)]
fn softmax_grad(weights: &mut [f32], gradient: &mut [f32], sees: usize, scale: f32) {
    let (weights, hidden) = weights.split_at_mut(sees);
    let (gradient, hidden_gradient) = gradient.split_at_mut(sees);
    hidden.fill(0.0);
    hidden_gradient.fill(0.0);
    let max = simd::largest(weights);
    let factor = simd::exp_minus(weights, max).recip();
    let mut mean = [0.0; 8];
    for (weights, gradient) in weights.chunks_mut(8).zip(gradient.chunks(8)) {
        for ((w, d), mean) in weights.iter_mut().zip(gradient).zip(&mut mean) {
            *w *= factor;
            *mean += *w * d;
        }
    }
    let mean: f32 = mean.iter().sum();
    gradient.iter_mut().zip(weights).for_each(|(d, w)| *d = *w * (*d - mean) * scale);
}
