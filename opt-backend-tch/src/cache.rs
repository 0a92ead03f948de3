//! The KV cache of one sequence.
//!
//! A layer is a slot of a storage `[2, slots, heads, capacity, head_dim]`, keys and then values, of which the first
//! positions are in use. It is written in place and its capacity doubles, so that an append copies the new rows and
//! nothing else.
//!
//! Forks share a slot. It remembers how many of its positions somebody counts as his own: the first side to append
//! after a fork takes the positions behind them and writes in place, which nobody else looks at; the other side finds
//! them taken and copies what it holds, once. A side that is left alone with a slot has all of it.
//!
//! A cache begins with a storage of one slot. Caches that are decoded side by side for some steps move into one
//! storage, in which a step of all of them is one append and one call of the attention kernel ([`append_together`]).

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
/// Steps that caches are decoded side by side before they move together. Moving copies all they hold: beams, which
/// are forked every few steps, and batches whose members come and go should not pay that at each change.
const SETTLED: usize = 4;

/// Keys and values of one sequence, all layers.
pub struct Cache {
    spec: CacheSpec,
    layers: Vec<Layer>,
    device: Device,
}

#[derive(Default, Clone)]
struct Layer {
    slot: Option<Arc<Slot>>,
    len: usize,
    /// Appends since this layer moved to the slot.
    settled: usize,
}

/// The place of one sequence in a storage.
struct Slot {
    storage: Arc<Storage>,
    index: usize,
    /// Positions that some cache counts as its own; those behind are free.
    taken: AtomicUsize,
}

struct Storage {
    /// `[2, slots, heads, capacity, head_dim]`.
    data: Held,
    /// For int8, the step of each position and head, `[2, slots, heads, capacity, 1]`.
    scales: Option<Held>,
    slots: usize,
    heads: usize,
    head_dim: usize,
    capacity: usize,
}

/// Keys and values of several sequences, each `[sequences, heads, positions, head_dim]` in f32, and how many
/// positions of each are its own. The others are zeros, or finite.
pub(crate) struct Together {
    pub(crate) keys: tch::Tensor,
    pub(crate) values: tch::Tensor,
    pub(crate) lengths: Vec<usize>,
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
        let slot = layer.claim(op, spec, device, end)?;
        let new = keys.heads_with(values, op, rows.start, [1, rows.len(), spec.heads, spec.head_dim])?;
        slot.storage.write(op, slot.index, start, rows.len(), &new)?;
        layer.len = end;
        layer.settled = layer.settled.saturating_add(1);
        Ok(())
    }

    /// Keys and values of a layer in f32, each `[1, heads, positions, head_dim]`: views, where they are held so.
    pub(crate) fn keys_values(&self, op: &'static str, layer: usize) -> Result<[tch::Tensor; 2]> {
        let CacheSpec { heads, head_dim, .. } = self.spec;
        let (len, slot) = match self.layers.get(layer) {
            Some(Layer { slot: Some(slot), len, .. }) => (*len, slot),
            _ => {
                let empty = || {
                    let size = sizes([1, heads, 0, head_dim]);
                    tch::Tensor::f_empty(size, (Kind::Float, self.device)).map_err(torch(op))
                };
                return Ok([empty()?, empty()?]);
            }
        };
        if self.spec.dtype == CacheDType::F32 {
            return slot.storage.keys_values(op, slot.index, 1, len);
        }
        let wide = slot.storage.wide(op, slot.index, len)?;
        let side = |i| wide.f_select(0, i).map_err(torch(op));
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
    /// A slot in which the positions from the length to `end` are this layer's to write.
    fn claim(&mut self, op: &'static str, spec: CacheSpec, device: Device, end: usize) -> Result<&Slot> {
        let len = self.len;
        let capacity = self.slot.as_ref().map_or(0, |slot| slot.storage.capacity);
        let ours = match &mut self.slot {
            Some(slot) if end <= capacity => match Arc::get_mut(slot) {
                Some(alone) => {
                    *alone.taken.get_mut() = end;
                    true
                }
                None => {
                    let taken = &slot.taken;
                    taken.compare_exchange(len, end, Ordering::AcqRel, Ordering::Acquire).is_ok()
                }
            },
            _ => false,
        };
        if !ours {
            let hint = spec.capacity_hint.clamp(FIRST_CAPACITY, MOST_HINTED);
            let wanted = grown(capacity, end).max(hint);
            let storage = Storage::new(op, spec, device, 1, wanted)?;
            if let Some(old) = &self.slot {
                storage.copy_from(op, 0, old, len)?;
            }
            self.move_to(&Arc::new(storage), 0, end);
        }
        self.slot.as_deref().ok_or_else(|| Error::new(ErrorKind::Device, op, "a cache lost its storage"))
    }

    fn move_to(&mut self, storage: &Arc<Storage>, index: usize, taken: usize) {
        let slot = Slot { storage: Arc::clone(storage), index, taken: AtomicUsize::new(taken) };
        self.slot = Some(Arc::new(slot));
        self.settled = 0;
    }
}

