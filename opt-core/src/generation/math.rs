//! Small numeric helpers over one row of scores.

/// Values that are looked at together where most of a row can be passed over.
pub(crate) const BLOCK: usize = 256;

/// Index of the largest value, the lowest among equals; `None` for an empty row. NaN never wins over a number.
pub fn argmax(values: &[f32]) -> Option<usize> {
    let maxima = maxima(values);
    let max = maxima.iter().copied().fold(f32::NEG_INFINITY, larger);
    let first = maxima.iter().position(|&m| m == max)? * BLOCK;
    // Where nothing is larger than -∞, the block may be all NaN and the infinity in a later one, or nowhere.
    let found = values.get(first..)?.iter().position(|&v| v == max);
    Some(found.map_or(0, |place| first + place))
}

/// The largest value; negative infinity for an empty row. NaN is passed over.
pub(crate) fn maximum(values: &[f32]) -> f32 {
    maxima(values).into_iter().fold(f32::NEG_INFINITY, larger)
}

/// The larger one; the first one if the second is NaN.
#[inline(always)]
fn larger(a: f32, b: f32) -> f32 {
    if b > a { b } else { a }
}

/// The largest value of each block of [`BLOCK`] values, NaN passed over: negative infinity where there is no number.
fn maxima(values: &[f32]) -> Vec<f32> {
    struct Maxima<'a>(&'a [f32]);
    impl pulp::NullaryFnOnce for Maxima<'_> {
        type Output = Vec<f32>;

        #[inline(always)]
        fn call(self) -> Vec<f32> {
            let mut maxima = Vec::with_capacity(self.0.len().div_ceil(BLOCK));
            for block in self.0.chunks(BLOCK) {
                // Several maxima side by side, since a single one would make each step wait for the one before; few
                // enough for registers.
                let mut lanes = [f32::NEG_INFINITY; 32];
                let (chunks, rest) = block.as_chunks::<32>();
                for chunk in chunks {
                    for (lane, &v) in lanes.iter_mut().zip(chunk) {
                        *lane = larger(*lane, v);
                    }
                }
                maxima.push(rest.iter().chain(&lanes).copied().fold(f32::NEG_INFINITY, larger));
            }
            maxima
        }
    }
    pulp::Arch::new().dispatch(Maxima(values))
}

/// ln Σ e^v, summed in f64 with the largest value taken out. Negative infinity if every value is.
pub fn log_sum_exp(values: &[f32]) -> f64 {
    Exponentials::of(values).log_sum_exp()
}

/// The exponentials of a row with its largest value taken out, as sums: what log-probabilities and draws rest on.
#[derive(Debug, Clone)]
pub(crate) struct Exponentials {
    pub(crate) max: f32,
    /// Those of [`BLOCK`] values each; none if the largest value is not finite.
    pub(crate) blocks: Vec<f64>,
}

impl Exponentials {
    pub(crate) fn of(values: &[f32]) -> Self {
        let max = maximum(values);
        let values = if max.is_finite() { values } else { &[] };
        Self { max, blocks: sums_exp(values, BLOCK, max) }
    }

    pub(crate) fn log_sum_exp(&self) -> f64 {
        if !self.max.is_finite() {
            return f64::from(self.max);
        }
        f64::from(self.max) + self.blocks.iter().sum::<f64>().ln()
    }
}

/// Σ e^(v - max), in f64. `max` is the largest value, and finite.
pub(crate) fn sum_exp(values: &[f32], max: f32) -> f64 {
    sums_exp(values, values.len().max(1), max).into_iter().sum()
}

/// Σ e^(v - max) of each block of so many values.
fn sums_exp(values: &[f32], block: usize, max: f32) -> Vec<f64> {
    struct Sums<'a>(&'a [f32], usize, f32);
    impl pulp::NullaryFnOnce for Sums<'_> {
        type Output = Vec<f64>;

        #[inline(always)]
        fn call(self) -> Vec<f64> {
            let Self(values, block, max) = self;
            let mut sums = Vec::with_capacity(values.len().div_ceil(block));
            // No closure, which would be compiled without this function's instructions.
            for block in values.chunks(block) {
                let mut lanes = [0.0_f64; 16];
                let (chunks, rest) = block.as_chunks::<16>();
                for chunk in chunks {
                    for (lane, &v) in lanes.iter_mut().zip(chunk) {
                        *lane += f64::from(exp_below_zero(v - max));
                    }
                }
                sums.push(rest.iter().map(|&v| f64::from(exp_below_zero(v - max))).chain(lanes).sum());
            }
            sums
        }
    }
    pulp::Arch::new().dispatch(Sums(values, block, max))
}

