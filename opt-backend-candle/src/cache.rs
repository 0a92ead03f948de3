//! The KV cache of one sequence.
//!
//! Keys and values of a layer are tensors `[heads, capacity, head_dim]` that are written in place and grow by
//! doubling. candle's clones share storage, and writes show through every clone; so forks count references, and a
//! cache that is to be appended to copies what another cache still refers to.

use crate::error::convert;
use candle_core::{DType, Device, Result as CandleResult, Tensor};
use opt_backend::{CacheDType, CacheLayer, CacheSpec, Error, ErrorKind, Result, check, ndarray::Array2};
use std::{fmt, sync::Arc};

/// Positions there is room for at first.
const FIRST: usize = 64;
/// The most positions that a hint makes room for: it is a guess, and may be of anything.
const MOST_HINTED: usize = 4096;
/// What is added to an int8 to hold it as u8, the only format of a byte that candle has.
pub(crate) const INT8_ZERO: f64 = 128.0;

/// Keys and values of one sequence, all layers. Created by [`opt_backend::Backend::new_cache`].
pub struct Cache {
    pub(crate) spec: CacheSpec,
    pub(crate) layers: Vec<Layer>,
}

/// Keys and values of one layer.
#[derive(Clone, Default)]
pub(crate) struct Layer {
    pub(crate) len: usize,
    /// Absent until the first append; shared between forks.
    room: Option<Arc<Room>>,
}

/// Room for a number of positions.
pub(crate) struct Room {
    pub(crate) capacity: usize,
    pub(crate) keys: Stored,
    pub(crate) values: Stored,
}

/// Keys or values.
pub(crate) struct Stored {
    /// `[heads, capacity, head_dim]`: f32, f16, or u8 for int8.
    pub(crate) elements: Tensor,
    /// Of int8: `[heads, capacity, 1]`.
    pub(crate) scales: Option<Tensor>,
}

impl fmt::Debug for Cache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lengths: Vec<usize> = self.layers.iter().map(|layer| layer.len).collect();
        f.debug_struct("Cache").field("lengths", &lengths).finish_non_exhaustive()
    }
}

impl Cache {
    pub(crate) fn new(spec: CacheSpec) -> Result<Self> {
        let fail = |kind, message: &str| Err(Error::new(kind, "new_cache", message));
        if spec.heads == 0 || spec.head_dim == 0 {
            return fail(ErrorKind::Shape, "expected at least one head of at least one element");
        }
        if spec.heads.checked_mul(spec.head_dim).is_none_or(|n| n > isize::MAX as usize / 4) {
            return fail(ErrorKind::Shape, "the heads are too wide to address");
        }
        if !matches!(spec.dtype, CacheDType::F32 | CacheDType::F16 | CacheDType::Int8) {
            return fail(ErrorKind::Unsupported, "expected a cache held as f32, f16 or int8");
        }
        let mut layers = crate::host::reserve("new_cache", spec.layers)?;
        layers.resize_with(spec.layers, Layer::default);
        Ok(Self { spec, layers })
    }

    pub(crate) fn width(&self) -> usize {
        self.spec.heads * self.spec.head_dim
    }

    pub(crate) fn fork(&self) -> Self {
        Self { spec: self.spec, layers: self.layers.clone() }
    }

    pub(crate) fn truncate(&mut self, len: usize) {
        for layer in &mut self.layers {
            layer.len = layer.len.min(len);
        }
    }

