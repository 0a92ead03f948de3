//! Vector instruction sets, chosen at run time.
//!
//! A kernel is written once, generic over [`Simd`], as an implementation of [`Kernel`]. [`SimdLevel::run`] enters a
//! function compiled for the chosen instruction set (`#[target_feature]`) and calls the kernel there. Everything a
//! kernel calls is `#[inline(always)]`: only code that ends up inside that one function is compiled with the wide
//! registers, and a vector type must never cross a real function call.
//!
//! The tokens (`Scalar`, `Avx2`, ...) are only handed out by [`SimdLevel::run`], and a level other than
//! scalar is only reachable through [`SimdLevel::is_available`]; that is why their arithmetic is safe to call.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
pub mod math;
#[cfg(target_arch = "aarch64")]
mod neon;
mod scalar;
mod weight;

use half::{bf16, f16};
use std::{fmt, str::FromStr};
pub use weight::{Bf16x2, Operand, Weight};

/// A vector instruction set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum SimdLevel {
    /// Plain Rust: runs everywhere, and is what the others are tested against.
    Scalar,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2,
    /// AVX2 and dot products of bytes (AVX-VNNI).
    Avx2Vnni,
    /// x86-64 with AVX-512 F, BW, DQ and VL.
    Avx512,
    /// AVX-512 and dot products of bytes (AVX512-VNNI).
    Avx512Vnni,
    /// The same and dot products of bf16 (AVX512-BF16).
    Avx512Bf16,
    /// 64-bit ARM.
    Neon,
    /// NEON and dot products of bytes (the DotProd extension).
    NeonDot,
}

impl SimdLevel {
    /// Every level, those of one architecture in the order of what they have.
    pub const ALL: [SimdLevel; 8] = [
        SimdLevel::Scalar,
        SimdLevel::Avx2,
        SimdLevel::Avx2Vnni,
        SimdLevel::Avx512,
        SimdLevel::Avx512Vnni,
        SimdLevel::Avx512Bf16,
        SimdLevel::Neon,
        SimdLevel::NeonDot,
    ];

    /// Whether this machine has it.
    pub fn is_available(self) -> bool {
        match self {
            SimdLevel::Scalar => true,
            #[cfg(target_arch = "x86_64")]
            SimdLevel::Avx2 => avx2::detected(),
            #[cfg(target_arch = "x86_64")]
            SimdLevel::Avx2Vnni => avx2::detected() && avx2::detected_vnni(),
            #[cfg(target_arch = "x86_64")]
            SimdLevel::Avx512 => avx2::detected() && avx512::detected(),
            #[cfg(target_arch = "x86_64")]
            SimdLevel::Avx512Vnni => avx2::detected() && avx512::detected() && avx512::detected_vnni(),
            #[cfg(target_arch = "x86_64")]
            SimdLevel::Avx512Bf16 => SimdLevel::Avx512Vnni.is_available() && avx512::detected_bf16(),
            #[cfg(target_arch = "aarch64")]
            SimdLevel::Neon => neon::detected(),
            #[cfg(target_arch = "aarch64")]
            SimdLevel::NeonDot => neon::detected() && neon::detected_dot(),
            #[allow(unreachable_patterns)]
            _ => false,
        }
    }

    /// The fastest level of this machine: the last that it has, but for dot products of bf16 where they are slow.
    pub fn best() -> SimdLevel {
        let is_fast = |level: &SimdLevel| match level {
            #[cfg(target_arch = "x86_64")]
            SimdLevel::Avx512Bf16 => avx512::fast_bf16(),
            _ => true,
        };
        let mut fastest_first = SimdLevel::ALL.into_iter().rev();
        fastest_first.find(|level| level.is_available() && is_fast(level)).unwrap_or(SimdLevel::Scalar)
    }

    /// The sizes of this level's tiles.
    pub fn sizes(self) -> Sizes {
        struct Ask;
        impl Kernel for Ask {
            type Output = Sizes;
            #[inline(always)]
            fn run<S: Simd>(self, _: S) -> Sizes {
                Sizes { panel: 2 * S::LANES, rows: S::ROWS, few: S::FEW }
            }
        }
        self.run(Ask)
    }

