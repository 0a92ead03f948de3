//! The register tile: the one inner loop behind linears, LM head and attention.
//!
//! A tile multiplies `M` rows by `N` vectors of columns and holds all products in registers. Every output element is
//! one chain of fused multiply-adds in ascending depth, whatever the tile, the row count or the vector width; that is
//! why a row's result does not depend on the batch it is computed in. Where operands are pairs of bf16, a step of the
//! chain is a dot product of two, and a place of the depth is a pair.

use crate::simd::{Operand, Simd, Weight};

/// Where a tile finds the left-hand elements.
pub trait Rows<X, const M: usize>: Copy {
    /// Element `k` of row `r`.
    ///
    /// # Safety
    /// The element exists.
    unsafe fn at(self, r: usize, k: usize) -> X;
}

/// Rows where they lie, each with its own pointer.
#[derive(Clone, Copy)]
pub struct Apart<X, const M: usize>(pub [*const X; M]);

/// Rows interleaved: `M` elements of depth 0, `M` of depth 1, ...
#[derive(Clone, Copy)]
pub struct Woven<X>(pub *const X);

impl<X, const M: usize> Apart<X, M> {
    /// The rows `0..count` of width `stride` at `start`; the last one stands in for those missing.
    ///
    /// # Safety
    /// `count > 0`, and the rows lie within one allocation.
    #[inline(always)]
    pub unsafe fn new(start: *const X, stride: usize, count: usize) -> Self {
        let mut rows = [start; M];
        let mut r = 1;
        while r < M {
            let row = if r < count { r } else { count - 1 };
            // SAFETY: row < count.
            rows[r] = unsafe { start.add(row * stride) };
            r += 1;
        }
        Self(rows)
    }
}

impl<X: Operand, const M: usize> Rows<X, M> for Apart<X, M> {
    #[inline(always)]
    unsafe fn at(self, r: usize, k: usize) -> X {
        // SAFETY: the caller's promise.
        unsafe { *self.0[r].add(k) }
    }
}

impl<X: Operand, const M: usize> Rows<X, M> for Woven<X> {
    #[inline(always)]
    unsafe fn at(self, r: usize, k: usize) -> X {
        // SAFETY: the caller's promise.
        unsafe { *self.0.add(k * M + r) }
    }
}

/// A matrix in memory: its first element and the distance of its rows.
#[derive(Clone, Copy)]
pub struct At<P> {
    pub start: P,
    pub stride: usize,
}

/// `out = a b`, or `out += a b`, for `M` rows and `N` vectors of columns, over `depth`. Elements of `b` are asked for
/// `ahead` elements early, unless that is 0; what lies before them is as far ahead as a negative number, wrapped.
///
/// # Safety
/// `a` has `M` rows of `depth`, `b` has `depth` rows and `out` has `M` rows, each of `N * LANES` elements.
#[inline(always)]
pub unsafe fn tile<S: Simd, W: Weight, A: Rows<W::Operand, M>, const M: usize, const N: usize>(
    s: S,
    depth: usize,
    a: A,
    b: At<*const W>,
    out: At<*mut f32>,
    add: bool,
    ahead: usize,
) {
    let mut sums = [[s.splat(0.0); N]; M];
    if add && M > 1 {
        // By the time the sums are complete, what they are added to is there.
        for r in 0..M {
            for n in 0..N {
                s.prefetch(out.start.wrapping_add(r * out.stride + n * S::LANES));
            }
        }
    }
    for k in 0..depth {
        // SAFETY: k < depth, r < M and the N vectors of a row exist by the caller's promise.
        unsafe {
            let row = b.start.add(k * b.stride);
            let mut columns = [s.splat(0.0); N];
            for (n, column) in columns.iter_mut().enumerate() {
                if ahead > 0 {
                    s.prefetch(row.wrapping_add(ahead).wrapping_add(n * S::LANES));
                }
                *column = W::load(s, row.add(n * S::LANES));
            }
            for (r, sums) in sums.iter_mut().enumerate() {
                let x = a.at(r, k).splat(s);
                for (sum, column) in sums.iter_mut().zip(columns) {
                    *sum = W::Operand::multiply_add(s, x, column, *sum);
                }
            }
        }
    }
    for (r, sums) in sums.into_iter().enumerate() {
        for (n, sum) in sums.into_iter().enumerate() {
            // SAFETY: row r and vector n of `out` exist by the caller's promise.
            unsafe {
                let target = out.start.add(r * out.stride + n * S::LANES);
                let sum = if add { s.add(s.load(target), sum) } else { sum };
                s.store(target, sum);
            }
        }
    }
}
