//! Functions of vectors: the exponential and the activations that rest on it.

use super::{Kernel, Simd};
use opt_backend::Activation;

/// Applies an activation to each element. A kernel of its own, so that its code exists once per instruction set.
pub struct Activate<'a>(pub Activation, pub &'a mut [f32]);

impl Kernel for Activate<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self(activation, xs) = self;
        let mut lanes = [0.0; 16];
        for xs in xs.chunks_mut(S::LANES) {
            // A short chunk goes the same way, so that its elements get the same bits.
            let (start, whole) = (xs.as_mut_ptr(), xs.len() == S::LANES);
            let start = if whole { start } else { lanes.as_mut_ptr() };
            if !whole {
                lanes[..xs.len()].copy_from_slice(xs);
            }
            // SAFETY: a whole chunk has LANES elements, `lanes` at least as many.
            unsafe { s.store(start, activate(s, activation, s.load(start))) };
            if !whole {
                xs.copy_from_slice(&lanes[..xs.len()]);
            }
        }
    }
}

/// eˣ to about one unit in the last place; 0 below -87.3, e⁸⁸ above 88.
///
/// x = n ln 2 + r with |r| <= ln 2 / 2, then 2ⁿ times the Taylor polynomial of degree 7 of eʳ (remainder 5e-9).
/// ln 2 is split in two so that n times the first part is exact.
#[inline(always)]
pub fn exp<S: Simd>(s: S, x: S::V) -> S::V {
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    const TAYLOR: [f32; 6] = [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0];
    let low = s.splat(-87.3);
    let clamped = s.min(s.splat(88.0), s.max(low, x));
    let n = s.round(s.mul(clamped, s.splat(std::f32::consts::LOG2_E)));
    let r = s.fma(n, s.splat(-LN2_HIGH), clamped);
    let r = s.fma(n, s.splat(-LN2_LOW), r);
    let mut p = s.splat(1.0 / 5040.0);
    let mut i = 0;
    while i < TAYLOR.len() {
        p = s.fma(p, r, s.splat(TAYLOR[i]));
        i += 1;
    }
    let p = s.fma(p, r, s.splat(1.0));
    s.where_less(x, low, s.splat(0.0), s.mul(p, s.exp2i(n)))
}

/// 1 / (1 + e⁻ˣ)
#[inline(always)]
fn sigmoid<S: Simd>(s: S, x: S::V) -> S::V {
    let one = s.splat(1.0);
    s.div(one, s.add(one, exp(s, s.sub(s.splat(0.0), x))))
}

#[inline(always)]
fn abs<S: Simd>(s: S, x: S::V) -> S::V {
    s.max(s.sub(s.splat(0.0), x), x)
}

#[inline(always)]
fn tanh<S: Simd>(s: S, x: S::V) -> S::V {
    // Near zero the quotient below loses its leading digits: Taylor there, to x^11 (relative remainder 2e-9).
    const TAYLOR: [f32; 5] = [62.0 / 2835.0, -17.0 / 315.0, 2.0 / 15.0, -1.0 / 3.0, 1.0];
    let (zero, one) = (s.splat(0.0), s.splat(1.0));
    let size = abs(s, x);
    let square = s.mul(x, x);
    let mut p = s.splat(-1382.0 / 155_925.0);
    let mut i = 0;
    while i < TAYLOR.len() {
        p = s.fma(p, square, s.splat(TAYLOR[i]));
        i += 1;
    }
    let near = s.mul(p, x);
    let e = exp(s, s.mul(size, s.splat(-2.0)));
    let far = s.div(s.sub(one, e), s.add(one, e));
    let far = s.where_less(x, zero, s.sub(zero, far), far);
    s.where_less(size, s.splat(0.3), near, far)
}

