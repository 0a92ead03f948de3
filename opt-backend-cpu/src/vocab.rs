//! What is done with rows of logits: log-probabilities of targets and the top k.
//!
//! A row has some fifty thousand elements of which a few matter, so one pass compares chunks with a threshold and
//! touches only those that pass it.

use opt_backend::{Result, TargetScore, TopK, ndarray::aview1, oracle};
use opt_kernels::{
    memory::Shared,
    pool::Pool,
    simd::{Kernel, Simd, SimdLevel, math},
};

/// Scores of `targets`, one a row of `logits`.
pub(crate) fn target_scores(
    pool: &Pool,
    level: SimdLevel,
    logits: &[f32],
    width: usize,
    targets: &[u32],
) -> Result<Vec<TargetScore>> {
    let mut scores = vec![TargetScore { log_prob: 0.0, greedy: false }; targets.len()];
    let out = Shared(scores.as_mut_ptr());
    pool.run(targets.len(), &|i| {
        let row = &logits[i * width..(i + 1) * width];
        let target = targets[i] as usize;
        let log_sum_exp = level.run(LogSumExp(row));
        let greedy = level.run(Argmax(row)) == Some(target);
        let log_prob = (f64::from(row[target]) - log_sum_exp) as f32;
        // SAFETY: i is below the number of targets, and no other task writes this element.
        unsafe { *out.at(i) = TargetScore { log_prob, greedy } };
    })?;
    Ok(scores)
}

/// The top `k` of each row of `logits`, `[rows, width]`.
pub(crate) fn top_k(
    pool: &Pool,
    level: SimdLevel,
    logits: &[f32],
    [rows, width]: [usize; 2],
    k: usize,
) -> Result<Vec<TopK>> {
    let mut tops = vec![TopK { ids: Vec::new(), logits: Vec::new(), log_sum_exp: 0.0 }; rows];
    let out = Shared(tops.as_mut_ptr());
    pool.run(rows, &|i| {
        let row = &logits[i * width..(i + 1) * width];
        let largest = level.run(Largest { row, k });
        let ids: Vec<u32> = largest.into_iter().map(|(_, id)| id).collect();
        let logits = ids.iter().map(|&id| row[id as usize]).collect();
        let top = TopK { ids, logits, log_sum_exp: level.run(LogSumExp(row)) as f32 };
        // SAFETY: i is below the number of rows, and no other task writes this element.
        unsafe { *out.at(i) = top };
    })?;
    Ok(tops)
}

/// log Σ exp(x): f32 exponentials, added in f64 every 1024 elements.
struct LogSumExp<'a>(&'a [f32]);

impl Kernel for LogSumExp<'_> {
    type Output = f64;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f64 {
        let max = largest(s, self.0);
        if max.is_infinite() {
            return f64::from(max);
        }
        let shift = s.splat(max);
        let mut total = 0.0;
        for chunk in self.0.chunks(1024) {
            let mut sum = s.splat(0.0);
            let (whole, rest) = chunk.split_at(chunk.len() - chunk.len() % S::LANES);
            for i in (0..whole.len()).step_by(S::LANES) {
                // SAFETY: the vector lies within `whole`.
                let x = unsafe { s.load(whole.as_ptr().add(i)) };
                sum = s.add(sum, math::exp(s, s.sub(x, shift)));
            }
            total += f64::from(s.sum(sum));
            for &x in rest {
                total += (f64::from(x) - f64::from(max)).exp();
            }
        }
        f64::from(max) + total.ln()
    }
}

/// The largest element that is a number; -∞ if there is none.
#[inline(always)]
pub(crate) fn largest<S: Simd>(s: S, row: &[f32]) -> f32 {
    let (whole, rest) = row.split_at(row.len() - row.len() % S::LANES);
    let mut max = s.splat(f32::NEG_INFINITY);
    for i in (0..whole.len()).step_by(S::LANES) {
        // SAFETY: the vector lies within `whole`. The accumulator comes second, so that NaN does not replace it.
        max = s.max(unsafe { s.load(whole.as_ptr().add(i)) }, max);
    }
    rest.iter().fold(s.largest(max), |max, &x| max.max(x))
}

/// The lowest index of the largest element.
struct Argmax<'a>(&'a [f32]);

impl Kernel for Argmax<'_> {
    type Output = Option<usize>;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Option<usize> {
        let max = largest(s, self.0);
        // Without a number in the row there is nothing to be fast at.
        self.0.iter().position(|&x| x == max).or_else(|| oracle::argmax(aview1(self.0)))
    }
}

/// The `k` largest elements as (key, index), largest first, the lower index first among equals.
struct Largest<'a> {
    row: &'a [f32],
    k: usize,
}

/// A number that orders as f32 does, NaN below all.
#[inline(always)]
fn key(x: f32) -> i32 {
    if x.is_nan() {
        return i32::MIN;
    }
    // Adding zero turns -0 into 0. Negative numbers order the other way round than their bits.
    let bits = (x + 0.0).to_bits() as i32;
    bits ^ ((bits >> 31) as u32 >> 1) as i32
}

impl Kernel for Largest<'_> {
    type Output = Vec<(i32, u32)>;

    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> Vec<(i32, u32)> {
        let k = self.k.min(self.row.len());
        if k == 0 {
            return Vec::new();
        }
        let order = |a: &(i32, u32), b: &(i32, u32)| b.0.cmp(&a.0).then(a.1.cmp(&b.1));
        let capacity = (2 * k).max(64);
        let mut best: Vec<(i32, u32)> = Vec::with_capacity((capacity + 64).min(self.row.len() + 64));
        // Nothing is below it: keys are 32 bits wide.
        let mut threshold = i64::MIN;
        for (i, chunk) in self.row.chunks(64).enumerate() {
            let max = chunk.iter().fold(i32::MIN, |max, &x| max.max(key(x)));
            if i64::from(max) <= threshold {
                continue;
            }
            for (j, &x) in chunk.iter().enumerate() {
                // Equal to the threshold is not enough: k elements before this one are at least as large.
                if i64::from(key(x)) > threshold {
                    best.push((key(x), (i * 64 + j) as u32));
                }
            }
            if best.len() > capacity {
                best.select_nth_unstable_by(k - 1, order);
                best.truncate(k);
                threshold = i64::from(best[k - 1].0);
            }
        }
        best.sort_unstable_by(order);
        best.truncate(k);
        best
    }
}
