//! Linears and the LM head: rows times packed panels.
//!
//! Two limits rule here. One row (decode) reads every weight once for two operations each: memory bandwidth decides,
//! so panels are streamed and shared out in pieces. Hundreds of rows (prefill) do hundreds of operations per weight:
//! the multiply-add units decide, so rows are woven into tiles, and a block of [`DEPTH`] x panel stays in the first
//! cache while all row tiles pass by it.
//!
//! Both add up in the same order: a chain over each block of [`DEPTH`], then the blocks one after the other, then
//! bias, then activation or residual. So the result of a row is bit-equal however many rows are computed with it.

use crate::{
    Machine,
    memory::{Aligned, Shared},
    output::{Output, Product, TILE},
    pack::{Packed, Source},
    simd::{Kernel, Operand, Simd, Weight},
    tile::{Apart, At, Woven, tile},
};
use opt_backend::Result;
use std::ops::Range;

/// Depth of a block: this many places of a panel of f32, or of pairs of bf16, are 32 KiB with AVX-512 and fit the first
/// cache.
pub(crate) const DEPTH: usize = 256;
/// Rows whose woven block of [`DEPTH`] should stay in the second cache.
const ROW_GROUP: usize = 516;
/// Tiles up to which reading a weight from memory takes about as long as multiplying by it.
const STREAMED_TILES: usize = 3;
/// Panels of a task of many rows: their outputs, too, are visited block after block and should stay in the cache.
const PANELS: usize = 6;
/// Bytes between the weights that are multiplied and those that are asked for, when each is used once: hardware
/// prefetch starts anew at every page of 4 KiB.
const AHEAD: usize = 4096;
/// Bytes of weights that are worth a task of their own when one row is multiplied.
const TASK_BYTES: usize = 96 << 10;

/// Computes the products of `x`, `[rows, depth]`, in f32 and in one parallel region.
///
/// # Safety
/// Every weight has `depth` places a row and panels as wide as the level's, and none is [`Packed::Bf16x2`]; bias,
/// residual and output have the fitting sizes, and nobody else accesses the outputs.
pub(crate) unsafe fn multiply(
    machine: Machine<'_>,
    x: &[f32],
    shape: [usize; 2],
    products: &[&Product<'_>],
) -> Result<()> {
    let level = machine.level;
    let products: Vec<_> = products.iter().map(|&product| (product, product.weights)).collect();
    let run = |block: Block<'_, f32, &Packed>| match block.weights {
        Packed::F32(panels) => level.run(block.with(panels)),
        Packed::F16(panels) => level.run(block.with(panels)),
        Packed::BF16(panels) => level.run(block.with(panels)),
        Packed::Codes(codes) => level.run(block.with(&**codes)),
        Packed::Bf16x2(_) => unreachable!("pairs of bf16 are multiplied by such"),
    };
    // SAFETY: the caller's promise.
    unsafe { multiply_by(machine, x, shape, &products, run) }
}

