//! The KV cache: pages of 32 positions, shared between forks until written to.
//!
//! A dispatch can bind few buffers, and a batch has many sequences. So sequences do not own buffers: all caches of one
//! shape draw pages from common slabs, one slab a layer, and a kernel reaches every sequence of a batch through page
//! numbers that it is handed with its arguments. One dispatch then appends for the whole batch, and one attends.
//!
//! Pages are counted references. A fork copies the list of pages. An append that begins inside a page somebody else
//! also refers to takes a new one, and the kernel that appends copies the positions before: at most one page a layer,
//! and no dispatch of its own. Whether a page counts as shared is decided for the whole batch before any of it is
//! changed, so no sequence writes to a page from which another one copies in the same dispatch.
//!
//! A slab doubles when it is full, up to the size of a binding. When it cannot grow, another slab begins, and a
//! sequence for which there is no room moves there with all its pages of that layer: what a layer of one sequence
//! holds always lies in one slab, so kernels bind one. Sequences in different slabs take a dispatch each.
//! A slab all of whose pages are free gives its memory back to the pool.

use crate::{
    fault::lock,
    gpu::Gpu,
    kernels::{HEAD_DIM_MOST, PAGE},
    pool::{Buffer, Slice},
    recorder::Recorder,
    tensor::quads,
};
use half::f16;
use opt_backend::{CacheDType, CacheLayer, CacheSpec, Error, ErrorKind, Result, check, ndarray::Array2};
use std::{
    collections::HashMap,
    sync::{Arc, Mutex, Weak},
};

/// Pages of a slab to begin with.
pub(crate) const PAGES_FIRST: usize = 8;

/// What decides how keys and values lie in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Shape {
    pub(crate) layers: usize,
    pub(crate) heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) dtype: CacheDType,
}

impl Shape {
    pub(crate) fn width(self) -> usize {
        self.heads * self.head_dim
    }

    /// Quads of a head.
    pub(crate) fn quads(self) -> usize {
        quads(self.head_dim)
    }

    /// Bytes of a head's keys or values at one position.
    fn head_bytes(self) -> usize {
        match self.dtype {
            CacheDType::F16 => 8 * self.quads(),
            CacheDType::Int8 => 4 * self.quads() + 4,
            _ => 16 * self.quads(),
        }
    }

    /// Bytes of a page: keys, then values.
    pub(crate) fn page_bytes(self) -> u64 {
        (2 * PAGE * self.heads * self.head_bytes()) as u64
    }
}

/// A buffer of pages.
#[derive(Default)]
struct Slab {
    buffer: Option<Arc<Buffer>>,
    /// How many caches refer to each page.
    references: Vec<u32>,
    free: Vec<u32>,
}

impl Slab {
    fn release(&mut self, page: u32) {
        if let Some(count) = self.references.get_mut(page as usize) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                self.free.push(page);
            }
        }
        if self.free.len() == self.references.len() {
            *self = Self::default();
        }
    }
}

/// The slabs of one layer.
#[derive(Default)]
pub(crate) struct Slabs(Vec<Slab>);

impl Slabs {
    pub(crate) fn buffer(&self, slab: usize) -> Option<Arc<Buffer>> {
        self.0.get(slab).and_then(|slab| slab.buffer.clone())
    }

    fn release(&mut self, slab: usize, pages: impl IntoIterator<Item = u32>) {
        if let Some(slab) = self.0.get_mut(slab) {
            pages.into_iter().for_each(|page| slab.release(page));
        }
    }

    fn references(&self, slab: usize, page: u32) -> u32 {
        self.0.get(slab).and_then(|slab| slab.references.get(page as usize)).copied().unwrap_or(0)
    }
}

/// The pages of all caches of one shape.
pub(crate) struct Store {
    pub(crate) gpu: Arc<Gpu>,
    pub(crate) shape: Shape,
    pub(crate) layers: Vec<Mutex<Slabs>>,
}

/// The stores in use, by shape.
#[derive(Default)]
pub(crate) struct Stores(Mutex<HashMap<Shape, Weak<Store>>>);

impl Stores {
    pub(crate) fn get(&self, gpu: &Arc<Gpu>, shape: Shape) -> Arc<Store> {
        let mut stores = lock(&self.0);
        if let Some(store) = stores.get(&shape).and_then(Weak::upgrade) {
            return store;
        }
        stores.retain(|_, store| store.strong_count() > 0);
        let layers = (0..shape.layers).map(|_| Mutex::default()).collect();
        let store = Arc::new(Store { gpu: Arc::clone(gpu), shape, layers });
        stores.insert(shape, Arc::downgrade(&store));
        store
    }
}

