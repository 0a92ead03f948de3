//! One query row: a step of decoding, which memory limits.
//!
//! A row reads all keys and values it sees once. A block's keys of all heads lie side by side, and so do its values; a
//! task therefore goes through a block for all its heads before the next, and asks for what it will read next while it
//! reads: left to the hardware, each piece of some kilobytes begins with a wait. Caches in half precision are
//! multiplied as they lie. Sums are those of [`super::Heads`], element by element, in the same order.

use super::{product, softmax};
use crate::cache::{BLOCK, Chunk, Layer, Part, Shape};
use opt_kernels::{
    memory::Shared,
    simd::{Kernel, Simd, Weight},
    tile::{Apart, At},
};
use std::ops::Range;

/// The row `row` of some heads, which sees `seen` positions.
pub(super) struct Row<'a> {
    pub(super) q: &'a [f32],
    pub(super) shape: Shape,
    pub(super) layer: &'a Layer,
    pub(super) heads: Range<usize>,
    pub(super) row: usize,
    pub(super) seen: usize,
    pub(super) out: Shared<f32>,
}

impl Kernel for &Row<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Shape { head_dim, .. } = self.shape;
        let (width, value_stride) = (self.shape.width(), self.shape.value_stride());
        let stride = self.seen.next_multiple_of(BLOCK);
        let mut scores = vec![0.0_f32; self.heads.len() * stride];
        let mut mixed = vec![0.0_f32; self.heads.len() * value_stride];
        let mut wide = Vec::new();
        for n in 0..self.chunks() {
            let (i, h) = (n / self.heads.len(), n % self.heads.len());
            // SAFETY: the query has head_dim elements, the keys are [head_dim, BLOCK], and there is room for the
            // scores of a block.
            unsafe {
                let a = self.q.as_ptr().add(self.row * width + (self.heads.start + h) * head_dim);
                let out = At { start: scores.as_mut_ptr().add(h * stride + i * BLOCK), stride };
                self.multiply(s, [head_dim, BLOCK], a, Part::Keys, n, out, &mut wide);
            }
        }
        let mut sums = vec![1.0_f32; self.heads.len()];
        // No closure: it would not be compiled for the instructions of this level.
        for (scores, sum) in scores.chunks_exact_mut(stride).zip(&mut sums) {
            *sum = softmax(s, self.shape, scores, self.seen);
        }
        for n in 0..self.chunks() {
            let (i, h) = (n / self.heads.len(), n % self.heads.len());
            let depth = BLOCK.min(self.seen - i * BLOCK);
            // SAFETY: scores of a block are there, values are [BLOCK, value_stride], and so wide is a head of mixed.
            unsafe {
                let a = scores.as_ptr().add(h * stride + i * BLOCK);
                let out = At { start: mixed.as_mut_ptr().add(h * value_stride), stride: value_stride };
                self.multiply(s, [depth, value_stride], a, Part::Values, n, out, &mut wide);
            }
        }
        for ((h, mixed), sum) in self.heads.clone().zip(mixed.chunks_exact(value_stride)).zip(sums) {
            let scale = 1.0 / sum;
            for (d, x) in mixed[..head_dim].iter().enumerate() {
                // SAFETY: this head of this row exists and belongs to this task alone.
                unsafe { *self.out.at(self.row * width + h * head_dim + d) = x * scale };
            }
        }
    }
}

impl Row<'_> {
    /// Chunks of keys, and as many of values.
    fn chunks(&self) -> usize {
        self.seen.div_ceil(BLOCK) * self.heads.len()
    }

    /// Chunk `n` in the order of memory, if there is one.
    #[inline(always)]
    fn chunk(&self, part: Part, n: usize) -> Option<Chunk<'_>> {
        let (block, head) = (n / self.heads.len(), n % self.heads.len());
        Some(self.layer.blocks.get(block)?.chunk(self.shape, part, self.heads.start + head))
    }

    /// One row times chunk `n`; the one behind it is asked for meanwhile. Values are added up over blocks.
    ///
    /// # Safety
    /// `a` has `depth` elements, the chunk `depth` rows of `columns`, a multiple of LANES, and `out` one.
    #[inline(always)]
    #[expect(clippy::too_many_arguments)]
    unsafe fn multiply<S: Simd>(
        &self,
        s: S,
        shape: [usize; 2],
        a: *const f32,
        part: Part,
        n: usize,
        out: At<*mut f32>,
        wide: &mut Vec<f32>,
    ) {
        let add = matches!(part, Part::Values) && n >= self.heads.len();
        let next = self.chunk(part, n + 1);
        // SAFETY: the caller's promise.
        unsafe {
            let a = Apart::<_, 1>::new(a, 0, 1);
            match (self.chunk(part, n), next) {
                (Some(Chunk::F32(b)), next) => {
                    let ahead = if let Some(Chunk::F32(next)) = next { distance(b, next) } else { 0 };
                    product(s, shape, a, b, out, add, ahead);
                }
                (Some(Chunk::F16(b)), next) => {
                    let ahead = if let Some(Chunk::F16(next)) = next { distance(b, next) } else { 0 };
                    product(s, shape, a, b, out, add, ahead);
                }
                (Some(chunk @ Chunk::Int8 { codes, .. }), _) => {
                    wide.resize(codes.len(), 0.0);
                    product(s, shape, a, chunk.in_f32(wide), out, add, 0);
                }
                (None, _) => {}
            }
        }
    }
}

/// How many elements `next` lies behind `from`, wrapped.
#[inline(always)]
fn distance<W: Weight>(from: &[W], next: &[W]) -> usize {
    let bytes = (next.as_ptr() as isize).wrapping_sub(from.as_ptr() as isize);
    (bytes / size_of::<W>() as isize) as usize
}
