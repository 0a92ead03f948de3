//! Causal attention over caches or within spans.
//!
//! Work is cut by sequence, head and, of long prompts, rows. A few rows take dot products with each key; many take
//! two matrix products around a softmax, over the keys that the last of them sees.

use super::{
    Kernels, Matrix, gemm,
    simd::{self, Held},
};
use crate::host;
use candle_core::Tensor;
use half::f16;
use opt_backend::{Result, Span};
use pulp::{Simd, WithSimd};

/// Rows of one task.
const ROWS: usize = 64;
/// Rows up to which dot products are faster than matrix products.
const FEW: usize = 4;

/// Where the keys (or values) of one sequence lie.
#[derive(Clone, Copy)]
pub(crate) enum Heads<'a> {
    /// Distances between heads and between positions.
    F32 { data: &'a [f32], head: usize, position: usize },
    /// `[heads, capacity, head_dim]`
    F16 { data: &'a [f16], capacity: usize },
    /// `[heads, capacity, head_dim]`, with 128 added, and a scale for each head and position.
    Int8 { data: &'a [u8], scales: &'a [f32], capacity: usize },
}

/// A sequence that attends.
pub(crate) struct Sequence<'a> {
    pub(crate) span: Span,
    pub(crate) keys: Heads<'a>,
    pub(crate) values: Heads<'a>,
    /// Positions, the new ones included.
    pub(crate) len: usize,
}

