//! Loops over numbers, compiled for each instruction set and chosen at run time by `pulp`, as candle's matmul is.

use half::{bf16, f16};
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
                wide.iter_mut().zip(data).for_each(|(wide, v)| *wide = v.single());
                wide
            }
            Held::BF16(data) => {
                let wide = &mut wide[..data.len()];
                wide.iter_mut().zip(data).for_each(|(wide, v)| *wide = v.single());
                wide
            }
        }
    }
}

/// Rows of a weight that are read side by side. More do not read faster: memory likes few long streams.
const STREAMS: usize = 2;
/// Numbers of a row that are worked on at a time. With a number that the compiler knows, what is widened stays in
/// registers. A multiple of two vectors of any instruction set.
const BLOCK: usize = 64;

/// What a weight's numbers are held as.
trait Number: Copy {
    fn single(self) -> f32;

    /// A block as f32.
    #[inline(always)]
    fn widen(_: Halves, from: &[Self; BLOCK], wide: &mut [f32; BLOCK]) {
        wide.iter_mut().zip(from).for_each(|(wide, v)| *wide = v.single());
    }
}

/// How f16 are widened: by the processor, where pulp has the instruction (AVX-512), else by arithmetic.
#[derive(Clone, Copy)]
struct Halves {
    #[cfg(target_arch = "x86_64")]
    avx512: Option<pulp::x86::V4>,
}

impl Halves {
    #[inline(always)]
    fn find() -> Self {
        Self {
            #[cfg(target_arch = "x86_64")]
            avx512: pulp::x86::V4::try_new(),
        }
    }
}

impl Number for f32 {
    #[inline(always)]
    fn single(self) -> f32 {
        self
    }
}

impl Number for bf16 {
    #[inline(always)]
    fn single(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
}

impl Number for f16 {
    /// Without a branch or a subnormal on the way, so that it vectorises. (`half` asks the processor for F16C at each
    /// call.) Subnormals are made as 0.5 + x and lose the 0.5; all else has its exponent raised as far as an
    /// infinity's needs, and scaled back.
    #[inline(always)]
    fn single(self) -> f32 {
        const SCALE: f32 = f32::from_bits((127 - 112) << 23);
        let bits = u32::from(self.to_bits()) << 16;
        let twice = bits << 1;
        let normal = f32::from_bits((twice >> 4).wrapping_add(224 << 23)) * SCALE;
        let small = f32::from_bits((twice >> 17) | (126 << 23)) - 0.5;
        let magnitude = if twice < 1 << 27 { small } else { normal };
        f32::from_bits(magnitude.to_bits() | (bits & (1 << 31)))
    }

    #[inline(always)]
    fn widen(halves: Halves, from: &[Self; BLOCK], wide: &mut [f32; BLOCK]) {
        #[cfg(target_arch = "x86_64")]
        if let Some(v4) = halves.avx512 {
            for (from, wide) in from.as_chunks::<16>().0.iter().zip(wide.as_chunks_mut::<16>().0) {
                *wide = pulp::cast(v4.avx512f._mm512_cvtph_ps(pulp::cast(from.map(f16::to_bits))));
            }
            return;
        }
        let _ = halves;
        wide.iter_mut().zip(from).for_each(|(wide, v)| *wide = v.single());
    }
}

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
        if depth == 0 || outputs == 0 {
            out.fill(0.0);
            return;
        }
        match weight {
            Held::F32(weight) => products(s, x, depth, weight, outputs, out),
            Held::F16(weight) => products(s, x, depth, weight, outputs, out),
            Held::BF16(weight) => products(s, x, depth, weight, outputs, out),
        }
    }
}

#[inline(always)]
fn products<S: Simd, T: Number>(
    s: S,
    x: &[f32],
    depth: usize,
    weight: &[T],
    outputs: usize,
    out: &mut [f32],
) {
    let halves = Halves::find();
    for (i, weight) in weight.chunks(STREAMS * depth).enumerate() {
        let first = i * STREAMS;
        let count = weight.len() / depth;
        // A last row without a partner is its own; what that gives is not kept.
        let (a, b) = (&weight[..depth], &weight[(count - 1) * depth..]);
        let mut rows = x.chunks_exact(depth).zip(out.chunks_exact_mut(outputs));
        let keep = |out: &mut [f32], sums: [f32; STREAMS]| {
            out[first..first + count].iter_mut().zip(sums).for_each(|(o, sum)| *o = sum);
        };
        while let Some((x0, out0)) = rows.next() {
            let Some((x1, out1)) = rows.next() else {
                let [sums] = dots(s, halves, [a, b], [x0]);
                keep(out0, sums);
                break;
            };
            let [sums0, sums1] = dots(s, halves, [a, b], [x0, x1]);
            keep(out0, sums0);
            keep(out1, sums1);
        }
    }
}

