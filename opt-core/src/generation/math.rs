//! Small numeric helpers over one row of scores.

/// Index of the largest value, the lowest among equals; `None` for an empty row. NaN never wins.
pub fn argmax(values: &[f32]) -> Option<usize> {
    let mut best: Option<(usize, f32)> = None;
    for (i, &v) in values.iter().enumerate() {
        if best.map_or(!v.is_nan(), |(_, b)| v > b) {
            best = Some((i, v));
        }
    }
    best.map(|(i, _)| i).or(if values.is_empty() { None } else { Some(0) })
}

/// The largest value; negative infinity for an empty row. NaN is passed over.
pub(crate) fn maximum(values: &[f32]) -> f32 {
    values.iter().copied().fold(f32::NEG_INFINITY, f32::max)
}

/// ln Σ e^v, summed in f64 with the largest value taken out. Negative infinity if every value is.
pub fn log_sum_exp(values: &[f32]) -> f64 {
    let max = f64::from(maximum(values));
    if !max.is_finite() {
        return max;
    }
    max + values.iter().map(|&v| exp_difference(v, max)).sum::<f64>().ln()
}

/// e^(value - max); the far more common -inf after filtering costs no exponential.
pub(crate) fn exp_difference(value: f32, max: f64) -> f64 {
    if value == f32::NEG_INFINITY { 0.0 } else { (f64::from(value) - max).exp() }
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
    let max = f64::from(maximum(values));
    if max == f64::NEG_INFINITY {
        return vec![0.0; values.len()];
    }
    let sum: f64 = values.iter().map(|&v| exp_difference(v, max)).sum();
    values.iter().map(|&v| (exp_difference(v, max) / sum) as f32).collect()
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
    for (i, &v) in values.iter().enumerate() {
        // A later index loses against an equal value, so what is not above the threshold cannot enter.
        if threshold.is_some_and(|t| number(v) <= t) {
            continue;
        }
        best.push((i, v));
        if best.len() == room && room > k {
            best.select_nth_unstable_by(k - 1, order);
            best.truncate(k);
            threshold = best.last().map(|b| number(b.1));
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
