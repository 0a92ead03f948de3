//! The gradient of causal attention within spans.
//!
//! A task is one head of one span. Blocks of queries go one after the other: their scores against all positions they
//! see, softmax again, and with P the weights, dP = dY Vᵀ and D the sum of P dP over a row,
//!
//! ```text
//! dS = P (dP - D) / √head_dim    dQ = dS K    dK += dSᵀ Q    dV += Pᵀ dY
//! ```
//!
//! all five products by the register tile.

use opt_backend::{Result, Span};
use opt_kernels::{
    memory::Shared,
    pool::Pool,
    simd::{Kernel, Simd, SimdLevel, math},
    tile::{Apart, At, Rows, tile},
};

/// Queries of a block, a multiple of every level's tile: their weights and gradients fit the second cache.
const QUERIES: usize = 48;
/// Positions that a product over positions is cut into.
const POSITIONS: usize = 256;
/// Elements between rows of scores that are not needed: rows at a power of two apart would share a few lines of the
/// first cache.
const APART: usize = 16;

/// What the gradient is computed from, `[rows, width]` each, and the gradients.
#[derive(Clone, Copy)]
pub(crate) struct Attention<'a> {
    pub(crate) q: &'a [f32],
    pub(crate) k: &'a [f32],
    pub(crate) v: &'a [f32],
    pub(crate) dy: &'a [f32],
    pub(crate) width: usize,
    pub(crate) heads: usize,
    /// Of queries, keys and values.
    pub(crate) out: [Shared<f32>; 3],
}

/// Writes the gradients of the rows of `spans`, none of which share rows.
///
/// # Safety
/// Spans lie within the rows, the heads divide the width, and nobody else accesses the gradients.
pub(crate) unsafe fn attend_grad(
    pool: &Pool,
    level: SimdLevel,
    of: Attention<'_>,
    spans: &[Span],
) -> Result<()> {
    let mut tasks: Vec<Head<'_>> =
        spans.iter().flat_map(|&span| (0..of.heads).map(move |head| Head { of, span, head })).collect();
    tasks.retain(|task| task.span.len > 0);
    // Long ones first, so that threads finish together.
    tasks.sort_by_key(|task| std::cmp::Reverse(task.span.len));
    pool.run(tasks.len(), &|i| level.run(tasks[i]))
}

#[derive(Clone, Copy)]
struct Head<'a> {
    of: Attention<'a>,
    span: Span,
    head: usize,
}

impl Kernel for Head<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        if S::ROWS == 12 { self.run_of::<S, 12>(s) } else { self.run_of::<S, 6>(s) }
    }
}

/// Rows that are columns of what lies in memory.
#[derive(Clone, Copy)]
struct Across {
    start: *const f32,
    stride: usize,
}

impl<const M: usize> Rows<f32, M> for Across {
    #[inline(always)]
    unsafe fn at(self, r: usize, k: usize) -> f32 {
        // SAFETY: the caller's promise.
        unsafe { *self.start.add(k * self.stride + r) }
    }
}

/// The sizes of a head's arrays.
#[derive(Clone, Copy)]
struct Sizes {
    /// Elements of a row, whole vectors.
    padded: usize,
    /// Between rows of scores.
    stride: usize,
}

