//! Gradients of LayerNorm, sums of columns, and rows added to rows.

use super::{Training, bound, groups_of};
use crate::{
    gpu::Gpu,
    kernels::Variant,
    tensor::{Tensor, ranges},
    weights::Norm,
};
use opt_backend::{Result, check};
use std::sync::Arc;

/// Quads that a workgroup of `columns.wgsl` sums.
const COLUMN_QUADS: usize = 16;
/// Bytes of the statistics of a row.
const STATS: u64 = 8;

impl Gpu {
    /// The gradient of LayerNorm with respect to its input.
    pub(super) fn layer_norm_grad(self: &Arc<Self>, x: &Tensor, norm: &Norm, dy: &Tensor) -> Result<Tensor> {
        let op = "layer_norm_grad";
        check::same_shape(op, dy.shape(), x.shape())?;
        check::width(op, x.width(), norm.width)?;
        let out = Tensor::new(self, op, x.shape())?;
        if out.is_empty() {
            return Ok(out);
        }
        let ranges = ranges(&[x, dy, &out]);
        let mut recorder = self.record(op, 0, ranges.len())?;
        for rows in &ranges {
            let uniforms = [rows.len() as u32, x.width() as u32, x.quads() as u32, norm.eps.to_bits(), 0];
            let [out, x_rows, dy] = [&out, x, dy].map(|tensor| tensor.slice(rows));
            let (out, x_rows, dy) = (bound(op, out)?, bound(op, x_rows)?, bound(op, dy)?);
            let buffers = [out, x_rows, norm.buffer.whole(), dy].map(Some);
            let variant = layer_norm_variant(x, false);
            recorder.dispatch(self, op, variant, &uniforms, &buffers, rows.len() as u64)?;
        }
        drop(recorder);
        Ok(out)
    }

    /// The gradients of LayerNorm with respect to weight and bias.
    pub(super) fn layer_norm_grad_params(
        self: &Arc<Self>,
        x: &Tensor,
        norm: &Norm,
        dy: &Tensor,
    ) -> Result<[Tensor; 2]> {
        let op = "layer_norm_grad_params";
        check::same_shape(op, dy.shape(), x.shape())?;
        check::width(op, x.width(), norm.width)?;
        let row = [1, x.width()];
        if x.is_empty() {
            return Ok([self.zeros(op, row)?, self.zeros(op, row)?]);
        }
        let [weight, bias] = [Tensor::new(self, op, row)?, Tensor::new(self, op, row)?];
        let stats = self.scratch(op, STATS * x.rows() as u64)?;
        let ranges = ranges(&[x, dy]);
        let mut recorder = self.record(op, 0, 2 * ranges.len())?;
        for rows in &ranges {
            let (count, width, quads) = (rows.len() as u32, x.width() as u32, x.quads() as u32);
            let first = rows.start as u32;
            let (x_rows, dy) = (bound(op, x.slice(rows))?, bound(op, dy.slice(rows))?);
            let uniforms = [count, width, quads, norm.eps.to_bits(), first];
            let buffers = [stats.whole(), x_rows].map(Some);
            let variant = layer_norm_variant(x, true);
            recorder.dispatch(self, op, variant, &uniforms, &buffers, rows.len() as u64)?;
            let uniforms = [count, width, quads, u32::from(first > 0), first];
            let [bias, weight] = [&bias, &weight].map(|row| row.slice(&(0..1)));
            let buffers = [bound(op, bias)?, bound(op, weight)?, dy, x_rows, stats.whole()].map(Some);
            let variant = Variant::Train(Training::Columns { norm: true });
            let groups = x.quads().div_ceil(COLUMN_QUADS) as u64;
            recorder.dispatch(self, op, variant, &uniforms, &buffers, groups)?;
        }
        drop(recorder);
        Ok([weight, bias])
    }