/// (1 + erf z) / 2, the normal distribution's function at √2 z, to about 1e-6 of its value in either tail.
///
/// erfc |z| = t exp(-z² + polynomial in t), t = 1 / (1 + |z| / 2): the Chebyshev fit of fractional error 1.2e-7 in
/// Press et al., Numerical Recipes, section 6.2.
#[inline(always)]
fn normal<S: Simd>(s: S, z: S::V) -> S::V {
    #[allow(clippy::excessive_precision)] // as published
    const FIT: [f32; 9] = [
        -0.822_152_23,
        1.488_515_87,
        -1.135_203_98,
        0.278_868_07,
        -0.186_288_06,
        0.096_784_18,
        0.374_091_96,
        1.000_023_68,
        -1.265_512_23,
    ];
    let (zero, one, half) = (s.splat(0.0), s.splat(1.0), s.splat(0.5));
    let size = abs(s, z);
    let t = s.div(one, s.fma(size, half, one));
    let mut p = s.splat(0.170_872_77);
    let mut i = 0;
    while i < FIT.len() {
        p = s.fma(p, t, s.splat(FIT[i]));
        i += 1;
    }
    let tail = s.mul(s.mul(t, half), exp(s, s.sub(p, s.mul(size, size))));
    s.where_less(z, zero, tail, s.sub(one, tail))
}

/// The activation of each element. Functions this crate does not know yet go element by element through f64.
#[inline(always)]
#[allow(clippy::approx_constant)] // MEGA's rounded constants
fn activate<S: Simd>(s: S, activation: Activation, x: S::V) -> S::V {
    let zero = s.splat(0.0);
    match activation {
        Activation::Linear => x,
        Activation::Relu => s.max(zero, x),
        Activation::Relu6 => s.min(s.splat(6.0), s.max(zero, x)),
        Activation::Relu2 => {
            let positive = s.max(zero, x);
            s.mul(positive, positive)
        }
        Activation::LeakyRelu => s.where_less(x, zero, s.mul(x, s.splat(0.01)), x),
        Activation::Gelu => gelu(s, x),
        Activation::Gelu10 => s.min(s.splat(10.0), s.max(s.splat(-10.0), gelu(s, x))),
        // x/2 (1 + tanh u) = x σ(2u)
        Activation::GeluTanh => {
            let cubic = s.mul(s.mul(x, x), s.splat(0.044_715));
            let u = s.mul(s.fma(cubic, x, x), s.splat(2.0 * 0.797_884_6));
            s.mul(x, sigmoid(s, u))
        }
        Activation::QuickGelu => s.mul(x, sigmoid(s, s.mul(x, s.splat(1.702)))),
        Activation::Silu => s.mul(x, sigmoid(s, x)),
        Activation::Sigmoid => sigmoid(s, x),
        Activation::Tanh => tanh(s, x),
        // tanh(ln(1 + e)) = (e² + 2e) / (e² + 2e + 2); from 20 on it is 1
        Activation::Mish => {
            let e = exp(s, s.min(s.splat(20.0), x));
            let n = s.mul(e, s.add(e, s.splat(2.0)));
            s.mul(x, s.div(n, s.add(n, s.splat(2.0))))
        }
        Activation::Laplace => normal(
            s,
            s.mul(s.sub(x, s.splat(0.707_107)), s.splat(std::f32::consts::FRAC_1_SQRT_2 / 0.282_095)),
        ),
        other => {
            let mut lanes = [0.0; 16];
            // SAFETY: no vector has more than sixteen lanes.
            unsafe { s.store(lanes.as_mut_ptr(), x) };
            for lane in &mut lanes {
                *lane = other.apply(f64::from(*lane)) as f32;
            }
            // SAFETY: as above.
            unsafe { s.load(lanes.as_ptr()) }
        }
    }
}

/// Multiplies each element of the last by the slope of an activation at that of the second.
pub struct Slope<'a>(pub Activation, pub &'a [f32], pub &'a mut [f32]);