impl Head<'_> {
    #[inline(always)]
    fn run_of<S: Simd, const M: usize>(self, s: S) {
        let panel = 2 * S::LANES;
        let (rows, head_dim) = (self.span.len, self.of.width / self.of.heads);
        let padded = head_dim.next_multiple_of(S::LANES);
        let positions = rows.next_multiple_of(panel);
        let sizes = Sizes { padded, stride: positions + APART };
        let [q, k, v, dy] = [
            self.gather(self.of.q, rows, padded),
            self.gather(self.of.k, positions, padded),
            self.gather(self.of.v, positions, padded),
            self.gather(self.of.dy, rows, padded),
        ];
        let (k_turned, v_turned) = (turn(s, &k, padded), turn(s, &v, padded));
        let mut weights = vec![0.0_f32; QUERIES * sizes.stride];
        let mut slopes = vec![0.0_f32; QUERIES * sizes.stride];
        let mut dq = vec![0.0_f32; QUERIES * padded];
        let (mut dk, mut dv) = (vec![0.0_f32; (rows + M) * padded], vec![0.0_f32; (rows + M) * padded]);
        for start in (0..rows).step_by(QUERIES) {
            let count = QUERIES.min(rows - start);
            scores::<S, M>(s, sizes, &q, &k_turned, start, count, &mut weights);
            scores::<S, M>(s, sizes, &dy, &v_turned, start, count, &mut slopes);
            let scale = 1.0 / (head_dim as f32).sqrt();
            for r in 0..count {
                let seen = start + r + 1;
                let at = r * sizes.stride..(r + 1) * sizes.stride;
                softmax(s, scale, &mut weights[at.clone()], &mut slopes[at.clone()], seen);
                // What tiles of this block read beyond.
                let end = ((start + count).next_multiple_of(panel) + APART).min(sizes.stride);
                weights[at.clone()][seen..end].fill(0.0);
                slopes[at][seen..end].fill(0.0);
            }
            for first in (0..start + count).step_by(POSITIONS) {
                for r in (0..count).step_by(M) {
                    // Later positions have no weight.
                    let seen = start + count.min(r + M);
                    if first >= seen {
                        continue;
                    }
                    // SAFETY: slopes have QUERIES rows, a multiple of M, keys as many rows as there are positions, dq
                    // QUERIES rows.
                    unsafe {
                        let a = slopes.as_ptr().add(r * sizes.stride + first);
                        let a = Apart::<f32, M>::new(a, sizes.stride, M.min(count - r));
                        let b = At { start: k.as_ptr().add(first * padded), stride: padded };
                        let out = At { start: dq.as_mut_ptr().add(r * padded), stride: padded };
                        product(s, [POSITIONS.min(seen - first), padded], a, b, out, first > 0);
                    }
                }
            }
            self.scatter(&dq, start..start + count, padded, 0);
            for first in (0..start + count).step_by(M) {
                // Queries before the first of these positions do not see it.
                let skipped = first.saturating_sub(start);
                // SAFETY: weights and slopes have `count` rows and more elements a row than positions rounded up to M,
                // the others `start + count` rows, dk and dv M more.
                unsafe {
                    let at = skipped * sizes.stride + first;
                    let depth = [count - skipped, padded];
                    let row = (start + skipped) * padded;
                    for (a, b, out) in [(&slopes, &q, &mut dk), (&weights, &dy, &mut dv)] {
                        let a = Across { start: a.as_ptr().add(at), stride: sizes.stride };
                        let b = At { start: b.as_ptr().add(row), stride: padded };
                        let out = At { start: out.as_mut_ptr().add(first * padded), stride: padded };
                        product::<S, _, M>(s, depth, a, b, out, true);
                    }
                }
            }
        }
        self.scatter(&dk, 0..rows, padded, 1);
        self.scatter(&dv, 0..rows, padded, 2);
    }

    /// This head of this span's rows, `[rows, padded]`, the rest zeros.
    #[inline(always)]
    fn gather(&self, from: &[f32], rows: usize, padded: usize) -> Vec<f32> {
        let (width, head_dim) = (self.of.width, self.of.width / self.of.heads);
        let mut to = vec![0.0; rows * padded];
        for r in 0..self.span.len {
            let row = &from[(self.span.start + r) * width + self.head * head_dim..][..head_dim];
            to[r * padded..][..head_dim].copy_from_slice(row);
        }
        to
    }

    /// Writes rows of this head and span, the first of which is the first of `from`, to one of the gradients.
    #[inline(always)]
    fn scatter(&self, from: &[f32], rows: std::ops::Range<usize>, padded: usize, which: usize) {
        let (width, head_dim) = (self.of.width, self.of.width / self.of.heads);
        for (r, row) in rows.enumerate() {
            let from = &from[r * padded..][..head_dim];
            // SAFETY: this head of this row exists and belongs to this task alone.
            unsafe {
                let to = self.of.out[which].at((self.span.start + row) * width + self.head * head_dim);
                to.copy_from_nonoverlapping(from.as_ptr(), head_dim);
            }
        }
    }
}

/// Panels `[padded, panel]` of the transpose of `x`, `[rows, padded]`, rows being whole panels.
#[inline(always)]
fn turn<S: Simd>(s: S, x: &[f32], padded: usize) -> Vec<f32> {
    let panel = 2 * S::LANES;
    let mut turned = vec![0.0; x.len()];
    for (x, turned) in x.chunks_exact(panel * padded).zip(turned.chunks_exact_mut(panel * padded)) {
        for half in [0, S::LANES] {
            for d in (0..padded).step_by(S::LANES) {
                // SAFETY: both are panel x padded, whole vectors.
                unsafe {
                    let to = turned.as_mut_ptr().add(d * panel + half);
                    s.transpose(x.as_ptr().add(half * padded + d), padded, to, panel);
                }
            }
        }
    }
    turned
}

