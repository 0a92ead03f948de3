//! What each op means: plain loops over host arrays, accumulated in f64.
//!
//! These are the bodies that [`crate::Backend`]'s defaults call and that the conformance suite compares overrides
//! to. They are written to be read, not to be fast.

pub mod gradient;

use crate::{Activation, TargetScore, TopK};
use ndarray::{Array2, Array3, ArrayView1, ArrayView2, Zip, s};

/// LayerNorm of each row: (x - mean) / √(variance + eps) · weight + bias, the variance over `width` (not minus 1).
pub fn layer_norm(
    x: ArrayView2<'_, f32>,
    weight: Option<ArrayView1<'_, f32>>,
    bias: Option<ArrayView1<'_, f32>>,
    eps: f32,
) -> Array2<f32> {
    let width = x.ncols() as f64;
    let mut out = Array2::zeros(x.dim());
    for (row, mut out) in x.outer_iter().zip(out.outer_iter_mut()) {
        let mean = row.iter().map(|&v| f64::from(v)).sum::<f64>() / width;
        let variance = row.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / width;
        let scale = (variance + f64::from(eps)).sqrt().recip();
        for (i, (o, &v)) in out.iter_mut().zip(row).enumerate() {
            let weight = weight.map_or(1.0, |w| f64::from(w[i]));
            let bias = bias.map_or(0.0, |b| f64::from(b[i]));
            *o = ((f64::from(v) - mean) * scale * weight + bias) as f32;
        }
    }
    out
}

/// x Wᵀ + b with x `[rows, in]`, W `[out, in]`, b `[out]`, then the activation.
pub fn linear(
    x: ArrayView2<'_, f32>,
    weight: ArrayView2<'_, f32>,
    bias: Option<ArrayView1<'_, f32>>,
    activation: Option<Activation>,
) -> Array2<f32> {
    let mut out = Array2::zeros((x.nrows(), weight.nrows()));
    for (x, mut out) in x.outer_iter().zip(out.outer_iter_mut()) {
        for (j, (w, o)) in weight.outer_iter().zip(out.iter_mut()).enumerate() {
            let sum = bias.map_or(0.0, |b| f64::from(b[j])) + dot(x, w);
            *o = activation.map_or(sum, |f| f.apply(sum)) as f32;
        }
    }
    out
}

/// Causal attention of one sequence.
///
/// Queries `[rows, heads * head_dim]` are the last rows of the sequence whose keys and values are
/// `[positions, heads * head_dim]`: query row i sees positions `0..=positions - rows + i`. Returns the output in
/// the queries' shape and the weights `[heads, rows, positions]`. A row that sees nothing gives zeros.
pub fn attend(
    q: ArrayView2<'_, f32>,
    keys: ArrayView2<'_, f32>,
    values: ArrayView2<'_, f32>,
    heads: usize,
) -> (Array2<f32>, Array3<f32>) {
    let (rows, width) = q.dim();
    let positions = keys.nrows();
    let head_dim = width / heads.max(1);
    let scale = (head_dim as f64).sqrt().recip();
    let mut out = Array2::zeros((rows, width));
    let mut weights = Array3::zeros((heads, rows, positions));
    for head in 0..heads {
        let columns = head * head_dim..(head + 1) * head_dim;
        for row in 0..rows {
            let seen = (positions + row + 1).saturating_sub(rows);
            let query = q.slice(s![row, columns.clone()]);
            let scores: Vec<f64> =
                (0..seen).map(|p| scale * dot(query, keys.slice(s![p, columns.clone()]))).collect();
            let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum();
            let mut mixed = vec![0.0; head_dim];
            for (p, score) in scores.iter().enumerate() {
                let weight = (score - max).exp() / sum;
                weights[[head, row, p]] = weight as f32;
                let value = values.slice(s![p, columns.clone()]);
                mixed.iter_mut().zip(value).for_each(|(m, &v)| *m += weight * f64::from(v));
            }
            let target = out.slice_mut(s![row, columns.clone()]);
            Zip::from(target).and(&ndarray::aview1(&mixed)).for_each(|o, &m| *o = m as f32);
        }
    }
    (out, weights)
}

/// Log-probability of `target` under the softmax of a row of logits, and whether it is the argmax.
///
/// # Panics
/// If `target` is not below the row's length; see [`crate::check::ids`].
pub fn target_score(logits: ArrayView1<'_, f32>, target: u32) -> TargetScore {
    let target = target as usize;
    let greedy = argmax(logits) == Some(target);
    TargetScore { log_prob: (f64::from(logits[target]) - log_sum_exp(logits)) as f32, greedy }
}

/// The `k` largest logits, largest first, the lower index first among equals; NaN comes last.
pub fn top_k(logits: ArrayView1<'_, f32>, k: usize) -> TopK {
    let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
    let key = |id: u32| logits[id as usize];
    // Not `total_cmp`: it tells -0 from 0 and puts NaN first, and then the first would not be the argmax.
    let descending = |a: f32, b: f32| b.partial_cmp(&a).unwrap_or_else(|| a.is_nan().cmp(&b.is_nan()));
    ids.sort_by(|&a, &b| descending(key(a), key(b)).then(a.cmp(&b)));
    ids.truncate(k);
    let values = ids.iter().map(|&id| logits[id as usize]).collect();
    TopK { ids, logits: values, log_sum_exp: log_sum_exp(logits) as f32 }
}

/// The lowest index of the largest value; `None` of an empty row.
pub fn argmax(row: ArrayView1<'_, f32>) -> Option<usize> {
    let better = |best: Option<(usize, f32)>, (i, &v): (usize, &f32)| match best {
        Some((_, max)) if v <= max || v.is_nan() => best,
        _ => Some((i, v)),
    };
    row.iter().enumerate().fold(None, better).map(|(i, _)| i)
}

/// log Σ exp(x), computed without overflow.
pub fn log_sum_exp(row: ArrayView1<'_, f32>) -> f64 {
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if max.is_infinite() {
        return f64::from(max);
    }
    let max = f64::from(max);
    max + row.iter().map(|&v| (f64::from(v) - max).exp()).sum::<f64>().ln()
}

fn dot(a: ArrayView1<'_, f32>, b: ArrayView1<'_, f32>) -> f64 {
    let product = |(&a, &b): (&f32, &f32)| f64::from(a) * f64::from(b);
    let (Some(a), Some(b)) = (a.as_slice(), b.as_slice()) else {
        return a.iter().zip(b).map(product).sum();
    };
    // Sums that do not wait for one another: much of the conformance suite's time is spent here.
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<16>(), b.as_chunks::<16>());
    let mut sums = [0.0; 16];
    for (a, b) in a.iter().zip(b) {
        for (sum, pair) in sums.iter_mut().zip(a.iter().zip(b)) {
            *sum += product(pair);
        }
    }
    sums.iter().sum::<f64>() + a_rest.iter().zip(b_rest).map(product).sum::<f64>()
}
