//! Loops over numbers, compiled for each instruction set and chosen at run time by `pulp`, as candle's matmul is.

use half::{bf16, f16, slice::HalfFloatSliceExt};
use opt_backend::Activation;
use pulp::{Arch, Simd, WithSimd};
use std::ops::Range;

/// Numbers of a weight as they are held.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Held<'a> {
    F32(&'a [f32]),
    F16(&'a [f16]),
    BF16(&'a [bf16]),
}

impl<'a> Held<'a> {
    /// Those of `range`.
    pub(crate) fn part(self, range: Range<usize>) -> Self {
        match self {
            Held::F32(data) => Held::F32(&data[range]),
            Held::F16(data) => Held::F16(&data[range]),
            Held::BF16(data) => Held::BF16(&data[range]),
        }
    }

    /// As f32: in place, or in `wide`.
    #[inline(always)]
    pub(crate) fn widen(self, wide: &'a mut [f32]) -> &'a [f32] {
        match self {
            Held::F32(data) => data,
            Held::F16(data) => {
                let wide = &mut wide[..data.len()];
                data.convert_to_f32_slice(wide);
                wide
            }
            Held::BF16(data) => {
                let wide = &mut wide[..data.len()];
                let each = wide.iter_mut().zip(data);
                each.for_each(|(wide, v)| *wide = f32::from_bits(u32::from(v.to_bits()) << 16));
                wide
            }
        }
    }
}

/// Outputs that are computed side by side: as many streams of weights.
const GROUP: usize = 4;
/// Columns of 16-bit weights that are widened at a time: with those of [`GROUP`] outputs they fit the first cache.
const COLUMNS: usize = 1024;

/// Products of a few rows `x` `[rows, depth]` with a weight `[outputs, depth]`, into `out` `[rows, outputs]`.
pub(crate) struct Dots<'a> {
    pub(crate) x: &'a [f32],
    pub(crate) depth: usize,
    pub(crate) weight: Held<'a>,
    pub(crate) outputs: usize,
    pub(crate) out: &'a mut [f32],
}

impl WithSimd for Dots<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) {
        let Self { x, depth, weight, outputs, out } = self;
        out.fill(0.0);
        if depth == 0 || outputs == 0 {
            return;
        }
        let columns = if matches!(weight, Held::F32(_)) { depth } else { COLUMNS.min(depth) };
        let mut wide = [const { Vec::new() }; GROUP];
        if !matches!(weight, Held::F32(_)) {
            for wide in &mut wide {
                wide.resize(columns, 0.0);
            }
        }
        for first in (0..outputs).step_by(GROUP) {
            let count = GROUP.min(outputs - first);
            for start in (0..depth).step_by(columns) {
                let end = depth.min(start + columns);
                let [a, b, c, d] = &mut wide;
                // Past the last output the last one is repeated; what it gives is not kept.
                let row = |j: usize| {
                    let at = (first + j.min(count - 1)) * depth;
                    weight.part(at + start..at + end)
                };
                let w = [row(0).widen(a), row(1).widen(b), row(2).widen(c), row(3).widen(d)];
                let rows = x.chunks_exact(depth).zip(out.chunks_exact_mut(outputs));
                let mut rows = rows.map(|(x, out)| (&x[start..end], &mut out[first..first + count]));
                while let Some((x0, out0)) = rows.next() {
                    match rows.next() {
                        Some((x1, out1)) => {
                            let [sums0, sums1] = dots(s, w, [x0, x1]);
                            out0.iter_mut().zip(sums0).for_each(|(o, sum)| *o += sum);
                            out1.iter_mut().zip(sums1).for_each(|(o, sum)| *o += sum);
                        }
                        None => {
                            let [sums] = dots(s, w, [x0]);
                            out0.iter_mut().zip(sums).for_each(|(o, sum)| *o += sum);
                        }
                    }
                }
            }
        }
    }
}

