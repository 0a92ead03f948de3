//! The KV cache of one sequence: blocks of [`BLOCK`] positions, shared between forks until written to.
//!
//! A block holds, for each head, its keys as `[head_dim, positions]` and its values as `[positions, head_dim]`: the
//! two layouts in which scores and weighted sums stream memory through the register tile. Blocks are counted
//! references: a fork copies the list, and an append copies the last block if another cache still refers to it.
//! Positions past the length hold anything.

use half::{f16, slice::HalfFloatSliceExt};
use opt_backend::{CacheDType, CacheLayer, CacheSpec, Error, ErrorKind, Result, ndarray::Array2};
use opt_kernels::{
    memory::{Aligned, Guards, Shared, reserve},
    pool::Pool,
};
use std::{
    ops::Range,
    sync::{Arc, OnceLock},
};

/// Positions of a block: two vectors of the widest instruction set. Small, because a short sequence holds one block
/// a layer, and because that is what an append after a fork copies.
pub(crate) const BLOCK: usize = 32;

/// Keys and values of one sequence, all layers. Created by [`opt_backend::Backend::new_cache`].
pub struct Cache {
    pub(crate) shape: Shape,
    pub(crate) layers: Vec<Layer>,
}

/// The sizes that blocks share.
#[derive(Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) dtype: CacheDType,
}

/// The blocks of one layer.
#[derive(Clone, Default)]
pub(crate) struct Layer {
    pub(crate) blocks: Vec<Arc<Block>>,
    pub(crate) len: usize,
}

/// Keys and values of [`BLOCK`] positions.
pub(crate) struct Block {
    keys: Elements,
    values: Elements,
}

/// Keys or values.
#[derive(Clone, Copy)]
pub(crate) enum Part {
    Keys,
    Values,
}

/// The keys or values of one head in a block, as they lie.
#[derive(Clone, Copy)]
pub(crate) enum Chunk<'a> {
    F32(&'a [f32]),
    F16(&'a [f16]),
    /// With a scale for each position: a column of keys, a row of values.
    Int8 {
        codes: &'a [i8],
        scales: &'a [f32],
        part: Part,
    },
}

impl<'a> Chunk<'a> {
    /// The elements in place or, if they are no f32, widened into `wide`, which has as many.
    pub(crate) fn in_f32(self, wide: &'a mut [f32]) -> &'a [f32] {
        match self {
            Chunk::F32(data) => return data,
            Chunk::F16(data) => data.convert_to_f32_slice(wide),
            Chunk::Int8 { codes, scales, part: Part::Keys } => {
                for (wide, codes) in wide.chunks_exact_mut(BLOCK).zip(codes.chunks_exact(BLOCK)) {
                    let codes = codes.iter().zip(scales);
                    wide.iter_mut().zip(codes).for_each(|(x, (&q, scale))| *x = f32::from(q) * scale);
                }
            }
            Chunk::Int8 { codes, scales, part: Part::Values } => {
                let depth = codes.len() / BLOCK;
                let rows = wide.chunks_exact_mut(depth).zip(codes.chunks_exact(depth));
                for ((wide, codes), scale) in rows.zip(scales) {
                    wide.iter_mut().zip(codes).for_each(|(x, &q)| *x = f32::from(q) * scale);
                }
            }
        }
        wide
    }
}

enum Elements {
    F32(Aligned<f32>),
    F16(Aligned<f16>),
    /// Elements and a scale per head and position, `[heads, BLOCK]`.
    Int8(Vec<i8>, Vec<f32>),
}

impl std::fmt::Debug for Cache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let lengths: Vec<usize> = self.layers.iter().map(|layer| layer.len).collect();
        f.debug_struct("Cache").field("lengths", &lengths).finish_non_exhaustive()
    }
}

impl Shape {
    pub(crate) fn width(self) -> usize {
        self.heads * self.head_dim
    }

    /// Distance of two positions of a head's values: whole vectors of the widest instruction set.
    pub(crate) fn value_stride(self) -> usize {
        self.head_dim.next_multiple_of(16)
    }
}

impl Cache {
    pub(crate) fn new(spec: CacheSpec) -> Result<Self> {
        let fail = |message: &str| Err(Error::new(ErrorKind::Shape, "new_cache", message));
        if spec.heads == 0 || spec.head_dim == 0 {
            return fail("expected at least one head of at least one element");
        }
        if spec.heads.checked_mul(spec.head_dim).and_then(|n| n.checked_mul(16 * BLOCK * 4)).is_none() {
            return fail("the heads are too wide to address");
        }
        let mut layers = reserve("new_cache", spec.layers)?;
        layers.resize_with(spec.layers, Layer::default);
        Ok(Self { shape: Shape { heads: spec.heads, head_dim: spec.head_dim, dtype: spec.dtype }, layers })
    }

