//! The right operand: blocks of panels, made where they are needed.

use crate::{
    gemm::{DEPTH, Wide},
    pack::{Panels, Source},
    simd::{Bf16x2, Operand, Simd},
};

/// Bytes of a cache line.
const LINE: usize = 64;

/// What makes panels of operands.
pub(crate) trait Right<X: Operand>: Sync {
    /// Columns of all panels together.
    fn outputs(&self) -> usize;
    /// Writes the places `start..start + block` of a panel, `[block, width]`; columns past the last are zeros. Places up
    /// to the next multiple of the width may be written, too.
    ///
    /// # Safety
    /// The panel and the places exist; the start is a multiple of [`DEPTH`], and the block no more than that.
    unsafe fn widen<S: Simd>(&self, s: S, block: [usize; 3], wide: &mut Wide<X>, scratch: &mut Wide<X>);
    /// Cache lines that a block of a panel is read from.
    fn lines(&self, block: usize) -> usize;
    /// Where one of them is, of the block that starts at `[panel, start]`; any address will do where there is none.
    fn line(&self, at: [usize; 2], line: usize) -> *const u8;
}

/// A matrix `[depth, outputs]` in row order.
pub(super) struct Rows<'a> {
    pub(super) data: &'a [f32],
    pub(super) depth: usize,
    pub(super) outputs: usize,
}

impl<X: Operand> Right<X> for Rows<'_> {
    fn outputs(&self) -> usize {
        self.outputs
    }

    #[inline(always)]
    unsafe fn widen<S: Simd>(
        &self,
        _: S,
        [panel, start, block]: [usize; 3],
        wide: &mut Wide<X>,
        _: &mut Wide<X>,
    ) {
        let width = 2 * S::LANES;
        let column = panel * width;
        let columns = width.min(self.outputs - column);
        for (k, out) in wide.0.chunks_exact_mut(width).take(block).enumerate() {
            let input = (start + k) * X::INPUTS;
            let first = &self.data[input * self.outputs + column..][..columns];
            let second = if X::INPUTS == 2 && input + 1 < self.depth {
                &self.data[(input + 1) * self.outputs + column..][..columns]
            } else {
                &[]
            };
            if columns == width {
                X::beside(&first[..width], if second.is_empty() { second } else { &second[..width] }, out);
            } else {
                let (out, rest) = out.split_at_mut(columns);
                X::beside(first, second, out);
                rest.fill(X::default());
            }
        }
    }

    fn lines(&self, block: usize) -> usize {
        2 * block * X::INPUTS
    }

    #[inline(always)]
    fn line(&self, [panel, start]: [usize; 2], line: usize) -> *const u8 {
        // Of AVX-512's width; narrower panels ask for their neighbours', too.
        let at = (start * X::INPUTS + line / 2) * self.outputs + panel * 32;
        self.data.as_ptr().wrapping_add(at).cast::<u8>().wrapping_add(line % 2 * LINE)
    }
}

/// A matrix `[outputs, depth]` in row order.
pub(crate) struct Columns<'a> {
    pub(crate) data: &'a [f32],
    pub(crate) depth: usize,
    pub(crate) outputs: usize,
}

impl<X: Operand> Right<X> for Columns<'_> {
    fn outputs(&self) -> usize {
        self.outputs
    }

    #[inline(always)]
    unsafe fn widen<S: Simd>(
        &self,
        s: S,
        [panel, start, block]: [usize; 3],
        wide: &mut Wide<X>,
        scratch: &mut Wide<X>,
    ) {
        let width = 2 * S::LANES;
        let range = start * X::INPUTS..self.depth.min((start + block) * X::INPUTS);
        for half in 0..2 {
            let first = panel * width + half * S::LANES;
            for (r, line) in scratch.0.chunks_exact_mut(DEPTH).take(S::LANES).enumerate() {
                if first + r < self.outputs {
                    let row = &self.data[(first + r) * self.depth..][range.clone()];
                    X::along(row, &mut line[..block]);
                } else {
                    line[..block].fill(X::default());
                }
            }
            for k in (0..block).step_by(S::LANES) {
                // SAFETY: both have room for DEPTH places, a multiple of LANES; operands are 32 bits wide.
                unsafe {
                    let to = wide.0.as_mut_ptr().add(k * width + half * S::LANES);
                    s.transpose(scratch.0.as_ptr().add(k).cast(), DEPTH, to.cast(), width);
                }
            }
        }
    }

    fn lines(&self, block: usize) -> usize {
        32 * (block * X::INPUTS).div_ceil(LINE / size_of::<f32>())
    }

    #[inline(always)]
    fn line(&self, [panel, start]: [usize; 2], line: usize) -> *const u8 {
        let at = (panel * 32 + line % 32) * self.depth + start * X::INPUTS;
        self.data.as_ptr().wrapping_add(at).cast::<u8>().wrapping_add(line / 32 * LINE)
    }
}

/// A packed weight, its places as columns.
pub(super) struct Transposed<'a, P> {
    panels: &'a P,
    places: usize,
}