/// The dot products of each of `x` with each of `w`, all of one length.
#[inline(always)]
pub(crate) fn dots<S: Simd, const X: usize>(s: S, w: [&[f32]; GROUP], x: [&[f32]; X]) -> [[f32; GROUP]; X] {
    let len = x[0].len();
    let steps = len / S::F32_LANES;
    let [w0, w1, w2, w3] = w;
    let (w0, w1, w2, w3) = (&w0[..len], &w1[..len], &w2[..len], &w3[..len]);
    let ([v0, v1, v2, v3], rests) = {
        let [a, b, c, d] = [w0, w1, w2, w3].map(|w| S::as_simd_f32s(w));
        ([&a.0[..steps], &b.0[..steps], &c.0[..steps], &d.0[..steps]], [a.1, b.1, c.1, d.1])
    };
    let x = x.map(|x| S::as_simd_f32s(&x[..len]));
    let mut sums = [[s.splat_f32s(0.0); GROUP]; X];
    for i in 0..steps {
        for (sums, x) in sums.iter_mut().zip(&x) {
            let x = x.0[i];
            sums[0] = s.mul_add_e_f32s(v0[i], x, sums[0]);
            sums[1] = s.mul_add_e_f32s(v1[i], x, sums[1]);
            sums[2] = s.mul_add_e_f32s(v2[i], x, sums[2]);
            sums[3] = s.mul_add_e_f32s(v3[i], x, sums[3]);
        }
    }
    let mut out = [[0.0; GROUP]; X];
    for ((out, sums), x) in out.iter_mut().zip(sums).zip(&x) {
        for ((out, sum), rest) in out.iter_mut().zip(sums).zip(rests) {
            *out = s.reduce_sum_f32s(sum) + rest.iter().zip(x.1).map(|(w, x)| w * x).sum::<f32>();
        }
    }
    out
}

/// eˣ to about one unit in the last place, from the reduction x = n ln 2 + r and a polynomial in r (Cephes' `expf`).
/// Below -87 it is about 1e-38; above 88 it stays finite.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    // Adding this leaves the rounded number in the low bits.
    const SHIFT: f32 = 12_582_912.0;
    let x = x.clamp(-87.0, 88.0);
    let shifted = x * std::f32::consts::LOG2_E + SHIFT;
    let n = shifted - SHIFT;
    // ln 2 in two parts, of which the first times n is exact.
    let r = (x - n * 0.693_359_4) - n * -2.121_944_4e-4;
    let p = 1.987_569_2e-4;
    let p = p * r + 1.398_2e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_5e-1;
    let p = p * r + 0.5;
    let p = (p * r * r + r) + 1.0;
    p * f32::from_bits((shifted.to_bits().wrapping_sub(SHIFT.to_bits()).wrapping_add(127)) << 23)
}

#[inline(always)]
fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

#[inline(always)]
fn tanh(x: f32) -> f32 {
    1.0 - 2.0 / (exp(2.0 * x) + 1.0)
}

/// The error function to 1.5e-7 (Abramowitz and Stegun 7.1.26).
#[inline(always)]
fn erf(x: f32) -> f32 {
    let t = 1.0 / (1.0 + 0.327_591_1 * x.abs());
    let p = 1.061_405_4;
    let p = p * t - 1.453_152;
    let p = p * t + 1.421_413_8;
    let p = p * t - 0.284_496_72;
    let p = p * t + 0.254_829_6;
    (1.0 - p * t * exp(-x * x)).copysign(x)
}

#[inline(always)]
fn gelu(x: f32) -> f32 {
    0.5 * x * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2))
}

/// Applies an activation in place.
pub(crate) fn activate(arch: Arch, activation: Activation, values: &mut [f32]) {
    macro_rules! each {
        ($f:expr) => {
            arch.dispatch(|| values.iter_mut().for_each(|v| *v = ($f)(*v)))
        };
    }
    match activation {
        Activation::Relu => each!(|x: f32| x.max(0.0)),
        Activation::Gelu => each!(gelu),
        Activation::GeluTanh => each!(|x: f32| {
            let inner = 0.797_884_6 * (x + 0.044_715 * x * x * x);
            0.5 * x * (1.0 + tanh(inner))
        }),
        Activation::Gelu10 => each!(|x: f32| gelu(x).clamp(-10.0, 10.0)),
        Activation::QuickGelu => each!(|x: f32| x * sigmoid(1.702 * x)),
        Activation::Silu => each!(|x: f32| x * sigmoid(x)),
        Activation::Sigmoid => each!(sigmoid),
        Activation::Tanh => each!(tanh),
        Activation::Relu6 => each!(|x: f32| x.clamp(0.0, 6.0)),
        Activation::Relu2 => each!(|x: f32| x.max(0.0) * x.max(0.0)),
        Activation::LeakyRelu => each!(|x: f32| x.max(0.0) + 0.01 * x.min(0.0)),
        // tanh(ln(1 + e)) = n / (n + 2) with n = e (e + 2); beyond 20 it is 1.
        Activation::Mish => each!(|x: f32| {
            let e = exp(x.min(20.0));
            let n = e * (e + 2.0);
            x * (n / (n + 2.0))
        }),
        // Defined with six digits; 0.398942 is 0.282095 √2.
        Activation::Laplace => each!(|x: f32| 0.5 * (1.0 + erf((x - 0.707_107) / 0.398_942_57))),
        Activation::Linear => {}
        // One that this file does not know yet: slow and right.
        other => values.iter_mut().for_each(|v| *v = other.apply(f64::from(*v)) as f32),
    }
}

