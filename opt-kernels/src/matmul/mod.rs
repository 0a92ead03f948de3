//! Products of matrices that lie in row order, and of such with the transpose of packed weights.
//!
//! Nothing is packed ahead: what a gradient multiplies by has just been computed and is used once. The left operand is
//! woven some megabytes at a time; of the right one, a task makes one block of a panel at a time, in the first cache,
//! and multiplies all rows of its share by it. Sums are in the order of `gemm.rs`: a chain over each block of
//! 256 places, then the blocks one after the other. So results do not depend on how work is shared out, and those
//! of f32 equal those of a packed weight, bit by bit.

mod left;
mod right;

use crate::{
    Machine,
    gemm::{DEPTH, Wide},
    memory::{Aligned, Number, Shared},
    output::TILE,
    pack::Packed,
    simd::{Bf16x2, Kernel, Operand, Simd},
    tile::{At, Woven, tile},
};
use left::Left;
use opt_backend::{DType, Layout, Result};
pub(crate) use right::{Columns, Right};
use right::{Rows, Transposed, TransposedPairs};
use std::ops::Range;

/// Bytes of the left operand that are woven at a time.
const WOVEN: usize = 8 << 20;
/// Rows of a task: their woven block of [`DEPTH`] should stay in the second cache.
const ROW_GROUP: usize = 516;
/// Panels of a task at most: their outputs, too, are visited block after block.
const PANELS: usize = 6;
/// Tasks for each thread, so that one that is slowed down does not hold up the others.
const TASKS: usize = 4;

/// Where a product goes: `[rows, columns]` in row order.
#[derive(Clone, Copy)]
pub struct Out {
    pub target: Shared<f32>,
    /// Whether the product is added to what is there; else every element is written.
    pub add: bool,
}

/// The product of `a` and `b`, whose shapes `layout` fits, of numbers rounded to bf16 if `dtype` is that and the machine
/// multiplies bf16; else as they are.
///
/// # Safety
/// `out` has room for the product, has been written if it is added to, and nobody else accesses it.
pub unsafe fn multiply(
    machine: Machine<'_>,
    (a, a_shape): (&[f32], [usize; 2]),
    (b, b_shape): (&[f32], [usize; 2]),
    layout: Layout,
    dtype: DType,
    out: Out,
) -> Result<()> {
    let [_, outputs] = layout.shape(a_shape, b_shape)?;
    let left = Left::new(a, a_shape, layout == Layout::TransposedTimes);
    let pairs = dtype == DType::BF16 && machine.level.bf16_dot();
    // SAFETY: the caller's promise.
    unsafe {
        match layout {
            Layout::TimesTransposed => {
                let right = Columns { data: b, depth: left.depth, outputs };
                if pairs {
                    run::<Bf16x2, _>(machine, left, &right, out)
                } else {
                    run::<f32, _>(machine, left, &right, out)
                }
            }
            Layout::Times | Layout::TransposedTimes => {
                let right = Rows { data: b, depth: left.depth, outputs };
                if pairs {
                    run::<Bf16x2, _>(machine, left, &right, out)
                } else {
                    run::<f32, _>(machine, left, &right, out)
                }
            }
        }
    }
}

/// The product of rows `[rows, outputs]` and a weight `[outputs, inputs]` as it is packed: `[rows, places]`, places being
/// the weight's inputs or, if it is quantized and has them in an order of its own, [`crate::quant::Codes::places`].
///
/// # Safety
/// As [`multiply`]; the weight was packed for the machine's level and has as many outputs as rows have elements.
pub unsafe fn multiply_by_transpose(
    machine: Machine<'_>,
    x: &[f32],
    shape: [usize; 2],
    weight: &Packed,
    out: Out,
) -> Result<()> {
    let left = Left::new(x, shape, false);
    let [_, inputs] = weight.shape();
    // SAFETY: the caller's promise.
    unsafe {
        match weight {
            Packed::F32(panels) => run::<f32, _>(machine, left, &Transposed::new(panels, inputs), out),
            Packed::F16(panels) => run::<f32, _>(machine, left, &Transposed::new(panels, inputs), out),
            Packed::BF16(panels) => run::<f32, _>(machine, left, &Transposed::new(panels, inputs), out),
            Packed::Codes(codes) => {
                run::<f32, _>(machine, left, &Transposed::new(&**codes, codes.places()), out)
            }
            Packed::Bf16x2(panels) => {
                run::<Bf16x2, _>(machine, left, &TransposedPairs::new(panels, inputs), out)
            }
        }
    }
}