    /// [`Simd::INT_TILES`] of this level.
    pub(crate) fn int_tiles(self) -> &'static [usize] {
        struct Ask;
        impl Kernel for Ask {
            type Output = &'static [usize];
            const BYTES: bool = true;
            #[inline(always)]
            fn run<S: Simd>(self, _: S) -> &'static [usize] {
                S::INT_TILES
            }
        }
        self.run(Ask)
    }

    /// [`Simd::BF16_DOT`] of this level.
    pub fn bf16_dot(self) -> bool {
        struct Ask;
        impl Kernel for Ask {
            type Output = bool;
            const BF16: bool = true;
            #[inline(always)]
            fn run<S: Simd>(self, _: S) -> bool {
                S::BF16_DOT
            }
        }
        self.run(Ask)
    }

    /// Runs `kernel` compiled for this level, or for the one below if it has no use for what this one adds.
    ///
    /// Values of this type that users can get hold of are checked when a backend is built; asking for an
    /// absent level here falls back to scalar.
    #[inline]
    pub fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self {
            #[cfg(target_arch = "x86_64")]
            SimdLevel::Avx512Bf16 if K::BF16 && self.is_available() => {
                // SAFETY: the features were just detected.
                unsafe { avx512::run_bf16(kernel) }
            }
            #[cfg(target_arch = "x86_64")]
            SimdLevel::Avx512Vnni | SimdLevel::Avx512Bf16 if K::BYTES && self.is_available() => {
                // SAFETY: the features were just detected.
                unsafe { avx512::run_vnni(kernel) }
            }
            #[cfg(target_arch = "x86_64")]
            SimdLevel::Avx512 | SimdLevel::Avx512Vnni | SimdLevel::Avx512Bf16 if self.is_available() => {
                // SAFETY: the features were just detected.
                unsafe { avx512::run(kernel) }
            }
            #[cfg(target_arch = "x86_64")]
            SimdLevel::Avx2Vnni if K::BYTES && self.is_available() => {
                // SAFETY: the features were just detected.
                unsafe { avx2::run_vnni(kernel) }
            }
            #[cfg(target_arch = "x86_64")]
            SimdLevel::Avx2 | SimdLevel::Avx2Vnni if self.is_available() => {
                // SAFETY: the features were just detected.
                unsafe { avx2::run(kernel) }
            }
            #[cfg(target_arch = "aarch64")]
            SimdLevel::NeonDot if K::BYTES && self.is_available() => {
                // SAFETY: the features were just detected.
                unsafe { neon::run_dot(kernel) }
            }
            #[cfg(target_arch = "aarch64")]
            SimdLevel::Neon | SimdLevel::NeonDot if self.is_available() => {
                // SAFETY: the feature was just detected.
                unsafe { neon::run(kernel) }
            }
            _ => kernel.run(scalar::Scalar),
        }
    }
}

impl fmt::Display for SimdLevel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            SimdLevel::Scalar => "scalar",
            SimdLevel::Avx2 => "avx2",
            SimdLevel::Avx2Vnni => "avx2-vnni",
            SimdLevel::Avx512 => "avx512",
            SimdLevel::Avx512Vnni => "avx512-vnni",
            SimdLevel::Avx512Bf16 => "avx512-bf16",
            SimdLevel::Neon => "neon",
            SimdLevel::NeonDot => "neon-dot",
        })
    }
}

impl FromStr for SimdLevel {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let mut all = SimdLevel::ALL.into_iter();
        all.find(|level| level.to_string() == name).ok_or_else(|| {
            let names: Vec<String> = SimdLevel::ALL.iter().map(ToString::to_string).collect();
            format!("unknown SIMD level {name:?}; expected one of {}", names.join(", "))
        })
    }
}

/// The sizes of a level's register tiles.
#[derive(Debug, Clone, Copy)]
pub struct Sizes {
    /// Columns of a weight panel: two vectors.
    pub panel: usize,
    /// [`Simd::ROWS`]
    pub rows: usize,
    /// [`Simd::FEW`]
    pub few: usize,
}

/// A computation that can be compiled for each instruction set.
pub trait Kernel {
    /// What it returns.
    type Output;
    /// Whether it multiplies bytes. One that does not is compiled for fewer levels: if all were compiled for all of them,
    /// there would be half as much code again.
    const BYTES: bool = false;
    /// Whether it multiplies pairs of bf16.
    const BF16: bool = false;
    /// The computation; implementations are `#[inline(always)]`.
    fn run<S: Simd>(self, s: S) -> Self::Output;
}