/// e^x of x up to 0, within two units in the last place, without a branch so that compilers make vector code of it: 2^n
/// times a polynomial on [-ln 2 / 2, ln 2 / 2], with the coefficients of Cephes' `expf` (S. L. Moshier).
#[inline(always)]
fn exp_below_zero(x: f32) -> f32 {
    // Adding 1.5 * 2^23 rounds to an integer, which then stands in the lowest bits.
    const ROUND: f32 = 12_582_912.0;
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    // ln 2 in two parts, so that the product is exact.
    let r = (x - n * 0.693_359_4) + n * 2.121_944_4e-4;
    let tail = [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5];
    let polynomial = tail.iter().fold(1.987_569_2e-4_f32, |sum, c| sum * r + c);
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(1.0_f32.to_bits()));
    // Below, the power of two would not be a normal number; NaN stays NaN.
    if x < -87.0 { 0.0 } else { (polynomial * r * r + r + 1.0) * power }
}

/// e^x; the far more common -inf after filtering costs no exponential.
pub(crate) fn exp(x: f32) -> f32 {
    if x == f32::NEG_INFINITY { 0.0 } else { x.exp() }
}

/// Turns logits into log-probabilities.
pub fn log_softmax_in_place(values: &mut [f32]) {
    let sum = log_sum_exp(values);
    if sum.is_finite() {
        values.iter_mut().for_each(|v| *v = (f64::from(*v) - sum) as f32);
    }
}

/// Probabilities of logits. All zero if every logit is negative infinity.
pub fn softmax(values: &[f32]) -> Vec<f32> {
    let max = maximum(values);
    if max == f32::NEG_INFINITY {
        return vec![0.0; values.len()];
    }
    let exps: Vec<f32> = values.iter().map(|&v| exp(v - max)).collect();
    let sum: f64 = exps.iter().map(|&e| f64::from(e)).sum();
    exps.into_iter().map(|e| (f64::from(e) / sum) as f32).collect()
}