impl<'a, P: Source<Operand = f32>> Transposed<'a, P> {
    pub(super) fn new(panels: &'a P, places: usize) -> Self {
        Self { panels, places }
    }
}

impl<P: Source<Operand = f32>> Right<f32> for Transposed<'_, P> {
    fn outputs(&self) -> usize {
        self.places
    }

    #[inline(always)]
    unsafe fn widen<S: Simd>(
        &self,
        s: S,
        [panel, start, block]: [usize; 3],
        wide: &mut Wide<f32>,
        scratch: &mut Wide<f32>,
    ) {
        let width = 2 * S::LANES;
        let first = panel * width;
        let columns = width.min(self.places - first);
        for (i, packed) in (start / width..(start + block).div_ceil(width)).enumerate() {
            // SAFETY: the packed panel exists and has these places; there is room for width x width in both, and for
            // DEPTH rows in `wide`.
            unsafe {
                self.panels.widen(s, packed, first, columns, scratch);
                scratch.0[columns * width..width * width].fill(0.0);
                for (row, column) in [(0, 0), (0, S::LANES), (S::LANES, 0), (S::LANES, S::LANES)] {
                    let from = scratch.0.as_ptr().add(row * width + column);
                    let to = wide.0.as_mut_ptr().add((i * width + column) * width + row);
                    s.transpose(from, width, to, width);
                }
            }
        }
    }

    fn lines(&self, block: usize) -> usize {
        // As if panels were 32 wide: narrower ones are fetched in part.
        block.div_ceil(32) * self.panels.bytes(32) / LINE
    }

    #[inline(always)]
    fn line(&self, [panel, start]: [usize; 2], line: usize) -> *const u8 {
        let lines = (self.panels.bytes(32) / LINE).max(1);
        let packed = start / 32 + line / lines;
        if packed >= self.panels.count() {
            return std::ptr::null();
        }
        self.panels.address(packed, panel * 32).wrapping_add(line % lines * LINE)
    }
}

/// A weight packed in pairs of bf16 of neighbouring inputs, as pairs of neighbouring outputs: its inputs are columns.
pub(super) struct TransposedPairs<'a> {
    panels: &'a Panels<Bf16x2>,
    inputs: usize,
}

impl<'a> TransposedPairs<'a> {
    pub(super) fn new(panels: &'a Panels<Bf16x2>, inputs: usize) -> Self {
        Self { panels, inputs }
    }
}

impl Right<Bf16x2> for TransposedPairs<'_> {
    fn outputs(&self) -> usize {
        self.inputs
    }

    #[inline(always)]
    unsafe fn widen<S: Simd>(
        &self,
        s: S,
        [panel, start, block]: [usize; 3],
        wide: &mut Wide<Bf16x2>,
        scratch: &mut Wide<Bf16x2>,
    ) {
        let (lanes, width) = (S::LANES, 2 * S::LANES);
        // Places of the weight are pairs of inputs, as many as a vector has lanes for the panel's columns; places of the
        // block are pairs of outputs, as many as that for a panel of the weight.
        let first = panel * lanes;
        let count = lanes.min(self.inputs.div_ceil(2) - first);
        let (turned, rows) = scratch.0.split_at_mut(width * lanes);
        for (i, packed) in (start / lanes..(start + block).div_ceil(lanes)).enumerate() {
            let elements = &self.panels.panel(packed)[first * width..][..count * width];
            let mut from = elements.as_ptr();
            if count < lanes {
                rows[..count * width].copy_from_slice(elements);
                rows[count * width..lanes * width].fill(Bf16x2::default());
                from = rows.as_ptr();
            }
            // SAFETY: `from` has `lanes` rows of `width`, `turned` `width` rows of `lanes`; pairs are 32 bits wide.
            unsafe {
                s.transpose(from.cast(), width, turned.as_mut_ptr().cast(), lanes);
                let (from, to) = (from.add(lanes), turned.as_mut_ptr().add(lanes * lanes));
                s.transpose(from.cast(), width, to.cast(), lanes);
            }
            let out = wide.0[i * lanes * width..][..lanes * width].chunks_exact_mut(width);
            for (out, two) in out.zip(turned.chunks_exact(width)) {
                let (lower, upper) = two.split_at(lanes);
                let (out, _) = out.as_chunks_mut::<2>();
                for ((out, &lower), &upper) in out.iter_mut().zip(lower).zip(upper) {
                    *out = Bf16x2::exchange(lower, upper);
                }
            }
        }
    }

    fn lines(&self, block: usize) -> usize {
        block.div_ceil(16) * self.panels.bytes(16) / LINE
    }

    #[inline(always)]
    fn line(&self, [panel, start]: [usize; 2], line: usize) -> *const u8 {
        let lines = (self.panels.bytes(16) / LINE).max(1);
        let packed = start / 16 + line / lines;
        if packed >= self.panels.count() {
            return std::ptr::null();
        }
        self.panels.address(packed, panel * 16).wrapping_add(line % lines * LINE)
    }
}
