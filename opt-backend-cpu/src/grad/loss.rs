//! Losses of rows of logits and their gradients, in the place of the logits.
//!
//! Exponentials are f32, and sums of them f64 every [`CHUNK`] elements.

use crate::vocab::largest;
use opt_backend::{Result, Smoothing};
use opt_kernels::{
    memory::Shared,
    pool::Pool,
    simd::{Kernel, Simd, SimdLevel, math},
};

/// Elements that are summed in f32.
const CHUNK: usize = 1024;

/// Calls `of_row` with each row, `[_, width]` at `rows`, and adds up what it returns in their order.
///
/// # Safety
/// There are `count` rows, and nobody else accesses them.
pub(crate) unsafe fn total(
    pool: &Pool,
    rows: Shared<f32>,
    [count, width]: [usize; 2],
    of_row: impl Fn(usize, &mut [f32]) -> f64 + Sync,
) -> Result<f64> {
    let mut losses = vec![0.0; count];
    let out = Shared(losses.as_mut_ptr());
    pool.run(count, &|i| {
        // SAFETY: row i exists and belongs to this task alone, and so does its loss.
        unsafe {
            let row = std::slice::from_raw_parts_mut(rows.at(i * width), width);
            *out.at(i) = of_row(i, row);
        }
    })?;
    Ok(losses.iter().sum())
}

/// The cross-entropy of a row; the row becomes its gradient.
pub(crate) fn cross_entropy(level: SimdLevel, row: &mut [f32], target: usize, smoothing: Smoothing) -> f64 {
    let (scale, epsilon) = (f64::from(smoothing.scale), f64::from(smoothing.epsilon));
    let count = row.len() as f64;
    let mean = if epsilon == 0.0 { 0.0 } else { level.run(Sum(row)) / count };
    let logit = f64::from(row[target]);
    let Exponentials { max, sum } = level.run(Exponential { row, by: 1.0 });
    let total = f64::from(max) + sum.ln();
    level.run(Rescale { row, factor: (scale / sum) as f32, offset: (scale * epsilon / count) as f32 });
    row[target] = (scale * ((logit - total).exp() - (1.0 - epsilon) - epsilon / count)) as f32;
    let smooth = if epsilon == 0.0 { 0.0 } else { epsilon * (total - mean) };
    (1.0 - epsilon) * (total - logit) + smooth
}

/// The loss of a row against a teacher's; the row becomes its gradient.
pub(crate) fn soft_targets(
    level: SimdLevel,
    student: &mut [f32],
    teacher: &[f32],
    temperature: f32,
    scale: f32,
) -> f64 {
    let (s, t) = (level.run(Sums { row: student, by: 1.0 / temperature }), {
        level.run(Sums { row: teacher, by: 1.0 / temperature })
    });
    let loss = level.run(Divergence { student, teacher, temperature, scale, s, t });
    f64::from(temperature) * f64::from(temperature) * loss
}

/// The sum of a row.
struct Sum<'a>(&'a [f32]);

impl Kernel for Sum<'_> {
    type Output = f64;

    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> f64 {
        let mut sums = [0.0; 8];
        let (whole, rest) = self.0.as_chunks::<8>();
        for chunk in whole {
            for (sum, &x) in sums.iter_mut().zip(chunk) {
                *sum += f64::from(x);
            }
        }
        for (sum, &x) in sums.iter_mut().zip(rest) {
            *sum += f64::from(x);
        }
        sums.iter().sum()
    }
}

/// The largest element of a row, and the sum of exponentials of what the others are below it.
#[derive(Clone, Copy)]
struct Exponentials {
    max: f32,
    sum: f64,
}

/// The vector at `i` of `row`, of which what lies past the end is `rest`.
#[inline(always)]
fn load<S: Simd>(s: S, row: &[f32], i: usize, rest: f32) -> S::V {
    if row.len() - i >= S::LANES {
        // SAFETY: so many elements are left.
        return unsafe { s.load(row.as_ptr().add(i)) };
    }
    let mut lanes = [rest; 16];
    lanes[..row.len() - i].copy_from_slice(&row[i..]);
    // SAFETY: no vector has more than sixteen lanes.
    unsafe { s.load(lanes.as_ptr()) }
}

