//! LayerNorm.
//!
//! Sums are in f64, eight at a time in a plain loop that compilers vectorise: rows whose mean is far larger than
//! their deviation would lose it in f32. The order of the sums is the same for every instruction set.

use opt_backend::Result;
use opt_kernels::{
    memory::Shared,
    pool::Pool,
    simd::{Kernel, Simd, SimdLevel},
};

/// A LayerNorm's parameters. Created by [`opt_backend::Backend::new_norm`].
#[derive(Debug)]
pub struct Norm {
    pub(crate) width: usize,
    pub(crate) eps: f32,
    pub(crate) weight: Option<Vec<f32>>,
    pub(crate) bias: Option<Vec<f32>>,
}

/// Normalises each row of `x`, `[_, width]`, into `out`.
///
/// # Safety
/// `out` has the size of `x`, and nobody else accesses it.
pub(crate) unsafe fn layer_norm(
    pool: &Pool,
    level: SimdLevel,
    x: &[f32],
    norm: &Norm,
    out: Shared<f32>,
) -> Result<()> {
    if norm.width == 0 {
        return Ok(());
    }
    let rows = x.len() / norm.width;
    // A task of some microseconds.
    let share = (16384 / norm.width).max(1);
    pool.run(rows.div_ceil(share), &|task| {
        level.run(Rows { x, norm, rows: task * share..rows.min((task + 1) * share), out });
    })
}

struct Rows<'a> {
    x: &'a [f32],
    norm: &'a Norm,
    rows: std::ops::Range<usize>,
    out: Shared<f32>,
}

impl Kernel for Rows<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let Norm { width, eps, ref weight, ref bias } = *self.norm;
        for row in self.rows {
            let x = &self.x[row * width..][..width];
            // SAFETY: this row of the output exists, is as yet unread, and belongs to this task alone. Writing the
            // input first makes it an initialised slice.
            let out = unsafe {
                let start = self.out.at(row * width);
                std::ptr::copy_nonoverlapping(x.as_ptr(), start, width);
                std::slice::from_raw_parts_mut(start, width)
            };
            let mean = sum(x, |x| x) / width as f64;
            let variance = sum(x, |x| (x - mean) * (x - mean)) / width as f64;
            let scale = 1.0 / (variance + f64::from(eps)).sqrt();
            for y in &mut *out {
                *y = ((f64::from(*y) - mean) * scale) as f32;
            }
            if let Some(weight) = weight {
                out.iter_mut().zip(weight).for_each(|(y, w)| *y *= w);
            }
            if let Some(bias) = bias {
                out.iter_mut().zip(bias).for_each(|(y, b)| *y += b);
            }
        }
    }
}

#[inline(always)]
fn sum(x: &[f32], f: impl Fn(f64) -> f64) -> f64 {
    let mut sums = [0.0; 8];
    let chunks = x.chunks_exact(8);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (sum, &x) in sums.iter_mut().zip(chunk) {
            *sum += f(f64::from(x));
        }
    }
    for (sum, &x) in sums.iter_mut().zip(rest) {
        *sum += f(f64::from(x));
    }
    sums.iter().sum()
}