/// The pages of one layer of a cache.
#[derive(Clone, Default)]
pub(crate) struct Pages {
    pub(crate) slab: usize,
    pub(crate) pages: Vec<u32>,
    /// Positions held.
    pub(crate) len: usize,
}

/// Keys and values of one sequence, all layers.
pub struct Cache {
    pub(crate) store: Arc<Store>,
    pub(crate) layers: Vec<Pages>,
}

impl std::fmt::Debug for Cache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let lengths: Vec<usize> = self.layers.iter().map(|layer| layer.len).collect();
        f.debug_struct("Cache").field("lengths", &lengths).finish_non_exhaustive()
    }
}

/// Positions of one sequence that have been given room: where they go, and what the kernel has to copy first.
pub(crate) struct Room {
    pub(crate) slab: usize,
    /// A page that is shared: its first positions (the length so far, within a page) go to the page that replaces it.
    pub(crate) copy: Option<(u32, u32)>,
    /// References to give up once the whole batch has its room.
    old: Vec<(usize, u32)>,
}

impl Cache {
    pub(crate) fn new(store: Arc<Store>) -> Self {
        let layers = vec![Pages::default(); store.shape.layers];
        Self { store, layers }
    }

    /// The shape of a cache for `spec`, if kernels can do it.
    pub(crate) fn shape(gpu: &Gpu, spec: CacheSpec) -> Result<Shape> {
        let op = "new_cache";
        let shape =
            Shape { layers: spec.layers, heads: spec.heads, head_dim: spec.head_dim, dtype: spec.dtype };
        let refuse = |message: std::fmt::Arguments<'_>| Err(Error::new(ErrorKind::Unsupported, op, message));
        if !matches!(spec.dtype, CacheDType::F32 | CacheDType::F16 | CacheDType::Int8) {
            return refuse(format_args!("no caches held as {:?}", spec.dtype));
        }
        if spec.head_dim > HEAD_DIM_MOST {
            let found = spec.head_dim;
            return refuse(format_args!("expected heads of at most {HEAD_DIM_MOST} elements, found {found}"));
        }
        let elements = spec.heads.checked_mul(spec.head_dim).filter(|width| *width < 1 << 24);
        if elements.is_none() || shape.page_bytes() > gpu.max_binding() {
            let most = gpu.max_binding();
            let (heads, head_dim) = (spec.heads, spec.head_dim);
            return refuse(format_args!("{heads} heads of {head_dim} do not fit a binding of {most} bytes"));
        }
        Ok(shape)
    }

    /// Shares all pages.
    pub(crate) fn fork(&self) -> Self {
        for (slabs, layer) in self.store.layers.iter().zip(&self.layers) {
            let mut slabs = lock(slabs);
            if let Some(slab) = slabs.0.get_mut(layer.slab) {
                for &page in &layer.pages {
                    if let Some(count) = slab.references.get_mut(page as usize) {
                        *count += 1;
                    }
                }
            }
        }
        Self { store: Arc::clone(&self.store), layers: self.layers.clone() }
    }

    /// Shortens every layer to at most `len` positions.
    pub(crate) fn truncate(&mut self, len: usize) {
        for (slabs, layer) in self.store.layers.iter().zip(&mut self.layers) {
            if len < layer.len {
                layer.len = len;
                let given_up = layer.pages.split_off(len.div_ceil(PAGE).min(layer.pages.len()));
                lock(slabs).release(layer.slab, given_up);
            }
        }
    }

    /// The slices of a slab that hold one layer, page after page, and what they are slices of.
    pub(crate) fn page_slice<'a>(&self, buffer: &'a Buffer, page: u32) -> Slice<'a> {
        let bytes = self.store.shape.page_bytes();
        buffer.slice(u64::from(page) * bytes, bytes)
    }
}

impl Drop for Cache {
    fn drop(&mut self) {
        for (slabs, layer) in self.store.layers.iter().zip(&mut self.layers) {
            if !layer.pages.is_empty() {
                lock(slabs).release(layer.slab, std::mem::take(&mut layer.pages));
            }
        }
    }
}