    /// Lets `write` fill `rows` further positions of a layer, in room that no other cache shares. They count once
    /// that has succeeded.
    pub(crate) fn append(
        &mut self,
        op: &'static str,
        device: &Device,
        layer: usize,
        rows: usize,
        write: impl FnOnce(&Room, usize) -> Result<()>,
    ) -> Result<()> {
        let spec = self.spec;
        check::layer(op, layer, self.layers.len())?;
        let Some(layer) = self.layers.get_mut(layer).filter(|_| rows > 0) else { return Ok(()) };
        let len = layer.len;
        let end = len.checked_add(rows).filter(|end| end.checked_next_power_of_two().is_some());
        let end = end.ok_or_else(|| Error::new(ErrorKind::OutOfMemory, op, "too many positions"))?;
        let fits =
            layer.room.as_mut().is_some_and(|room| room.capacity >= end && Arc::get_mut(room).is_some());
        if !fits {
            let first = if layer.room.is_none() { spec.capacity_hint.min(MOST_HINTED) } else { 0 };
            let capacity = end.max(first).max(FIRST).next_power_of_two();
            crate::host::count(op, [capacity, spec.heads * spec.head_dim])?;
            let room = Room::new(device, spec, capacity).and_then(|room| {
                if let Some(old) = layer.room.as_deref().filter(|_| len > 0) {
                    room.keys.copy(&old.keys, len)?;
                    room.values.copy(&old.values, len)?;
                }
                Ok(room)
            });
            layer.room = Some(Arc::new(room.map_err(|error| convert(op, error))?));
        }
        if let Some(room) = &layer.room {
            write(room, len)?;
        }
        layer.len = end;
        Ok(())
    }

    /// One layer in host memory.
    pub(crate) fn read(&self, layer: usize) -> Result<CacheLayer> {
        let op = "cache_read";
        check::layer(op, layer, self.layers.len())?;
        let shape = (self.layers[layer].len, self.width());
        let Some((room, len)) = self.layers[layer].held() else {
            return Ok(CacheLayer { keys: Array2::zeros((0, shape.1)), values: Array2::zeros((0, shape.1)) });
        };
        let read = |stored: &Stored| {
            let rows = || stored.wide(len)?.transpose(0, 1)?.flatten_all()?.to_vec1::<f32>();
            let rows = rows().map_err(|error| convert(op, error))?;
            Array2::from_shape_vec(shape, rows).map_err(|error| Error::shape(op, error))
        };
        Ok(CacheLayer { keys: read(&room.keys)?, values: read(&room.values)? })
    }
}

impl Layer {
    /// Where its positions lie and how many there are; `None` if there are none.
    pub(crate) fn held(&self) -> Option<(&Room, usize)> {
        self.room.as_deref().filter(|_| self.len > 0).map(|room| (room, self.len))
    }
}

impl Room {
    fn new(device: &Device, spec: CacheSpec, capacity: usize) -> CandleResult<Self> {
        let stored = || Stored::new(device, spec, capacity);
        Ok(Self { capacity, keys: stored()?, values: stored()? })
    }
}

impl Stored {
    fn new(device: &Device, spec: CacheSpec, capacity: usize) -> CandleResult<Self> {
        let dtype = match spec.dtype {
            CacheDType::F16 => DType::F16,
            CacheDType::Int8 => DType::U8,
            _ => DType::F32,
        };
        let scales = (dtype == DType::U8)
            .then(|| Tensor::zeros((spec.heads, capacity, 1), DType::F32, device))
            .transpose()?;
        let elements = Tensor::zeros((spec.heads, capacity, spec.head_dim), dtype, device)?;
        Ok(Self { elements, scales })
    }

    /// Takes over the first `len` positions of `from`.
    fn copy(&self, from: &Self, len: usize) -> CandleResult<()> {
        let copy = |to: &Tensor, from: &Tensor| to.slice_set(&from.narrow(1, 0, len)?.contiguous()?, 1, 0);
        copy(&self.elements, &from.elements)?;
        match (&self.scales, &from.scales) {
            (Some(to), Some(from)) => copy(to, from),
            _ => Ok(()),
        }
    }