/// # Safety
/// As [`multiply`].
unsafe fn run<X: Operand + Number, R: Right<X>>(
    machine: Machine<'_>,
    left: Left<'_>,
    right: &R,
    out: Out,
) -> Result<()> {
    let Machine { pool, guards, level, .. } = machine;
    let sizes = level.sizes();
    let (rows, places, outputs) = (left.rows, left.depth.div_ceil(X::INPUTS), right.outputs());
    if rows == 0 || outputs == 0 {
        return Ok(());
    }
    if places == 0 {
        if !out.add {
            // SAFETY: the output has this size.
            unsafe { out.target.at(0).write_bytes(0, rows * outputs) };
        }
        return Ok(());
    }
    // Chunks of the left operand: all rows if they are few, and as many blocks of their depth as there is room for.
    let held = WOVEN / size_of::<X>();
    let chunk_rows = rows.min((held / places.min(8 * DEPTH) / sizes.rows).max(1) * sizes.rows);
    let chunk_rows = rows.div_ceil(rows.div_ceil(chunk_rows)).next_multiple_of(sizes.rows);
    let chunk_places = (held / chunk_rows / DEPTH).max(1) * DEPTH;
    let panels = outputs.div_ceil(sizes.panel);
    let mut woven = Aligned::<X>::zeroed(guards, chunk_rows * places.min(chunk_places), "matmul")?;
    for first in (0..rows).step_by(chunk_rows) {
        let chunk = first..rows.min(first + chunk_rows);
        // Row groups of about equal size and whole tiles; more of them where panels are too few to share out.
        let tiles = chunk.len().div_ceil(sizes.rows);
        let wanted = pool.threads() * TASKS;
        let groups = chunk.len().div_ceil(ROW_GROUP).max(wanted.div_ceil(panels).min(tiles.div_ceil(4)));
        let group_tiles = tiles.div_ceil(groups);
        let groups = tiles.div_ceil(group_tiles);
        let share = (panels * groups / wanted).clamp(1, PANELS);
        let shares = panels.div_ceil(share);
        for start in (0..places).step_by(chunk_places) {
            let depth = start..places.min(start + chunk_places);
            let target = Shared(woven.as_mut_slice().as_mut_ptr());
            let weave = |t: usize| {
                let tile = t * sizes.rows..chunk.len().min((t + 1) * sizes.rows);
                level.run(left::Weave { left, first, tile, tiles, depth: depth.clone(), target });
            };
            let work = chunk.len() * depth.len();
            if work < 1 << 13 {
                (0..tiles).for_each(weave);
            } else {
                pool.run(tiles, &weave)?;
            }
            let woven = woven.as_slice();
            let body = |task: usize| {
                let (group, part) = (task / shares, task % shares);
                let tiles_of = group * group_tiles..tiles.min((group + 1) * group_tiles);
                let panels = part * share..panels.min((part + 1) * share);
                let rows = chunk.len();
                let task =
                    Task { woven, first, rows, tiles, tiles_of, depth: depth.clone(), right, panels, out };
                level.run(task);
            };
            if work * panels < 1 << 12 {
                (0..groups * shares).for_each(body);
            } else {
                pool.run(groups * shares, &body)?;
            }
        }
    }
    Ok(())
}

/// Some rows of a chunk times some panels.
struct Task<'a, X, R> {
    /// For each block, for each tile, `[block, tile rows]`.
    woven: &'a [X],
    /// The first row of the chunk.
    first: usize,
    /// Rows and tiles of the chunk.
    rows: usize,
    tiles: usize,
    tiles_of: Range<usize>,
    /// Places of the chunk.
    depth: Range<usize>,
    right: &'a R,
    panels: Range<usize>,
    out: Out,
}

impl<X: Operand, R: Right<X>> Kernel for Task<'_, X, R> {
    type Output = ();
    const BF16: bool = X::BF16;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        if S::ROWS == 12 { self.run_of::<S, 12>(s) } else { self.run_of::<S, 6>(s) }
    }
}

impl<X: Operand, R: Right<X>> Task<'_, X, R> {
    #[inline(always)]
    fn run_of<S: Simd, const M: usize>(&self, s: S) {
        let width = 2 * S::LANES;
        let outputs = self.right.outputs();
        let mut wide = Wide::new();
        let mut scratch = Wide::new();
        let mut sums = [0.0_f32; TILE];
        let mut start = self.depth.start;
        while start < self.depth.end {
            let block = DEPTH.min(self.depth.end - start);
            let woven = (start - self.depth.start) * self.tiles * M;
            let add = self.out.add || start > 0;
            for panel in self.panels.clone() {
                // SAFETY: the panel and these places exist; `wide` has room for a block.
                unsafe { self.right.widen(s, [panel, start, block], &mut wide, &mut scratch) };
                let columns = width.min(outputs - panel * width);
                let next = if panel + 1 < self.panels.end {
                    [panel + 1, start]
                } else {
                    [self.panels.start, start + block]
                };
                let lines = self.right.lines(block);
                let count = self.tiles_of.len();
                for (i, t) in self.tiles_of.clone().enumerate() {
                    // While this block is multiplied, the next one is fetched, some lines with each tile.
                    for line in lines * i / count..lines * (i + 1) / count {
                        s.prefetch_far(self.right.line(next, line));
                    }
                    let rows = M.min(self.rows - t * M);
                    // SAFETY: the woven block of this tile has M rows of `block`; the outputs of these rows and this
                    // panel exist and belong to this task alone. A tile that reaches past them goes by way of `sums`.
                    unsafe {
                        let a = Woven(self.woven.as_ptr().add(woven + t * M * block));
                        let b = At { start: wide.0.as_ptr(), stride: width };
                        let target = self.out.target.at((self.first + t * M) * outputs + panel * width);
                        if rows == M && columns == width {
                            let out = At { start: target, stride: outputs };
                            tile::<S, X, _, M, 2>(s, block, a, b, out, add, 0);
                            continue;
                        }
                        let out = At { start: sums.as_mut_ptr(), stride: width };
                        if add {
                            for r in 0..rows {
                                let row = target.add(r * outputs);
                                std::ptr::copy_nonoverlapping(row, out.start.add(r * width), columns);
                            }
                        }
                        if columns <= S::LANES {
                            tile::<S, X, _, M, 1>(s, block, a, b, out, add, 0);
                        } else {
                            tile::<S, X, _, M, 2>(s, block, a, b, out, add, 0);
                        }
                        for r in 0..rows {
                            let row = target.add(r * outputs);
                            std::ptr::copy_nonoverlapping(out.start.add(r * width), row, columns);
                        }
                    }
                }
            }
            start += block;
        }
    }
}
