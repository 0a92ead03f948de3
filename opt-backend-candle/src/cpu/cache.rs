//! Appending to a cache in main memory, without the temporaries that candle's ops would make.

use super::{Heads, Kernels};
use crate::{
    cache::{Cache, INT8_ZERO, Room, Stored},
    host::{change, numbers},
};
use candle_core::{DType, Device, Layout, Storage, StorageRef, Tensor};
use half::f16;
use opt_backend::Result;
use std::ops::Range;

impl Kernels {
    /// Appends rows of `keys` and `values` `[_, heads * head_dim]`.
    pub(crate) fn append(
        &self,
        op: &'static str,
        cache: &mut Cache,
        layer: usize,
        [keys, values]: [&Tensor; 2],
        rows: Range<usize>,
    ) -> Result<()> {
        let (width, dim) = (cache.width(), cache.spec.head_dim);
        cache.append(op, &Device::Cpu, layer, rows.len(), |room, at| {
            for (stored, new) in [(&room.keys, keys), (&room.values, values)] {
                let (storage, layout) = new.storage_and_layout();
                let new = numbers::<f32>(op, &storage, layout)?;
                let new = &new[rows.start * width..rows.end * width];
                stored.write_rows(op, new, width, dim, room.capacity, at)?;
            }
            Ok(())
        })
    }
}

impl Stored {
    /// Writes `new` `[rows, width]` as the positions from `at` on.
    fn write_rows(
        &self,
        op: &'static str,
        new: &[f32],
        width: usize,
        dim: usize,
        capacity: usize,
        at: usize,
    ) -> Result<()> {
        // (position of the row and head among all, its numbers)
        let parts = || {
            new.chunks_exact(width).enumerate().flat_map(move |(i, row)| {
                row.chunks_exact(dim).enumerate().map(move |(head, part)| (head * capacity + at + i, part))
            })
        };
        match self.elements.dtype() {
            DType::F16 => change::<f16, _>(op, &self.elements, |to| {
                for (place, part) in parts() {
                    let to = to[place * dim..][..dim].iter_mut();
                    to.zip(part).for_each(|(t, v)| *t = f16::from_f32(*v));
                }
            }),
            DType::U8 => {
                let scale = |part: &[f32]| part.iter().fold(0.0f32, |max, v| max.max(v.abs())) / 127.0;
                change::<u8, _>(op, &self.elements, |to| {
                    for (place, part) in parts() {
                        let scale = scale(part);
                        let divisor = if scale == 0.0 { 1.0 } else { scale };
                        let to = to[place * dim..][..dim].iter_mut();
                        to.zip(part).for_each(|(t, v)| {
                            let step = (v / divisor).round().clamp(-127.0, 127.0);
                            *t = (step + INT8_ZERO as f32) as u8;
                        });
                    }
                })?;
                let Some(scales) = &self.scales else { return Ok(()) };
                change::<f32, _>(op, scales, |to| {
                    parts().for_each(|(place, part)| to[place] = scale(part));
                })
            }
            _ => change::<f32, _>(op, &self.elements, |to| {
                parts().for_each(|(place, part)| to[place * dim..][..dim].copy_from_slice(part));
            }),
        }
    }

    /// The locks that [`Locked::heads`] reads under.
    pub(crate) fn lock(&self) -> Locked<'_> {
        let scales = self.scales.as_ref().map(Tensor::storage_and_layout);
        Locked { elements: self.elements.storage_and_layout(), dtype: self.elements.dtype(), scales }
    }
}

/// Keys or values that are being read.
pub(crate) struct Locked<'a> {
    elements: (StorageRef<'a>, &'a Layout),
    dtype: DType,
    scales: Option<(StorageRef<'a>, &'a Layout)>,
}

impl Locked<'_> {
    pub(crate) fn heads(&self, op: &'static str, room: &Room, dim: usize) -> Result<Heads<'_>> {
        let (storage, layout): (&Storage, _) = (&self.elements.0, self.elements.1);
        let capacity = room.capacity;
        match (self.dtype, &self.scales) {
            (DType::F16, _) => Ok(Heads::F16 { data: numbers(op, storage, layout)?, capacity }),
            (DType::U8, Some((scales, scales_layout))) => Ok(Heads::Int8 {
                data: numbers(op, storage, layout)?,
                scales: numbers(op, scales, scales_layout)?,
                capacity,
            }),
            _ => Ok(Heads::F32 { data: numbers(op, storage, layout)?, head: capacity * dim, position: dim }),
        }
    }
}