/// exp(x - max) of each number in place; returns their sum.
#[inline(always)]
pub(crate) fn exp_minus(values: &mut [f32], max: f32) -> f32 {
    let mut sums = [0.0f32; 16];
    let mut chunks = values.chunks_exact_mut(16);
    for chunk in &mut chunks {
        for (v, sum) in chunk.iter_mut().zip(&mut sums) {
            *v = exp(*v - max);
            *sum += *v;
        }
    }
    let mut sum: f32 = sums.iter().sum();
    for v in chunks.into_remainder() {
        *v = exp(*v - max);
        sum += *v;
    }
    sum
}

/// The largest number; -∞ if there is none. NaN is not one.
#[inline(always)]
pub(crate) fn largest(values: &[f32]) -> f32 {
    let mut most = [f32::NEG_INFINITY; 16];
    let (chunks, rest) = values.as_chunks::<16>();
    for chunk in chunks {
        most.iter_mut().zip(chunk).for_each(|(m, &v)| *m = if v > *m { v } else { *m });
    }
    most.iter().chain(rest).fold(f32::NEG_INFINITY, |m, &v| if v > m { v } else { m })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_close_from_end_to_end() {
        let mut worst = 0.0f64;
        for i in -87_000..=88_000 {
            let x = i as f32 / 1000.0;
            let exact = f64::from(x).exp();
            worst = worst.max((f64::from(exp(x)) - exact).abs() / exact);
        }
        assert!(worst < 2e-7, "{worst:e}");
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(f32::NEG_INFINITY) < 1e-37 && exp(f32::INFINITY).is_finite());
    }

    #[test]
    fn dots_of_every_format_and_length() {
        for depth in [1, 5, 16, 33, 100, 1024, 1500, 3000] {
            for (rows, outputs) in [(1, 1), (1, 4), (2, 5), (3, 7), (5, 9)] {
                // Multiples of 1/8 below 8: exact in every format, and their sums in f32.
                let number = |i: usize| (i * 7919 % 127) as f32 / 8.0 - 8.0;
                let x: Vec<f32> = (0..rows * depth).map(|i| number(i).round()).collect();
                let weight: Vec<f32> = (0..outputs * depth).map(number).collect();
                let half: Vec<f16> = weight.iter().map(|&v| f16::from_f32(v)).collect();
                let brain: Vec<bf16> = weight.iter().map(|&v| bf16::from_f32(v)).collect();
                for weight in [Held::F32(&weight), Held::F16(&half), Held::BF16(&brain)] {
                    let mut out = vec![f32::NAN; rows * outputs];
                    Arch::new().dispatch(Dots { x: &x, depth, weight, outputs, out: &mut out });
                    for (i, found) in out.iter().enumerate() {
                        let (row, output) = (i / outputs, i % outputs);
                        let mut wide = vec![0.0; depth];
                        let w = weight.part(output * depth..(output + 1) * depth).widen(&mut wide);
                        let expected: f32 = w.iter().zip(&x[row * depth..]).map(|(w, x)| w * x).sum();
                        assert_eq!(*found, expected, "[{rows}, {depth}] to {outputs}, element {i}");
                    }
                }
            }
        }
    }

    #[test]
    fn the_largest_is_not_nan() {
        assert_eq!(largest(&[]), f32::NEG_INFINITY);
        assert_eq!(largest(&[f32::NAN; 40]), f32::NEG_INFINITY);
        let mut values: Vec<f32> = (0..40).map(|i| i as f32).collect();
        values[39] = f32::NAN;
        assert_eq!(largest(&values), 38.0);
    }
}
