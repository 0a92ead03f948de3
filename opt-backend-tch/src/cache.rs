//! The KV cache of one sequence.
//!
//! A layer is one tensor `[2, heads, capacity, head_dim]`, keys and then values, of which the first positions are in
//! use. It is written in place and its capacity doubles, so that an append copies the new rows and nothing else.
//!
//! Forks share it. A storage remembers how many of its positions somebody counts as his own: the first side to
//! append after a fork takes the positions behind them and writes in place, which nobody else looks at; the other
//! side finds them taken and copies what it holds, once. A side that is left alone with a storage has all of it.

use crate::{
    error::torch,
    tensor::{Held, Tensor, read_matrix, sizes},
};
use opt_backend::{CacheDType, CacheLayer, CacheSpec, Error, ErrorKind, Result, check};
use std::{
    fmt,
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};
use tch::{Device, Kind};

/// Positions that a cache has room for at first.
const FIRST_CAPACITY: usize = 64;
/// What a hint may ask for at most; a cache that grows past it does so by doubling.
const MOST_HINTED: usize = 4096;

/// Keys and values of one sequence, all layers.
pub struct Cache {
    spec: CacheSpec,
    layers: Vec<Layer>,
    device: Device,
}

#[derive(Default, Clone)]
struct Layer {
    storage: Option<Arc<Storage>>,
    len: usize,
}

struct Storage {
    /// `[2, heads, capacity, head_dim]`.
    data: Held,
    /// For int8, the step of each position and head, `[2, heads, capacity, 1]`.
    scales: Option<Held>,
    capacity: usize,
    /// Positions that some cache counts as its own; those behind are free.
    taken: AtomicUsize,
}

impl fmt::Debug for Cache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lengths: Vec<usize> = self.layers.iter().map(|layer| layer.len).collect();
        f.debug_struct("Cache").field("lengths", &lengths).finish_non_exhaustive()
    }
}

impl Cache {
    pub(crate) fn new(spec: CacheSpec, device: Device) -> Result<Self> {
        const OP: &str = "new_cache";
        if spec.heads == 0 || spec.head_dim == 0 {
            return Err(Error::shape(OP, "expected at least one head of at least one element"));
        }
        // Bytes of the longest first allocation, and strides in i64 for any length that memory can hold.
        let most =
            spec.heads.checked_mul(spec.head_dim).and_then(|width| width.checked_mul(MOST_HINTED * 16));
        if most.is_none_or(|most| i64::try_from(most).is_err()) {
            return Err(Error::shape(OP, "the heads are too wide to address"));
        }
        kind_of(spec.dtype)?;
        let mut layers = Vec::new();
        layers.try_reserve_exact(spec.layers).map_err(|_| {
            let message = format_args!("no host memory for {} layers", spec.layers);
            Error::new(ErrorKind::OutOfMemory, OP, message)
        })?;
        layers.resize_with(spec.layers, Layer::default);
        Ok(Self { spec, layers, device })
    }

    fn width(&self) -> usize {
        self.spec.heads * self.spec.head_dim
    }

    pub(crate) fn len(&self, layer: usize) -> usize {
        self.layers.get(layer).map_or(0, |layer| layer.len)
    }

    pub(crate) fn heads(&self) -> usize {
        self.spec.heads
    }

    /// Fails unless there is a layer `layer` and rows of `width` fit.
    pub(crate) fn check(&self, op: &'static str, layer: usize, width: usize) -> Result<()> {
        check::layer(op, layer, self.layers.len())?;
        check::width(op, width, self.width())
    }

    pub(crate) fn truncate(&mut self, len: usize) {
        for layer in &mut self.layers {
            layer.len = layer.len.min(len);
        }
    }

    pub(crate) fn fork(&self) -> Self {
        Self { spec: self.spec, layers: self.layers.clone(), device: self.device }
    }

