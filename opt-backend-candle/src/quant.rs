//! Quantized weights as tensors of any device: codes stay packed there and are expanded some rows at a time.
//!
//! On the CPU they are the kernels' own (see `cpu/quantized.rs`); here is what other devices do.

use crate::error::convert;
use candle_core::{DType, Device, Result as CandleResult, Tensor};
use opt_backend::{Result, quant::Quantized};
use opt_kernels::rows::{Numbers, Rows};
use std::ops::Range;

/// A quantized weight on a device. What its parts mean: [`opt_kernels::rows`].
pub(crate) struct Tiles {
    pub(crate) shape: [usize; 2],
    /// u8
    bytes: Tensor,
    levels: Tensor,
    /// f16 or f32, as are zero points.
    scales: Tensor,
    zeros: Option<Tensor>,
    group: usize,
    places: usize,
    order: Option<Tensor>,
    /// Rows that are expanded at a time.
    pub(crate) tile: usize,
}

fn numbers(numbers: Numbers, shape: [usize; 2], device: &Device) -> CandleResult<Tensor> {
    match numbers {
        Numbers::Half(numbers) => Tensor::from_vec(numbers, &shape, device),
        Numbers::Single(numbers) => Tensor::from_vec(numbers, &shape, device),
    }
}

impl Tiles {
    pub(crate) fn new(op: &'static str, device: &Device, weight: &Quantized) -> Result<Self> {
        let rows = Rows::new(weight);
        let tile = rows.tile();
        let Rows { shape, bytes, per_byte, levels, scales, zeros, group, places, order } = rows;
        let beside = [shape[0], places / group];
        let hold = || {
            Ok(Self {
                shape,
                bytes: Tensor::from_vec(bytes, (shape[0], places / per_byte), device)?,
                levels: Tensor::from_vec(levels, (256, per_byte), device)?,
                scales: numbers(scales, beside, device)?,
                zeros: zeros.map(|zeros| numbers(zeros, beside, device)).transpose()?,
                group,
                places,
                order: order.map(|order| Tensor::from_vec(order, shape[1], device)).transpose()?,
                tile,
            })
        };
        hold().map_err(|error| convert(op, error))
    }

    /// Those of the rows that `part` takes of each tensor, `count` of them, `[count, in]` in f32. Of elements there
    /// must be some.
    fn expand(&self, count: usize, part: impl Fn(&Tensor) -> CandleResult<Tensor>) -> CandleResult<Tensor> {
        // Not as u8: to candle the largest index of a type is none.
        let bytes = part(&self.bytes)?.flatten_all()?.to_dtype(DType::U32)?;
        let groups = self.places / self.group;
        let mut x = self.levels.index_select(&bytes, 0)?.reshape((count, groups, self.group))?;
        let beside = |x: &Tensor| part(x)?.to_dtype(DType::F32)?.unsqueeze(2);
        if let Some(zeros) = &self.zeros {
            x = x.broadcast_sub(&beside(zeros)?)?;
        }
        let x = x.broadcast_mul(&beside(&self.scales)?)?.reshape((count, self.places))?;
        match &self.order {
            Some(order) => x.index_select(order, 1),
            None => Ok(x),
        }
    }

    /// The rows `rows` in f32, expanded a tile at a time.
    pub(crate) fn tiles(&self, rows: Range<usize>) -> impl Iterator<Item = CandleResult<Tensor>> {
        rows.clone().step_by(self.tile).map(move |start| {
            let count = self.tile.min(rows.end - start);
            self.expand(count, |x| x.narrow(0, start, count))
        })
    }

    /// `x Wᵀ`, of some rows, outputs and inputs.
    pub(crate) fn product(&self, x: &Tensor) -> CandleResult<Tensor> {
        let parts = self.tiles(0..self.shape[0]).map(|weight| x.matmul(&weight?.t()?));
        Tensor::cat(&parts.collect::<CandleResult<Vec<_>>>()?, 1)
    }

    /// The rows that `ids` names, of which there are some, as of elements.
    pub(crate) fn gather(&self, ids: &Tensor) -> CandleResult<Tensor> {
        self.expand(ids.dim(0)?, |x| x.index_select(ids, 0))
    }

    /// The rows `rows`, end to end in host memory.
    pub(crate) fn read(&self, rows: Range<usize>) -> CandleResult<Vec<f32>> {
        let mut data = Vec::with_capacity(rows.len() * self.shape[1]);
        for tile in self.tiles(rows) {
            data.extend(tile?.flatten_all()?.to_vec1::<f32>()?);
        }
        Ok(data)
    }
}
