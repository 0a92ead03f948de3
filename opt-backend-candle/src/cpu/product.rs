//! Linears and the LM head.
//!
//! A product of few rows streams each weight once through the dot products of [`super::simd`]; of many, f32 weights
//! go through candle's `matmul`, 16-bit weights are widened a tile at a time and multiplied by `gemm`, the crate
//! candle multiplies with. (candle's own `matmul` wants both sides in one format, has no bf16 kernel on the CPU -
//! it widens the whole weight at each call - and would round activations to 16 bits.)

use super::{
    Kernels,
    simd::{self, Dots, Held},
};
use crate::{
    error::convert,
    host::{change, count, numbers, tensor, zeros},
    weights::Weight,
};
use candle_core::{DType, Layout, Storage, Tensor};
use opt_backend::{Activation, Error, ErrorKind, Result};

/// Rows up to which a product is computed as dot products. Beyond, packing weights for a matrix product pays.
const FEW: usize = 8;
/// Outputs of 16-bit weights that are widened and multiplied at a time, at least and at most: so few that the widened
/// tile stays in a cache, so many that arranging the input for each tile costs little.
const TILE: [usize; 2] = [64, 384];

/// What is done with a product before it is handed out.
#[derive(Clone, Copy)]
pub(crate) enum After<'a> {
    Nothing,
    Activate(Activation),
    /// Adds `[rows, outputs]`.
    Add(&'a Tensor),
}

/// One of several products of the same input.
pub(crate) struct Product<'a> {
    pub(crate) weight: &'a Weight,
    pub(crate) bias: Option<&'a Tensor>,
    pub(crate) after: After<'a>,
}

/// A piece of a product: outputs `first..first + outputs` of all rows.
struct Piece<'a> {
    weight: Held<'a>,
    first: usize,
    outputs: usize,
    bias: Option<&'a [f32]>,
    after: Finish<'a>,
    /// `[rows, outputs]`
    out: &'a mut [f32],
}

/// [`After`] with the residual's numbers and its width.
#[derive(Clone, Copy)]
enum Finish<'a> {
    Nothing,
    Activate(Activation),
    Add(&'a [f32], usize),
}

/// A weight's numbers.
pub(super) fn held<'a>(
    op: &'static str,
    storage: &'a Storage,
    layout: &Layout,
    dtype: DType,
) -> Result<Held<'a>> {
    match dtype {
        DType::F32 => numbers(op, storage, layout).map(Held::F32),
        DType::F16 => numbers(op, storage, layout).map(Held::F16),
        DType::BF16 => numbers(op, storage, layout).map(Held::BF16),
        other => {
            Err(Error::new(ErrorKind::Unsupported, op, format_args!("no products with {other:?} weights")))
        }
    }
}