/// Computes the products of `x`, `[rows, depth]`, in one parallel region: `run` is called for each block of them.
///
/// # Safety
/// As that of [`multiply`], but for how weights are packed: `run` is the one to know.
pub(crate) unsafe fn multiply_by<X: Operand, W: Copy + Sync>(
    machine: Machine<'_>,
    x: &[X],
    [rows, depth]: [usize; 2],
    products: &[(&Product<'_>, W)],
    run: impl Fn(Block<'_, X, W>) + Sync,
) -> Result<()> {
    let Machine { pool, level, .. } = machine;
    let sizes = level.sizes();
    let woven = if rows > sizes.few { Some(weave(machine, x, [rows, depth])?) } else { None };
    // Row groups of about equal size, each a whole number of tiles.
    let groups = if woven.is_some() { rows.div_ceil(ROW_GROUP) } else { 1 };
    let group_rows = rows.div_ceil(groups).next_multiple_of(if woven.is_some() { sizes.rows } else { 1 });
    // Panels a task: enough tasks to even out threads that are slowed down, none too small.
    let panels: usize = products.iter().map(|(p, _)| p.weights.panels()).sum();
    let bytes = products.iter().map(|(p, _)| p.weights.panel_bytes()).max().unwrap_or(0).max(1);
    let share = panels / (pool.threads() * 8);
    let share = if woven.is_some() { share.clamp(1, PANELS) } else { share.max(TASK_BYTES / bytes).max(1) };
    let tasks: Vec<(usize, usize, usize)> = (0..groups)
        .flat_map(|group| {
            products.iter().enumerate().flat_map(move |(i, (product, _))| {
                (0..product.weights.panels()).step_by(share).map(move |first| (group, i, first))
            })
        })
        .collect();
    let body = |task: usize| {
        let (group, i, first) = tasks[task];
        let (product, weights) = products[i];
        let output = Output { product, outputs: product.weights.shape()[0], level };
        let row_range = group * group_rows..rows.min((group + 1) * group_rows);
        let panels = first..product.weights.panels().min(first + share);
        run(Block { x, woven: woven.as_ref(), rows, row_range, depth, weights, panels, output });
    };
    // A region costs more than a product this small.
    if rows * depth * panels < 1 << 12 {
        (0..tasks.len()).for_each(body);
        return Ok(());
    }
    pool.run(tasks.len(), &body)
}

/// Interleaves rows by tiles: for each block of [`DEPTH`], for each tile, `[block depth, tile rows]`. Missing rows of
/// the last tile are zeros.
fn weave<X: Operand>(machine: Machine<'_>, x: &[X], [rows, depth]: [usize; 2]) -> Result<Aligned<X>> {
    let Machine { pool, guards, level, .. } = machine;
    let tile_rows = level.sizes().rows;
    let tiles = rows.div_ceil(tile_rows);
    let mut woven = Aligned::<X>::zeroed(guards, tiles * tile_rows * depth, "linear")?;
    let target = Shared(woven.as_mut_slice().as_mut_ptr());
    pool.run(tiles, &|t| {
        let first = t * tile_rows;
        for start in (0..depth).step_by(DEPTH) {
            let block = DEPTH.min(depth - start);
            // SAFETY: the part of this tile and block, which belongs to this task alone.
            let part = unsafe {
                std::slice::from_raw_parts_mut(
                    target.at(start * tiles * tile_rows + first * block),
                    block * tile_rows,
                )
            };
            for (r, row) in (first..rows.min(first + tile_rows)).enumerate() {
                let row = &x[row * depth + start..][..block];
                part.iter_mut().skip(r).step_by(tile_rows).zip(row).for_each(|(p, &x)| *p = x);
            }
        }
    })?;
    Ok(woven)
}

/// Some panels times some rows.
pub(crate) struct Block<'a, X: Operand, W> {
    x: &'a [X],
    woven: Option<&'a Aligned<X>>,
    rows: usize,
    row_range: Range<usize>,
    depth: usize,
    weights: W,
    panels: Range<usize>,
    output: Output<'a>,
}

impl<'a, X: Operand, W> Block<'a, X, W> {
    /// The same block of `weights`, whose type is known now.
    fn with<V>(self, weights: V) -> Block<'a, X, V> {
        let Self { x, woven, rows, row_range, depth, weights: _, panels, output } = self;
        Block { x, woven, rows, row_range, depth, weights, panels, output }
    }
}

impl<X: Operand, P: Source<Operand = X>> Kernel for Block<'_, X, &P> {
    type Output = ();
    const BF16: bool = X::BF16;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        if self.depth == 0 {
            for panel in self.panels.clone() {
                // SAFETY: as in `few`.
                unsafe {
                    for row in self.row_range.clone() {
                        let (out, columns) = self.output.target(s, row, panel);
                        for column in 0..columns {
                            *out.add(column) = 0.0;
                        }
                    }
                    self.output.finish(s, self.row_range.clone(), panel);
                }
            }
            return;
        }
        match self.woven {
            // A few tiles: memory decides, so each panel is streamed from first to last byte.
            Some(woven) if self.streams::<S>() => {
                for panel in self.panels.clone() {
                    self.many::<S>(s, woven.as_slice(), panel..panel + 1);
                }
            }
            Some(woven) => self.many::<S>(s, woven.as_slice(), self.panels.clone()),
            None => match self.rows {
                1 => self.few::<S, 1>(s),
                2 => self.few::<S, 2>(s),
                _ if S::FEW == 4 || self.rows <= 4 => self.few::<S, 4>(s),
                _ => self.few::<S, 8>(s),
            },
        }
    }
}

