//! NEON of 64-bit ARM: four lanes, thirty-two registers.

use super::{Kernel, Simd};
use half::{bf16, f16};
use std::arch::aarch64::*;

/// Proof that the CPU has the feature, and DotProd or not: made by [`run`] and [`run_dot`] only.
#[derive(Clone, Copy)]
pub(super) struct Neon<const DOT: bool>(());

pub(super) fn detected() -> bool {
    std::arch::is_aarch64_feature_detected!("neon")
}

pub(super) fn detected_dot() -> bool {
    std::arch::is_aarch64_feature_detected!("dotprod")
}

/// # Safety
/// The CPU has NEON.
#[target_feature(enable = "neon")]
pub(super) unsafe fn run<K: Kernel>(kernel: K) -> K::Output {
    kernel.run(Neon::<false>(()))
}

/// # Safety
/// The CPU has NEON and DotProd.
#[target_feature(enable = "neon,dotprod")]
pub(super) unsafe fn run_dot<K: Kernel>(kernel: K) -> K::Output {
    kernel.run(Neon::<true>(()))
}

/// `sums` plus the products of each quad's signed bytes.
///
/// # Safety
/// The CPU has DotProd.
#[inline(always)]
unsafe fn sdot(mut sums: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // The instruction has no stable intrinsic.
    unsafe {
        std::arch::asm!(
            ".arch_extension dotprod",
            "sdot {sums:v}.4s, {a:v}.16b, {b:v}.16b",
            sums = inout(vreg) sums,
            a = in(vreg) a,
            b = in(vreg) b,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sums
}

// SAFETY of every block below: the token exists only where the CPU has NEON, and pointers are valid for four
// elements by the callers' promise.
#[allow(clippy::undocumented_unsafe_blocks, unused_unsafe)]
impl<const DOT: bool> Simd for Neon<DOT> {
    type V = float32x4_t;
    const LANES: usize = 4;
    const ROWS: usize = 12;
    const FEW: usize = 8;

    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> float32x4_t {
        unsafe { vld1q_f32(p) }
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const f16) -> float32x4_t {
        // Integer steps: the conversion instruction has no stable intrinsic. Shifting exponent and fraction into
        // place and multiplying by 2^112 rebiases normals and subnormals alike; infinities and NaN are mended after.
        unsafe {
            let bits = vmovl_u16(vld1_u16(p.cast()));
            let sign = vshlq_n_u32::<16>(vandq_u32(bits, vdupq_n_u32(0x8000)));
            let rest = vshlq_n_u32::<13>(vandq_u32(bits, vdupq_n_u32(0x7fff)));
            let scaled = vmulq_f32(vreinterpretq_f32_u32(rest), vdupq_n_f32(f32::from_bits(0x7780_0000)));
            let special = vcgeq_u32(rest, vdupq_n_u32(0x7c00 << 13));
            let mended = vorrq_u32(rest, vdupq_n_u32(0x7f80_0000));
            let wide = vbslq_u32(special, mended, vreinterpretq_u32_f32(scaled));
            vreinterpretq_f32_u32(vorrq_u32(wide, sign))
        }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const bf16) -> float32x4_t {
        unsafe { vreinterpretq_f32_u32(vshlq_n_u32::<16>(vmovl_u16(vld1_u16(p.cast())))) }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, v: float32x4_t) {
        unsafe { vst1q_f32(p, v) }
    }
    #[inline(always)]
    fn splat(self, x: f32) -> float32x4_t {
        unsafe { vdupq_n_f32(x) }
    }
    #[inline(always)]
    fn fma(self, a: float32x4_t, b: float32x4_t, c: float32x4_t) -> float32x4_t {
        unsafe { vfmaq_f32(c, a, b) }
    }
    #[inline(always)]
    fn add(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        unsafe { vaddq_f32(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        unsafe { vsubq_f32(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        unsafe { vmulq_f32(a, b) }
    }
    #[inline(always)]
    fn div(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        unsafe { vdivq_f32(a, b) }
    }
    #[inline(always)]
    fn max(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        unsafe { vbslq_f32(vcgtq_f32(a, b), a, b) }
    }
    #[inline(always)]
    fn min(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        unsafe { vbslq_f32(vcltq_f32(a, b), a, b) }
    }
    #[inline(always)]
    fn round(self, a: float32x4_t) -> float32x4_t {
        unsafe { vrndnq_f32(a) }
    }
    #[inline(always)]
    fn exp2i(self, n: float32x4_t) -> float32x4_t {
        unsafe {
            let biased = vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127));
            vreinterpretq_f32_s32(vshlq_n_s32::<23>(biased))
        }
    }
    #[inline(always)]
    fn where_less(self, a: float32x4_t, b: float32x4_t, yes: float32x4_t, no: float32x4_t) -> float32x4_t {
        unsafe { vbslq_f32(vcltq_f32(a, b), yes, no) }
    }
    #[inline(always)]
    fn sum(self, a: float32x4_t) -> f32 {
        unsafe { vaddvq_f32(a) }
    }
    #[inline(always)]
    fn largest(self, a: float32x4_t) -> f32 {
        unsafe { vmaxvq_f32(a) }
    }

    type B = uint8x16_t;
    type I = int32x4_t;
    // Products are of signed bytes.
    const CENTRE: i32 = 128;
    const INT_TILES: &'static [usize] = &[1, 2, 4, 6];

    #[inline(always)]
    unsafe fn load_bytes(self, p: *const u8) -> uint8x16_t {
        unsafe { vld1q_u8(p) }
    }
    #[inline(always)]
    unsafe fn store_bytes(self, p: *mut u8, b: uint8x16_t) {
        unsafe { vst1q_u8(p, b) }
    }
    #[inline(always)]
    unsafe fn splat_quad(self, p: *const i8) -> uint8x16_t {
        unsafe { vreinterpretq_u8_u32(vdupq_n_u32(p.cast::<u32>().read_unaligned())) }
    }
    #[inline(always)]
    fn low_nibbles(self, b: uint8x16_t) -> uint8x16_t {
        unsafe { vandq_u8(b, vdupq_n_u8(15)) }
    }
    #[inline(always)]
    fn high_nibbles(self, b: uint8x16_t) -> uint8x16_t {
        unsafe { vshrq_n_u8::<4>(b) }
    }
    #[inline(always)]
    fn lookup_bytes(self, table: &[u8; 16], b: uint8x16_t) -> uint8x16_t {
        unsafe { vqtbl1q_u8(vld1q_u8(table.as_ptr()), b) }
    }
    #[inline(always)]
    fn dot_bytes(self, sums: int32x4_t, codes: uint8x16_t, x: uint8x16_t) -> int32x4_t {
        self.dot_nibbles(sums, unsafe { veorq_u8(codes, vdupq_n_u8(128)) }, x)
    }
    #[inline(always)]
    fn dot_nibbles(self, sums: int32x4_t, codes: uint8x16_t, x: uint8x16_t) -> int32x4_t {
        unsafe {
            let (codes, x) = (vreinterpretq_s8_u8(codes), vreinterpretq_s8_u8(x));
            if DOT {
                return sdot(sums, codes, x);
            }
            let low = vpaddlq_s16(vmull_s8(vget_low_s8(codes), vget_low_s8(x)));
            let high = vpaddlq_s16(vmull_high_s8(codes, x));
            vaddq_s32(sums, vpaddq_s32(low, high))
        }
    }
    #[inline(always)]
    fn splat_int(self, x: i32) -> int32x4_t {
        unsafe { vdupq_n_s32(x) }
    }
    #[inline(always)]
    unsafe fn load_int(self, p: *const i32) -> int32x4_t {
        unsafe { vdupq_n_s32(p.read_unaligned()) }
    }
    #[inline(always)]
    fn mul_int(self, a: int32x4_t, b: int32x4_t) -> int32x4_t {
        unsafe { vmulq_s32(a, b) }
    }
    #[inline(always)]
    fn int_to_float(self, x: int32x4_t) -> float32x4_t {
        unsafe { vcvtq_f32_s32(x) }
    }
    #[inline(always)]
    fn byte<const J: i32>(self, b: uint8x16_t) -> int32x4_t {
        unsafe {
            let shifted = vshlq_u32(vreinterpretq_u32_u8(b), vdupq_n_s32(-8 * J));
            vreinterpretq_s32_u32(vandq_u32(shifted, vdupq_n_u32(255)))
        }
    }
    #[inline(always)]
    fn add_int(self, a: int32x4_t, b: int32x4_t) -> int32x4_t {
        unsafe { vaddq_s32(a, b) }
    }
    #[inline(always)]
    fn sub_int(self, a: int32x4_t, b: int32x4_t) -> int32x4_t {
        unsafe { vsubq_s32(a, b) }
    }
    #[inline(always)]
    fn lookup(self, table: &[f32; 16], at: int32x4_t) -> float32x4_t {
        let mut lanes = [0_i32; 4];
        unsafe {
            vst1q_s32(lanes.as_mut_ptr(), at);
            vld1q_f32(lanes.map(|i| table[(i & 15) as usize]).as_ptr())
        }
    }
}
