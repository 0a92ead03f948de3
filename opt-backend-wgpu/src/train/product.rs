//! Products of tensors, and of tensors and weights.

use super::{Training, bound};
use crate::{
    gpu::Gpu,
    kernels::{TILE, Variant},
    pool::Slice,
    tensor::{Tensor, quads, ranges},
    weights::{Held, Matrix},
};
use opt_backend::{Layout, Result, check};
use std::{ops::Range, sync::Arc};

/// Threads of `multiply_apart.wgsl`, and rows of each.
const APART_THREADS: usize = 64;
const APART_ROWS: usize = 8;

/// What one dispatch computes.
struct Piece<'a> {
    a: Slice<'a>,
    b: Slice<'a>,
    /// Rows of the result, in one of its buffers, and columns.
    rows: Range<usize>,
    columns: Range<usize>,
    depth: usize,
    /// Column of `a` at which it begins.
    a_at: usize,
    /// Whether it adds to what is there.
    adds: bool,
    /// Of a packed weight: its parameters, and what the shader is told of them.
    packed: Option<(Slice<'a>, [u32; 3])>,
}

impl Gpu {
    /// The product of two tensors, plus `into`.
    pub(super) fn multiply(
        self: &Arc<Self>,
        [a, b]: [&Tensor; 2],
        layout: Layout,
        into: Option<Tensor>,
    ) -> Result<Tensor> {
        let op = "matmul";
        let shape = layout.shape(a.shape(), b.shape())?;
        if let Some(into) = &into {
            check::same_shape(op, into.shape(), shape)?;
        }
        if a.is_empty() || b.is_empty() {
            return into.map_or_else(|| self.zeros(op, shape), Ok);
        }
        let (out, adds) = self.target(op, shape, into)?;
        let mut pieces = Vec::with_capacity(1);
        // The parts of each operand begin at multiples of 16 rows, so that what they are columns of is whole quads.
        match layout {
            Layout::TimesTransposed => {
                for rows in ranges(&[a, &out]) {
                    for columns in ranges(&[b]) {
                        pieces.push(Piece {
                            a: bound(op, a.slice(&rows))?,
                            b: bound(op, b.slice(&columns))?,
                            rows: rows.clone(),
                            columns,
                            depth: a.width(),
                            a_at: 0,
                            adds,
                            packed: None,
                        });
                    }
                }
            }
            Layout::Times => {
                for rows in ranges(&[a, &out]) {
                    for deep in ranges(&[b]) {
                        pieces.push(Piece {
                            a: bound(op, a.slice(&rows))?,
                            b: bound(op, b.slice(&deep))?,
                            rows: rows.clone(),
                            columns: 0..shape[1],
                            depth: deep.len(),
                            a_at: deep.start,
                            adds: adds || deep.start > 0,
                            packed: None,
                        });
                    }
                }
            }
            Layout::TransposedTimes => {
                for rows in ranges(&[&out]) {
                    for deep in ranges(&[a, b]) {
                        pieces.push(Piece {
                            a: bound(op, a.slice(&deep))?,
                            b: bound(op, b.slice(&deep))?,
                            rows: rows.clone(),
                            columns: 0..shape[1],
                            depth: deep.len(),
                            a_at: rows.start,
                            adds: adds || deep.start > 0,
                            packed: None,
                        });
                    }
                }
            }
        }
        let strides = [a.quads(), b.quads()];
        let kernel = Training::Multiply { layout, tiled: !self.software };
        self.record_pieces(op, kernel, strides, &out, &pieces)?;
        Ok(out)
    }

