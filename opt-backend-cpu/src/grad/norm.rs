//! The gradients of LayerNorm. Sums are in f64, as those of the op itself.

use crate::Norm;
use opt_backend::Result;
use opt_kernels::{
    memory::Shared,
    pool::Pool,
    simd::{Kernel, Simd, SimdLevel},
};
use std::ops::Range;

/// Elements of a task.
const ELEMENTS: usize = 16384;
/// Columns of a task that sums rows.
const COLUMNS: usize = 64;

/// Writes the gradient of rows `[_, width]`.
///
/// # Safety
/// `x`, `dy` and `out` have the same size, a multiple of the norm's width, and nobody else accesses `out`.
pub(crate) unsafe fn of_input(
    pool: &Pool,
    level: SimdLevel,
    x: &[f32],
    norm: &Norm,
    dy: &[f32],
    out: Shared<f32>,
) -> Result<()> {
    if norm.width == 0 {
        return Ok(());
    }
    let ones;
    let weight = match &norm.weight {
        Some(weight) => weight,
        None => {
            ones = vec![1.0; norm.width];
            &ones
        }
    };
    let rows = x.len() / norm.width;
    let share = (ELEMENTS / norm.width).max(1);
    pool.run(rows.div_ceil(share), &|task| {
        let rows = task * share..rows.min((task + 1) * share);
        level.run(OfInput { x, dy, weight, eps: norm.eps, rows, out });
    })
}

struct OfInput<'a> {
    x: &'a [f32],
    dy: &'a [f32],
    weight: &'a [f32],
    eps: f32,
    rows: Range<usize>,
    out: Shared<f32>,
}

impl Kernel for OfInput<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let width = self.weight.len();
        let n = width as f64;
        for row in self.rows {
            let (x, dy) = (&self.x[row * width..][..width], &self.dy[row * width..][..width]);
            let (mean, scale) = moments(x, self.eps);
            let (mut inner, mut product) = ([0.0; 8], [0.0; 8]);
            let each = x.chunks(8).zip(dy.chunks(8)).zip(self.weight.chunks(8));
            for ((x, dy), weight) in each {
                for (i, ((&x, &dy), &w)) in x.iter().zip(dy).zip(weight).enumerate() {
                    let g = f64::from(dy) * f64::from(w);
                    inner[i] += g;
                    product[i] += g * ((f64::from(x) - mean) * scale);
                }
            }
            let (inner, product) = (inner.iter().sum::<f64>() / n, product.iter().sum::<f64>() / n);
            // SAFETY: this row exists and belongs to this task alone. Writing something first makes it an initialised
            // slice.
            let out = unsafe {
                let start = self.out.at(row * width);
                start.copy_from_nonoverlapping(dy.as_ptr(), width);
                std::slice::from_raw_parts_mut(start, width)
            };
            for ((out, &x), &w) in out.iter_mut().zip(x).zip(self.weight) {
                let g = f64::from(*out) * f64::from(w);
                let normal = (f64::from(x) - mean) * scale;
                *out = (scale * (g - inner - normal * product)) as f32;
            }
        }
    }
}

/// The mean of a row and one over its deviation.
#[inline(always)]
fn moments(x: &[f32], eps: f32) -> (f64, f64) {
    let n = x.len() as f64;
    let (whole, rest) = x.as_chunks::<8>();
    let mut sums = [0.0; 8];
    for x in whole {
        for (sum, &x) in sums.iter_mut().zip(x) {
            *sum += f64::from(x);
        }
    }
    for (sum, &x) in sums.iter_mut().zip(rest) {
        *sum += f64::from(x);
    }
    let mean = sums.iter().sum::<f64>() / n;
    let mut sums = [0.0; 8];
    for x in whole {
        for (sum, &x) in sums.iter_mut().zip(x) {
            *sum += (f64::from(x) - mean) * (f64::from(x) - mean);
        }
    }
    for (sum, &x) in sums.iter_mut().zip(rest) {
        *sum += (f64::from(x) - mean) * (f64::from(x) - mean);
    }
    (mean, 1.0 / (sums.iter().sum::<f64>() / n + f64::from(eps)).sqrt())
}

