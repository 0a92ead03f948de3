//! Functions of vectors: the exponential and the activations that rest on it.

use super::Simd;
use opt_backend::Activation;

/// eˣ to about one unit in the last place; 0 below -87.3, e⁸⁸ above 88.
///
/// x = n ln 2 + r with |r| <= ln 2 / 2, then 2ⁿ times the Taylor polynomial of degree 7 of eʳ (remainder 5e-9).
/// ln 2 is split in two so that n times the first part is exact.
#[inline(always)]
pub(crate) fn exp<S: Simd>(s: S, x: S::V) -> S::V {
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

/// erf x to 2e-7: formula 7.1.26 of Abramowitz and Stegun, Handbook of Mathematical Functions.
#[inline(always)]
fn erf<S: Simd>(s: S, x: S::V) -> S::V {
    const A: [f32; 4] = [-1.453_152, 1.421_413_7, -0.284_496_74, 0.254_829_6];
    let (zero, one) = (s.splat(0.0), s.splat(1.0));
    let size = abs(s, x);
    let t = s.div(one, s.fma(size, s.splat(0.327_591_1), one));
    let mut p = s.splat(1.061_405_4);
    let mut i = 0;
    while i < A.len() {
        p = s.fma(p, t, s.splat(A[i]));
        i += 1;
    }
    let tail = s.mul(s.mul(p, t), exp(s, s.sub(zero, s.mul(size, size))));
    let value = s.sub(one, tail);
    s.where_less(x, zero, s.sub(zero, value), value)
}

/// The activation of each element. Functions this crate does not know yet go element by element through f64.
#[inline(always)]
pub(crate) fn activate<S: Simd>(s: S, activation: Activation, x: S::V) -> S::V {
    let (zero, one) = (s.splat(0.0), s.splat(1.0));
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
        Activation::Laplace => {
            let z = s.mul(s.sub(x, s.splat(0.707_107)), s.splat(std::f32::consts::FRAC_1_SQRT_2 / 0.282_095));
            s.mul(s.splat(0.5), s.add(one, erf(s, z)))
        }
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

#[inline(always)]
fn gelu<S: Simd>(s: S, x: S::V) -> S::V {
    let erf = erf(s, s.mul(x, s.splat(std::f32::consts::FRAC_1_SQRT_2)));
    s.mul(s.mul(x, s.splat(0.5)), s.add(s.splat(1.0), erf))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::{Kernel, SimdLevel};

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
                assert!(noise <= 1e-12 * power, "{level}: {activation} up to {size}: {:e}", noise / power);
            }
        }
    }
}