/// A capacity of at least `needed`: the old one, or double.
fn grown(capacity: usize, needed: usize) -> usize {
    if needed <= capacity { capacity } else { needed.max(capacity.saturating_mul(2)) }
}

/// Appends one row to each of several caches, from the row `first` on, and gives them side by side; `None`, and
/// nothing done, where they are better served one by one: formats that must be widened, forks, lengths far apart,
/// caches that have only just met.
///
/// All caches have the layer and the shape of the rows.
pub(crate) fn append_together(
    op: &'static str,
    caches: &mut [&mut Cache],
    layer: usize,
    keys: &Tensor,
    values: &Tensor,
    first: usize,
) -> Result<Option<Together>> {
    let Some((spec, device)) = caches.first().map(|cache| (cache.spec, cache.device)) else {
        return Ok(None);
    };
    let alike = |cache: &&mut Cache| cache.spec.dtype == CacheDType::F32 && cache.spec.heads == spec.heads;
    if caches.len() < 2 || !caches.iter().all(alike) {
        return Ok(None);
    }
    let expected = caches.len();
    let mut layers: Vec<&mut Layer> =
        caches.iter_mut().filter_map(|cache| cache.layers.get_mut(layer)).collect();
    let count = layers.len();
    let lengths: Vec<usize> = layers.iter().map(|layer| layer.len + 1).collect();
    let longest = lengths.iter().copied().max().unwrap_or(0);
    let alone = |layer: &mut &mut Layer| layer.slot.as_mut().is_some_and(|slot| Arc::get_mut(slot).is_some());
    // What is computed for positions that are not there should not outweigh the rest.
    if count != expected
        || 2 * lengths.iter().sum::<usize>() < count * longest
        || !layers.iter_mut().all(alone)
    {
        return Ok(None);
    }
    let Some(storage) = shared(&layers) else {
        if layers.iter().any(|layer| layer.settled < SETTLED) {
            return Ok(None);
        }
        return move_together(op, &mut layers, spec, device, longest)
            .and_then(|storage| fill(op, &mut layers, &storage, lengths, [keys, values], first));
    };
    let storage = if longest <= storage.capacity {
        storage
    } else {
        move_together(op, &mut layers, spec, device, longest)?
    };
    fill(op, &mut layers, &storage, lengths, [keys, values], first)
}

/// The storage whose slots are those of the layers, in their order.
fn shared(layers: &[&mut Layer]) -> Option<Arc<Storage>> {
    let storage = &layers.first()?.slot.as_ref()?.storage;
    let in_place = |(i, layer): (usize, &&mut Layer)| {
        layer.slot.as_ref().is_some_and(|slot| slot.index == i && Arc::ptr_eq(&slot.storage, storage))
    };
    let all = storage.slots == layers.len() && layers.iter().enumerate().all(in_place);
    all.then(|| Arc::clone(storage))
}

/// Moves the layers to a new storage with a slot for each.
fn move_together(
    op: &'static str,
    layers: &mut [&mut Layer],
    spec: CacheSpec,
    device: Device,
    needed: usize,
) -> Result<Arc<Storage>> {
    let capacities = layers.iter().filter_map(|layer| layer.slot.as_ref().map(|slot| slot.storage.capacity));
    let capacity = grown(capacities.max().unwrap_or(0), needed);
    let storage = Storage::new(op, spec, device, layers.len(), capacity)?;
    for (i, layer) in layers.iter().enumerate() {
        if let Some(slot) = &layer.slot {
            storage.copy_from(op, i, slot, layer.len)?;
        }
    }
    let storage = Arc::new(storage);
    for (i, layer) in layers.iter_mut().enumerate() {
        layer.move_to(&storage, i, layer.len);
    }
    Ok(storage)
}

/// Writes one row to each slot of a storage that belongs to the layers.
fn fill(
    op: &'static str,
    layers: &mut [&mut Layer],
    storage: &Storage,
    lengths: Vec<usize>,
    [keys, values]: [&Tensor; 2],
    first: usize,
) -> Result<Option<Together>> {
    let (count, longest) = (lengths.len(), lengths.iter().copied().max().unwrap_or(0));
    let shape = [1, storage.heads, storage.head_dim];
    if lengths.iter().all(|len| *len == longest) {
        let new = keys.heads_with(values, op, first, [count, shape[0], shape[1], shape[2]])?;
        let mut to = storage.view(op, &storage.data, storage.head_dim, [0, count], [longest - 1, 1])?;
        to.f_copy_(&new).map_err(torch(op))?;
    } else {
        for (i, layer) in layers.iter().enumerate() {
            let new = keys.heads_with(values, op, first + i, [1, shape[0], shape[1], shape[2]])?;
            storage.write(op, i, layer.len, 1, &new)?;
        }
    }
    for layer in layers {
        layer.len += 1;
        layer.settled = layer.settled.saturating_add(1);
        if let Some(slot) = layer.slot.as_mut().and_then(Arc::get_mut) {
            *slot.taken.get_mut() = layer.len;
        }
    }
    let [keys, values] = storage.keys_values(op, 0, count, longest)?;
    Ok(Some(Together { keys, values, lengths }))
}