    /// `dy W`, plus `into`.
    pub(super) fn times_weight(
        self: &Arc<Self>,
        op: &'static str,
        dy: &Tensor,
        matrix: &Matrix,
        into: Option<Tensor>,
    ) -> Result<Tensor> {
        let [outputs, inputs] = matrix.shape;
        check::width(op, dy.width(), outputs)?;
        if let Some(into) = &into {
            check::same_shape(op, into.shape(), [dy.rows(), inputs])?;
        }
        let Some(order) = &matrix.order else {
            return self.times_weight_in_order(op, dy, matrix, inputs, into);
        };
        let places = self.times_weight_in_order(op, dy, matrix, order.places(), None)?;
        let dx = self.arranged_by(op, &places, &order.back, inputs)?;
        match into {
            Some(into) => self.add(&into, &dx),
            None => Ok(dx),
        }
    }

    /// The product in the order of the matrix's columns, `width` of them.
    fn times_weight_in_order(
        self: &Arc<Self>,
        op: &'static str,
        dy: &Tensor,
        matrix: &Matrix,
        width: usize,
        into: Option<Tensor>,
    ) -> Result<Tensor> {
        let shape = [dy.rows(), width];
        if dy.is_empty() || width == 0 {
            return into.map_or_else(|| self.zeros(op, shape), Ok);
        }
        let (out, adds) = self.target(op, shape, into)?;
        let format = matrix.format().single();
        let mut pieces = Vec::with_capacity(1);
        for rows in ranges(&[dy, &out]) {
            for part in &matrix.parts {
                let packed = match (&matrix.held, &part.parameters) {
                    (Held::Packed(layout), Some(parameters)) => {
                        let zeros_at = layout.zeros_at(part.rows.len());
                        let numbers = [layout.groups, layout.group_words(), zeros_at].map(|n| n as u32);
                        Some((parameters.whole(), numbers))
                    }
                    _ => None,
                };
                pieces.push(Piece {
                    a: bound(op, dy.slice(&rows))?,
                    b: part.buffer.whole(),
                    rows: rows.clone(),
                    columns: 0..width,
                    depth: part.rows.len(),
                    a_at: part.rows.start,
                    adds: adds || part.rows.start > 0,
                    packed,
                });
            }
        }
        let strides = [dy.quads(), quads(matrix.shape[1])];
        let kernel = Training::Grad { format, tiled: !self.software };
        self.record_pieces(op, kernel, strides, &out, &pieces)?;
        Ok(out)
    }

    /// Where a product is written, and whether what is there is added to.
    fn target(
        self: &Arc<Self>,
        op: &'static str,
        shape: [usize; 2],
        into: Option<Tensor>,
    ) -> Result<(Tensor, bool)> {
        match into {
            Some(mut into) => {
                into.own(self, op)?;
                Ok((into, true))
            }
            None => Ok((Tensor::new(self, op, shape)?, false)),
        }
    }

    fn record_pieces(
        &self,
        op: &'static str,
        kernel: Training,
        [a_stride, b_stride]: [usize; 2],
        out: &Tensor,
        pieces: &[Piece<'_>],
    ) -> Result<()> {
        let mut recorder = self.record(op, 0, pieces.len())?;
        for piece in pieces {
            let column_groups = piece.columns.len().div_ceil(TILE);
            let mut uniforms = [
                piece.rows.len(),
                piece.columns.len(),
                piece.depth,
                a_stride,
                piece.a_at / 4,
                b_stride,
                out.quads(),
                piece.columns.start / 4,
                column_groups,
                usize::from(piece.adds),
            ]
            .map(|number| number as u32)
            .to_vec();
            let mut buffers = [bound(op, out.slice(&piece.rows))?, piece.a, piece.b].map(Some).to_vec();
            if let Some((parameters, numbers)) = piece.packed {
                buffers.push(Some(parameters));
                uniforms.extend(numbers);
            }
            let groups = if self.software {
                (piece.rows.len().div_ceil(APART_ROWS) * quads(piece.columns.len())).div_ceil(APART_THREADS)
            } else {
                piece.rows.len().div_ceil(TILE) * column_groups
            };
            recorder.dispatch(self, op, Variant::Train(kernel), &uniforms, &buffers, groups as u64)?;
        }
        Ok(())
    }
}