impl<'a> Heads<'a> {
    /// The first `len` positions of one head as f32, `[len, dim]`: in place, or in `wide`.
    fn matrix(self, head: usize, len: usize, dim: usize, wide: &'a mut Vec<f32>) -> Matrix<'a> {
        match self {
            Heads::F32 { data, head: apart, position } => {
                Matrix { data: &data[head * apart..], strides: [position, 1] }
            }
            Heads::F16 { data, capacity } => {
                wide.resize(len * dim, 0.0);
                let data = Held::F16(&data[head * capacity * dim..][..len * dim]);
                Matrix { data: data.widen(wide), strides: [dim, 1] }
            }
            Heads::Int8 { data, scales, capacity } => {
                wide.resize(len * dim, 0.0);
                let rows = data[head * capacity * dim..].chunks_exact(dim).zip(&scales[head * capacity..]);
                for (wide, (row, scale)) in wide.chunks_exact_mut(dim).zip(rows) {
                    wide.iter_mut().zip(row).for_each(|(w, &v)| *w = f32::from(i16::from(v) - 128) * scale);
                }
                Matrix { data: wide, strides: [dim, 1] }
            }
        }
    }
}

/// Rows of one head of one sequence.
struct Task<'a> {
    sequence: usize,
    head: usize,
    /// The first row within the span.
    first: usize,
    /// Rows within the span, and where their result goes.
    outs: Vec<(usize, &'a mut [f32])>,
}

impl Kernels {
    /// softmax(q kᵀ / √dim) v for the rows of each sequence; zeros in rows of none.
    pub(crate) fn attend(
        &self,
        q: &Tensor,
        shape: [usize; 2],
        heads: usize,
        sequences: &[Sequence<'_>],
    ) -> Result<Tensor> {
        let op = "attend";
        let [rows, width] = shape;
        let dim = width / heads;
        let mut out = host::zeros(op, host::count(op, shape)?)?;
        if !out.is_empty() {
            let (storage, layout) = q.storage_and_layout();
            let q = host::numbers::<f32>(op, &storage, layout)?;
            let work = sequences.iter().map(|s| s.span.len.saturating_mul(s.len).saturating_mul(2 * width));
            let work = work.fold(0, usize::saturating_add);
            let tasks = tasks(&mut out, rows, heads, dim, sequences);
            self.pool.each(work, tasks, |task| self.run(q, width, dim, sequences, task));
        }
        host::tensor(op, out, &shape)
    }

    fn run(&self, q: &[f32], width: usize, dim: usize, sequences: &[Sequence<'_>], task: Task<'_>) {
        let Task { sequence, head, first, outs } = task;
        let Some(last) = outs.iter().map(|(row, _)| *row).max() else { return };
        let Sequence { span, keys, values, len } = &sequences[sequence];
        // Row i sees the positions before the new ones, and of those the first i + 1.
        let before = len - span.len;
        let seen = before + last + 1;
        let (mut wide_keys, mut wide_values) = (Vec::new(), Vec::new());
        let keys = keys.matrix(head, seen, dim, &mut wide_keys);
        let values = values.matrix(head, seen, dim, &mut wide_values);
        let query = |row: usize| &q[(span.start + row) * width + head * dim..];
        let scale = (dim as f32).sqrt().recip();
        if outs.len() <= FEW {
            let mut scores = Vec::with_capacity(seen);
            for (row, out) in outs {
                let query = &query(row)[..dim];
                let scores = &mut scores;
                self.arch.dispatch(Row { query, keys, values, seen: before + row + 1, scale, scores, out });
            }
            return;
        }
        let count = last + 1 - first;
        let mut scores = vec![0.0; count * seen];
        let queries = Matrix { data: query(first), strides: [width, 1] };
        let transposed = Matrix { data: keys.data, strides: [1, keys.strides[0]] };
        gemm(&mut scores, [count, seen], queries, transposed, dim, scale);
        let mut sums = vec![0.0; count];
        self.arch.dispatch(|| {
            for (i, (scores, sum)) in scores.chunks_exact_mut(seen).zip(&mut sums).enumerate() {
                let (sees, rest) = scores.split_at_mut(before + first + i + 1);
                let max = simd::largest(sees);
                *sum = simd::exp_minus(sees, max);
                rest.fill(0.0);
            }
        });
        let mut mixed = vec![0.0; count * dim];
        let weights = Matrix { data: &scores, strides: [seen, 1] };
        gemm(&mut mixed, [count, dim], weights, values, seen, 1.0);
        for (row, out) in outs {
            let factor = sums[row - first].recip();
            let mixed = &mixed[(row - first) * dim..][..dim];
            out.iter_mut().zip(mixed).for_each(|(o, m)| *o = m * factor);
        }
    }
}

/// Cuts the work; hands each task its parts of `out` `[rows, heads * dim]`.
fn tasks<'a>(
    out: &'a mut [f32],
    rows: usize,
    heads: usize,
    dim: usize,
    sequences: &[Sequence<'_>],
) -> Vec<Task<'a>> {
    let mut tasks = Vec::new();
    // For each row the sequence it belongs to (the last, should spans overlap).
    let mut owners = vec![None; rows];
    // For each sequence its first task; those of a head lie end to end.
    let mut starts = Vec::with_capacity(sequences.len());
    for (sequence, Sequence { span, .. }) in sequences.iter().enumerate() {
        owners[span.rows()].fill(Some(sequence));
        starts.push(tasks.len());
        for head in 0..heads {
            for first in (0..span.len).step_by(ROWS) {
                tasks.push(Task { sequence, head, first, outs: Vec::new() });
            }
        }
    }
    for (row, (owner, out)) in owners.iter().zip(out.chunks_exact_mut(heads * dim)).enumerate() {
        let Some(sequence) = *owner else { continue };
        let span = sequences[sequence].span;
        let row = row - span.start;
        for (head, out) in out.chunks_exact_mut(dim).enumerate() {
            let task = starts[sequence] + head * span.len.div_ceil(ROWS) + row / ROWS;
            tasks[task].outs.push((row, out));
        }
    }
    tasks
}

/// Attention of one row of one head.
struct Row<'a> {
    query: &'a [f32],
    keys: Matrix<'a>,
    values: Matrix<'a>,
    seen: usize,
    scale: f32,
    /// For the scores.
    scores: &'a mut Vec<f32>,
    out: &'a mut [f32],
}

impl WithSimd for Row<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) {
        let Self { query, keys, values, seen, scale, scores, out } = self;
        let dim = query.len();
        scores.clear();
        for position in (0..seen).step_by(4) {
            // Past the last position the last one is repeated; what it gives is not kept.
            let key = |i: usize| &keys.data[(position + i).min(seen - 1) * keys.strides[0]..][..dim];
            let sums = simd::four_dots(s, [key(0), key(1), key(2), key(3)], query);
            scores.extend(sums.iter().take(seen - position).map(|sum| sum * scale));
        }
        let max = simd::largest(scores);
        let factor = simd::exp_minus(scores, max).recip();
        out.fill(0.0);
        let value = |position: usize| &values.data[position * values.strides[0]..][..dim];
        let (fours, rest) = scores.as_chunks::<4>();
        for (i, weights) in fours.iter().enumerate() {
            let [a, b, c, d] = [value(4 * i), value(4 * i + 1), value(4 * i + 2), value(4 * i + 3)];
            let values = a.iter().zip(b).zip(c.iter().zip(d));
            for (o, ((a, b), (c, d))) in out.iter_mut().zip(values) {
                *o += (weights[0] * a + weights[1] * b) + (weights[2] * c + weights[3] * d);
            }
        }
        for (i, weight) in rest.iter().enumerate() {
            let value = value(seen - rest.len() + i);
            out.iter_mut().zip(value).for_each(|(o, v)| *o += weight * v);
        }
        out.iter_mut().for_each(|o| *o *= factor);
    }
}