/// Vectors of f32 and what kernels need of them. `max` and `min` return `b` if either operand is NaN.
///
/// # Safety
/// The unsafe methods read or write [`Simd::LANES`] elements at `p`, which need not be aligned.
#[allow(clippy::missing_safety_doc)] // said above, once for all
pub trait Simd: Copy {
    /// A vector.
    type V: Copy;
    /// Its elements.
    const LANES: usize;
    /// Rows of the register tile of packed GEMM: `ROWS * 2` accumulators and three more vectors fit the registers.
    const ROWS: usize;
    /// Rows of the largest tile that reads unpacked rows.
    const FEW: usize;

    unsafe fn load(self, p: *const f32) -> Self::V;
    unsafe fn load_f16(self, p: *const f16) -> Self::V;
    unsafe fn load_bf16(self, p: *const bf16) -> Self::V;
    unsafe fn store(self, p: *mut f32, v: Self::V);
    /// Asks for the cache line at `p`, which need not exist.
    #[inline(always)]
    fn prefetch<T>(self, _: *const T) {}
    /// As [`Simd::prefetch`], but no nearer than the second cache.
    #[inline(always)]
    fn prefetch_far<T>(self, _: *const T) {}
    /// Writes the transpose of the `LANES` rows of [`Simd::LANES`] elements at `from`, each `from_stride` after the
    /// one before, to `to`. Elements are moved, whatever their bits.
    #[inline(always)]
    unsafe fn transpose(self, from: *const f32, from_stride: usize, to: *mut f32, to_stride: usize) {
        for row in 0..Self::LANES {
            for column in 0..Self::LANES {
                // SAFETY: the caller's promise.
                unsafe {
                    let x = from.cast::<u32>().add(row * from_stride + column).read_unaligned();
                    to.cast::<u32>().add(column * to_stride + row).write_unaligned(x);
                }
            }
        }
    }
    fn splat(self, x: f32) -> Self::V;
    /// `a * b + c`, fused but for scalar.
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    /// To the nearest integer, of magnitudes below 2^22.
    fn round(self, a: Self::V) -> Self::V;
    /// 2 to the power of an integral `n` within -126..=127.
    fn exp2i(self, n: Self::V) -> Self::V;
    /// `yes` where a < b, else `no`.
    fn where_less(self, a: Self::V, b: Self::V, yes: Self::V, no: Self::V) -> Self::V;
    /// The sum of the elements, in a fixed order.
    fn sum(self, a: Self::V) -> f32;
    /// The largest element.
    fn largest(self, a: Self::V) -> f32;

    /// Whether [`Simd::dot_bf16`] is an instruction: then weights of bf16 are packed for it. The default body is what it
    /// is tested against.
    const BF16_DOT: bool = false;

    /// `sums` plus, for each lane, the two products of a [`Bf16x2`] of `a` and one of `b`.
    ///
    /// A product of two bf16 is exact in f32. Each of the two is added with one rounding, to the nearest and of two as
    /// near to the even one; which comes first is the instruction set's choice. What is smaller than 2^-126, in the
    /// operands or the result, may be taken for 0.
    #[inline(always)]
    fn dot_bf16(self, sums: Self::V, a: Self::V, b: Self::V) -> Self::V {
        weight::dot_by_lanes(self, sums, a, b)
    }

    /// As many quads of bytes as a vector has lanes.
    type B: Copy;
    /// As many 32-bit integers.
    type I: Copy;
    /// What [`Simd::dot_bytes`] takes off each code before it multiplies.
    const CENTRE: i32;
    /// Rows that a register tile of integer products may have, of two vectors each: of 1, 2, 3, 4 and 6.
    const INT_TILES: &'static [usize];

