//! What lies in memory to be multiplied: weights, and the operands they are multiplied by.

use super::Simd;
use crate::memory::Number;
use half::{bf16, f16};

/// How weights lie in memory.
pub trait Weight: Number + Send + Sync + 'static {
    /// What they are loaded as, and rows that meet them consist of.
    type Operand: Operand;
    /// Whether weights are operands as they lie: `Self` is [`Weight::Operand`].
    const IS_OPERAND: bool = false;
    /// Inputs of an output that one of these holds.
    const INPUTS: usize = 1;
    /// As many operands as a vector has lanes.
    ///
    /// # Safety
    /// [`Simd::LANES`] elements can be read at `p`.
    unsafe fn load<S: Simd>(s: S, p: *const Self) -> S::V;
    /// Holds up to [`Weight::INPUTS`] numbers, rounded; those missing are 0.
    fn pack(numbers: &[f32]) -> Self;
    /// Holds an operand, rounded.
    fn of(operand: Self::Operand) -> Self;
    /// Writes up to [`Weight::INPUTS`] numbers.
    fn unpack(self, numbers: &mut [f32]);
}

/// What is multiplied and added lane by lane: a number, or two at once.
pub trait Operand: Weight<Operand = Self> + Default {
    /// [`Kernel::BF16`](super::Kernel::BF16) of what multiplies them.
    const BF16: bool = false;
    fn splat<S: Simd>(self, s: S) -> S::V;
    /// `sum` plus the products of `x` and `column`.
    fn multiply_add<S: Simd>(s: S, x: S::V, column: S::V, sum: S::V) -> S::V;
    /// One operand for each element of two neighbouring inputs; `second` is empty where there is none.
    fn beside(first: &[f32], second: &[f32], out: &mut [Self]);
    /// The operands of neighbouring inputs of one row, of which the last may be incomplete.
    fn along(row: &[f32], out: &mut [Self]);
}

/// Two bf16 of neighbouring inputs, the first in the lower half: what [`Simd::dot_bf16`] takes in each lane.
#[derive(Clone, Copy, Default)]
#[repr(transparent)]
pub struct Bf16x2(u32);

impl Number for Bf16x2 {}

impl Bf16x2 {
    /// Rounds to the nearest, of two as near to the even one; infinities and NaN stay what they are.
    ///
    /// In plain integers and without branches, unlike [`bf16::from_f32`]: loops over rows become vectors.
    #[inline(always)]
    pub fn new(first: f32, second: f32) -> Self {
        let round = |x: f32| {
            let bits = x.to_bits();
            let nearest = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
            if x.is_nan() { bits >> 16 | 0x40 } else { nearest }
        };
        Self(round(second) << 16 | round(first))
    }

    /// The first numbers of both beside each other, that of `lower` in the lower half, and the second.
    #[inline(always)]
    pub fn exchange(lower: Bf16x2, upper: Bf16x2) -> [Bf16x2; 2] {
        [Self(lower.0 & 0xffff | upper.0 << 16), Self(lower.0 >> 16 | upper.0 & 0xffff_0000)]
    }

    #[inline(always)]
    pub fn numbers(self) -> [f32; 2] {
        [self.0 << 16, self.0 & 0xffff_0000].map(f32::from_bits)
    }
}

impl Weight for f32 {
    type Operand = f32;
    const IS_OPERAND: bool = true;
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const f32) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { s.load(p) }
    }
    #[inline(always)]
    fn of(operand: f32) -> f32 {
        operand
    }
    fn pack(numbers: &[f32]) -> f32 {
        numbers.first().copied().unwrap_or_default()
    }
    fn unpack(self, numbers: &mut [f32]) {
        numbers.fill(self);
    }
}

impl Weight for f16 {
    type Operand = f32;
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const f16) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { s.load_f16(p) }
    }
    #[inline(always)]
    fn of(operand: f32) -> f16 {
        f16::from_f32(operand)
    }
    fn pack(numbers: &[f32]) -> f16 {
        f16::from_f32(f32::pack(numbers))
    }
    fn unpack(self, numbers: &mut [f32]) {
        self.to_f32().unpack(numbers);
    }
}

impl Weight for bf16 {
    type Operand = f32;
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const bf16) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { s.load_bf16(p) }
    }
    #[inline(always)]
    fn of(operand: f32) -> bf16 {
        bf16::from_bits(Bf16x2::new(operand, 0.0).0 as u16)
    }
    fn pack(numbers: &[f32]) -> bf16 {
        bf16::from_f32(f32::pack(numbers))
    }
    fn unpack(self, numbers: &mut [f32]) {
        self.to_f32().unpack(numbers);
    }
}