/// Writes the gradients of weight and bias, one element a column of `[rows, width]` each.
///
/// # Safety
/// `x` and `dy` have the same size, `out` has room for `width` elements each, and nobody else accesses it.
pub(crate) unsafe fn of_params(
    pool: &Pool,
    level: SimdLevel,
    x: &[f32],
    norm: &Norm,
    dy: &[f32],
    out: [Shared<f32>; 2],
) -> Result<()> {
    let width = norm.width;
    if width == 0 {
        return Ok(());
    }
    let rows = x.len() / width;
    let mut of_rows = vec![(0.0, 0.0); rows];
    let target = Shared(of_rows.as_mut_ptr());
    let share = (ELEMENTS / width).max(1);
    pool.run(rows.div_ceil(share), &|task| {
        let rows = task * share..rows.min((task + 1) * share);
        level.run(Moments { x, width, eps: norm.eps, rows, target });
    })?;
    pool.run(width.div_ceil(COLUMNS), &|task| {
        let columns = task * COLUMNS..width.min((task + 1) * COLUMNS);
        level.run(OfParams { x, dy, of_rows: &of_rows, width, columns, out });
    })
}

struct Moments<'a> {
    x: &'a [f32],
    width: usize,
    eps: f32,
    rows: Range<usize>,
    target: Shared<(f64, f64)>,
}

impl Kernel for Moments<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        for row in self.rows {
            let found = moments(&self.x[row * self.width..][..self.width], self.eps);
            // SAFETY: there is one element a row, which belongs to this task alone.
            unsafe { *self.target.at(row) = found };
        }
    }
}

struct OfParams<'a> {
    x: &'a [f32],
    dy: &'a [f32],
    of_rows: &'a [(f64, f64)],
    width: usize,
    columns: Range<usize>,
    out: [Shared<f32>; 2],
}

impl Kernel for OfParams<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let (mut weight, mut bias) = ([0.0; COLUMNS], [0.0; COLUMNS]);
        for (row, &(mean, scale)) in self.of_rows.iter().enumerate() {
            let at = row * self.width + self.columns.start;
            let (x, dy) = (&self.x[at..][..self.columns.len()], &self.dy[at..][..self.columns.len()]);
            for (((weight, bias), &x), &dy) in weight.iter_mut().zip(&mut bias).zip(x).zip(dy) {
                *weight += f64::from(dy) * ((f64::from(x) - mean) * scale);
                *bias += f64::from(dy);
            }
        }
        for (i, column) in self.columns.enumerate() {
            // SAFETY: this column of either exists and belongs to this task alone.
            unsafe {
                *self.out[0].at(column) = weight[i] as f32;
                *self.out[1].at(column) = bias[i] as f32;
            }
        }
    }
}

/// Writes the sum of each column of `[rows, width]`.
///
/// # Safety
/// `out` has room for `width` elements, and nobody else accesses it.
pub(crate) unsafe fn sum_rows(
    pool: &Pool,
    level: SimdLevel,
    x: &[f32],
    width: usize,
    out: Shared<f32>,
) -> Result<()> {
    pool.run(width.div_ceil(COLUMNS), &|task| {
        let columns = task * COLUMNS..width.min((task + 1) * COLUMNS);
        level.run(SumRows { x, width, columns, out });
    })
}

struct SumRows<'a> {
    x: &'a [f32],
    width: usize,
    columns: Range<usize>,
    out: Shared<f32>,
}

impl Kernel for SumRows<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let mut sums = [0.0; COLUMNS];
        for row in self.x.chunks_exact(self.width) {
            for (sum, &x) in sums.iter_mut().zip(&row[self.columns.clone()]) {
                *sum += f64::from(x);
            }
        }
        for (column, sum) in self.columns.zip(sums) {
            // SAFETY: this column exists and belongs to this task alone.
            unsafe { *self.out.at(column) = sum as f32 };
        }
    }
}
