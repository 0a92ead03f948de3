//! What each op of [`crate::Train`] means: plain loops over host arrays, accumulated in f64.

use super::{dot, log_sum_exp};
use crate::{
    Activation, AdamW, Dropout, Layout, Moments8, Sgd, Smoothing,
    moments::{BLOCK, DynamicMap, SIGNED, UNSIGNED},
};
use ndarray::{Array1, Array2, ArrayView1, ArrayView2, ArrayViewMut1, Axis, s};

/// A product of two matrices as `layout` says, of operands as they are.
pub fn matmul(a: ArrayView2<'_, f32>, b: ArrayView2<'_, f32>, layout: Layout) -> Array2<f32> {
    let (a, b) = match layout {
        Layout::TimesTransposed => (a, b),
        Layout::Times => (a, b.reversed_axes()),
        Layout::TransposedTimes => (a.reversed_axes(), b.reversed_axes()),
    };
    Array2::from_shape_fn((a.nrows(), b.nrows()), |(i, j)| dot(a.row(i), b.row(j)) as f32)
}

/// The gradients of [`super::layer_norm`] with respect to `x`, weight and bias, given that of its result.
pub fn layer_norm(
    x: ArrayView2<'_, f32>,
    weight: Option<ArrayView1<'_, f32>>,
    eps: f32,
    dy: ArrayView2<'_, f32>,
) -> (Array2<f32>, Array1<f32>, Array1<f32>) {
    let width = x.ncols();
    let mut dx = Array2::zeros(x.dim());
    let (mut d_weight, mut d_bias) = (vec![0.0_f64; width], vec![0.0_f64; width]);
    for ((x, dy), mut dx) in x.outer_iter().zip(dy.outer_iter()).zip(dx.outer_iter_mut()) {
        let n = width as f64;
        let mean = x.iter().map(|&v| f64::from(v)).sum::<f64>() / n;
        let variance = x.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / n;
        let scale = (variance + f64::from(eps)).sqrt().recip();
        let normal: Vec<f64> = x.iter().map(|&v| (f64::from(v) - mean) * scale).collect();
        // The gradient of the normalised values.
        let inner: Vec<f64> = (0..width)
            .map(|i| f64::from(dy[i]) * weight.map_or(1.0, |weight| f64::from(weight[i])))
            .collect();
        let mean_inner = inner.iter().sum::<f64>() / n;
        let mean_product = inner.iter().zip(&normal).map(|(g, x)| g * x).sum::<f64>() / n;
        for i in 0..width {
            dx[i] = (scale * (inner[i] - mean_inner - normal[i] * mean_product)) as f32;
            d_weight[i] += f64::from(dy[i]) * normal[i];
            d_bias[i] += f64::from(dy[i]);
        }
    }
    let single = |v: Vec<f64>| v.into_iter().map(|v| v as f32).collect();
    (dx, single(d_weight), single(d_bias))
}

/// The gradients of [`super::attend`], of one sequence whose queries, keys and values all have the same rows, with
/// respect to these three.
pub fn attend(
    q: ArrayView2<'_, f32>,
    keys: ArrayView2<'_, f32>,
    values: ArrayView2<'_, f32>,
    heads: usize,
    dy: ArrayView2<'_, f32>,
) -> [Array2<f32>; 3] {
    let (rows, width) = q.dim();
    let head_dim = width / heads.max(1);
    let scale = (head_dim as f64).sqrt().recip();
    let [mut dq, mut dk, mut dv] = [(); 3].map(|()| Array2::<f64>::zeros((rows, width)));
    for head in 0..heads {
        let columns = head * head_dim..(head + 1) * head_dim;
        for row in 0..rows {
            let of = |x: ArrayView2<'_, f32>, row: usize| x.slice(s![row, columns.clone()]).mapv(f64::from);
            let (query, dy) = (of(q, row), of(dy, row));
            let scores: Vec<f64> = (0..=row).map(|p| scale * query.dot(&of(keys, p))).collect();
            let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum();
            let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp() / sum).collect();
            let d_weights: Vec<f64> = (0..=row).map(|p| dy.dot(&of(values, p))).collect();
            let mean: f64 = weights.iter().zip(&d_weights).map(|(w, d)| w * d).sum();
            for p in 0..=row {
                let d_score = weights[p] * (d_weights[p] - mean) * scale;
                dq.slice_mut(s![row, columns.clone()]).scaled_add(d_score, &of(keys, p));
                dk.slice_mut(s![p, columns.clone()]).scaled_add(d_score, &query);
                dv.slice_mut(s![p, columns.clone()]).scaled_add(weights[p], &dy);
            }
        }
    }
    [dq, dk, dv].map(|d| d.mapv(|v| v as f32))
}