impl Kernel for Slope<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self(activation, xs, dys) = self;
        let (mut x_lanes, mut dy_lanes) = ([0.0; 16], [0.0; 16]);
        for (xs, dys) in xs.chunks(S::LANES).zip(dys.chunks_mut(S::LANES)) {
            let (len, whole) = (dys.len(), dys.len() == S::LANES && xs.len() == S::LANES);
            let (mut x, mut dy) = (xs.as_ptr(), dys.as_mut_ptr());
            if !whole {
                x_lanes[..xs.len()].copy_from_slice(xs);
                dy_lanes[..len].copy_from_slice(dys);
                (x, dy) = (x_lanes.as_ptr(), dy_lanes.as_mut_ptr());
            }
            // SAFETY: whole chunks have LANES elements, arrays of lanes at least as many.
            unsafe { s.store(dy, s.mul(slope(s, activation, s.load(x)), s.load(dy))) };
            if !whole {
                dys.copy_from_slice(&dy_lanes[..len]);
            }
        }
    }
}

/// The slope of the activation at each element; see [`Activation::slope`].
#[inline(always)]
#[allow(clippy::approx_constant)] // MEGA's rounded constants
fn slope<S: Simd>(s: S, activation: Activation, x: S::V) -> S::V {
    let (zero, one) = (s.splat(0.0), s.splat(1.0));
    match activation {
        Activation::Linear => one,
        Activation::Relu => s.where_less(zero, x, one, zero),
        Activation::Relu6 => s.where_less(zero, x, s.where_less(x, s.splat(6.0), one, zero), zero),
        Activation::Relu2 => s.mul(s.splat(2.0), s.max(zero, x)),
        Activation::LeakyRelu => s.where_less(zero, x, one, s.splat(0.01)),
        Activation::Gelu => gelu_slope(s, x),
        Activation::Gelu10 => s.where_less(s.splat(10.0), gelu(s, x), zero, gelu_slope(s, x)),
        // With t = tanh u: (1 + t) / 2 = σ(2u), 1 - t² = 4 σ(2u) σ(-2u).
        Activation::GeluTanh => {
            let square = s.mul(x, x);
            let k = s.splat(2.0 * 0.797_884_6);
            let u = s.mul(s.mul(s.fma(square, s.splat(0.044_715), one), x), k);
            let inner = s.mul(s.fma(square, s.splat(3.0 * 0.044_715), one), k);
            let (plus, minus) = (sigmoid(s, u), sigmoid(s, s.sub(zero, u)));
            s.fma(s.mul(x, inner), s.mul(plus, minus), plus)
        }
        Activation::QuickGelu => gated_slope(s, s.mul(x, s.splat(1.702))),
        Activation::Silu => gated_slope(s, x),
        Activation::Sigmoid => s.mul(sigmoid(s, x), sigmoid(s, s.sub(zero, x))),
        Activation::Tanh => {
            let twice = s.add(x, x);
            let product = s.mul(sigmoid(s, twice), sigmoid(s, s.sub(zero, twice)));
            s.mul(s.splat(4.0), product)
        }
        Activation::Laplace => {
            let z = s.mul(s.sub(x, s.splat(0.707_107)), s.splat(1.0 / 0.282_095));
            s.mul(density(s, z), s.splat(1.0 / 0.282_095))
        }
        other => {
            let mut lanes = [0.0; 16];
            // SAFETY: no vector has more than sixteen lanes.
            unsafe { s.store(lanes.as_mut_ptr(), x) };
            for lane in &mut lanes {
                *lane = other.slope(f64::from(*lane)) as f32;
            }
            // SAFETY: as above.
            unsafe { s.load(lanes.as_ptr()) }
        }
    }
}

/// Of x σ(z), z being a multiple of x.
#[inline(always)]
fn gated_slope<S: Simd>(s: S, z: S::V) -> S::V {
    let (plus, minus) = (sigmoid(s, z), sigmoid(s, s.sub(s.splat(0.0), z)));
    s.fma(s.mul(z, minus), plus, plus)
}