    /// Writes new positions `[heads, rows, head_dim]` (contiguous f32) from `at` on, by candle's ops.
    pub(crate) fn write(&self, new: &Tensor, at: usize) -> CandleResult<()> {
        match &self.scales {
            None => self.elements.slice_set(&new.to_dtype(self.elements.dtype())?, 1, at),
            Some(scales) => {
                let scale = (new.abs()?.max_keepdim(2)? / 127.0)?;
                // Rows of zeros are divided by one.
                let divisor = (&scale + scale.eq(0.0)?.to_dtype(DType::F32)?)?;
                let steps = new.broadcast_div(&divisor)?.round()?.clamp(-127.0, 127.0)?;
                self.elements.slice_set(&(steps + INT8_ZERO)?.to_dtype(DType::U8)?, 1, at)?;
                scales.slice_set(&scale.contiguous()?, 1, at)
            }
        }
    }

    /// The first `len` positions as f32, `[heads, len, head_dim]`.
    pub(crate) fn wide(&self, len: usize) -> CandleResult<Tensor> {
        let elements = self.elements.narrow(1, 0, len)?;
        match &self.scales {
            None => elements.to_dtype(DType::F32),
            Some(scales) => {
                let steps = (elements.to_dtype(DType::F32)? - INT8_ZERO)?;
                steps.broadcast_mul(&scales.narrow(1, 0, len)?)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn append(cache: &mut Cache, rows: usize) {
        cache
            .append("test", &Device::Cpu, 0, rows, |room, at| {
                let (heads, dim) = (cache_shape().heads, cache_shape().head_dim);
                let new = Tensor::full(at as f32, (heads, rows, dim), &Device::Cpu).unwrap();
                room.keys.write(&new, at).and_then(|()| room.values.write(&new, at)).unwrap();
                Ok(())
            })
            .unwrap();
    }

    fn cache_shape() -> CacheSpec {
        CacheSpec { layers: 1, heads: 2, head_dim: 4, dtype: CacheDType::F32, capacity_hint: 0 }
    }

    fn room(cache: &Cache) -> *const Room {
        cache.layers[0].room.as_ref().map_or(std::ptr::null(), Arc::as_ptr)
    }

    #[test]
    fn rooms_double_and_are_copied_only_when_shared() {
        let mut cache = Cache::new(cache_shape()).unwrap();
        assert!(room(&cache).is_null());
        append(&mut cache, 0);
        assert!(room(&cache).is_null(), "nothing is allocated for nothing");
        let (mut rooms, mut capacities) = (Vec::new(), Vec::new());
        for _ in 0..300 {
            append(&mut cache, 1);
            let capacity = cache.layers[0].held().unwrap().0.capacity;
            if rooms.last() != Some(&room(&cache)) {
                rooms.push(room(&cache));
                capacities.push(capacity);
            }
        }
        assert_eq!(capacities, [64, 128, 256, 512], "one step in hundreds moves the cache");

        let fork = cache.fork();
        assert_eq!(room(&fork), room(&cache), "a fork copies nothing");
        append(&mut cache, 1);
        assert_ne!(room(&fork), room(&cache), "an append beside a fork copies");
        let own = room(&cache);
        append(&mut cache, 1);
        assert_eq!(room(&cache), own, "and only once");
        let shared = room(&fork);
        drop(cache);
        let mut fork = fork;
        append(&mut fork, 1);
        assert_eq!(room(&fork), shared, "what nobody else holds is written in place");
        fork.truncate(10);
        append(&mut fork, 1);
        assert_eq!(room(&fork), shared);
        assert_eq!(fork.layers[0].len, 11);
    }

    #[test]
    fn a_failed_append_adds_nothing() {
        let mut cache = Cache::new(cache_shape()).unwrap();
        append(&mut cache, 5);
        let fail = |_: &Room, _| Err(Error::new(ErrorKind::Device, "test", "no"));
        assert!(cache.append("test", &Device::Cpu, 0, 3, fail).is_err());
        assert_eq!(cache.layers[0].len, 5);
        let error = cache.append("test", &Device::Cpu, 0, usize::MAX / 2, fail).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::OutOfMemory);
        assert_eq!(cache.read(0).unwrap().keys.nrows(), 5);
    }
}