    /// Appends the rows `rows`, which exist, of keys and values `[_, width]`. If it fails, nothing was appended.
    pub(crate) fn append(
        &mut self,
        op: &'static str,
        layer: usize,
        keys: &Tensor,
        values: &Tensor,
        rows: Range<usize>,
    ) -> Result<()> {
        let (spec, device) = (self.spec, self.device);
        let Some(layer) = self.layers.get_mut(layer) else { return Ok(()) };
        if rows.is_empty() {
            return Ok(());
        }
        let start = layer.len;
        let end = start + rows.len();
        let storage = layer.claim(op, spec, device, end)?;
        let new = keys.heads_with(values, op, rows.start, [rows.len(), spec.heads, spec.head_dim])?;
        storage.write(op, spec, start, rows.len(), &new)?;
        layer.len = end;
        Ok(())
    }

    /// Keys and values of a layer in f32, each `[1, heads, positions, head_dim]`: views, where they are held so.
    pub(crate) fn keys_values(&self, op: &'static str, layer: usize) -> Result<[tch::Tensor; 2]> {
        let CacheSpec { heads, head_dim, .. } = self.spec;
        let (len, storage) = match self.layers.get(layer) {
            Some(Layer { storage: Some(storage), len }) => (*len, storage),
            _ => {
                let empty = || {
                    let size = sizes([1, heads, 0, head_dim]);
                    tch::Tensor::f_empty(size, (Kind::Float, self.device)).map_err(torch(op))
                };
                return Ok([empty()?, empty()?]);
            }
        };
        if self.spec.dtype == CacheDType::F32 {
            let side = heads * storage.capacity * head_dim;
            let view = |offset: usize| {
                let size = sizes([1, heads, len, head_dim]);
                let stride = sizes([side, storage.capacity * head_dim, head_dim, 1]);
                storage.data.f_as_strided(size, stride, offset as i64).map_err(torch(op))
            };
            return Ok([view(0)?, view(side)?]);
        }
        let wide = storage.wide(op, len)?;
        let side = |i| wide.f_narrow(0, i, 1).map_err(torch(op));
        Ok([side(0)?, side(1)?])
    }

    pub(crate) fn read(&self, layer: usize) -> Result<CacheLayer> {
        const OP: &str = "cache_read";
        check::layer(OP, layer, self.layers.len())?;
        let shape = [self.len(layer), self.width()];
        let [keys, values] = self.keys_values(OP, layer)?;
        let rows = |heads: tch::Tensor| {
            let rows = heads.f_transpose(1, 2).map_err(torch(OP))?;
            read_matrix(OP, &rows, shape)
        };
        Ok(CacheLayer { keys: rows(keys)?, values: rows(values)? })
    }
}

fn kind_of(dtype: CacheDType) -> Result<Kind> {
    match dtype {
        CacheDType::F32 => Ok(Kind::Float),
        CacheDType::F16 => Ok(Kind::Half),
        CacheDType::Int8 => Ok(Kind::Int8),
        other => {
            let message = format_args!("expected a cache of f32, f16 or int8, found {other:?}");
            Err(Error::new(ErrorKind::Unsupported, "new_cache", message))
        }
    }
}

impl Layer {
    /// A storage in which the positions from the length to `end` are this layer's to write.
    fn claim(&mut self, op: &'static str, spec: CacheSpec, device: Device, end: usize) -> Result<&Storage> {
        let len = self.len;
        let (fits, capacity) = match &mut self.storage {
            None => (false, 0),
            Some(storage) if storage.capacity < end => (false, storage.capacity),
            Some(storage) => {
                let ours = match Arc::get_mut(storage) {
                    Some(alone) => {
                        *alone.taken.get_mut() = end;
                        true
                    }
                    None => {
                        let taken = &storage.taken;
                        taken.compare_exchange(len, end, Ordering::AcqRel, Ordering::Acquire).is_ok()
                    }
                };
                (ours, storage.capacity)
            }
        };
        if !fits {
            let hint = spec.capacity_hint.clamp(FIRST_CAPACITY, MOST_HINTED);
            let wanted =
                if capacity < end { end.max(capacity.saturating_mul(2)).max(hint) } else { capacity };
            let new = Storage::new(op, spec, device, wanted, end)?;
            if let Some(old) = &self.storage {
                new.copy_from(op, old, len)?;
            }
            self.storage = Some(Arc::new(new));
        }
        self.storage.as_deref().ok_or_else(|| Error::new(ErrorKind::Device, op, "a cache lost its storage"))
    }
}