/// Products of the rows `start..start + count` of `x` and the positions they see, in whole panels.
#[inline(always)]
fn scores<S: Simd, const M: usize>(
    s: S,
    Sizes { padded, stride }: Sizes,
    x: &[f32],
    turned: &[f32],
    start: usize,
    count: usize,
    out: &mut [f32],
) {
    let panel = 2 * S::LANES;
    for (i, turned) in turned.chunks_exact(panel * padded).enumerate() {
        for r in (0..count).step_by(M) {
            if i * panel >= start + count.min(r + M) {
                continue;
            }
            // SAFETY: these rows exist, a panel has `padded` rows, and `out` has QUERIES rows, a multiple of M.
            unsafe {
                let a = x.as_ptr().add((start + r) * padded);
                let a = Apart::<f32, M>::new(a, padded, M.min(count - r));
                let b = At { start: turned.as_ptr(), stride: panel };
                let out = At { start: out.as_mut_ptr().add(r * stride + i * panel), stride };
                tile::<S, f32, _, M, 2>(s, padded, a, b, out, false, 0);
            }
        }
    }
}

/// Turns the scores of a row into weights, and what `slopes` has, their gradients, into those of the scores. Elements
/// past `seen` are what they may, up to whole vectors.
#[inline(always)]
fn softmax<S: Simd>(s: S, scale: f32, weights: &mut [f32], slopes: &mut [f32], seen: usize) {
    let end = seen.next_multiple_of(S::LANES);
    weights[seen..end].fill(f32::NEG_INFINITY);
    slopes[seen..end].fill(0.0);
    let (weights, slopes) = (weights[..end].as_mut_ptr(), slopes[..end].as_mut_ptr());
    // SAFETY of all below: both have `end` elements, a multiple of LANES.
    let mut max = s.splat(f32::NEG_INFINITY);
    for i in (0..end).step_by(S::LANES) {
        // SAFETY: as above.
        max = s.max(max, unsafe { s.load(weights.add(i)) });
    }
    let (max, by) = (s.splat(s.largest(max)), s.splat(scale));
    let (mut sum, mut mixed) = (s.splat(0.0), s.splat(0.0));
    for i in (0..end).step_by(S::LANES) {
        // SAFETY: as above.
        unsafe {
            let weight = math::exp(s, s.mul(s.sub(s.load(weights.add(i)), max), by));
            s.store(weights.add(i), weight);
            sum = s.add(sum, weight);
            mixed = s.fma(weight, s.load(slopes.add(i)), mixed);
        }
    }
    let sum = s.sum(sum);
    let (mean, part) = (s.splat(s.sum(mixed) / sum), s.splat(1.0 / sum));
    for i in (0..end).step_by(S::LANES) {
        // SAFETY: as above.
        unsafe {
            let weight = s.mul(s.load(weights.add(i)), part);
            s.store(weights.add(i), weight);
            let slope = s.sub(s.load(slopes.add(i)), mean);
            s.store(slopes.add(i), s.mul(s.mul(weight, by), slope));
        }
    }
}

/// `M` rows times all `columns`, a multiple of LANES.
///
/// # Safety
/// `a` has `M` rows of `depth`, `b` has `depth` rows and `out` has `M` rows, each of `columns`.
#[inline(always)]
unsafe fn product<S: Simd, A: Rows<f32, M>, const M: usize>(
    s: S,
    [depth, columns]: [usize; 2],
    a: A,
    b: At<*const f32>,
    out: At<*mut f32>,
    add: bool,
) {
    let mut column = 0;
    while column < columns {
        // SAFETY: the caller's promise; a tile is no wider than what is left.
        unsafe {
            let b = At { start: b.start.add(column), stride: b.stride };
            let out = At { start: out.start.add(column), stride: out.stride };
            if columns - column >= 2 * S::LANES {
                tile::<S, f32, _, M, 2>(s, depth, a, b, out, add, 0);
                column += 2 * S::LANES;
            } else {
                tile::<S, f32, _, M, 1>(s, depth, a, b, out, add, 0);
                column += S::LANES;
            }
        }
    }
}