/// `dy` times the slope of the activation at `x`.
pub fn activate(x: ArrayView2<'_, f32>, dy: ArrayView2<'_, f32>, activation: Activation) -> Array2<f32> {
    ndarray::Zip::from(x)
        .and(dy)
        .map_collect(|&x, &dy| (activation.slope(f64::from(x)) * f64::from(dy)) as f32)
}

/// The cross-entropy of each row's target, summed, and its gradient with respect to the logits, both times
/// `smoothing.scale`.
///
/// With label smoothing ε the loss of a row is (1 - ε) · nll + ε · mean(-log p), as transformers' `LabelSmoother` has
/// it.
///
/// # Panics
/// If a target is not below the rows' length; see [`crate::check::ids`].
pub fn cross_entropy(
    logits: ArrayView2<'_, f32>,
    targets: &[u32],
    smoothing: Smoothing,
) -> (f32, Array2<f32>) {
    let (scale, epsilon) = (f64::from(smoothing.scale), f64::from(smoothing.epsilon));
    let vocab = logits.ncols() as f64;
    let mut gradient = Array2::zeros(logits.dim());
    let mut loss = 0.0;
    for ((row, mut d), &target) in logits.outer_iter().zip(gradient.outer_iter_mut()).zip(targets) {
        let target = target as usize;
        let total = log_sum_exp(row);
        let mean = row.iter().map(|&v| f64::from(v)).sum::<f64>() / vocab;
        loss += (1.0 - epsilon) * (total - f64::from(row[target])) + epsilon * (total - mean);
        for (i, (d, &v)) in d.iter_mut().zip(row).enumerate() {
            let wanted = epsilon / vocab + if i == target { 1.0 - epsilon } else { 0.0 };
            *d = (scale * ((f64::from(v) - total).exp() - wanted)) as f32;
        }
    }
    ((loss * scale) as f32, gradient)
}

/// T² KL(softmax(teacher / T) ‖ softmax(student / T)) summed over rows and its gradient with respect to the student's
/// logits, both times `scale` (DistilBERT's soft-target loss, arXiv 1503.02531).
pub fn soft_targets(
    student: ArrayView2<'_, f32>,
    teacher: ArrayView2<'_, f32>,
    temperature: f32,
    scale: f32,
) -> (f32, Array2<f32>) {
    let (t, scale) = (f64::from(temperature), f64::from(scale));
    let mut gradient = Array2::zeros(student.dim());
    let mut loss = 0.0;
    for ((student, teacher), mut d) in
        student.outer_iter().zip(teacher.outer_iter()).zip(gradient.outer_iter_mut())
    {
        let cooled = |row: ArrayView1<'_, f32>| {
            let row: Vec<f64> = row.iter().map(|&v| f64::from(v) / t).collect();
            let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let total = max + row.iter().map(|v| (v - max).exp()).sum::<f64>().ln();
            row.into_iter().map(|v| v - total).collect::<Vec<f64>>()
        };
        for ((s, p), d) in cooled(student).into_iter().zip(cooled(teacher)).zip(d.iter_mut()) {
            loss += t * t * p.exp() * (p - s);
            *d = (scale * t * (s.exp() - p.exp())) as f32;
        }
    }
    ((loss * scale) as f32, gradient)
}

/// Zeroes the elements that `dropout` drops and scales the others, in place.
pub fn dropout(x: &mut Array2<f32>, dropout: Dropout) {
    let scale = dropout.scale();
    for (i, v) in x.iter_mut().enumerate() {
        *v = if dropout.keeps(i as u32) { *v * scale } else { 0.0 };
    }
}

/// The factor of gradients whose squares sum to `sum_squares`: what `torch.nn.utils.clip_grad_norm_` multiplies by.
pub fn clip_factor(sum_squares: f32, max_norm: f32) -> f32 {
    (max_norm / (sum_squares.sqrt() + 1e-6)).min(1.0)
}

