//! The left operand: rows are interleaved by tiles.

use crate::{
    gemm::DEPTH,
    memory::Shared,
    simd::{Kernel, Operand, Simd},
};
use std::ops::Range;

/// A matrix whose rows meet panels, or whose columns do.
#[derive(Clone, Copy)]
pub(super) struct Left<'a> {
    data: &'a [f32],
    pub(super) rows: usize,
    pub(super) depth: usize,
    transposed: bool,
}

impl<'a> Left<'a> {
    /// `[rows, depth]`, or `[depth, rows]` if it is transposed.
    pub(super) fn new(data: &'a [f32], shape: [usize; 2], transposed: bool) -> Self {
        let [rows, depth] = if transposed { [shape[1], shape[0]] } else { shape };
        Self { data, rows, depth, transposed }
    }
}

/// Weaves one tile of a chunk of rows: for each block of [`DEPTH`], `[block, tile rows]`.
pub(super) struct Weave<'a, X> {
    pub(super) left: Left<'a>,
    /// The first row of the chunk.
    pub(super) first: usize,
    /// The tile's rows, counted from there.
    pub(super) tile: Range<usize>,
    /// Tiles of the chunk.
    pub(super) tiles: usize,
    /// The places that are woven.
    pub(super) depth: Range<usize>,
    pub(super) target: Shared<X>,
}

impl<X: Operand> Kernel for Weave<'_, X> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let Left { data, rows: all, depth, transposed } = self.left;
        let count = self.tile.len();
        let mut line = [X::default(); DEPTH];
        let mut start = self.depth.start;
        while start < self.depth.end {
            let block = DEPTH.min(self.depth.end - start);
            let at = (start - self.depth.start) * self.tiles * S::ROWS + self.tile.start * block;
            // SAFETY: the part of this tile and block, which belongs to this task alone and was zeroed or written.
            let part = unsafe { std::slice::from_raw_parts_mut(self.target.at(at), block * S::ROWS) };
            if transposed {
                let row = self.first + self.tile.start;
                for (k, out) in part.chunks_exact_mut(S::ROWS).enumerate() {
                    let input = (start + k) * X::INPUTS;
                    let first = &data[input * all + row..][..count];
                    let second = if X::INPUTS == 2 && input + 1 < depth {
                        &data[(input + 1) * all + row..][..count]
                    } else {
                        &[]
                    };
                    X::beside(first, second, out);
                }
            } else {
                for r in 0..count {
                    let row = &data[(self.first + self.tile.start + r) * depth..][..depth];
                    let end = depth.min((start + block) * X::INPUTS);
                    X::along(&row[start * X::INPUTS..end], &mut line[..block]);
                    for (k, &x) in line[..block].iter().enumerate() {
                        part[k * S::ROWS + r] = x;
                    }
                }
            }
            // An earlier chunk may have left something there.
            for k in 0..if count < S::ROWS { block } else { 0 } {
                part[k * S::ROWS + count..(k + 1) * S::ROWS].fill(X::default());
            }
            start += block;
        }
    }
}