/// Stores a vector at `i` of `row`, as far as that reaches.
#[inline(always)]
fn store<S: Simd>(s: S, row: &mut [f32], i: usize, v: S::V) {
    if row.len() - i >= S::LANES {
        // SAFETY: so many elements are left.
        return unsafe { s.store(row.as_mut_ptr().add(i), v) };
    }
    let mut lanes = [0.0; 16];
    // SAFETY: no vector has more than sixteen lanes.
    unsafe { s.store(lanes.as_mut_ptr(), v) };
    let count = row.len() - i;
    row[i..].copy_from_slice(&lanes[..count]);
}

/// Replaces elements by exponentials of what they are below the largest, times `by`.
struct Exponential<'a> {
    row: &'a mut [f32],
    by: f32,
}

impl Kernel for Exponential<'_> {
    type Output = Exponentials;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Exponentials {
        let max = largest(s, self.row);
        let (shift, by) = (s.splat(max), s.splat(self.by));
        let mut total = 0.0;
        for chunk in self.row.chunks_mut(CHUNK) {
            let mut sum = s.splat(0.0);
            for i in (0..chunk.len()).step_by(S::LANES) {
                let x = load(s, chunk, i, f32::NEG_INFINITY);
                let e = math::exp(s, s.mul(s.sub(x, shift), by));
                store(s, chunk, i, e);
                sum = s.add(sum, e);
            }
            total += f64::from(s.sum(sum));
        }
        Exponentials { max, sum: total }
    }
}

/// What [`Exponential`] returns, of a row that stays as it is.
struct Sums<'a> {
    row: &'a [f32],
    by: f32,
}

impl Kernel for Sums<'_> {
    type Output = Exponentials;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Exponentials {
        let max = largest(s, self.row);
        let (shift, by) = (s.splat(max), s.splat(self.by));
        let mut total = 0.0;
        for chunk in self.row.chunks(CHUNK) {
            let mut sum = s.splat(0.0);
            for i in (0..chunk.len()).step_by(S::LANES) {
                let x = load(s, chunk, i, f32::NEG_INFINITY);
                sum = s.add(sum, math::exp(s, s.mul(s.sub(x, shift), by)));
            }
            total += f64::from(s.sum(sum));
        }
        Exponentials { max, sum: total }
    }
}

/// Each element times a factor less an offset.
struct Rescale<'a> {
    row: &'a mut [f32],
    factor: f32,
    offset: f32,
}

impl Kernel for Rescale<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        for x in self.row.iter_mut() {
            *x = *x * self.factor - self.offset;
        }
    }
}

/// The divergence of cooled rows; the student's becomes its gradient.
struct Divergence<'a> {
    student: &'a mut [f32],
    teacher: &'a [f32],
    temperature: f32,
    scale: f32,
    s: Exponentials,
    t: Exponentials,
}

impl Kernel for Divergence<'_> {
    type Output = f64;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f64 {
        let by = s.splat(1.0 / self.temperature);
        let (s_max, t_max) = (s.splat(self.s.max), s.splat(self.t.max));
        let (s_part, t_part) = (s.splat((1.0 / self.s.sum) as f32), s.splat((1.0 / self.t.sum) as f32));
        // What logarithms of the teacher's probabilities have on those of the student's.
        let offset = s.splat((self.s.sum.ln() - self.t.sum.ln()) as f32);
        let factor = s.splat(self.scale * self.temperature);
        let mut total = 0.0;
        for (student, teacher) in self.student.chunks_mut(CHUNK).zip(self.teacher.chunks(CHUNK)) {
            let mut sum = s.splat(0.0);
            for i in (0..student.len()).step_by(S::LANES) {
                let x = s.mul(s.sub(load(s, student, i, self.s.max), s_max), by);
                let y = s.mul(s.sub(load(s, teacher, i, f32::MIN), t_max), by);
                let (q, p) = (s.mul(math::exp(s, x), s_part), s.mul(math::exp(s, y), t_part));
                // A probability of zero counts nothing, however unlikely the other is.
                let more = s.where_less(s.splat(0.0), p, s.add(s.sub(y, x), offset), p);
                sum = s.fma(p, more, sum);
                store(s, student, i, s.mul(factor, s.sub(q, p)));
            }
            total += f64::from(s.sum(sum));
        }
        total
    }
}