#[inline(always)]
fn gelu_slope<S: Simd>(s: S, x: S::V) -> S::V {
    s.fma(x, density(s, x), normal(s, s.mul(x, s.splat(std::f32::consts::FRAC_1_SQRT_2))))
}

/// The density of the normal distribution.
#[inline(always)]
fn density<S: Simd>(s: S, z: S::V) -> S::V {
    s.mul(exp(s, s.mul(s.mul(z, z), s.splat(-0.5))), s.splat(0.398_942_3))
}

#[inline(always)]
fn gelu<S: Simd>(s: S, x: S::V) -> S::V {
    s.mul(x, normal(s, s.mul(x, s.splat(std::f32::consts::FRAC_1_SQRT_2))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::SimdLevel;

    struct Map<'a, F>(&'a [f32], F);

    trait Function: Copy {
        fn at<S: Simd>(self, s: S, x: S::V) -> S::V;
    }

    impl<F: Function> Kernel for Map<'_, F> {
        type Output = Vec<f32>;
        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> Vec<f32> {
            let mut lanes = [0.0; 16];
            let one = |&x: &f32| {
                // SAFETY: no vector has more than sixteen lanes.
                unsafe { s.store(lanes.as_mut_ptr(), self.1.at(s, s.splat(x))) };
                lanes[0]
            };
            self.0.iter().map(one).collect()
        }
    }

    #[derive(Clone, Copy)]
    struct Exp;
    impl Function for Exp {
        #[inline(always)]
        fn at<S: Simd>(self, s: S, x: S::V) -> S::V {
            exp(s, x)
        }
    }

    impl Function for Activation {
        #[inline(always)]
        fn at<S: Simd>(self, s: S, x: S::V) -> S::V {
            activate(s, self, x)
        }
    }

    fn levels() -> impl Iterator<Item = SimdLevel> {
        SimdLevel::ALL.into_iter().filter(|level| level.is_available())
    }

    #[test]
    fn exp_is_within_three_ulp() {
        let xs: Vec<f32> = (-87_000..88_000).step_by(7).map(|i| i as f32 * 1e-3).collect();
        for level in levels() {
            for (x, y) in xs.iter().zip(level.run(Map(&xs, Exp))) {
                let expected = f64::from(*x).exp();
                let error = (f64::from(y) - expected).abs() / expected;
                assert!(
                    error <= 3.0 * f64::from(f32::EPSILON) / 2.0,
                    "{level}: exp {x} = {y}, error {error:e}"
                );
            }
            let edges = level.run(Map(&[f32::NEG_INFINITY, -1e9, -88.0, f32::NAN, 0.0], Exp));
            assert_eq!(edges[..3], [0.0; 3], "{level}");
            assert!(edges[3].is_nan() && edges[4] == 1.0, "{level}: {edges:?}");
        }
    }

    #[test]
    fn activations_are_close_to_their_reference() {
        // Ranges by size, so that small inputs are judged by their own scale.
        for size in [1e-3_f32, 0.1, 1.0, 5.0, 30.0] {
            let xs: Vec<f32> = (-1000..=1000).map(|i| i as f32 / 1000.0 * size).collect();
            for (level, activation) in levels().flat_map(|l| Activation::all().map(move |a| (l, a))) {
                let (mut noise, mut power) = (0.0, 0.0);
                for (x, y) in xs.iter().zip(level.run(Map(&xs, activation))) {
                    let expected = activation.apply(f64::from(*x));
                    let error = f64::from(y) - expected;
                    assert!(
                        error.abs() <= 2e-6 * expected.abs().max(1.0),
                        "{level}: {activation} {x} = {y}, not {expected}"
                    );
                    noise += error * error;
                    power += expected * expected;
                }
                assert!(noise <= 1e-11 * power, "{level}: {activation} up to {size}: {:e}", noise / power);
            }
        }
    }
}