    /// The sum of each column.
    pub(super) fn sum_rows(self: &Arc<Self>, x: &Tensor) -> Result<Tensor> {
        let op = "sum_rows";
        let row = [1, x.width()];
        if x.is_empty() {
            return self.zeros(op, row);
        }
        let out = Tensor::new(self, op, row)?;
        let ranges = ranges(&[x]);
        let mut recorder = self.record(op, 0, ranges.len())?;
        for rows in &ranges {
            let adds = u32::from(rows.start > 0);
            let uniforms = [rows.len() as u32, x.width() as u32, x.quads() as u32, adds, 0];
            let buffers = [bound(op, out.slice(&(0..1)))?, bound(op, x.slice(rows))?].map(Some);
            let variant = Variant::Train(Training::Columns { norm: false });
            let groups = x.quads().div_ceil(COLUMN_QUADS) as u64;
            recorder.dispatch(self, op, variant, &uniforms, &buffers, groups)?;
        }
        drop(recorder);
        Ok(out)
    }

    /// `into` plus each row of `dy` at the row that `rows` says.
    pub(super) fn scatter_add(
        self: &Arc<Self>,
        mut into: Tensor,
        rows: &[usize],
        dy: &Tensor,
    ) -> Result<Tensor> {
        let op = "scatter_add";
        check::rows(op, rows, into.rows())?;
        check::same_shape(op, dy.shape(), [rows.len(), into.width()])?;
        if dy.is_empty() {
            return Ok(into);
        }
        into.own(self, op)?;
        // Rows of dy by where they go; those of one place in their order.
        let mut sorted: Vec<(usize, usize)> = rows.iter().copied().zip(0..).collect();
        sorted.sort_unstable();
        let pairs: Vec<_> = ranges(&[&into])
            .into_iter()
            .flat_map(|to| ranges(&[dy]).into_iter().map(move |from| (to.clone(), from)))
            .collect();
        // Each row of dy is in one pair, with at most three words of a list.
        let mut recorder = self.record(op, 4 * rows.len(), pairs.len())?;
        for (to, from) in pairs {
            let begin = sorted.partition_point(|(row, _)| *row < to.start);
            let end = sorted.partition_point(|(row, _)| *row < to.end);
            let (mut lists, mut sources): (Vec<u32>, Vec<u32>) = Default::default();
            let mut last = None;
            for &(row, source) in &sorted[begin..end] {
                if !from.contains(&source) {
                    continue;
                }
                let at = sources.len() as u32;
                if last.replace(row) != Some(row) {
                    lists.extend([(row - to.start) as u32, at, at]);
                }
                sources.push((source - from.start) as u32);
                if let Some(end) = lists.last_mut() {
                    *end = at + 1;
                }
            }
            let targets = lists.len() / 3;
            let lists_at = recorder.data(&lists);
            let rows_at = recorder.data(&sources);
            let uniforms = [targets as u32, into.quads() as u32, lists_at, rows_at];
            let buffers = [None, Some(bound(op, into.slice(&to))?), Some(bound(op, dy.slice(&from))?)];
            let variant = Variant::Train(Training::Scatter);
            recorder.dispatch(self, op, variant, &uniforms, &buffers, groups_of(targets * into.quads()))?;
        }
        drop(recorder);
        Ok(into)
    }

    /// The rows of all parts.
    pub(super) fn concat(self: &Arc<Self>, parts: &[&Tensor]) -> Result<Tensor> {
        let op = "concat";
        let width = parts.first().map_or(0, |part| part.width());
        for part in parts {
            check::width(op, part.width(), width)?;
        }
        let out = Tensor::new(self, op, [parts.iter().map(|part| part.rows()).sum(), width])?;
        let mut recorder = self.record(op, 0, 0)?;
        let mut at = 0;
        for part in parts {
            out.copy_rows(self, &mut recorder, part, &(0..part.rows()), at);
            at += part.rows();
        }
        drop(recorder);
        Ok(out)
    }
}

fn layer_norm_variant(x: &Tensor, stats: bool) -> Variant {
    let threads = if x.quads() > 128 { 256 } else { 64 };
    Variant::Train(Training::LayerNorm { stats, threads })
}
