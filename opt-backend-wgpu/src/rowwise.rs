//! Ops that work row by row: gathering, sums, LayerNorm.

use crate::{
    gpu::Gpu,
    kernels::{Format, Variant},
    packed::Order,
    pool::{Buffer, Slice},
    tensor::{Tensor, ranges},
    weights::{Held, Matrix, Norm},
};
use opt_backend::{DType, Error, Result, check};
use std::{ops::Range, sync::Arc};

/// Threads of an element-wise kernel.
const THREADS: usize = 256;

fn lost(op: &'static str) -> Error {
    Error::shape(op, "expected rows of at least one element")
}

/// Entries of a table, or rows of a tensor, that one dispatch can see.
struct Source<'a> {
    rows: Range<usize>,
    slice: Slice<'a>,
    /// Of quantized entries: their parameters and what uniforms say of them.
    packed: Option<(Slice<'a>, [u32; 5])>,
}

impl Gpu {
    /// The entries `ids` of a table as rows; `x` is added if there is one.
    pub(crate) fn gather(
        self: &Arc<Self>,
        op: &'static str,
        table: &Matrix,
        ids: &[u32],
        x: Option<&Tensor>,
    ) -> Result<Tensor> {
        let [entries, width] = table.shape;
        check::ids(op, ids, entries)?;
        if let Some(x) = x {
            check::same_shape(op, x.shape(), [ids.len(), width])?;
        }
        let sources = table.parts.iter().map(|part| {
            let packed = match (&table.held, &part.parameters) {
                (Held::Packed(layout), Some(parameters)) => {
                    let rows = part.rows.len();
                    let ends = [layout.zeros_at(rows), layout.places_at(rows)].map(|at| at as u32);
                    let (groups, words) = (layout.groups as u32, layout.group_words() as u32);
                    Some((parameters.whole(), [width as u32, groups, words, ends[0], ends[1]]))
                }
                _ => None,
            };
            Source { rows: part.rows.clone(), slice: part.buffer.whole(), packed }
        });
        let sources: Vec<Source<'_>> = sources.collect();
        let format = table.format().single();
        let variant = Variant::Gather { format, add: x.is_some(), places: table.order.is_some() };
        self.pick(op, variant, width, &sources, ids, x)
    }

    /// The rows `rows` of a tensor, in that order.
    pub(crate) fn take_rows(self: &Arc<Self>, x: &Tensor, rows: &[usize]) -> Result<Tensor> {
        let op = "take_rows";
        check::rows(op, rows, x.rows())?;
        if rows.len() == x.rows() && rows.iter().enumerate().all(|(i, &row)| i == row) {
            // All of them, in order: who writes to a tensor takes memory of its own first, so they may share.
            return Ok(x.clone());
        }
        let ids: Vec<u32> = rows.iter().map(|&row| row as u32).collect();
        let sources: Vec<Source<'_>> = ranges(&[x])
            .into_iter()
            .filter_map(|rows| x.slice(&rows).map(|slice| Source { rows, slice, packed: None }))
            .collect();
        let variant = Variant::Gather { format: Format::Plain(DType::F32), add: false, places: false };
        self.pick(op, variant, x.width(), &sources, &ids, None)
    }