impl Storage {
    fn new(op: &'static str, spec: CacheSpec, device: Device, capacity: usize, taken: usize) -> Result<Self> {
        let empty = |width: usize, kind| {
            let size = sizes([2, spec.heads, capacity, width]);
            tch::Tensor::f_empty(size, (kind, device)).map(Held::new).map_err(torch(op))
        };
        let scales = match spec.dtype {
            CacheDType::Int8 => Some(empty(1, Kind::Float)?),
            _ => None,
        };
        let data = empty(spec.head_dim, kind_of(spec.dtype)?)?;
        Ok(Self { data, scales, capacity, taken: AtomicUsize::new(taken) })
    }

    /// The positions `start..start + len` of a part, as a view `[2, heads, len, _]`.
    fn positions(op: &'static str, part: &Held, start: usize, len: usize) -> Result<tch::Tensor> {
        part.f_narrow(2, start as i64, len as i64).map_err(torch(op))
    }

    /// Takes the first `len` positions over; the storage is new, so nobody else sees it.
    fn copy_from(&self, op: &'static str, old: &Storage, len: usize) -> Result<()> {
        let copy = |to: &Held, from: &Held| {
            let mut to = Self::positions(op, to, 0, len)?;
            to.f_copy_(&Self::positions(op, from, 0, len)?).map_err(torch(op))
        };
        copy(&self.data, &old.data)?;
        match (&self.scales, &old.scales) {
            (Some(to), Some(from)) => copy(to, from),
            _ => Ok(()),
        }
    }

    /// Writes keys and values `[2, heads, len, head_dim]` to positions that are the caller's.
    fn write(
        &self,
        op: &'static str,
        spec: CacheSpec,
        start: usize,
        len: usize,
        new: &tch::Tensor,
    ) -> Result<()> {
        let mut to = match &self.scales {
            None => {
                // One call in place of a narrow: this runs for every layer and token.
                let CacheSpec { heads, head_dim, .. } = spec;
                let stride = [heads * self.capacity * head_dim, self.capacity * head_dim, head_dim, 1];
                let size = sizes([2, heads, len, head_dim]);
                let at = (start * head_dim) as i64;
                self.data.f_as_strided(size, sizes(stride), at).map_err(torch(op))?
            }
            Some(_) => Self::positions(op, &self.data, start, len)?,
        };
        let Some(scales) = &self.scales else { return to.f_copy_(new).map_err(torch(op)) };
        let mut to_scales = Self::positions(op, scales, start, len)?;
        let mut quantize = || {
            let new = new.f_to_dtype(Kind::Float, false, false)?;
            let scale = new.f_abs()?.f_amax([-1], true)?.f_div_scalar(127.0)?;
            // Rows of zeros have a scale of 0; 0 / 1 is what they become.
            let steps = new.f_div(&scale.f_masked_fill(&scale.f_eq(0.0)?, 1.0)?)?;
            // Half away from zero, as Rust rounds.
            let away = steps.f_sign()?.f_mul_scalar(0.5)?;
            let steps = steps.f_add(&away)?.f_trunc()?.f_clamp(-127.0, 127.0)?;
            to.f_copy_(&steps)?;
            to_scales.f_copy_(&scale)
        };
        quantize().map_err(torch(op))
    }

    /// The first `len` positions in f32, `[2, heads, len, head_dim]`.
    fn wide(&self, op: &'static str, len: usize) -> Result<tch::Tensor> {
        let held = Self::positions(op, &self.data, 0, len)?;
        let wide = held.f_to_dtype(Kind::Float, false, true).map_err(torch(op))?;
        let Some(scales) = &self.scales else { return Ok(wide) };
        wide.f_mul(&Self::positions(op, scales, 0, len)?).map_err(torch(op))
    }
}
