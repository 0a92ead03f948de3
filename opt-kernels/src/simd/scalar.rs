//! The fallback: arrays of four, which compilers turn into whatever vectors the target has for certain.
//!
//! `fma` rounds twice here: a fused one would be a library call on machines without the instruction.

use super::Simd;
use half::{bf16, f16};
use std::array::from_fn;

const LANES: usize = 4;

#[derive(Clone, Copy)]
pub(super) struct Scalar;

impl Simd for Scalar {
    type V = [f32; LANES];
    const LANES: usize = LANES;
    const ROWS: usize = 6;
    const FEW: usize = 4;

    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> Self::V {
        // SAFETY: the caller's promise.
        unsafe { p.cast::<Self::V>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const f16) -> Self::V {
        // SAFETY: the caller's promise.
        unsafe { p.cast::<[f16; LANES]>().read_unaligned() }.map(f16::to_f32)
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const bf16) -> Self::V {
        // SAFETY: the caller's promise.
        unsafe { p.cast::<[bf16; LANES]>().read_unaligned() }
            .map(|x| f32::from_bits(u32::from(x.to_bits()) << 16))
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, v: Self::V) {
        // SAFETY: the caller's promise.
        unsafe { p.cast::<Self::V>().write_unaligned(v) }
    }
    #[inline(always)]
    fn splat(self, x: f32) -> Self::V {
        [x; LANES]
    }
    #[inline(always)]
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        from_fn(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        from_fn(|i| a[i] + b[i])
    }
    #[inline(always)]
    fn sub(self, a: Self::V, b: Self::V) -> Self::V {
        from_fn(|i| a[i] - b[i])
    }
    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        from_fn(|i| a[i] * b[i])
    }
    #[inline(always)]
    fn div(self, a: Self::V, b: Self::V) -> Self::V {
        from_fn(|i| a[i] / b[i])
    }
    #[inline(always)]
    fn max(self, a: Self::V, b: Self::V) -> Self::V {
        from_fn(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    fn min(self, a: Self::V, b: Self::V) -> Self::V {
        from_fn(|i| if a[i] < b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    fn round(self, a: Self::V) -> Self::V {
        const SHIFT: f32 = 12_582_912.0; // 1.5 * 2^23: there the spacing of f32 is 1
        a.map(|x| (x + SHIFT) - SHIFT)
    }
    #[inline(always)]
    fn exp2i(self, n: Self::V) -> Self::V {
        n.map(|n| f32::from_bits(((n as i32 + 127) << 23) as u32))
    }
    #[inline(always)]
    fn where_less(self, a: Self::V, b: Self::V, yes: Self::V, no: Self::V) -> Self::V {
        from_fn(|i| if a[i] < b[i] { yes[i] } else { no[i] })
    }
    #[inline(always)]
    fn sum(self, a: Self::V) -> f32 {
        (a[0] + a[2]) + (a[1] + a[3])
    }
    #[inline(always)]
    fn largest(self, a: Self::V) -> f32 {
        a.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }

    type B = [[u8; 4]; LANES];
    type I = [i32; LANES];
    const CENTRE: i32 = 0;
    const INT_TILES: &'static [usize] = &[1, 2];

    #[inline(always)]
    unsafe fn load_bytes(self, p: *const u8) -> Self::B {
        // SAFETY: the caller's promise.
        unsafe { p.cast::<Self::B>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store_bytes(self, p: *mut u8, b: Self::B) {
        // SAFETY: the caller's promise.
        unsafe { p.cast::<Self::B>().write_unaligned(b) }
    }
    #[inline(always)]
    unsafe fn splat_quad(self, p: *const i8) -> Self::B {
        // SAFETY: the caller's promise.
        [unsafe { p.cast::<[u8; 4]>().read_unaligned() }; LANES]
    }
    #[inline(always)]
    fn low_nibbles(self, b: Self::B) -> Self::B {
        b.map(|quad| quad.map(|b| b & 15))
    }
    #[inline(always)]
    fn high_nibbles(self, b: Self::B) -> Self::B {
        b.map(|quad| quad.map(|b| b >> 4))
    }
    #[inline(always)]
    fn lookup_bytes(self, table: &[u8; 16], b: Self::B) -> Self::B {
        b.map(|quad| quad.map(|b| table[usize::from(b & 15)]))
    }
    #[inline(always)]
    fn dot_bytes(self, sums: Self::I, codes: Self::B, x: Self::B) -> Self::I {
        from_fn(|lane| {
            (0..4).fold(sums[lane], |sum, j| sum + i32::from(codes[lane][j]) * i32::from(x[lane][j] as i8))
        })
    }
    #[inline(always)]
    fn dot_nibbles(self, sums: Self::I, codes: Self::B, x: Self::B) -> Self::I {
        self.dot_bytes(sums, codes, x)
    }
    #[inline(always)]
    fn splat_int(self, x: i32) -> Self::I {
        [x; LANES]
    }
    #[inline(always)]
    unsafe fn load_int(self, p: *const i32) -> Self::I {
        // SAFETY: the caller's promise.
        [unsafe { p.read_unaligned() }; LANES]
    }
    #[inline(always)]
    fn mul_int(self, a: Self::I, b: Self::I) -> Self::I {
        from_fn(|i| a[i] * b[i])
    }
    #[inline(always)]
    fn int_to_float(self, x: Self::I) -> Self::V {
        x.map(|x| x as f32)
    }
    #[inline(always)]
    fn byte<const J: i32>(self, b: Self::B) -> Self::I {
        b.map(|quad| i32::from(quad[J as usize & 3]))
    }
    #[inline(always)]
    fn add_int(self, a: Self::I, b: Self::I) -> Self::I {
        from_fn(|i| a[i].wrapping_add(b[i]))
    }
    #[inline(always)]
    fn sub_int(self, a: Self::I, b: Self::I) -> Self::I {
        from_fn(|i| a[i] - b[i])
    }
    #[inline(always)]
    fn lookup(self, table: &[f32; 16], at: Self::I) -> Self::V {
        at.map(|i| table[(i & 15) as usize])
    }
}