    fn pick(
        self: &Arc<Self>,
        op: &'static str,
        variant: Variant,
        width: usize,
        sources: &[Source<'_>],
        ids: &[u32],
        x: Option<&Tensor>,
    ) -> Result<Tensor> {
        let out = Tensor::new(self, op, [ids.len(), width])?;
        let mut operands = vec![&out];
        operands.extend(x);
        let ranges = ranges(&operands);
        let mut recorder = self.record(op, ids.len(), ranges.len() * sources.len())?;
        let ids_at = recorder.data(ids);
        for rows in &ranges {
            for source in sources {
                let first = source.rows.start as u32;
                let count = source.rows.len() as u32;
                let at = ids_at + rows.start as u32;
                let mut uniforms = [rows.len() as u32, out.quads() as u32, at, first, count].to_vec();
                let slice = out.slice(rows).ok_or_else(|| lost(op))?;
                let mut buffers = vec![None, Some(slice), Some(source.slice)];
                if let Some(x) = x {
                    buffers.push(Some(x.slice(rows).ok_or_else(|| lost(op))?));
                }
                if let Some((parameters, numbers)) = source.packed {
                    buffers.push(Some(parameters));
                    uniforms.extend(numbers);
                }
                let groups = (rows.len() * out.quads()).div_ceil(THREADS) as u64;
                recorder.dispatch(self, op, variant, &uniforms, &buffers, groups)?;
            }
        }
        drop(recorder);
        Ok(out)
    }

    /// The columns of a tensor in the order of a quantized weight.
    pub(crate) fn arrange(self: &Arc<Self>, op: &'static str, x: &Tensor, order: &Order) -> Result<Tensor> {
        self.arranged_by(op, x, &order.buffer, order.places())
    }

    /// `width` columns of a tensor, each the one that `columns` says, or zero.
    pub(crate) fn arranged_by(
        self: &Arc<Self>,
        op: &'static str,
        x: &Tensor,
        columns: &Buffer,
        width: usize,
    ) -> Result<Tensor> {
        let out = Tensor::new(self, op, [x.rows(), width])?;
        let ranges = ranges(&[x, &out]);
        let mut recorder = self.record(op, 0, ranges.len())?;
        for rows in &ranges {
            let uniforms = [rows.len() as u32, 4 * x.quads() as u32, out.quads() as u32];
            let (Some(from), Some(to)) = (x.slice(rows), out.slice(rows)) else { return Err(lost(op)) };
            let buffers = [columns.whole(), to, from].map(Some);
            let groups = (rows.len() * out.quads()).div_ceil(THREADS) as u64;
            recorder.dispatch(self, op, Variant::Arrange, &uniforms, &buffers, groups)?;
        }
        drop(recorder);
        Ok(out)
    }

    /// `x + y`.
    pub(crate) fn add(self: &Arc<Self>, x: &Tensor, y: &Tensor) -> Result<Tensor> {
        let op = "add";
        check::same_shape(op, y.shape(), x.shape())?;
        let out = Tensor::new(self, op, x.shape())?;
        let ranges = ranges(&[&out, x, y]);
        let mut recorder = self.record(op, 0, ranges.len())?;
        for rows in &ranges {
            let quads = rows.len() * out.quads();
            let buffers = [out.slice(rows), x.slice(rows), y.slice(rows)];
            if buffers.iter().any(Option::is_none) {
                return Err(lost(op));
            }
            let groups = quads.div_ceil(THREADS) as u64;
            recorder.dispatch(self, op, Variant::Add, &[quads as u32], &buffers, groups)?;
        }
        drop(recorder);
        Ok(out)
    }

    /// LayerNorm of each row.
    pub(crate) fn layer_norm(self: &Arc<Self>, x: &Tensor, norm: &Norm) -> Result<Tensor> {
        let op = "layer_norm";
        check::width(op, x.width(), norm.width)?;
        let out = Tensor::new(self, op, x.shape())?;
        let ranges = ranges(&[x, &out]);
        let variant = Variant::LayerNorm { threads: if x.quads() > 128 { 256 } else { 64 } };
        let mut recorder = self.record(op, 0, ranges.len())?;
        for rows in &ranges {
            let uniforms = [rows.len() as u32, x.width() as u32, x.quads() as u32, norm.eps.to_bits()];
            let (Some(from), Some(to)) = (x.slice(rows), out.slice(rows)) else { return Err(lost(op)) };
            let buffers = [from, to, norm.buffer.whole()].map(Some);
            recorder.dispatch(self, op, variant, &uniforms, &buffers, rows.len() as u64)?;
        }
        drop(recorder);
        Ok(out)
    }
}
