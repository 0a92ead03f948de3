//! Tails of distributions.

use libm::{erfc, lgamma};

/// P(|Z| ≥ |z|) of the standard normal distribution.
pub(super) fn normal_two_sided(z: f64) -> f64 {
    erfc(z.abs() / std::f64::consts::SQRT_2)
}

/// P(|T| ≥ |t|) of Student's distribution with `degrees` of freedom: I_x(ν/2, 1/2) at x = ν / (ν + t²).
pub(super) fn student_two_sided(t: f64, degrees: f64) -> f64 {
    if t.is_nan() {
        return t;
    }
    let t2 = t * t;
    if t2.is_infinite() {
        return 0.0;
    }
    // Both x and 1 - x are made without a difference of near numbers.
    incomplete_beta(degrees / 2.0, 0.5, degrees / (degrees + t2), t2 / (degrees + t2))
}

/// The regularized incomplete beta function I_x(a, b), y = 1 - x, by the continued fraction of Abramowitz and Stegun
/// 26.5.8 with Lentz's method.
fn incomplete_beta(a: f64, b: f64, x: f64, y: f64) -> f64 {
    if x <= 0.0 {
        return 0.0;
    }
    if y <= 0.0 {
        return 1.0;
    }
    let front = (lgamma(a + b) - lgamma(a) - lgamma(b) + a * x.ln() + b * y.ln()).exp();
    // The fraction converges fast below the mean only; above it the other tail is computed.
    if x < (a + 1.0) / (a + b + 2.0) {
        (front * fraction(a, b, x) / a).clamp(0.0, 1.0)
    } else {
        (1.0 - front * fraction(b, a, y) / b).clamp(0.0, 1.0)
    }
}

fn fraction(a: f64, b: f64, x: f64) -> f64 {
    let nonzero = |v: f64| if v.abs() < 1e-300 { 1e-300 } else { v };
    let mut c = 1.0;
    let mut d = 1.0 / nonzero(1.0 - (a + b) * x / (a + 1.0));
    let mut value = d;
    for m in 1..100_000 {
        let m = f64::from(m);
        for term in [
            m * (b - m) * x / ((a + 2.0 * m - 1.0) * (a + 2.0 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2.0 * m) * (a + 2.0 * m + 1.0)),
        ] {
            d = 1.0 / nonzero(1.0 + term * d);
            c = nonzero(1.0 + term / c);
            value *= c * d;
        }
        if (c * d - 1.0).abs() < 1e-15 {
            break;
        }
    }
    value
}

/// P(X ≤ k) for X binomial of n trials with chance 1/2, summed from the largest term down.
pub(super) fn binomial_half_at_most(k: u64, n: u64) -> f64 {
    if k >= n {
        return 1.0;
    }
    let (kf, nf) = (k as f64, n as f64);
    let log = lgamma(nf + 1.0) - lgamma(kf + 1.0) - lgamma(nf - kf + 1.0) - nf * std::f64::consts::LN_2;
    let (mut ratio, mut total) = (1.0, 1.0);
    let mut i = kf;
    while i > 0.0 && ratio > total * 1e-18 {
        ratio *= i / (nf - i + 1.0);
        total += ratio;
        i -= 1.0;
    }
    (log + total.ln()).exp().min(1.0)
}