impl Storage {
    fn new(op: &'static str, spec: CacheSpec, device: Device, slots: usize, capacity: usize) -> Result<Self> {
        let CacheSpec { heads, head_dim, .. } = spec;
        let empty = |width: usize, kind| {
            let size = sizes([2, slots, heads, capacity, width]);
            // Attention over several sequences multiplies what is not there by zero, which must not give NaN.
            let part = if slots > 1 {
                tch::Tensor::f_zeros(size, (kind, device))
            } else {
                tch::Tensor::f_empty(size, (kind, device))
            };
            part.map(Held::new).map_err(torch(op))
        };
        let scales = match spec.dtype {
            CacheDType::Int8 => Some(empty(1, Kind::Float)?),
            _ => None,
        };
        let data = empty(head_dim, kind_of(spec.dtype)?)?;
        Ok(Self { data, scales, slots, heads, head_dim, capacity })
    }

    /// The positions `start..start + len` of the slots `slot..slot + count` of a part whose rows are `width` wide, as
    /// a view `[2, count, heads, len, width]`.
    fn view(
        &self,
        op: &'static str,
        part: &Held,
        width: usize,
        [slot, count]: [usize; 2],
        [start, len]: [usize; 2],
    ) -> Result<tch::Tensor> {
        let head = self.capacity * width;
        let sequence = self.heads * head;
        let size = sizes([2, count, self.heads, len, width]);
        let stride = sizes([self.slots * sequence, sequence, head, width, 1]);
        part.f_as_strided(size, stride, (slot * sequence + start * width) as i64).map_err(torch(op))
    }

    /// The first `len` keys and values of f32 slots, each `[count, heads, len, head_dim]`.
    fn keys_values(
        &self,
        op: &'static str,
        slot: usize,
        count: usize,
        len: usize,
    ) -> Result<[tch::Tensor; 2]> {
        let head = self.capacity * self.head_dim;
        let sequence = self.heads * head;
        let size = sizes([count, self.heads, len, self.head_dim]);
        let stride = sizes([sequence, head, self.head_dim, 1]);
        let side = |side: usize| {
            let offset = (side * self.slots + slot) * sequence;
            self.data.f_as_strided(size, stride, offset as i64).map_err(torch(op))
        };
        Ok([side(0)?, side(1)?])
    }

    /// Takes over the first `len` positions of another slot; the storage is new, so nobody else sees it.
    fn copy_from(&self, op: &'static str, index: usize, old: &Slot, len: usize) -> Result<()> {
        let copy = |to: &Held, from: &Held, width: usize| {
            let mut to = self.view(op, to, width, [index, 1], [0, len])?;
            to.f_copy_(&old.storage.view(op, from, width, [old.index, 1], [0, len])?).map_err(torch(op))
        };
        copy(&self.data, &old.storage.data, self.head_dim)?;
        match (&self.scales, &old.storage.scales) {
            (Some(to), Some(from)) => copy(to, from, 1),
            _ => Ok(()),
        }
    }

    /// Writes keys and values `[2, 1, heads, len, head_dim]` to positions that are the caller's.
    fn write(
        &self,
        op: &'static str,
        index: usize,
        start: usize,
        len: usize,
        new: &tch::Tensor,
    ) -> Result<()> {
        let mut to = self.view(op, &self.data, self.head_dim, [index, 1], [start, len])?;
        let Some(scales) = &self.scales else { return to.f_copy_(new).map_err(torch(op)) };
        let mut to_scales = self.view(op, scales, 1, [index, 1], [start, len])?;
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

    /// The first `len` positions of a slot in f32, `[2, 1, heads, len, head_dim]`.
    fn wide(&self, op: &'static str, index: usize, len: usize) -> Result<tch::Tensor> {
        let held = self.view(op, &self.data, self.head_dim, [index, 1], [0, len])?;
        let wide = held.f_to_dtype(Kind::Float, false, true).map_err(torch(op))?;
        let Some(scales) = &self.scales else { return Ok(wide) };
        wide.f_mul(&self.view(op, scales, 1, [index, 1], [0, len])?).map_err(torch(op))
    }
}