/// The `k` largest values with their indices: the largest first, the lower index first among equals, NaN last.
pub fn top_k(values: &[f32], k: usize) -> Vec<(usize, f32)> {
    let k = k.min(values.len());
    if k == 0 {
        return Vec::new();
    }
    // Adding zero makes -0 the equal of 0 in the total order too.
    let number = |v: f32| if v.is_nan() { f32::NEG_INFINITY } else { v + 0.0 };
    let order = |a: &(usize, f32), b: &(usize, f32)| {
        number(b.1).total_cmp(&number(a.1)).then(a.1.is_nan().cmp(&b.1.is_nan())).then(a.0.cmp(&b.0))
    };
    // Candidates are gathered and cut down in turn, so that a row is passed over once and hardly anything is moved.
    let room = (2 * k).max(64);
    let mut best: Vec<(usize, f32)> = Vec::with_capacity(room.min(values.len()));
    let mut threshold = None;
    // A later index loses against an equal value, so what is not above the threshold cannot enter.
    let enters = |v: f32, threshold: Option<f32>| threshold.is_none_or(|t| number(v) > t);
    for (b, (block, max)) in values.chunks(BLOCK).zip(maxima(values)).enumerate() {
        if !enters(max, threshold) {
            continue;
        }
        for (i, &v) in block.iter().enumerate().map(|(i, v)| (b * BLOCK + i, v)) {
            if !enters(v, threshold) {
                continue;
            }
            best.push((i, v));
            if best.len() == room && room > k {
                best.select_nth_unstable_by(k - 1, order);
                best.truncate(k);
                threshold = best.last().map(|b| number(b.1));
            }
        }
    }
    if k < best.len() {
        best.select_nth_unstable_by(k - 1, order);
        best.truncate(k);
    }
    best.sort_unstable_by(order);
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn largest_values_and_their_order() {
        let values = [1.0, 3.0, f32::NAN, 3.0, f32::NEG_INFINITY, 2.0];
        assert_eq!(argmax(&values), Some(1));
        assert_eq!(argmax(&[f32::NAN, f32::NEG_INFINITY]), Some(1));
        assert_eq!((argmax(&[]), argmax(&[f32::NAN])), (None, Some(0)));
        // In later blocks too: nothing but NaN in front of an infinity, and equals in two blocks.
        let mut long = vec![f32::NAN; 3 * BLOCK];
        assert_eq!((argmax(&long), maximum(&long)), (Some(0), f32::NEG_INFINITY));
        long[2 * BLOCK + 7] = f32::NEG_INFINITY;
        assert_eq!(argmax(&long), Some(2 * BLOCK + 7));
        (long[BLOCK + 3], long[2 * BLOCK + 9]) = (-1.0, -1.0);
        assert_eq!((argmax(&long), maximum(&long)), (Some(BLOCK + 3), -1.0));
        assert_eq!(top_k(&long, 3)[..2], [(BLOCK + 3, -1.0), (2 * BLOCK + 9, -1.0)]);
        assert_eq!(top_k(&values, 3), [(1, 3.0), (3, 3.0), (5, 2.0)]);
        assert_eq!(top_k(&values, 4)[3], (0, 1.0));
        assert_eq!(top_k(&values, 99).len(), 6);
        assert_eq!(top_k(&[-0.0, 0.0], 1)[0].0, 0);
        assert!(top_k(&values, 0).is_empty());
        // More than fit before the list is first cut down.
        let many: Vec<f32> = (0..5000).map(|i| ((i * 37) % 1009) as f32).collect();
        let mut sorted: Vec<(usize, f32)> = many.iter().copied().enumerate().collect();
        sorted.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        for k in [1, 2, 50, 700, 4999] {
            assert_eq!(top_k(&many, k), sorted[..k], "k = {k}");
        }
    }

    #[test]
    fn exponentials_are_those_of_the_library() {
        let mut worst = 0.0_f64;
        for i in 0..=870_000 {
            let x = -(i as f32) * 1e-4;
            let (found, expected) = (f64::from(exp_below_zero(x)), f64::from(x).exp());
            worst = worst.max((found / expected - 1.0).abs());
        }
        assert!(worst < 2.4e-7, "{worst}");
        assert_eq!(
            (exp_below_zero(0.0), exp_below_zero(-87.1), exp_below_zero(f32::NEG_INFINITY)),
            (1.0, 0.0, 0.0)
        );
        assert!(exp_below_zero(f32::NAN).is_nan());
        for len in [1, 15, 16, 17, 1000] {
            let values: Vec<f32> = (0..len).map(|i| ((i * 37) % 101) as f32 * -0.3).collect();
            let expected: f64 = values.iter().map(|v| f64::from(*v).exp()).sum();
            assert!((sum_exp(&values, 0.0) / expected - 1.0).abs() < 1e-7);
        }
        assert!(log_sum_exp(&[0.0, f32::NAN]).is_nan());
    }

    /// torch 2.13: log_softmax([1, -2, 0.5, 88, 87.5]) and of those with two -inf.
    #[test]
    fn log_softmax_of_torch() {
        let mut values = [1.0, -2.0, 0.5, 88.0, 87.5];
        log_softmax_in_place(&mut values);
        for (found, want) in values.iter().zip([-87.474075, -90.474075, -87.974075, -0.474077, -0.974077]) {
            assert!((found - want).abs() < 1e-5, "{found} {want}");
        }
        let mut values = [f32::NEG_INFINITY, 0.0, f32::NEG_INFINITY];
        log_softmax_in_place(&mut values);
        assert_eq!(values, [f32::NEG_INFINITY, 0.0, f32::NEG_INFINITY]);
        assert_eq!(softmax(&[f32::NEG_INFINITY; 2]), [0.0; 2]);
        assert!((log_sum_exp(&[0.0; 4]) - 4f64.ln()).abs() < 1e-12);
    }
}