    /// Fails unless there is a layer `layer` and rows of `width` fit.
    pub(crate) fn check(&self, op: &'static str, layer: usize, width: usize) -> Result<()> {
        if layer >= self.layers.len() {
            let count = self.layers.len();
            return Err(Error::shape(op, format_args!("expected a layer below {count}, found {layer}")));
        }
        opt_backend::check::width(op, width, self.shape.width())
    }

    /// Calls `body` with each cache and its number, in one parallel region. If some fail, the error of one of them.
    pub(crate) fn for_each(
        pool: &Pool,
        caches: &mut [&mut Cache],
        body: impl Fn(usize, &mut Cache) -> Result<()> + Sync,
    ) -> Result<()> {
        let (each, failed) = (Shared(caches.as_mut_ptr()), OnceLock::new());
        pool.run(caches.len(), &|i| {
            // SAFETY: there is a cache `i`, and it belongs to this task alone.
            if let Err(e) = body(i, unsafe { &mut **each.at(i) }) {
                _ = failed.set(e);
            }
        })?;
        failed.into_inner().map_or(Ok(()), Err)
    }

    pub(crate) fn fork(&self) -> Self {
        Self { shape: self.shape, layers: self.layers.clone() }
    }

    pub(crate) fn truncate(&mut self, len: usize) {
        for layer in &mut self.layers {
            if len < layer.len {
                layer.len = len;
                layer.blocks.truncate(len.div_ceil(BLOCK));
            }
        }
    }
}

impl Layer {
    /// Appends rows of `keys` and `values`, both `[_, width]`. If memory runs out, nothing has been appended.
    pub(crate) fn append(
        &mut self,
        shape: Shape,
        keys: &[f32],
        values: &[f32],
        rows: Range<usize>,
    ) -> Result<()> {
        let end = self.len + rows.len();
        self.blocks.truncate(self.len.div_ceil(BLOCK));
        if let Some(last) = self.blocks.last_mut()
            && end > self.len
            && !self.len.is_multiple_of(BLOCK)
            && Arc::get_mut(last).is_none()
        {
            *last = Arc::new(last.copy(shape)?);
        }
        while self.blocks.len() < end.div_ceil(BLOCK) {
            self.blocks.push(Arc::new(Block::new(shape)?));
        }
        let mut row = rows.start;
        while self.len < end {
            let slot = self.len % BLOCK;
            let count = (BLOCK - slot).min(end - self.len);
            if let Some(block) = self.blocks.get_mut(self.len / BLOCK).and_then(Arc::get_mut) {
                block.keys.write_keys(shape, keys, row, slot..slot + count);
                block.values.write_values(shape, values, row, slot..slot + count);
            }
            row += count;
            self.len += count;
        }
        Ok(())
    }

    /// Everything as host arrays.
    pub(crate) fn read(&self, shape: Shape) -> CacheLayer {
        let mut keys = Array2::zeros((self.len, shape.width()));
        let mut values = keys.clone();
        let (head_dim, stride) = (shape.head_dim, shape.value_stride());
        let mut wide = [vec![0.0; head_dim * BLOCK], vec![0.0; stride * BLOCK]];
        for (i, block) in self.blocks.iter().enumerate() {
            for head in 0..shape.heads {
                let [k, v] = &mut wide;
                let (k, v) = block.head(shape, head, k, v);
                for position in i * BLOCK..self.len.min((i + 1) * BLOCK) {
                    for d in 0..head_dim {
                        keys[[position, head * head_dim + d]] = k[d * BLOCK + position % BLOCK];
                        values[[position, head * head_dim + d]] = v[position % BLOCK * stride + d];
                    }
                }
            }
        }
        CacheLayer { keys, values }
    }
}

impl Block {
    fn new(shape: Shape) -> Result<Self> {
        Ok(Self {
            keys: Elements::new(shape, shape.head_dim)?,
            values: Elements::new(shape, shape.value_stride())?,
        })
    }

    fn copy(&self, shape: Shape) -> Result<Self> {
        let mut copy = Self::new(shape)?;
        copy.keys.copy_from(&self.keys);
        copy.values.copy_from(&self.values);
        Ok(copy)
    }

    /// Keys `[head_dim, BLOCK]` and values `[BLOCK, value stride]` of one head, in place or widened into `k` and `v`
    /// of those sizes.
    pub(crate) fn head<'a>(
        &'a self,
        shape: Shape,
        head: usize,
        k: &'a mut [f32],
        v: &'a mut [f32],
    ) -> (&'a [f32], &'a [f32]) {
        (self.chunk(shape, Part::Keys, head).in_f32(k), self.chunk(shape, Part::Values, head).in_f32(v))
    }

    /// The keys or the values of one head, as they lie.
    #[inline(always)]
    pub(crate) fn chunk(&self, shape: Shape, part: Part, head: usize) -> Chunk<'_> {
        let (elements, depth) = match part {
            Part::Keys => (&self.keys, shape.head_dim),
            Part::Values => (&self.values, shape.value_stride()),
        };
        let of = head * depth * BLOCK..(head + 1) * depth * BLOCK;
        match elements {
            Elements::F32(data) => Chunk::F32(&data.as_slice()[of]),
            Elements::F16(data) => Chunk::F16(&data.as_slice()[of]),
            Elements::Int8(data, scales) => {
                Chunk::Int8 { codes: &data[of], scales: &scales[head * BLOCK..(head + 1) * BLOCK], part }
            }
        }
    }
}

