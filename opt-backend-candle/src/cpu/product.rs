//! Linears and the LM head.
//!
//! A product of few rows streams each weight once through the dot products of [`super::simd`]. One of many rows goes
//! through `gemm`, the crate candle multiplies with, a tile of outputs at a time that is widened and transposed before.
//! Not through candle's `matmul`: on the CPU that wants both sides in one format, so that f16 weights would round the
//! activations; it has no bf16 kernel and widens the whole weight at each call; and over weights `[out, in]` gemm
//! spends more time on rearranging them than on multiplying. Where candle is built with MKL or Accelerate, which do
//! not, f32 products of many rows are its `matmul`.

use super::{
    Kernels, Matrix, gemm,
    simd::{self, Dots, Held, Transpose},
};
use crate::{
    error::convert,
    host::{change, count, numbers, tensor, zeros},
    weights::{Kept, Weight, foreign},
};
use candle_core::{DType, Layout, Storage, Tensor};
use opt_backend::{Activation, Error, ErrorKind, Result};

/// Rows up to which a product is computed as dot products. Beyond, packing weights for a matrix product pays.
const FEW: usize = 8;
/// Outputs of a tile, at least and at most: so few that it stays in a cache, so many that arranging the input for each
/// costs little.
const TILE: [usize; 2] = [32, 128];

/// What is done with a product before it is handed out.
#[derive(Clone, Copy)]
pub(crate) enum After<'a> {
    Nothing,
    Activate(Activation),
    /// Adds `[rows, outputs]`.
    Add(&'a Tensor),
}

/// One of several products of the same input.
pub(crate) struct Product<'a, W = Kept> {
    pub(crate) weight: &'a W,
    pub(crate) bias: Option<&'a Tensor>,
    pub(crate) after: After<'a>,
}

impl<'a, W> Product<'a, W> {
    /// With the weight as what it is.
    fn of<V>(&self, weight: &'a V) -> Product<'a, V> {
        Product { weight, bias: self.bias, after: self.after }
    }
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
        let dense = products.iter().map(|p| if let Kept::Dense(w) = p.weight { Some(p.of(w)) } else { None });
        if let Some(dense) = dense.collect::<Option<Vec<_>>>() {
            return self.dense(op, x, [rows, depth], &dense);
        }
        let coded =
            products.iter().map(|p| if let Kept::Host(w) = p.weight { Some(p.of(&**w)) } else { None });
        if let Some(coded) = coded.collect::<Option<Vec<_>>>() {
            return self.quantized(op, x, [rows, depth], &coded);
        }
        if products.len() == 1 {
            return Err(foreign(op));
        }
        // Of a mixed checkpoint.
        let alone = |p: &Product<'_>| self.products(op, x, [rows, depth], &[p.of(p.weight)]);
        Ok(products.iter().map(alone).collect::<Result<Vec<_>>>()?.into_iter().flatten().collect())
    }