impl Kernels {
    /// `x Wᵀ + b` for each product, and what comes after. Depths and the residual's shape have been checked.
    pub(crate) fn products(
        &self,
        op: &'static str,
        x: &Tensor,
        [rows, depth]: [usize; 2],
        products: &[Product<'_>],
    ) -> Result<Vec<Tensor>> {
        // Products of no depth, too, are made of dots: of sums of nothing.
        if rows > FEW && depth > 0 && products.iter().all(|p| p.weight.data.dtype() == DType::F32) {
            return products.iter().map(|product| self.whole(op, x, rows, product)).collect();
        }
        self.in_pieces(op, x, [rows, depth], products)
    }

    /// One product of many rows through candle, then one pass over it.
    fn whole(&self, op: &'static str, x: &Tensor, rows: usize, product: &Product<'_>) -> Result<Tensor> {
        let weight = &product.weight.data;
        let y = self.pool.install(|| x.matmul(&weight.t()?)).map_err(|error| convert(op, error))?;
        let outputs = product.weight.shape[0];
        with_finish(op, product, outputs, |bias, after| {
            if bias.is_none() && matches!(after, Finish::Nothing) {
                return Ok(());
            }
            change::<f32>(op, &y, |y| {
                let share = self.pool.share(rows, y.len());
                let pieces = y.chunks_mut((share * outputs).max(1)).enumerate().collect();
                self.pool.each(rows * outputs, pieces, |(i, y): (usize, &mut [f32])| {
                    self.finish(y, i * share, 0, outputs, bias, after);
                });
            })
        })?;
        Ok(y)
    }

    /// Cuts products by outputs into pieces for all threads. The pieces' results are put together afterwards, which
    /// for one row is no work: they lie end to end.
    fn in_pieces(
        &self,
        op: &'static str,
        x: &Tensor,
        [rows, depth]: [usize; 2],
        products: &[Product<'_>],
    ) -> Result<Vec<Tensor>> {
        let (storage, layout) = x.storage_and_layout();
        let x = numbers::<f32>(op, &storage, layout)?;
        let total: usize = products.iter().map(|p| p.weight.shape[0]).sum();
        let work = count(op, [total, depth])?.saturating_mul(rows);
        let share = match rows {
            // An even number, since outputs are computed in pairs.
            ..=FEW => self.pool.share(total, work).next_multiple_of(2),
            _ => total.div_ceil(2 * self.pool.threads()).next_multiple_of(16).clamp(TILE[0], TILE[1]),
        };
        let mut outs = Vec::with_capacity(products.len());
        for product in products {
            outs.push(zeros(op, count(op, [rows, product.weight.shape[0]])?)?);
        }
        let locks: Vec<_> = products
            .iter()
            .map(|p| {
                let residual = if let After::Add(residual) = p.after { Some(residual) } else { None };
                let lock = Tensor::storage_and_layout;
                (lock(&p.weight.data), p.bias.map(lock), residual.map(lock))
            })
            .collect();
        let mut pieces = Vec::new();
        for ((product, out), (weight, bias, residual)) in products.iter().zip(&mut outs).zip(&locks) {
            let outputs = product.weight.shape[0];
            let weight = held(op, &weight.0, weight.1, product.weight.data.dtype())?;
            let bias = bias.as_ref().map(|(storage, layout)| numbers(op, storage, layout)).transpose()?;
            let residual =
                residual.as_ref().map(|(storage, layout)| numbers(op, storage, layout)).transpose()?;
            let after = match (product.after, residual) {
                (After::Activate(activation), _) => Finish::Activate(activation),
                (_, Some(residual)) => Finish::Add(residual, outputs),
                _ => Finish::Nothing,
            };
            for (i, out) in out.chunks_mut((share * rows).max(1)).enumerate() {
                let first = i * share;
                let count = share.min(outputs - first);
                let weight = weight.part(first * depth..(first + count) * depth);
                pieces.push(Piece { weight, first, outputs: count, bias, after, out });
            }
        }
        self.pool.each(work, pieces, |piece| {
            let Piece { weight, first, outputs, bias, after, out } = piece;
            if rows <= FEW || depth == 0 {
                self.arch.dispatch(Dots { x, depth, weight, outputs, out });
            } else {
                tile(x, [rows, depth], weight, outputs, out);
            }
            self.finish(out, 0, first, outputs, bias, after);
        });
        drop(locks);
        let each = products.iter().zip(outs);
        each.map(|(product, out)| {
            let outputs = product.weight.shape[0];
            let out =
                if rows > 1 && outputs > share { joined(op, &out, [rows, outputs], share)? } else { out };
            tensor(op, out, &[rows, outputs])
        })
        .collect()
    }

    /// Adds the bias and does what comes after, on the outputs `first..first + outputs` of rows from `row` on.
    fn finish(
        &self,
        out: &mut [f32],
        row: usize,
        first: usize,
        outputs: usize,
        bias: Option<&[f32]>,
        after: Finish<'_>,
    ) {
        let bias = bias.map(|bias| &bias[first..first + outputs]);
        for (i, out) in out.chunks_exact_mut(outputs.max(1)).enumerate() {
            if let Some(bias) = bias {
                out.iter_mut().zip(bias).for_each(|(o, b)| *o += b);
            }
            if let Finish::Add(residual, width) = after {
                let residual = &residual[(row + i) * width + first..][..outputs];
                out.iter_mut().zip(residual).for_each(|(o, r)| *o += r);
            }
        }
        if let Finish::Activate(activation) = after {
            simd::activate(self.arch, activation, out);
        }
    }
}

/// Calls `body` with the numbers of a product's bias and residual.
fn with_finish<R>(
    op: &'static str,
    product: &Product<'_>,
    outputs: usize,
    body: impl FnOnce(Option<&[f32]>, Finish<'_>) -> Result<R>,
) -> Result<R> {
    let bias = product.bias.map(|bias| bias.storage_and_layout());
    let bias = bias.as_ref().map(|(storage, layout)| numbers(op, storage, layout)).transpose()?;
    match product.after {
        After::Nothing => body(bias, Finish::Nothing),
        After::Activate(activation) => body(bias, Finish::Activate(activation)),
        After::Add(residual) => {
            let (storage, layout) = residual.storage_and_layout();
            body(bias, Finish::Add(numbers(op, &storage, layout)?, outputs))
        }
    }
}

/// The product of many rows with a few widened outputs of a weight, into `out` `[rows, outputs]`.
fn tile(x: &[f32], [rows, depth]: [usize; 2], weight: Held<'_>, outputs: usize, out: &mut [f32]) {
    let mut wide = vec![0.0; if matches!(weight, Held::F32(_)) { 0 } else { outputs * depth }];
    let weight = weight.widen(&mut wide);
    super::gemm(
        out,
        [rows, outputs],
        super::Matrix { data: x, strides: [depth, 1] },
        super::Matrix { data: weight, strides: [1, depth] },
        depth,
        1.0,
    );
}

/// Pieces `[rows, share]` that lie end to end as rows `[rows, outputs]`.
fn joined(op: &'static str, pieces: &[f32], [rows, outputs]: [usize; 2], share: usize) -> Result<Vec<f32>> {
    let mut out = crate::host::reserve(op, pieces.len())?;
    for row in 0..rows {
        for first in (0..outputs).step_by(share) {
            let count = share.min(outputs - first);
            let start = first * rows + row * count;
            out.extend_from_slice(&pieces[start..start + count]);
        }
    }
    Ok(out)
}