impl Weight for Bf16x2 {
    type Operand = Bf16x2;
    const IS_OPERAND: bool = true;
    const INPUTS: usize = 2;
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const Bf16x2) -> S::V {
        // SAFETY: the caller's promise; vectors are only bits until something is computed from them.
        unsafe { s.load(p.cast()) }
    }
    #[inline(always)]
    fn of(operand: Bf16x2) -> Bf16x2 {
        operand
    }
    fn pack(numbers: &[f32]) -> Bf16x2 {
        let number = |i: usize| numbers.get(i).copied().unwrap_or_default();
        Bf16x2::new(number(0), number(1))
    }
    fn unpack(self, numbers: &mut [f32]) {
        numbers.iter_mut().zip(self.numbers()).for_each(|(to, number)| *to = number);
    }
}

impl Operand for f32 {
    #[inline(always)]
    fn splat<S: Simd>(self, s: S) -> S::V {
        s.splat(self)
    }
    #[inline(always)]
    fn multiply_add<S: Simd>(s: S, x: S::V, column: S::V, sum: S::V) -> S::V {
        s.fma(x, column, sum)
    }
    #[inline(always)]
    fn beside(first: &[f32], _: &[f32], out: &mut [f32]) {
        for (out, &x) in out.iter_mut().zip(first) {
            *out = x;
        }
    }
    #[inline(always)]
    fn along(row: &[f32], out: &mut [f32]) {
        for (out, &x) in out.iter_mut().zip(row) {
            *out = x;
        }
    }
}

impl Operand for Bf16x2 {
    const BF16: bool = true;
    #[inline(always)]
    fn splat<S: Simd>(self, s: S) -> S::V {
        s.splat(f32::from_bits(self.0))
    }
    #[inline(always)]
    fn multiply_add<S: Simd>(s: S, x: S::V, column: S::V, sum: S::V) -> S::V {
        s.dot_bf16(sum, x, column)
    }
    #[inline(always)]
    fn beside(first: &[f32], second: &[f32], out: &mut [Bf16x2]) {
        if second.is_empty() {
            for (out, &x) in out.iter_mut().zip(first) {
                *out = Bf16x2::new(x, 0.0);
            }
            return;
        }
        for ((out, &x), &y) in out.iter_mut().zip(first).zip(second) {
            *out = Bf16x2::new(x, y);
        }
    }
    #[inline(always)]
    fn along(row: &[f32], out: &mut [Bf16x2]) {
        let (whole, rest) = row.as_chunks::<2>();
        for (out, x) in out.iter_mut().zip(whole) {
            *out = Bf16x2::new(x[0], x[1]);
        }
        if let ([x], Some(out)) = (rest, out.get_mut(whole.len())) {
            *out = Bf16x2::new(*x, 0.0);
        }
    }
}