    fn dense(
        &self,
        op: &'static str,
        x: &Tensor,
        [rows, depth]: [usize; 2],
        products: &[Product<'_, Weight>],
    ) -> Result<Vec<Tensor>> {
        if self.library
            && rows > FEW
            && depth > 0
            && products.iter().all(|p| p.weight.data.dtype() == DType::F32)
        {
            return products.iter().map(|product| self.whole(op, x, rows, product)).collect();
        }
        self.in_pieces(op, x, [rows, depth], products)
    }

    /// One product of many rows through candle, then one pass over it.
    fn whole(
        &self,
        op: &'static str,
        x: &Tensor,
        rows: usize,
        product: &Product<'_, Weight>,
    ) -> Result<Tensor> {
        let weight = &product.weight.data;
        let y = self.pool.install(|| x.matmul(&weight.t()?)).map_err(|error| convert(op, error))?;
        let outputs = product.weight.shape[0];
        with_finish(op, product, outputs, |bias, after| {
            if bias.is_none() && matches!(after, Finish::Nothing) {
                return Ok(());
            }
            change::<f32, _>(op, &y, |y| {
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
        products: &[Product<'_, Weight>],
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
            // A product of no depth is made of dots, too: of sums of nothing.
            if rows <= FEW || depth == 0 {
                self.arch.dispatch(Dots { x, depth, weight, outputs, out });
            } else {
                self.tile(x, [rows, depth], weight, outputs, out);
            }
            self.finish(out, 0, first, outputs, bias, after);
        });
        drop(locks);
        let each = products.iter().zip(outs);
        each.map(|(product, out)| {
            let outputs = product.weight.shape[0];
            let out = if rows > 1 && outputs > share {
                self.joined(op, &out, [rows, outputs], share)?
            } else {
                out
            };
            tensor(op, out, &[rows, outputs])
        })
        .collect()
    }

    /// The product of many rows with a few outputs of a weight, into `out` `[rows, outputs]`.
    fn tile(&self, x: &[f32], [rows, depth]: [usize; 2], weight: Held<'_>, outputs: usize, out: &mut [f32]) {
        let mut wide = vec![0.0; outputs * depth];
        self.arch.dispatch(Transpose { weight, depth, outputs, out: &mut wide });
        let x = Matrix { data: x, strides: [depth, 1] };
        let weight = Matrix { data: &wide, strides: [outputs, 1] };
        gemm(out, [rows, outputs], x, weight, depth, 1.0);
    }

    /// Pieces `[rows, share]` that lie end to end as rows `[rows, outputs]`.
    fn joined(
        &self,
        op: &'static str,
        pieces: &[f32],
        [rows, outputs]: [usize; 2],
        share: usize,
    ) -> Result<Vec<f32>> {
        let mut out = zeros(op, pieces.len())?;
        let group = self.pool.share(rows, pieces.len());
        let groups = out.chunks_mut(group * outputs).enumerate().collect();
        self.pool.each(pieces.len(), groups, |(i, out): (usize, &mut [f32])| {
            for (row, out) in (i * group..).zip(out.chunks_exact_mut(outputs)) {
                for (piece, out) in out.chunks_mut(share).enumerate() {
                    let start = piece * share * rows + row * out.len();
                    out.copy_from_slice(&pieces[start..start + out.len()]);
                }
            }
        });
        Ok(out)
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
    product: &Product<'_, Weight>,
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Linear;
    use candle_core::Device;
    use opt_backend::{DType, HostMatrix, HostVector, ndarray::Array2};
    use opt_kernels::Compute;

    /// MKL and Accelerate are not to be had everywhere; the way to them is.
    #[test]
    fn products_through_candles_matmul_are_the_same() {
        let numbers = |rows, columns, seed: usize| {
            Array2::from_shape_fn((rows, columns), |(i, j)| {
                ((i * 31 + j * 17 + seed) % 29) as f32 / 16.0 - 0.9
            })
        };
        let own = Kernels::new(2, Compute::F32).unwrap();
        let mut library = Kernels::new(2, Compute::F32).unwrap();
        library.library = true;
        for (rows, depth, outputs) in [(9, 5, 1), (20, 64, 130), (70, 33, 300)] {
            let weight = numbers(outputs, depth, 1);
            let bias = numbers(1, outputs, 2).row(0).to_owned();
            let (weight, bias) = (HostMatrix::F32(weight.view()), Some(HostVector::F32(bias.view())));
            let linear = Linear::new(&Device::Cpu, weight, bias, DType::F32).unwrap();
            let on_device = |m: Array2<f32>| {
                let shape = [m.nrows(), m.ncols()];
                tensor("test", m.into_raw_vec_and_offset().0, &shape).unwrap()
            };
            let x = on_device(numbers(rows, depth, 3));
            let residual = on_device(numbers(rows, outputs, 4));
            for after in [After::Nothing, After::Activate(Activation::Relu), After::Add(&residual)] {
                for bias in [None, linear.bias.as_ref()] {
                    let product = || [Product { weight: &linear.weight, bias, after }];
                    let run = |kernels: &Kernels| {
                        let made = kernels.products("test", &x, [rows, depth], &product()).unwrap();
                        made[0].to_vec2::<f32>().unwrap()
                    };
                    let (own, library) = (run(&own), run(&library));
                    let close = |(a, b): (&f32, &f32)| (a - b).abs() < 1e-4;
                    assert!(own.iter().flatten().zip(library.iter().flatten()).all(close), "{rows} rows");
                }
            }
        }
    }
}