    /// The `4 * LANES` bytes at `p`.
    unsafe fn load_bytes(self, p: *const u8) -> Self::B;
    unsafe fn store_bytes(self, p: *mut u8, b: Self::B);
    /// The quad at `p` in every lane.
    unsafe fn splat_quad(self, p: *const i8) -> Self::B;
    /// The lower four bits of each byte.
    fn low_nibbles(self, b: Self::B) -> Self::B;
    /// The upper four bits of each byte.
    fn high_nibbles(self, b: Self::B) -> Self::B;
    /// For each byte, which is below 16, the entry of `table`.
    fn lookup_bytes(self, table: &[u8; 16], b: Self::B) -> Self::B;
    /// `sums` plus, for each lane, the products of (code - CENTRE) and x; codes are unsigned, x is signed and not -128.
    fn dot_bytes(self, sums: Self::I, codes: Self::B, x: Self::B) -> Self::I;
    /// `sums` plus, for each lane, the products of codes below 16 and signed x.
    fn dot_nibbles(self, sums: Self::I, codes: Self::B, x: Self::B) -> Self::I;
    fn splat_int(self, x: i32) -> Self::I;
    /// The one integer at `p` in every lane.
    unsafe fn load_int(self, p: *const i32) -> Self::I;
    fn mul_int(self, a: Self::I, b: Self::I) -> Self::I;
    fn int_to_float(self, x: Self::I) -> Self::V;
    /// Byte `J` of each quad.
    fn byte<const J: i32>(self, b: Self::B) -> Self::I;
    fn add_int(self, a: Self::I, b: Self::I) -> Self::I;
    fn sub_int(self, a: Self::I, b: Self::I) -> Self::I;
    /// The entries of `table` at `at`, which are below 16.
    fn lookup(self, table: &[f32; 16], at: Self::I) -> Self::V;
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the operations on bytes give, lane by lane; products as if nothing had been taken off the codes.
    struct Bytes<'a> {
        codes: &'a [u8],
        x: &'a [i8; 4],
    }

    impl Kernel for Bytes<'_> {
        type Output = Vec<[i64; 10]>;
        const BYTES: bool = true;

        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> Self::Output {
            let table: [u8; 16] = std::array::from_fn(|i| (i * 17) as u8);
            let levels: [f32; 16] = std::array::from_fn(|i| i as f32 * 0.5 - 3.0);
            let mut found = Vec::new();
            for codes in self.codes.chunks_exact(4 * S::LANES) {
                // SAFETY: whole vectors of codes, a quad of x, and arrays of sixteen, the most lanes there are.
                unsafe {
                    let (b, x) = (s.load_bytes(codes.as_ptr()), s.splat_quad(self.x.as_ptr()));
                    let (low, high) = (s.low_nibbles(b), s.high_nibbles(b));
                    let total: i32 = self.x.iter().map(|x| i32::from(*x)).sum();
                    let start = s.mul_int(s.splat_int(S::CENTRE), s.load_int(&total));
                    let ints = [
                        s.dot_bytes(start, b, x),
                        s.dot_nibbles(s.splat_int(-7), low, x),
                        s.dot_nibbles(s.splat_int(0), high, x),
                        s.dot_bytes(start, s.lookup_bytes(&table, low), x),
                        s.byte::<0>(b),
                        s.byte::<1>(b),
                        s.byte::<2>(high),
                        s.sub_int(s.byte::<3>(b), s.splat_int(300)),
                    ];
                    let floats = [s.lookup(&levels, s.byte::<0>(low)), s.int_to_float(s.byte::<1>(b))];
                    let mut lanes = [[0.0_f32; 16]; 10];
                    for (to, from) in lanes.iter_mut().zip(ints) {
                        s.store(to.as_mut_ptr(), s.int_to_float(from));
                    }
                    for (to, from) in lanes[8..].iter_mut().zip(floats) {
                        s.store(to.as_mut_ptr(), from);
                    }
                    let lane = |lane: usize| std::array::from_fn(|i| (2.0 * lanes[i][lane]) as i64);
                    found.extend((0..S::LANES).map(lane));
                }
            }
            found
        }
    }

    #[test]
    fn bytes_are_the_same_on_every_level() {
        // All codes there are in several neighbourhoods, and the largest and smallest of both operands.
        let codes: Vec<u8> =
            (0..1024_u32).map(|i| (i * 37 + i / 256 * 101) as u8).chain([0; 64]).chain([255; 64]).collect();
        for x in [[127; 4], [-127; 4], [127, -127, 127, -127], [0, 1, -1, 90], [3, -50, 127, -2]] {
            let run = |level: SimdLevel| level.run(Bytes { codes: &codes, x: &x });
            let expected = run(SimdLevel::Scalar);
            // The scalar twin against plain sums.
            for (quad, found) in codes.chunks_exact(4).zip(&expected) {
                let dot = |f: &dyn Fn(u8) -> u8| -> i64 {
                    quad.iter().zip(x).map(|(c, x)| i64::from(f(*c)) * i64::from(x)).sum()
                };
                let sums = [dot(&|c| c), dot(&|c| c & 15) - 7, dot(&|c| c >> 4), dot(&|c| (c & 15) * 17)];
                assert_eq!(found[..4], sums.map(|sum| 2 * sum));
            }
            for level in SimdLevel::ALL.into_iter().filter(|level| level.is_available()) {
                assert_eq!(run(level), expected, "{level}, {x:?}");
            }
        }
    }
}
