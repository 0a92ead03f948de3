//! Causal attention over cached keys and values.
//!
//! A task is some query rows of one head of one sequence. Its rows go in tiles: scores of a tile against all positions
//! it sees, softmax row by row, then the weighted sum of values, block of positions after block. Scores of a tile fit
//! the second cache at any context length OPT has, so a two-pass softmax is both simpler and more exact than an online
//! one. The order of every sum is fixed by absolute positions: prefill in chunks equals prefill at once, bit by bit.
//! A row that comes alone has its own way through memory ([`row`]) to the same bits.

mod row;

use crate::cache::{BLOCK, Layer, Shape};
use opt_backend::{Result, Span};
use opt_kernels::{
    memory::Shared,
    pool::Pool,
    simd::{Kernel, Simd, SimdLevel, Weight, math},
    tile::{Apart, At, tile},
};

/// Query rows of a task: enough that widening a head's cache for it does not weigh.
const TASK_ROWS: usize = 64;
/// Tasks a thread should get, that none waits long for the last.
const TASKS: usize = 4;

/// What a thread does at a time.
enum Task<'a> {
    Rows(Heads<'a>),
    Row(row::Row<'a>),
}

/// Attention of the rows of `spans`, each the last positions of its layer.
///
/// # Safety
/// `q` and `out` are `[rows, width]` and contain the spans' rows; nobody else accesses `out`; each layer has the
/// shape beside it, that width, and at least its span's positions.
pub(crate) unsafe fn attend(
    pool: &Pool,
    level: SimdLevel,
    q: &[f32],
    sequences: &[(Span, Shape, &Layer)],
    out: Shared<f32>,
) -> Result<()> {
    let mut tasks = Vec::new();
    let mut work = 0;
    // Many rows alone are tasks enough; few are shared by heads.
    let parts = (pool.threads() * TASKS).div_ceil(sequences.len().max(1));
    for &(span, shape, layer) in sequences {
        work += span.len * layer.len * shape.width();
        if span.len == 1 {
            let share = shape.heads.div_ceil(parts);
            for start in (0..shape.heads).step_by(share) {
                let heads = start..shape.heads.min(start + share);
                tasks.push(Task::Row(row::Row {
                    q,
                    shape,
                    layer,
                    heads,
                    row: span.start,
                    seen: layer.len,
                    out,
                }));
            }
            continue;
        }
        for head in 0..shape.heads {
            for start in (0..span.len).step_by(TASK_ROWS) {
                let rows = span.start + start..span.start + span.len.min(start + TASK_ROWS);
                let first = layer.len - span.len + start;
                tasks.push(Task::Rows(Heads { q, shape, layer, head, rows, first, out }));
            }
        }
    }
    // The last rows see the most; begin with them, so that threads finish together.
    tasks.reverse();
    let body = |i: usize| match &tasks[i] {
        Task::Rows(task) => level.run(task),
        Task::Row(task) => level.run(task),
    };
    if work < 1 << 15 {
        (0..tasks.len()).for_each(body);
        return Ok(());
    }
    pool.run(tasks.len(), &body)
}

/// Rows of one head; `first` is the position of the first.
struct Heads<'a> {
    q: &'a [f32],
    shape: Shape,
    layer: &'a Layer,
    head: usize,
    rows: std::ops::Range<usize>,
    first: usize,
    out: Shared<f32>,
}

impl Kernel for &Heads<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let blocks = (self.first + self.rows.len()).div_ceil(BLOCK);
        let (keys_len, values_len) = (self.shape.head_dim * BLOCK, self.shape.value_stride() * BLOCK);
        let widen = !matches!(self.shape.dtype, opt_backend::CacheDType::F32);
        let mut wide = vec![0.0_f32; if widen { blocks * (keys_len + values_len) } else { 0 }];
        let mut rest = wide.as_mut_slice();
        let mut views = Vec::with_capacity(blocks);
        for block in &self.layer.blocks[..blocks] {
            let [mut k, mut v]: [&mut [f32]; 2] = Default::default();
            if widen {
                (k, rest) = rest.split_at_mut(keys_len);
                (v, rest) = rest.split_at_mut(values_len);
            }
            views.push(block.head(self.shape, self.head, k, v));
        }
        let stride = blocks * BLOCK;
        let tile_rows = S::FEW;
        let mut scores = vec![0.0_f32; tile_rows * stride];
        let mut mixed = vec![0.0_f32; tile_rows * self.shape.value_stride()];
        for start in self.rows.clone().step_by(tile_rows) {
            let rows = start..self.rows.end.min(start + tile_rows);
            match tile_rows {
                4 => self.tile::<S, 4>(s, rows, &views, &mut scores, &mut mixed),
                _ => self.tile::<S, 8>(s, rows, &views, &mut scores, &mut mixed),
            }
        }
    }
}