/// The dot products of each of `x` with both rows of a weight, all of one length.
#[inline(always)]
fn dots<S: Simd, T: Number, const X: usize>(
    s: S,
    halves: Halves,
    [a, b]: [&[T]; STREAMS],
    x: [&[f32]; X],
) -> [[f32; STREAMS]; X] {
    let ((a_blocks, a_rest), (b_blocks, b_rest)) = (a.as_chunks::<BLOCK>(), b.as_chunks::<BLOCK>());
    let x_blocks = x.map(|x| &x.as_chunks::<BLOCK>().0[..a_blocks.len()]);
    // Two sums each, so that one can be added to while the other is.
    let mut a_sums = [[s.splat_f32s(0.0); 2]; X];
    let mut b_sums = a_sums;
    for (i, (a, b)) in a_blocks.iter().zip(b_blocks).enumerate() {
        let (mut a_wide, mut b_wide) = ([0.0; BLOCK], [0.0; BLOCK]);
        T::widen(halves, a, &mut a_wide);
        T::widen(halves, b, &mut b_wide);
        let ((a, _), (b, _)) = (S::as_simd_f32s(&a_wide), S::as_simd_f32s(&b_wide));
        for row in 0..X {
            let (x, _) = S::as_simd_f32s(&x_blocks[row][i]);
            for j in 0..BLOCK / S::F32_LANES {
                a_sums[row][j % 2] = s.mul_add_e_f32s(a[j], x[j], a_sums[row][j % 2]);
                b_sums[row][j % 2] = s.mul_add_e_f32s(b[j], x[j], b_sums[row][j % 2]);
            }
        }
    }
    let mut out = [[0.0; STREAMS]; X];
    for row in 0..X {
        let x_rest = &x[row][a.len() - a_rest.len()..];
        let rest = |w: &[T]| w.iter().zip(x_rest).map(|(w, x)| w.single() * x).sum::<f32>();
        let whole = |[even, odd]: [S::f32s; 2]| s.reduce_sum_f32s(s.add_f32s(even, odd));
        out[row] = [whole(a_sums[row]) + rest(a_rest), whole(b_sums[row]) + rest(b_rest)];
    }
    out
}

/// A weight `[outputs, depth]` as f32 `[depth, outputs]`, into `out`: the order in which matrix products read it
/// without rearranging it themselves, which at that shape they do slowly.
pub(crate) struct Transpose<'a> {
    pub(crate) weight: Held<'a>,
    pub(crate) depth: usize,
    pub(crate) outputs: usize,
    pub(crate) out: &'a mut [f32],
}

impl WithSimd for Transpose<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Self { weight, depth, outputs, out } = self;
        match weight {
            Held::F32(weight) => transpose(weight, depth, outputs, out),
            Held::F16(weight) => transpose(weight, depth, outputs, out),
            Held::BF16(weight) => transpose(weight, depth, outputs, out),
        }
    }
}

#[inline(always)]
fn transpose<T: Number>(weight: &[T], depth: usize, outputs: usize, out: &mut [f32]) {
    /// As many rows are read at once as numbers fill a cache line of what is written.
    const ROWS: usize = 16;
    let halves = Halves::find();
    let whole = outputs - outputs % ROWS;
    let mut wide = [[0.0; BLOCK]; ROWS];
    for first in (0..whole).step_by(ROWS) {
        let rows: [&[T]; ROWS] = std::array::from_fn(|i| &weight[(first + i) * depth..][..depth]);
        let mut write = |column: usize, numbers: [f32; ROWS]| {
            out[column * outputs + first..][..ROWS].copy_from_slice(&numbers);
        };
        let blocks = depth / BLOCK;
        for block in 0..blocks {
            for (row, wide) in rows.iter().zip(&mut wide) {
                if let Some(from) = row.as_chunks::<BLOCK>().0.get(block) {
                    T::widen(halves, from, wide);
                }
            }
            for column in 0..BLOCK {
                write(block * BLOCK + column, wide.each_ref().map(|row| row[column]));
            }
        }
        for column in blocks * BLOCK..depth {
            write(column, rows.map(|row| row[column].single()));
        }
    }
    for (i, row) in weight[whole * depth..].chunks_exact(depth).enumerate() {
        let out = out[whole + i..].iter_mut().step_by(outputs);
        out.zip(row).for_each(|(o, v)| *o = v.single());
    }
}

/// The dot product of `x` with each of four rows, all of one length.
#[inline(always)]
pub(crate) fn four_dots<S: Simd>(s: S, w: [&[f32]; 4], x: &[f32]) -> [f32; 4] {
    let [a, b, c, d] = w.map(|w| S::as_simd_f32s(w));
    let (x, x_rest) = S::as_simd_f32s(x);
    let mut sums = [s.splat_f32s(0.0); 4];
    for ((((a, b), c), d), x) in a.0.iter().zip(b.0).zip(c.0).zip(d.0).zip(x) {
        sums[0] = s.mul_add_e_f32s(*a, *x, sums[0]);
        sums[1] = s.mul_add_e_f32s(*b, *x, sums[1]);
        sums[2] = s.mul_add_e_f32s(*c, *x, sums[2]);
        sums[3] = s.mul_add_e_f32s(*d, *x, sums[3]);
    }
    let mut out = [0.0; 4];
    for ((out, sum), rest) in out.iter_mut().zip(sums).zip([a.1, b.1, c.1, d.1]) {
        *out = s.reduce_sum_f32s(sum) + rest.iter().zip(x_rest).map(|(w, x)| w * x).sum::<f32>();
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
        // Defined with six digits, not with 1/√2; 0.398942 is 0.282095 √2.
        #[allow(clippy::approx_constant)]
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
    fn every_half_is_the_same_single() {
        for bits in 0..=u16::MAX {
            let (found, expected) = (f16::from_bits(bits).single(), f16::from_bits(bits).to_f32());
            assert!(
                found.to_bits() == expected.to_bits() || (found.is_nan() && expected.is_nan()),
                "{bits:#x}"
            );
        }
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