impl Elements {
    /// `depth` elements a head and position.
    fn new(shape: Shape, depth: usize) -> Result<Self> {
        let len = shape.heads * depth * BLOCK;
        fn zeros<T: Copy + Default>(len: usize) -> Result<Vec<T>> {
            let mut vec = reserve("cache", len)?;
            vec.resize(len, T::default());
            Ok(vec)
        }
        // Blocks are written through slices, within which bounds are checked.
        let guards = &Guards::default();
        match shape.dtype {
            CacheDType::F32 => Ok(Elements::F32(Aligned::zeroed(guards, len, "cache")?)),
            CacheDType::F16 => Ok(Elements::F16(Aligned::zeroed(guards, len, "cache")?)),
            CacheDType::Int8 => Ok(Elements::Int8(zeros(len)?, zeros(shape.heads * BLOCK)?)),
            other => {
                Err(Error::new(ErrorKind::Unsupported, "cache", format_args!("no {other:?} caches here")))
            }
        }
    }

    fn copy_from(&mut self, other: &Self) {
        match (self, other) {
            (Elements::F32(to), Elements::F32(from)) => to.as_mut_slice().copy_from_slice(from.as_slice()),
            (Elements::F16(to), Elements::F16(from)) => to.as_mut_slice().copy_from_slice(from.as_slice()),
            (Elements::Int8(to, scales), Elements::Int8(from, from_scales)) => {
                to.copy_from_slice(from);
                scales.copy_from_slice(from_scales);
            }
            // Both were made for one shape.
            _ => {}
        }
    }

    /// Writes keys, transposed: rows from `row` on become the positions `slots`.
    fn write_keys(&mut self, shape: Shape, rows: &[f32], row: usize, slots: Range<usize>) {
        let width = shape.width();
        let rows = &rows[row * width..][..slots.len() * width];
        match self {
            Elements::F32(data) => transpose(data.as_mut_slice(), rows, width, slots, |x| x),
            Elements::F16(data) => transpose(data.as_mut_slice(), rows, width, slots, f16::from_f32),
            Elements::Int8(data, scales) => {
                for (slot, row) in slots.zip(rows.chunks_exact(width)) {
                    for (head, row) in row.chunks_exact(shape.head_dim).enumerate() {
                        let scale = int8_scale(row);
                        scales[head * BLOCK + slot] = scale;
                        let to = data[head * shape.head_dim * BLOCK..].iter_mut().skip(slot).step_by(BLOCK);
                        to.zip(row).for_each(|(q, &x)| *q = to_int8(x, scale));
                    }
                }
            }
        }
    }

    /// Writes values: rows from `row` on become the positions `slots`.
    fn write_values(&mut self, shape: Shape, rows: &[f32], row: usize, slots: Range<usize>) {
        let (width, stride) = (shape.width(), shape.value_stride());
        for (slot, row) in slots.zip(rows[row * width..].chunks_exact(width)) {
            for (head, row) in row.chunks_exact(shape.head_dim).enumerate() {
                let to = (head * BLOCK + slot) * stride..(head * BLOCK + slot) * stride + shape.head_dim;
                match self {
                    Elements::F32(data) => data.as_mut_slice()[to].copy_from_slice(row),
                    Elements::F16(data) => {
                        let to = data.as_mut_slice()[to].iter_mut();
                        to.zip(row).for_each(|(h, &x)| *h = f16::from_f32(x));
                    }
                    Elements::Int8(data, scales) => {
                        let scale = int8_scale(row);
                        scales[head * BLOCK + slot] = scale;
                        data[to].iter_mut().zip(row).for_each(|(q, &x)| *q = to_int8(x, scale));
                    }
                }
            }
        }
    }
}

fn transpose<T>(to: &mut [T], rows: &[f32], width: usize, slots: Range<usize>, convert: impl Fn(f32) -> T) {
    for (column, to) in to.chunks_exact_mut(BLOCK).enumerate() {
        let from = rows[column..].iter().step_by(width);
        to[slots.clone()].iter_mut().zip(from).for_each(|(t, &x)| *t = convert(x));
    }
}

/// The step of symmetric quantization: the largest magnitude becomes 127.
fn int8_scale(row: &[f32]) -> f32 {
    row.iter().fold(0.0_f32, |max, x| max.max(x.abs())) / 127.0
}

fn to_int8(x: f32, scale: f32) -> i8 {
    if scale == 0.0 { 0 } else { (x / scale).round() as i8 }
}
