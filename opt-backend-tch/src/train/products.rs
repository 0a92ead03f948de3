//! Products of matrices, and gradients through frozen weights.

use crate::{
    Tch,
    error::torch,
    onednn,
    quant::Coded,
    tensor::{Matrix, Tensor, kind_of, sizes},
    weights::Rows,
};
use opt_backend::{DType, Layout, Result, check};
use tch::{Device, Kind};

/// Elements of a weight that are widened at a time: 4 MiB.
const WIDENED: usize = 1 << 20;

/// See [`opt_backend::Train::matmul`].
pub(crate) fn matmul(
    tch: &Tch,
    a: &Tensor,
    b: &Tensor,
    layout: Layout,
    dtype: DType,
    into: Option<Tensor>,
) -> Result<Tensor> {
    const OP: &str = "matmul";
    let shape = layout.shape(a.shape(), b.shape())?;
    if let Some(into) = &into {
        check::same_shape(OP, into.shape(), shape)?;
    }
    let kind = kind_of(dtype)?;
    let kind = if multiplies(tch, kind) { kind } else { Kind::Float };
    let (a, b) = (a.matrix_as(OP, kind)?, b.matrix_as(OP, kind)?);
    let transposed = |m: Matrix<'_>| m.f_transpose(0, 1).map_err(torch(OP));
    match layout {
        Layout::Times => added(OP, &a, &b, kind, shape, into),
        Layout::TimesTransposed => added(OP, &a, &transposed(b)?, kind, shape, into),
        Layout::TransposedTimes => added(OP, &transposed(a)?, &b, kind, shape, into),
    }
}

/// Whether the device has arithmetic in `kind` that is faster than widening.
fn multiplies(tch: &Tch, kind: Kind) -> bool {
    match kind {
        Kind::Float => true,
        _ if tch.device() != Device::Cpu => true,
        Kind::BFloat16 => onednn::has_bf16(),
        _ => false,
    }
}

/// `a b + into`, the sum in the memory of `into`.
fn added(
    op: &'static str,
    a: &tch::Tensor,
    b: &tch::Tensor,
    kind: Kind,
    shape: [usize; 2],
    into: Option<Tensor>,
) -> Result<Tensor> {
    let Some(into) = into else {
        return Ok(Tensor::new(a.f_mm(b).map_err(torch(op))?, kind, shape));
    };
    let mut into = into.into_own(op)?;
    let summed = match kind {
        Kind::Float => into.f_addmm_(a, b),
        _ => a.f_mm(b).and_then(|product| into.f_add_(&product)),
    };
    let _ = summed.map_err(torch(op))?;
    Ok(Tensor::new(into, Kind::Float, shape))
}

/// `dy W + into`. Shapes have been checked.
pub(crate) fn through(
    op: &'static str,
    tch: &Tch,
    dy: &Tensor,
    weight: Rows<'_>,
    inputs: usize,
    into: Option<Tensor>,
) -> Result<Tensor> {
    let [rows, outputs] = dy.shape();
    let shape = [rows, inputs];
    match weight {
        Rows::Dense(weight, kind) if multiplies(tch, kind) => {
            added(op, &*dy.matrix_as(op, kind)?, &weight, kind, shape, into)
        }
        Rows::Dense(weight, _) => {
            let part = (WIDENED / inputs.max(1)).max(1);
            in_blocks(op, tch, dy, shape, into, |add| {
                for start in (0..outputs).step_by(part) {
                    let block = weight.f_narrow(0, start as i64, part.min(outputs - start) as i64);
                    add(start, &block.and_then(|block| block.f_totype(Kind::Float)).map_err(torch(op))?)?;
                }
                Ok(())
            })
        }
        Rows::Coded(coded) => through_codes(op, tch, dy, coded, shape, into),
    }
}

fn through_codes(
    op: &'static str,
    tch: &Tch,
    dy: &Tensor,
    coded: &Coded,
    shape: [usize; 2],
    into: Option<Tensor>,
) -> Result<Tensor> {
    in_blocks(op, tch, dy, shape, into, |add| coded.each_block(op, tch, add))
}

/// What adds the share of a block of rows of a weight, given the number of the first.
type Add<'a> = dyn FnMut(usize, &tch::Tensor) -> Result<()> + 'a;

/// `dy W + into`, of a weight that comes in blocks of f32.
fn in_blocks(
    op: &'static str,
    tch: &Tch,
    dy: &Tensor,
    shape: [usize; 2],
    into: Option<Tensor>,
    blocks: impl FnOnce(&mut Add<'_>) -> Result<()>,
) -> Result<Tensor> {
    let dy = dy.matrix_as(op, Kind::Float)?;
    let mut sum = match into {
        Some(into) => into.into_own(op)?,
        None => tch::Tensor::f_zeros(sizes(shape), (Kind::Float, tch.device())).map_err(torch(op))?,
    };
    if !shape.contains(&0) {
        blocks(&mut |start, block| {
            let count = block.size().first().copied().unwrap_or(0);
            let columns = dy.f_narrow(1, start as i64, count);
            let _ = columns.and_then(|columns| sum.f_addmm_(&columns, block)).map_err(torch(op))?;
            Ok(())
        })?;
    }
    Ok(Tensor::new(sum, Kind::Float, shape))
}