impl Store {
    /// Gives `new` more positions room in each of the layers `all`. The lengths stay; [`Store::settle`] ends it.
    ///
    /// If memory runs out, the caches hold what they held; some may keep spare pages.
    pub(crate) fn make_room(
        &self,
        op: &'static str,
        slabs: &mut Slabs,
        recorder: &mut Recorder,
        all: &mut [(&mut Pages, usize)],
    ) -> Result<Vec<Room>> {
        for (pages, _) in all.iter_mut() {
            // Spare pages, left by a call that failed; a fork may have made them common.
            let spare = pages.pages.split_off(pages.len.div_ceil(PAGE).min(pages.pages.len()));
            slabs.release(pages.slab, spare);
        }
        // Before anything changes.
        let shared: Vec<bool> = all
            .iter()
            .map(|(pages, new)| {
                let within = *new > 0 && !pages.len.is_multiple_of(PAGE);
                let last = pages.pages.get(pages.len / PAGE).copied();
                within && last.is_some_and(|last| slabs.references(pages.slab, last) > 1)
            })
            .collect();
        let mut rooms = Vec::with_capacity(all.len());
        let mut failed = None;
        for ((pages, new), shared) in all.iter_mut().zip(shared) {
            match self.make_room_for_one(op, slabs, recorder, pages, *new, shared) {
                Ok(room) => rooms.push(room),
                Err(error) => {
                    failed = Some(error);
                    break;
                }
            }
        }
        match failed {
            None => Ok(rooms),
            Some(error) => {
                self.undo(slabs, all, rooms);
                Err(error)
            }
        }
    }

    /// Takes back what [`Store::make_room`] has given, before anything was written to it.
    pub(crate) fn undo(&self, slabs: &mut Slabs, all: &mut [(&mut Pages, usize)], mut rooms: Vec<Room>) {
        for ((pages, _), room) in all.iter_mut().zip(&mut rooms) {
            // The page that was to be replaced is the right one still.
            if let Some((old, new)) = room.copy
                && let Some(page) = pages.pages.get_mut(pages.len / PAGE)
            {
                *page = old;
                slabs.release(room.slab, [new]);
                room.old.retain(|given_up| *given_up != (room.slab, old));
            }
        }
        self.settle(slabs, rooms);
    }

    /// Gives up the references that appends have made needless.
    pub(crate) fn settle(&self, slabs: &mut Slabs, rooms: Vec<Room>) {
        for room in rooms {
            room.old.into_iter().for_each(|(slab, page)| slabs.release(slab, [page]));
        }
    }

    fn make_room_for_one(
        &self,
        op: &'static str,
        slabs: &mut Slabs,
        recorder: &mut Recorder,
        pages: &mut Pages,
        new: usize,
        shared: bool,
    ) -> Result<Room> {
        let mut old = Vec::new();
        let wanted = (pages.len + new).div_ceil(PAGE);
        let more = wanted.saturating_sub(pages.pages.len()) + usize::from(shared);
        if more == 0 {
            return Ok(Room { slab: pages.slab, copy: None, old });
        }
        if !self.ensure(op, slabs, recorder, pages.slab, more)? {
            self.move_to_other_slab(op, slabs, recorder, pages, more, &mut old)?;
        }
        let slab = pages.slab;
        let mut copy = None;
        if shared
            && let Some(replaced) = pages.pages.get_mut(pages.len / PAGE)
            && let Some(page) = take(slabs, slab)
        {
            old.push((slab, *replaced));
            copy = Some((*replaced, page));
            *replaced = page;
        }
        while pages.pages.len() < wanted {
            let Some(page) = take(slabs, slab) else {
                return Err(Error::new(ErrorKind::Device, op, "a slab has fewer free pages than it said"));
            };
            pages.pages.push(page);
        }
        Ok(Room { slab, copy, old })
    }

    /// Sees to it that a slab has `more` free pages, growing it if it may; whether it has.
    fn ensure(
        &self,
        op: &'static str,
        slabs: &mut Slabs,
        recorder: &mut Recorder,
        slab: usize,
        more: usize,
    ) -> Result<bool> {
        while slabs.0.len() <= slab {
            slabs.0.push(Slab::default());
        }
        let Some(slab) = slabs.0.get_mut(slab) else { return Ok(false) };
        if slab.free.len() >= more {
            return Ok(true);
        }
        let bytes = self.shape.page_bytes();
        let most = (self.gpu.max_binding() / bytes.max(1)) as usize;
        let held = slab.references.len();
        let needed = held - slab.free.len() + more;
        if needed > most {
            return Ok(false);
        }
        let size = needed.max(2 * held).max(PAGES_FIRST).min(most);
        let buffer = match self.gpu.scratch(op, size as u64 * bytes) {
            Ok(buffer) => buffer,
            // Doubling is a convenience; what is needed may still fit.
            Err(_) if size > needed => self.gpu.scratch(op, needed as u64 * bytes)?,
            Err(error) => return Err(error),
        };
        let size = ((buffer.size() / bytes) as usize).min(most);
        if let Some(old) = &slab.buffer {
            let all = held as u64 * bytes;
            recorder.copy(&self.gpu, old.slice(0, all), buffer.slice(0, all));
        }
        slab.buffer = Some(Arc::new(buffer));
        slab.references.resize(size, 0);
        slab.free.extend((held..size).rev().map(|page| page as u32));
        Ok(true)
    }

