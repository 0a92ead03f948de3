//! What is done element by element, compiled for each instruction set.

use opt_backend::{
    AdamW, Dropout, Sgd,
    moments::{BLOCK, PACKED, SIGNED, UNSIGNED},
};
use opt_kernels::simd::{Kernel, Simd};

/// Elements `first..` of a tensor, some of which are dropped.
pub(crate) struct Drop<'a> {
    pub(crate) x: &'a mut [f32],
    pub(crate) first: usize,
    pub(crate) dropout: Dropout,
}

impl Kernel for Drop<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let scale = self.dropout.scale();
        let first = self.first as u32;
        for (i, x) in self.x.iter_mut().enumerate() {
            *x = if self.dropout.keeps(first.wrapping_add(i as u32)) { *x * scale } else { 0.0 };
        }
    }
}

/// One step of AdamW, as [`opt_backend::oracle::gradient::adamw`] has it.
pub(crate) struct Adam<'a> {
    pub(crate) param: &'a mut [f32],
    pub(crate) gradient: &'a [f32],
    pub(crate) moments: [&'a mut [f32]; 2],
    pub(crate) adam: AdamW,
    /// [`AdamW::corrections`]
    pub(crate) corrections: (f32, f32),
    pub(crate) factor: f32,
}

impl Kernel for Adam<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let Self { param, gradient, moments: [first, second], adam, corrections: (step_size, root), factor } =
            self;
        for (((p, &g), m), v) in param.iter_mut().zip(gradient).zip(first).zip(second) {
            let g = g * factor;
            *m = adam.beta1 * *m + (1.0 - adam.beta1) * g;
            *v = adam.beta2 * *v + (1.0 - adam.beta2) * g * g;
            let decayed = *p * (1.0 - adam.lr * adam.weight_decay);
            *p = decayed - step_size * *m / (v.sqrt() / root + adam.eps);
        }
    }
}

/// One step of AdamW with moments in eight bits, as [`opt_backend::oracle::gradient::adamw8`] has it, of elements that
/// begin with a block.
pub(crate) struct Adam8<'a> {
    pub(crate) param: &'a mut [f32],
    pub(crate) gradient: &'a [f32],
    /// Codes of both, and scales.
    pub(crate) moments: [&'a mut [f32]; 3],
    pub(crate) adam: AdamW,
    /// [`AdamW::corrections`]
    pub(crate) corrections: (f32, f32),
    pub(crate) factor: f32,
}

impl Kernel for Adam8<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { param, gradient, moments: [first, second, scales], adam, corrections, factor } = self;
        let (mut m, mut v) = ([0.0; BLOCK], [0.0; BLOCK]);
        let codes = first.chunks_mut(PACKED).zip(second.chunks_mut(PACKED)).zip(scales.chunks_mut(2));
        let blocks = param.chunks_mut(BLOCK).zip(gradient.chunks(BLOCK)).zip(codes);
        for ((param, gradient), ((first, second), scales)) in blocks {
            let (m, v) = (&mut m[..param.len()], &mut v[..param.len()]);
            SIGNED.decode(first, scales[0], m);
            UNSIGNED.decode(second, scales[1], v);
            Adam { param, gradient, moments: [m, v], adam, corrections, factor }.run(simd);
            scales[0] = SIGNED.encode(m, first);
            scales[1] = UNSIGNED.encode(v, second);
        }
    }
}

/// One step of SGD, as [`opt_backend::oracle::gradient::sgd`] has it; the velocity is empty where there is none.
pub(crate) fn sgd(param: &mut [f32], gradient: &[f32], velocity: &mut [f32], sgd: Sgd, factor: f32) {
    let lr = -sgd.lr;
    if velocity.is_empty() {
        for (p, &g) in param.iter_mut().zip(gradient) {
            *p += lr * (g * factor + sgd.weight_decay * *p);
        }
        return;
    }
    for ((p, &g), v) in param.iter_mut().zip(gradient).zip(velocity) {
        *v = *v * sgd.momentum + (g * factor + sgd.weight_decay * *p);
        *p += lr * *v;
    }
}

/// The sum of squares.
pub(crate) struct Squares<'a>(pub(crate) &'a [f32]);

impl Kernel for Squares<'_> {
    type Output = f64;

    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> f64 {
        let mut sums = [0.0; 16];
        let (whole, rest) = self.0.as_chunks::<16>();
        for chunk in whole {
            for (sum, &x) in sums.iter_mut().zip(chunk) {
                *sum += f64::from(x) * f64::from(x);
            }
        }
        for (sum, &x) in sums.iter_mut().zip(rest) {
            *sum += f64::from(x) * f64::from(x);
        }
        sums.iter().sum()
    }
}