impl Heads<'_> {
    #[inline(always)]
    fn tile<S: Simd, const M: usize>(
        &self,
        s: S,
        rows: std::ops::Range<usize>,
        blocks: &[(&[f32], &[f32])],
        scores: &mut [f32],
        mixed: &mut [f32],
    ) {
        let Shape { head_dim, .. } = self.shape;
        let (width, value_stride) = (self.shape.width(), self.shape.value_stride());
        let stride = blocks.len() * BLOCK;
        let first = self.first + rows.start - self.rows.start;
        // Positions the last row of the tile sees.
        let seen = first + rows.len();
        let blocks = &blocks[..seen.div_ceil(BLOCK)];
        let queries = &self.q[rows.start * width + self.head * head_dim..];
        for (i, (keys, _)) in blocks.iter().enumerate() {
            // SAFETY: the queries' rows have head_dim elements from here on, keys are [head_dim, BLOCK], scores
            // [M, stride].
            unsafe {
                let a = Apart::<_, M>::new(queries.as_ptr(), width, rows.len());
                let out = At { start: scores.as_mut_ptr().add(i * BLOCK), stride };
                product(s, [head_dim, BLOCK], a, keys, out, false, 0);
            }
        }
        let mut sums = [1.0_f32; M];
        for (r, sum) in sums.iter_mut().enumerate().take(rows.len()) {
            *sum = softmax(s, self.shape, &mut scores[r * stride..][..blocks.len() * BLOCK], first + r + 1);
        }
        for (i, (_, values)) in blocks.iter().enumerate() {
            let depth = BLOCK.min(seen - i * BLOCK);
            // SAFETY: scores are [M, stride], values [BLOCK, value_stride], mixed [M, value_stride].
            unsafe {
                let a = Apart::<_, M>::new(scores.as_ptr().add(i * BLOCK), stride, M);
                let out = At { start: mixed.as_mut_ptr(), stride: value_stride };
                product(s, [depth, value_stride], a, values, out, i > 0, 0);
            }
        }
        for (r, row) in rows.enumerate() {
            let scale = 1.0 / sums[r];
            for (d, x) in mixed[r * value_stride..][..head_dim].iter().enumerate() {
                // SAFETY: this head of this row exists and belongs to this task alone.
                unsafe { *self.out.at(row * width + self.head * head_dim + d) = x * scale };
            }
        }
    }
}

/// Turns scores into exp((score - max) / √head_dim), zero from `seen` on, and returns their sum.
#[inline(always)]
fn softmax<S: Simd>(s: S, shape: Shape, scores: &mut [f32], seen: usize) -> f32 {
    let end = seen.next_multiple_of(S::LANES).min(scores.len());
    for score in &mut scores[seen..end] {
        *score = f32::NEG_INFINITY;
    }
    for weight in &mut scores[end..] {
        *weight = 0.0;
    }
    let scores = scores.as_mut_ptr();
    let mut max = s.splat(f32::NEG_INFINITY);
    for i in (0..end).step_by(S::LANES) {
        // SAFETY: end is a multiple of LANES and at most the length, itself a multiple of LANES.
        max = s.max(max, unsafe { s.load(scores.add(i)) });
    }
    let max = s.splat(s.largest(max));
    let scale = s.splat(1.0 / (shape.head_dim as f32).sqrt());
    let mut sum = s.splat(0.0);
    for i in (0..end).step_by(S::LANES) {
        // SAFETY: as above.
        unsafe {
            let weight = math::exp(s, s.mul(s.sub(s.load(scores.add(i)), max), scale));
            s.store(scores.add(i), weight);
            sum = s.add(sum, weight);
        }
    }
    s.sum(sum)
}

/// `M` rows times all `columns`, a multiple of LANES; what lies `ahead` elements further is asked for, unless that is 0.
///
/// # Safety
/// `a` has `M` rows of `depth`, `b` has `depth` rows and `out` has `M` rows, each of `columns`.
#[inline(always)]
unsafe fn product<S: Simd, W: Weight<Operand = f32>, const M: usize>(
    s: S,
    [depth, columns]: [usize; 2],
    a: Apart<f32, M>,
    b: &[W],
    out: At<*mut f32>,
    add: bool,
    ahead: usize,
) {
    let mut column = 0;
    while column < columns {
        let left = (columns - column) / S::LANES;
        // SAFETY: the caller's promise; a tile is no wider than what is left.
        unsafe {
            let b = At { start: b.as_ptr().add(column), stride: columns };
            let out = At { start: out.start.add(column), stride: out.stride };
            // One row has few sums under way at a time: more columns make up for it.
            column += S::LANES
                * if M == 1 && left >= 4 {
                    tile::<S, W, _, M, 4>(s, depth, a, b, out, add, ahead);
                    4
                } else if left >= 2 {
                    tile::<S, W, _, M, 2>(s, depth, a, b, out, add, ahead);
                    2
                } else {
                    tile::<S, W, _, M, 1>(s, depth, a, b, out, add, ahead);
                    1
                };
        }
    }
}
