//! What lies in memory to be multiplied: weights, and what they are multiplied by.

use super::Simd;
use crate::memory::Number;
use half::{bf16, f16};

/// How weights lie in memory.
pub trait Weight: Number + Send + Sync + 'static {
    /// What they are multiplied by.
    type Factor: Factor;
    /// Whether this is its own factor, and needs no widening.
    const IS_FACTOR: bool = false;
    /// As many factors as a vector has lanes.
    ///
    /// # Safety
    /// [`Simd::LANES`] elements can be read at `p`.
    unsafe fn load<S: Simd>(s: S, p: *const Self) -> S::V;
    /// Factors of a row that one of these meets, one after the other.
    const STEPS: usize = 1;
    /// [`Weight::load`] for the factor `step`, which is below [`Weight::STEPS`].
    ///
    /// # Safety
    /// As that of [`Weight::load`].
    #[inline(always)]
    unsafe fn load_step<S: Simd>(s: S, p: *const Self, _step: usize) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { Self::load(s, p) }
    }
}

/// What a packed matrix consists of.
pub trait Stored: Weight {
    /// Inputs of an output that one of these holds.
    const INPUTS: usize = 1;
    /// Holds up to [`Stored::INPUTS`] numbers, rounded; those missing are 0.
    fn pack(numbers: &[f32]) -> Self;
    /// Writes up to [`Stored::INPUTS`] numbers.
    fn unpack(self, numbers: &mut [f32]);
}

/// What rows consist of while they are multiplied: a number, or two at once.
pub trait Factor: Weight<Factor = Self> + Default {
    fn splat<S: Simd>(self, s: S) -> S::V;
    /// `sum` plus the products of `x` and `column`.
    fn multiply_add<S: Simd>(s: S, x: S::V, column: S::V, sum: S::V) -> S::V;
}

/// Two bf16 of neighbouring inputs, the first in the lower half: what [`Simd::dot_bf16`] takes in each lane.
#[derive(Clone, Copy, Default)]
#[repr(transparent)]
pub struct Pair(u32);

/// A [`Pair`] whose numbers are multiplied one after the other, as f32.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct Halves(Pair);

impl Number for Pair {}
impl Number for Halves {}

impl Pair {
    /// To the nearest, of two as near to the even one; infinities and NaN stay what they are.
    #[inline(always)]
    pub fn round(first: f32, second: f32) -> Self {
        // Plain integers, and no branches: loops over rows become vectors.
        let round = |x: f32| {
            let bits = x.to_bits();
            let nearest = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
            if x.is_nan() { bits >> 16 | 0x40 } else { nearest }
        };
        Self(round(second) << 16 | round(first))
    }

    #[inline(always)]
    pub fn numbers(self) -> [f32; 2] {
        [self.0 << 16, self.0 & 0xffff_0000].map(f32::from_bits)
    }
}

impl Weight for f32 {
    type Factor = f32;
    const IS_FACTOR: bool = true;
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const f32) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { s.load(p) }
    }
}

impl Stored for f32 {
    fn pack(numbers: &[f32]) -> f32 {
        numbers.first().copied().unwrap_or_default()
    }
    fn unpack(self, numbers: &mut [f32]) {
        numbers.fill(self);
    }
}

impl Weight for f16 {
    type Factor = f32;
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const f16) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { s.load_f16(p) }
    }
}

impl Stored for f16 {
    fn pack(numbers: &[f32]) -> f16 {
        f16::from_f32(f32::pack(numbers))
    }
    fn unpack(self, numbers: &mut [f32]) {
        self.to_f32().unpack(numbers);
    }
}

impl Weight for bf16 {
    type Factor = f32;
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const bf16) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { s.load_bf16(p) }
    }
}

impl Stored for bf16 {
    fn pack(numbers: &[f32]) -> bf16 {
        bf16::from_f32(f32::pack(numbers))
    }
    fn unpack(self, numbers: &mut [f32]) {
        self.to_f32().unpack(numbers);
    }
}

impl Weight for Pair {
    type Factor = Pair;
    const IS_FACTOR: bool = true;
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const Pair) -> S::V {
        // SAFETY: the caller's promise; vectors are only bits until something is computed from them.
        unsafe { s.load(p.cast()) }
    }
}

impl Stored for Pair {
    const INPUTS: usize = 2;
    fn pack(numbers: &[f32]) -> Pair {
        let number = |i: usize| numbers.get(i).copied().unwrap_or_default();
        Pair::round(number(0), number(1))
    }
    fn unpack(self, numbers: &mut [f32]) {
        numbers.iter_mut().zip(self.numbers()).for_each(|(to, number)| *to = number);
    }
}

impl Weight for Halves {
    type Factor = f32;
    const STEPS: usize = 2;
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const Halves) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { Self::load_step(s, p, 0) }
    }
    #[inline(always)]
    unsafe fn load_step<S: Simd>(s: S, p: *const Halves, step: usize) -> S::V {
        // SAFETY: the caller's promise.
        let [first, second] = s.halves(unsafe { s.load(p.cast()) });
        if step == 0 { first } else { second }
    }
}

impl Factor for f32 {
    #[inline(always)]
    fn splat<S: Simd>(self, s: S) -> S::V {
        s.splat(self)
    }
    #[inline(always)]
    fn multiply_add<S: Simd>(s: S, x: S::V, column: S::V, sum: S::V) -> S::V {
        s.fma(x, column, sum)
    }
}

impl Factor for Pair {
    #[inline(always)]
    fn splat<S: Simd>(self, s: S) -> S::V {
        s.splat(f32::from_bits(self.0))
    }
    #[inline(always)]
    fn multiply_add<S: Simd>(s: S, x: S::V, column: S::V, sum: S::V) -> S::V {
        s.dot_bf16(sum, x, column)
    }
}

/// The elements of a vector, in the first of sixteen places, the most lanes there are.
#[inline(always)]
fn lanes<S: Simd>(s: S, v: S::V) -> [f32; 16] {
    let mut lanes = [0.0; 16];
    // SAFETY: there is room for as many lanes as a vector has.
    unsafe { s.store(lanes.as_mut_ptr(), v) };
    lanes
}

/// [`Simd::dot_bf16`] in plain Rust.
#[inline(always)]
pub(super) fn dot_by_lanes<S: Simd>(s: S, sums: S::V, a: S::V, b: S::V) -> S::V {
    let (mut sums, a, b) = (lanes(s, sums), lanes(s, a), lanes(s, b));
    for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
        let [a, b] = [a, b].map(|lane| Pair(lane.to_bits()).numbers());
        *sum = a[0] * b[0] + (a[1] * b[1] + *sum);
    }
    // SAFETY: there are as many elements as a vector has.
    unsafe { s.load(sums.as_ptr()) }
}

/// [`Simd::halves`] in plain Rust.
#[inline(always)]
pub(super) fn halves_by_lanes<S: Simd>(s: S, pairs: S::V) -> [S::V; 2] {
    let numbers = lanes(s, pairs).map(|lane| Pair(lane.to_bits()).numbers());
    // SAFETY: there are as many elements as a vector has.
    [0, 1].map(|i| unsafe { s.load(numbers.map(|pair| pair[i]).as_ptr()) })
}
