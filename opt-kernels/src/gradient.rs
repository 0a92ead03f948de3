//! Loops of training over slices in main memory, for backends whose library has none that touches memory once.
//!
//! What they compute: `opt_backend::oracle::gradient`. Each works on a part that its caller cuts, so that threads are
//! the caller's affair. They are written for the compiler to vectorise: sums are kept in eight parts, and in f64,
//! since a row's mean or a sum of squares loses too much otherwise.

use opt_backend::{
    AdamW, Dropout, Sgd,
    moments::{BLOCK, PACKED, SIGNED, UNSIGNED},
};

/// One step of AdamW.
pub fn adamw(
    param: &mut [f32],
    gradient: &[f32],
    [first, second]: [&mut [f32]; 2],
    adam: AdamW,
    factor: f32,
) {
    let (step_size, root) = adam.corrections();
    let decay = 1.0 - adam.lr * adam.weight_decay;
    let [new1, new2] = [1.0 - adam.beta1, 1.0 - adam.beta2];
    let moments = first.iter_mut().zip(second);
    for ((p, g), (m, v)) in param.iter_mut().zip(gradient).zip(moments) {
        let g = g * factor;
        *m = adam.beta1 * *m + new1 * g;
        *v = adam.beta2 * *v + new2 * g * g;
        *p = *p * decay - step_size * *m / (v.sqrt() / root + adam.eps);
    }
}

/// One step of AdamW with moments in eight bits (`opt_backend::Moments8`), of elements that begin with a block; the
/// moments are the codes of the two, and the scales of both.
pub fn adamw8(
    param: &mut [f32],
    gradient: &[f32],
    [first, second, scales]: [&mut [f32]; 3],
    adam: AdamW,
    factor: f32,
) {
    let (mut m, mut v) = ([0.0; BLOCK], [0.0; BLOCK]);
    let codes = first.chunks_mut(PACKED).zip(second.chunks_mut(PACKED)).zip(scales.chunks_mut(2));
    for ((p, g), ((first, second), scales)) in param.chunks_mut(BLOCK).zip(gradient.chunks(BLOCK)).zip(codes)
    {
        let (m, v) = (&mut m[..p.len()], &mut v[..p.len()]);
        SIGNED.decode(first, scales[0], m);
        UNSIGNED.decode(second, scales[1], v);
        adamw(p, g, [m, v], adam, factor);
        scales[0] = SIGNED.encode(m, first);
        scales[1] = UNSIGNED.encode(v, second);
    }
}

/// One step of stochastic gradient descent.
pub fn sgd(param: &mut [f32], gradient: &[f32], velocity: Option<&mut [f32]>, sgd: Sgd, factor: f32) {
    let Sgd { lr, momentum, weight_decay } = sgd;
    let Some(velocity) = velocity else {
        for (p, g) in param.iter_mut().zip(gradient) {
            *p -= lr * (g * factor + weight_decay * *p);
        }
        return;
    };
    for ((p, g), v) in param.iter_mut().zip(gradient).zip(velocity) {
        *v = momentum * *v + (g * factor + weight_decay * *p);
        *p -= lr * *v;
    }
}

/// Drops elements; the first of `x` is element `first` of its tensor.
pub fn dropout(x: &mut [f32], first: usize, dropout: Dropout) {
    let scale = dropout.scale();
    for (i, v) in x.iter_mut().enumerate() {
        *v = if dropout.keeps((first + i) as u32) { *v * scale } else { 0.0 };
    }
}

/// The sum of squares.
pub fn sum_squares(x: &[f32]) -> f64 {
    sum(x, |&v| f64::from(v) * f64::from(v))
}

/// Mean, and one over the root of variance plus eps.
fn moments(x: &[f32], eps: f32) -> (f32, f32) {
    let width = x.len() as f64;
    // The mean as f32, as the deviations below are taken from it.
    let mean = (sum(x, |&v| f64::from(v)) / width) as f32;
    let variance = sum(x, |&v| f64::from(v - mean) * f64::from(v - mean)) / width;
    (mean, (variance + f64::from(eps)).sqrt().recip() as f32)
}

/// The gradient of LayerNorm with respect to its input, of rows of `width` elements, into `dx`.
pub fn layer_norm(x: &[f32], weight: Option<&[f32]>, eps: f32, dy: &[f32], dx: &mut [f32], width: usize) {
    let width = width.max(1);
    let rows = x.chunks_exact(width).zip(dy.chunks_exact(width)).zip(dx.chunks_exact_mut(width));
    for ((x, dy), dx) in rows {
        let (mean, scale) = moments(x, eps);
        // The gradient of the normalised values, for now.
        match weight {
            Some(weight) => dx.iter_mut().zip(dy).zip(weight).for_each(|((d, dy), w)| *d = dy * w),
            None => dx.copy_from_slice(dy),
        }
        let mean_inner = (sum(dx, |&v| f64::from(v)) / width as f64) as f32;
        let product = sum_of_two(dx, x, |&d, &x| f64::from(d) * f64::from((x - mean) * scale));
        let mean_product = (product / width as f64) as f32;
        for (d, x) in dx.iter_mut().zip(x) {
            *d = scale * (*d - mean_inner - (x - mean) * scale * mean_product);
        }
    }
}

/// Adds to the gradients of LayerNorm with respect to its weight and bias those of some rows.
pub fn layer_norm_params(x: &[f32], eps: f32, dy: &[f32], [weight, bias]: [&mut [f64]; 2]) {
    let width = weight.len().max(1);
    for (x, dy) in x.chunks_exact(width).zip(dy.chunks_exact(width)) {
        let (mean, scale) = moments(x, eps);
        for ((x, dy), (w, b)) in x.iter().zip(dy).zip(weight.iter_mut().zip(bias.iter_mut())) {
            *w += f64::from(dy * ((x - mean) * scale));
            *b += f64::from(*dy);
        }
    }
}

/// Σ f(x), in eight parts.
fn sum(x: &[f32], f: impl Fn(&f32) -> f64) -> f64 {
    let mut sums = [0.0; 8];
    let (chunks, rest) = x.as_chunks::<8>();
    for chunk in chunks {
        sums.iter_mut().zip(chunk).for_each(|(sum, v)| *sum += f(v));
    }
    sums.iter().sum::<f64>() + rest.iter().map(f).sum::<f64>()
}

/// Σ f(x, y), in eight parts.
fn sum_of_two(x: &[f32], y: &[f32], f: impl Fn(&f32, &f32) -> f64) -> f64 {
    let mut sums = [0.0; 8];
    let ((xs, x_rest), (ys, y_rest)) = (x.as_chunks::<8>(), y.as_chunks::<8>());
    for (x, y) in xs.iter().zip(ys) {
        sums.iter_mut().zip(x.iter().zip(y)).for_each(|(sum, (x, y))| *sum += f(x, y));
    }
    sums.iter().sum::<f64>() + x_rest.iter().zip(y_rest).map(|(x, y)| f(x, y)).sum::<f64>()
}