/// [`Simd::dot_bf16`] in plain Rust.
#[inline(always)]
pub(super) fn dot_by_lanes<S: Simd>(s: S, sums: S::V, a: S::V, b: S::V) -> S::V {
    // Sixteen are the most lanes there are.
    let [mut sums, a, b] = [sums, a, b].map(|v| {
        let mut lanes = [0.0_f32; 16];
        // SAFETY: there is room for as many lanes as a vector has.
        unsafe { s.store(lanes.as_mut_ptr(), v) };
        lanes
    });
    for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
        let [a, b] = [a, b].map(|lane| Bf16x2(lane.to_bits()).numbers());
        *sum = a[0] * b[0] + (a[1] * b[1] + *sum);
    }
    // SAFETY: there are as many elements as a vector has.
    unsafe { s.load(sums.as_ptr()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::{Kernel, SimdLevel};

    /// Any bits at all, from a counter.
    fn noise(seed: u32) -> impl FnMut() -> u32 {
        let mut state = seed;
        move || {
            state = state.wrapping_mul(0x9e37_79b1).wrapping_add(0x7f4a_7c15);
            (state ^ state >> 15).wrapping_mul(0x85eb_ca6b)
        }
    }

    #[test]
    fn rounding_is_to_the_nearest_and_of_two_to_the_even() {
        let mut next = noise(1);
        let awkward = [
            0,
            1,
            0x7f80_0000,
            0x7f80_0001,
            0x7fff_ffff,
            0x7f7f_ffff,
            0x3f80_8000,
            0x3f81_8000,
            0x3f80_8001,
            0x0000_8000,
            0x007f_ffff,
        ];
        let signed = awkward.into_iter().flat_map(|bits| [bits, bits | 1 << 31]);
        for x in signed.chain((0..10_000).map(|_| next())).map(f32::from_bits) {
            let expected = bf16::from_f32(x).to_f32();
            for found in [Bf16x2::new(x, 1.0).numbers()[0], Bf16x2::new(1.0, x).numbers()[1]] {
                assert!(
                    found.to_bits() == expected.to_bits() || found.is_nan() && x.is_nan(),
                    "{x:e}: {found}"
                );
            }
        }
    }

    /// Dot products of as many lanes as any level has.
    struct Dot<'a> {
        sums: &'a [f32; 16],
        a: &'a [Bf16x2; 16],
        b: &'a [Bf16x2; 16],
    }

    impl Kernel for Dot<'_> {
        type Output = [f32; 16];
        const BF16: bool = true;

        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> Self::Output {
            let mut out = [0.0; 16];
            for at in (0..16).step_by(S::LANES) {
                // SAFETY: sixteen is a multiple of every level's lanes.
                unsafe {
                    let (a, b) =
                        (Bf16x2::load(s, self.a.as_ptr().add(at)), Bf16x2::load(s, self.b.as_ptr().add(at)));
                    let dots = s.dot_bf16(s.load(self.sums.as_ptr().add(at)), a, b);
                    s.store(out.as_mut_ptr().add(at), dots);
                }
            }
            out
        }
    }

    /// Calls `check` with what each level finds.
    fn dots(sums: &[f32; 16], a: &[Bf16x2; 16], b: &[Bf16x2; 16], check: impl Fn(SimdLevel, [f32; 16])) {
        for level in SimdLevel::ALL.into_iter().filter(|level| level.is_available()) {
            check(level, level.run(Dot { sums, a, b }));
        }
    }

    #[test]
    fn dot_products_are_rounded_twice() {
        let mut next = noise(2);
        for _ in 0..1000 {
            // Of either sign, and not so small that products vanish.
            let mut number = || f32::from_bits(next() & 0x83ff_0000 | 0x3c00_0000);
            let [a, b] = [(); 2].map(|()| [(); 16].map(|()| Bf16x2::new(number(), number())));
            let sums = [(); 16].map(|()| number());
            dots(&sums, &a, &b, |level, found| {
                for i in 0..16 {
                    let (a, b) = (a[i].numbers(), b[i].numbers());
                    let terms = [
                        sums[i].into(),
                        f64::from(a[0]) * f64::from(b[0]),
                        f64::from(a[1]) * f64::from(b[1]),
                    ];
                    let (exact, size) =
                        (terms.iter().sum::<f64>(), terms.iter().map(|t| t.abs()).sum::<f64>());
                    let error = (f64::from(found[i]) - exact).abs();
                    assert!(error <= f64::from(f32::EPSILON) * size, "{level}: {}, not {exact}", found[i]);
                }
            });
        }
    }

    #[test]
    fn dot_products_of_awkward_numbers() {
        const INF: f32 = f32::INFINITY;
        for (sum, a, b, expected) in [
            (f32::NAN, [1.0, 1.0], [1.0, 1.0], f32::NAN),
            (1.0, [f32::NAN, 1.0], [0.0, 1.0], f32::NAN),
            (1.0, [1.0, 0.0], [1.0, f32::NAN], f32::NAN),
            (1.0, [INF, 1.0], [2.0, 1.0], INF),
            (1.0, [1.0, -2.0], [1.0, INF], -INF),
            (1.0, [INF, 1.0], [0.0, 1.0], f32::NAN),
            (1.0, [INF, INF], [1.0, -1.0], f32::NAN),
            (-INF, [1.0, 1.0], [1.0, INF], f32::NAN),
            (1.0, [1e30, 1.0], [1e30, 1.0], INF),
            // What is too small to be told from 0.
            (1e-40, [1e-40, 1e-30], [1.0, 1e-30], 0.0),
            (1.0, [1e-40, 0.0], [1.0, -0.0], 1.0),
        ] {
            let [a, b] = [a, b].map(|[first, second]| [Bf16x2::new(first, second); 16]);
            dots(&[sum; 16], &a, &b, |level, found| {
                for f in found {
                    let holds =
                        f == expected || f.is_nan() && expected.is_nan() || (f - expected).abs() < 1e-37;
                    assert!(holds, "{level}: {sum} + {:?} * {:?} = {f}", a[0].numbers(), b[0].numbers());
                }
            });
        }
    }
}