    /// Copies all pages to a slab that has room for them and `more`.
    fn move_to_other_slab(
        &self,
        op: &'static str,
        slabs: &mut Slabs,
        recorder: &mut Recorder,
        pages: &mut Pages,
        more: usize,
        old: &mut Vec<(usize, u32)>,
    ) -> Result<()> {
        let needed = pages.pages.len() + more;
        let bytes = self.shape.page_bytes();
        if needed as u64 * bytes > self.gpu.max_binding() {
            let (most, positions) = (self.gpu.max_binding(), needed * PAGE);
            let found =
                format_args!("a layer's keys and values of {positions} positions do not fit {most} bytes");
            return Err(self.gpu.out_of_memory(op, found));
        }
        let from = pages.slab;
        let mut to = 0;
        while to == from || !self.ensure(op, slabs, recorder, to, needed)? {
            to += 1;
        }
        let (Some(source), Some(target)) = (slabs.buffer(from), slabs.buffer(to)) else {
            pages.slab = to;
            return Ok(());
        };
        for page in &mut pages.pages {
            let Some(moved) = take(slabs, to) else { break };
            let slice = |buffer: &'_ Arc<Buffer>, page: u32| (Arc::clone(buffer), u64::from(page) * bytes);
            let ((source, from_at), (target, to_at)) = (slice(&source, *page), slice(&target, moved));
            recorder.copy(&self.gpu, source.slice(from_at, bytes), target.slice(to_at, bytes));
            old.push((from, *page));
            *page = moved;
        }
        pages.slab = to;
        Ok(())
    }

    /// Keys and values of `len` positions from the bytes of their pages.
    pub(crate) fn decode(shape: Shape, len: usize, bytes: &[u8]) -> CacheLayer {
        let mut keys = Array2::zeros((len, shape.width()));
        let mut values = keys.clone();
        let head_bytes = shape.head_bytes();
        let row = shape.heads * head_bytes;
        for (index, page) in bytes.chunks_exact((shape.page_bytes() as usize).max(1)).enumerate() {
            let (page_keys, page_values) = page.split_at(PAGE * row);
            for (part, to) in [(page_keys, &mut keys), (page_values, &mut values)] {
                for (slot, from) in part.chunks_exact(row.max(1)).enumerate() {
                    let position = index * PAGE + slot;
                    if position >= len {
                        break;
                    }
                    let mut to = to.row_mut(position);
                    for (head, from) in from.chunks_exact(head_bytes.max(1)).enumerate() {
                        let elements = to.iter_mut().skip(head * shape.head_dim).take(shape.head_dim);
                        decode_head(shape, from, elements);
                    }
                }
            }
        }
        CacheLayer { keys, values }
    }
}

/// Widens one head of one position.
fn decode_head<'a>(shape: Shape, from: &[u8], to: impl Iterator<Item = &'a mut f32>) {
    let float = |b: &[u8]| f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
    match shape.dtype {
        CacheDType::F16 => to.zip(from.chunks_exact(2)).for_each(|(to, b)| {
            *to = f16::from_le_bytes([b[0], b[1]]).to_f32();
        }),
        CacheDType::Int8 => {
            let scale = float(&from[4 * shape.quads()..]);
            to.zip(from).for_each(|(to, &q)| *to = f32::from(q as i8) * scale);
        }
        _ => to.zip(from.chunks_exact(4)).for_each(|(to, b)| *to = float(b)),
    }
}

/// A free page, with one reference.
fn take(slabs: &mut Slabs, slab: usize) -> Option<u32> {
    let slab = slabs.0.get_mut(slab)?;
    let page = slab.free.pop()?;
    *slab.references.get_mut(page as usize)? = 1;
    Some(page)
}

/// Fails unless a cache has the layer and rows of `width` fit.
pub(crate) fn check_fits(op: &'static str, cache: &Cache, layer: usize, width: usize) -> Result<()> {
    check::layer(op, layer, cache.layers.len())?;
    check::width(op, width, cache.store.shape.width())
}