impl<X: Operand, P: Source<Operand = X>> Block<'_, X, &P> {
    /// At most `M` rows, read where they lie: each panel is streamed once.
    #[inline(always)]
    fn few<S: Simd, const M: usize>(&self, s: S) {
        let width = 2 * S::LANES;
        let mut sums = [0.0_f32; TILE];
        let mut wide = Wide::new();
        for panel in self.panels.clone() {
            let mut start = 0;
            while start < self.depth {
                let block = DEPTH.min(self.depth - start);
                // SAFETY: x has `rows` rows of `depth`, the panel `depth` rows of two vectors, `sums` at least M.
                unsafe {
                    let a = Apart::<X, M>::new(self.x.as_ptr().add(start), self.depth, self.rows);
                    let out = At { start: sums.as_mut_ptr(), stride: width };
                    match self.weights.elements(panel, start) {
                        Some(elements) => {
                            let b = At { start: elements, stride: width };
                            let ahead = AHEAD / size_of::<P::Element>();
                            tile::<S, P::Element, _, M, 2>(s, block, a, b, out, start > 0, ahead);
                        }
                        None => {
                            self.weights.widen(s, panel, start, block, &mut wide);
                            let b = At { start: wide.0.as_ptr(), stride: width };
                            tile::<S, X, _, M, 2>(s, block, a, b, out, start > 0, 0);
                        }
                    }
                }
                start += block;
            }
            // SAFETY: each row and column of this panel belongs to this task alone.
            unsafe {
                self.output.copy_out(s, &sums, 0..self.rows, panel);
                self.output.finish(s, 0..self.rows, panel);
            }
        }
    }

    /// Whether weights are used so few times that reading them takes as long as multiplying.
    #[inline(always)]
    fn streams<S: Simd>(&self) -> bool {
        self.row_range.len() <= STREAMED_TILES * S::ROWS
    }

    /// As [`Block::many_of`], by tiles as large as the level has them.
    #[inline(always)]
    fn many<S: Simd>(&self, s: S, woven: &[X], panels: Range<usize>) {
        if S::ROWS == 12 {
            self.many_of::<S, 12>(s, woven, panels);
        } else {
            self.many_of::<S, 6>(s, woven, panels);
        }
    }

    /// Woven rows: block by block, so that panel block and woven block stay in their caches.
    #[inline(always)]
    fn many_of<S: Simd, const M: usize>(&self, s: S, woven: &[X], panels: Range<usize>) {
        let width = 2 * S::LANES;
        let padded = self.rows.next_multiple_of(M);
        let mut sums = [0.0_f32; TILE];
        let mut wide = Wide::new();
        let mut start = 0;
        while start < self.depth {
            let block = DEPTH.min(self.depth - start);
            let last = start + block == self.depth;
            for panel in panels.clone() {
                // What is no operand as it lies is widened once for all rows.
                let mut ahead = 0;
                let elements: *const X = match self.weights.elements(panel, start) {
                    Some(elements) if P::Element::IS_OPERAND => {
                        ahead = if self.streams::<S>() { AHEAD / size_of::<X>() } else { 0 };
                        elements.cast()
                    }
                    _ => {
                        // SAFETY: the panel has the places start..start + block, at most DEPTH.
                        unsafe { self.weights.widen(s, panel, start, block, &mut wide) };
                        wide.0.as_ptr()
                    }
                };
                // While this block is multiplied, the next one is fetched, some lines with each tile; or what comes next
                // by the first tile, as it goes.
                let next = self.next_block(&panels, panel, start, block);
                let lines = if ahead == 0 { self.weights.bytes(block) / 64 } else { 0 };
                let tiles = self.row_range.len().div_ceil(M);
                let full_width = (panel + 1) * width <= self.output.outputs;
                for (i, row) in self.row_range.clone().step_by(M).enumerate() {
                    for line in lines * i / tiles..lines * (i + 1) / tiles {
                        s.prefetch_far(next.wrapping_byte_add(line * 64));
                    }
                    let rows = row..self.row_range.end.min(row + M);
                    let ahead = if i == 0 { ahead } else { 0 };
                    // SAFETY: the woven block of this tile has M rows of `block`; the outputs of these rows and this
                    // panel exist and belong to this task alone. A tile that reaches past them goes by way of `sums`.
                    unsafe {
                        let a = Woven(woven.as_ptr().add(start * padded + row * block));
                        let b = At { start: elements, stride: width };
                        if rows.len() == M && full_width {
                            let out = At {
                                start: self.output.target(s, row, panel).0,
                                stride: self.output.outputs,
                            };
                            tile::<S, X, _, M, 2>(s, block, a, b, out, start > 0, ahead);
                        } else {
                            let out = At { start: sums.as_mut_ptr(), stride: width };
                            if start > 0 {
                                self.output.copy_in(s, &mut sums, rows.clone(), panel);
                            }
                            tile::<S, X, _, M, 2>(s, block, a, b, out, start > 0, ahead);
                            self.output.copy_out(s, &sums, rows.clone(), panel);
                        }
                        if last {
                            self.output.finish(s, rows, panel);
                        }
                    }
                }
            }
            start += block;
        }
    }

    /// The block of `panels` that comes after this one; any address will do where there is none.
    #[inline(always)]
    fn next_block(&self, panels: &Range<usize>, panel: usize, start: usize, block: usize) -> *const u8 {
        let (panel, start) =
            if panel + 1 < panels.end { (panel + 1, start) } else { (panels.start, start + block) };
        self.weights.address(panel, start)
    }
}

/// A widened panel block; aligned, so that no load straddles two cache lines.
#[repr(align(64))]
pub struct Wide<X>(pub(crate) [X; DEPTH * 32]);

impl<X: Operand> Wide<X> {
    #[inline(always)]
    pub(crate) fn new() -> Self {
        Self([X::default(); DEPTH * 32])
    }
}
