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

/// The `k` largest values with their indices: the largest first, the lower index first among equals.
pub fn top_k(values: &[f32], k: usize) -> Vec<(usize, f32)> {
    let order = |a: &u32, b: &u32| {
        let (x, y) = (values[*a as usize], values[*b as usize]);
        y.total_cmp(&x).then(a.cmp(b))
    };
    let mut ids: Vec<u32> = (0..values.len() as u32).collect();
    let k = k.min(ids.len());
    if k == 0 {
        return Vec::new();
    }
    if k < ids.len() {
        ids.select_nth_unstable_by(k - 1, order);
        ids.truncate(k);
    }
    ids.sort_unstable_by(order);
    ids.into_iter().map(|i| (i as usize, values[i as usize])).collect()
}