/// One step of AdamW (arXiv 1711.05101, `torch.optim.AdamW`) on parameters and both moments, in place; `factor`
/// multiplies the gradient.
pub fn adamw(
    param: &mut Array2<f32>,
    gradient: ArrayView2<'_, f32>,
    [first, second]: [&mut Array2<f32>; 2],
    adam: AdamW,
    factor: f32,
) {
    let (step_size, root) = adam.corrections();
    ndarray::Zip::from(param).and(gradient).and(first).and(second).for_each(|p, &g, m, v| {
        let g = g * factor;
        *m = adam.beta1 * *m + (1.0 - adam.beta1) * g;
        *v = adam.beta2 * *v + (1.0 - adam.beta2) * g * g;
        let decayed = *p * (1.0 - adam.lr * adam.weight_decay);
        *p = decayed - step_size * *m / (v.sqrt() / root + adam.eps);
    });
}

/// [`adamw`] with moments in eight bits (arXiv 2110.02861, bitsandbytes' `AdamW8bit`): decoded, moved in f32, encoded
/// again. Parameters are moved by the moments as they are before they are encoded.
///
/// # Panics
/// If shapes do not fit; see [`crate::check::moments8`].
pub fn adamw8(
    param: &mut Array2<f32>,
    gradient: ArrayView2<'_, f32>,
    moments: &mut Moments8<Array2<f32>>,
    adam: AdamW,
    factor: f32,
) {
    let [mut first, mut second] = decode_moments(moments, param.dim().into());
    adamw(param, gradient, [&mut first, &mut second], adam, factor);
    *moments = encode_moments([&first, &second]);
}

/// First and second moment of a parameter of this shape.
///
/// # Panics
/// If shapes do not fit; see [`crate::check::moments8`].
pub fn decode_moments(moments: &Moments8<Array2<f32>>, shape: [usize; 2]) -> [Array2<f32>; 2] {
    let decode = |map: &DynamicMap, codes: &Array2<f32>, scales: ArrayView1<'_, f32>| {
        let mut values = Array2::zeros(shape);
        let blocks = values.as_slice_mut().unwrap_or_default().chunks_mut(BLOCK);
        for ((block, codes), scale) in blocks.zip(codes.outer_iter()).zip(scales) {
            map.decode(&codes.to_vec(), *scale, block);
        }
        values
    };
    [
        decode(&SIGNED, &moments.first, moments.scales.column(0)),
        decode(&UNSIGNED, &moments.second, moments.scales.column(1)),
    ]
}

/// First and second moment in eight bits.
pub fn encode_moments(moments: [&Array2<f32>; 2]) -> Moments8<Array2<f32>> {
    let shapes = Moments8::shapes(moments[0].dim().into());
    let mut scales = Array2::zeros(shapes.scales);
    let mut encode = |map: &DynamicMap, which: usize| {
        let mut codes = Array2::zeros(shapes.first);
        let values: Vec<f32> = moments[which].iter().copied().collect();
        let rows = values.chunks(BLOCK).zip(codes.outer_iter_mut());
        for ((block, mut codes), scale) in rows.zip(scales.column_mut(which)) {
            *scale = map.encode(block, codes.as_slice_mut().unwrap_or_default());
        }
        codes
    };
    let (first, second) = (encode(&SIGNED, 0), encode(&UNSIGNED, 1));
    Moments8 { first, second, scales }
}

/// One step of `torch.optim.SGD` with weight decay and, where there is a velocity, momentum; in place.
pub fn sgd(
    param: &mut Array2<f32>,
    gradient: ArrayView2<'_, f32>,
    velocity: Option<&mut Array2<f32>>,
    sgd: Sgd,
    factor: f32,
) {
    let mut step = gradient.mapv(|g| g * factor);
    step.scaled_add(sgd.weight_decay, &*param);
    match velocity {
        Some(velocity) => {
            velocity.mapv_inplace(|v| v * sgd.momentum);
            *velocity += &step;
            param.scaled_add(-sgd.lr, &*velocity);
        }
        None => param.scaled_add(-sgd.lr, &step),
    }
}

/// The sum of each column.
pub fn sum_rows(x: ArrayView2<'_, f32>) -> Array2<f32> {
    let sum = |column: ArrayView1<'_, f32>| column.iter().map(|&v| f64::from(v)).sum::<f64>() as f32;
    x.axis_iter(Axis(1)).map(sum).collect::<Array1<f32>>().insert_axis(Axis(0))
}

/// Adds row i of `dy` to row `rows[i]` of `into`.
pub fn scatter_add(into: &mut Array2<f32>, rows: &[usize], dy: ArrayView2<'_, f32>) {
    for (&row, dy) in rows.iter().zip(dy.outer_iter()) {
        let mut target: ArrayViewMut1<'_, f32> = into.row_mut(row);
        target += &dy;
    }
}
