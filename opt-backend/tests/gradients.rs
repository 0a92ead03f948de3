//! The gradients of [`opt_backend::oracle::gradient`] against finite differences of the forward oracles, in f64, and
//! torch's figures where a formula is torch's own.

use ndarray::{Array1, Array2, Array3, ArrayView2, array};
use opt_backend::{Activation, AdamW, Dropout, Layout, Sgd, Smoothing, oracle, oracle::gradient};

/// Numbers in -1..1 that differ from place to place.
fn numbers(rows: usize, width: usize, seed: u64) -> Array2<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    Array2::from_shape_simple_fn((rows, width), || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1_u64 << 23) as f32 - 1.0
    })
}

fn weighed(y: ArrayView2<'_, f32>, dy: &Array2<f32>) -> f64 {
    y.iter().zip(dy).map(|(&y, &dy)| f64::from(y) * f64::from(dy)).sum()
}

/// Compares `gradient` of Σ f(x) dy with central differences. The forward oracles hand out f32, so the step is large
/// and what is left of the difference is the third derivative.
fn check(what: &str, x: &Array2<f32>, gradient: &Array2<f32>, f: impl Fn(&Array2<f32>) -> f64) {
    let step = 2.0_f32.powi(-7);
    let largest = gradient.iter().fold(1e-3_f64, |m, &g| m.max(f64::from(g).abs()));
    for index in ndarray::indices(x.dim()) {
        let at = |offset: f32| {
            let mut moved = x.clone();
            moved[index] += offset;
            f(&moved)
        };
        // Richardson: the error is of the fourth order.
        let slope = |h: f32| (at(h) - at(-h)) / (2.0 * f64::from(h));
        let expected = (4.0 * slope(step) - slope(2.0 * step)) / 3.0;
        let found = f64::from(gradient[index]);
        assert!(
            (found - expected).abs() < 2e-4 * largest,
            "{what} at {index:?}: expected {expected}, found {found}"
        );
    }
}

#[test]
fn layer_norm() {
    for (rows, width) in [(1, 5), (4, 16)] {
        let (x, dy) = (numbers(rows, width, 1), numbers(rows, width, 2));
        let (weight, bias) = (numbers(1, width, 3), numbers(1, width, 4));
        let forward = |x: &Array2<f32>, w: &Array2<f32>, b: &Array2<f32>| {
            weighed(oracle::layer_norm(x.view(), Some(w.row(0)), Some(b.row(0)), 1e-5).view(), &dy)
        };
        let (dx, dw, db) = gradient::layer_norm(x.view(), Some(weight.row(0)), 1e-5, dy.view());
        let row = |v: Array1<f32>| v.insert_axis(ndarray::Axis(0));
        check("dx", &x, &dx, |x| forward(x, &weight, &bias));
        check("weight", &weight, &row(dw), |w| forward(&x, w, &bias));
        check("bias", &bias, &row(db), |b| forward(&x, &weight, b));
    }
    let (x, dy) = (numbers(3, 7, 5), numbers(3, 7, 6));
    let (dx, ..) = gradient::layer_norm(x.view(), None, 1e-5, dy.view());
    check("without weight", &x, &dx, |x| weighed(oracle::layer_norm(x.view(), None, None, 1e-5).view(), &dy));
}

#[test]
fn matmul() {
    let (x, w, dy) = (numbers(3, 5, 1), numbers(4, 5, 2), numbers(3, 4, 3));
    let forward = |x: &Array2<f32>, w: &Array2<f32>| {
        weighed(oracle::linear(x.view(), w.view(), None, None).view(), &dy)
    };
    let y = gradient::matmul(x.view(), w.view(), Layout::TimesTransposed);
    assert_eq!(y, oracle::linear(x.view(), w.view(), None, None));
    check("dx", &x, &gradient::matmul(dy.view(), w.view(), Layout::Times), |x| forward(x, &w));
    let dw = gradient::matmul(dy.view(), x.view(), Layout::TransposedTimes);
    check("dw", &w, &dw, |w| forward(&x, w));
    assert_eq!(gradient::sum_rows(dy.view()).dim(), (1, 4));
}

#[test]
fn attention() {
    for (rows, heads, head_dim) in [(1, 1, 2), (5, 2, 3), (9, 3, 4)] {
        let width = heads * head_dim;
        let [q, k, v, dy] = [1, 2, 3, 4].map(|seed| numbers(rows, width, seed));
        let forward = |q: &Array2<f32>, k: &Array2<f32>, v: &Array2<f32>| {
            let (y, _): (_, Array3<f32>) = oracle::attend(q.view(), k.view(), v.view(), heads);
            weighed(y.view(), &dy)
        };
        let [dq, dk, dv] = gradient::attend(q.view(), k.view(), v.view(), heads, dy.view());
        check("dq", &q, &dq, |q| forward(q, &k, &v));
        check("dk", &k, &dk, |k| forward(&q, k, &v));
        check("dv", &v, &dv, |v| forward(&q, &k, v));
    }
}

#[test]
fn activations() {
    // Away from the corners of those that have some.
    let points: Vec<f64> = (-60..60).map(|i| f64::from(i) / 8.0 + 0.0613).chain([-11.3, 12.4]).collect();
    for activation in Activation::all() {
        for &x in &points {
            let h = 1e-4;
            let slope = |h: f64| (activation.apply(x + h) - activation.apply(x - h)) / (2.0 * h);
            let expected = (4.0 * slope(h) - slope(2.0 * h)) / 3.0;
            let found = activation.slope(x);
            assert!(
                (found - expected).abs() < 1e-6,
                "{activation} at {x}: expected {expected}, found {found}"
            );
        }
    }
    // torch's choices where there is no derivative.
    for (activation, x, slope) in
        [(Activation::Relu, 0.0, 0.0), (Activation::Relu6, 6.0, 0.0), (Activation::LeakyRelu, 0.0, 0.01)]
    {
        assert_eq!(activation.slope(x), slope, "{activation} at {x}");
    }
}

#[test]
fn cross_entropy() {
    let logits = numbers(4, 6, 1).mapv(|v| 3.0 * v);
    let targets = [2, 0, 5, 5];
    for epsilon in [0.0, 0.1] {
        let smoothing = Smoothing { scale: 0.25, epsilon };
        let (loss, d) = gradient::cross_entropy(logits.view(), &targets, smoothing);
        // In f64, by the definition.
        let direct = |logits: &Array2<f32>| {
            let each = logits.outer_iter().zip(targets).map(|(row, target)| {
                let total: f64 = row.iter().map(|&v| f64::from(v).exp()).sum::<f64>().ln();
                let nll = |i: usize| total - f64::from(row[i]);
                let mean = (0..6).map(nll).sum::<f64>() / 6.0;
                let e = f64::from(epsilon);
                (1.0 - e) * nll(target as usize) + e * mean
            });
            0.25 * each.sum::<f64>()
        };
        assert!((f64::from(loss) - direct(&logits)).abs() < 1e-6);
        check("logits", &logits, &d, direct);
    }
}

#[test]
fn soft_targets() {
    let [student, teacher] = [1, 2].map(|seed| numbers(3, 7, seed).mapv(|v| 4.0 * v));
    let (loss, d) = gradient::soft_targets(student.view(), teacher.view(), 2.0, 0.5);
    let direct = |student: &Array2<f32>| {
        let mut sum = 0.0;
        for (s, t) in student.outer_iter().zip(teacher.outer_iter()) {
            let total = |row: ndarray::ArrayView1<'_, f32>| {
                row.iter().map(|&v| (f64::from(v) / 2.0).exp()).sum::<f64>().ln()
            };
            let (of_s, of_t) = (total(s), total(t));
            for (&s, &t) in s.iter().zip(t) {
                let (log_s, log_t) = (f64::from(s) / 2.0 - of_s, f64::from(t) / 2.0 - of_t);
                sum += log_t.exp() * (log_t - log_s);
            }
        }
        0.5 * 4.0 * sum
    };
    assert!((f64::from(loss) - direct(&student)).abs() < 1e-6);
    check("student", &student, &d, direct);
}

/// Figures of torch 2.13: `torch.optim.AdamW([p], lr=0.1, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.2)` and
/// `torch.optim.SGD([p], lr=0.1, momentum=0.9, weight_decay=0.2)`, p = [1, -2, 0.5], gradients [0.1, 0.2, -0.3] and
/// [-0.4, 0.1, 0.3].
#[test]
fn optimizers() {
    let gradients = [array![[0.1, 0.2, -0.3]], array![[-0.4, 0.1, 0.3]]];
    let close = |found: &Array2<f32>, expected: [f32; 3]| {
        let off = found.iter().zip(expected).map(|(f, e)| (f - e).abs()).fold(0.0, f32::max);
        assert!(off < 2e-6, "expected {expected:?}, found {found}");
    };
    let mut p = array![[1.0, -2.0, 0.5]];
    let (mut m, mut v) = (Array2::zeros((1, 3)), Array2::zeros((1, 3)));
    for (i, g) in gradients.iter().enumerate() {
        let step = i as u64 + 1;
        let adam = AdamW { lr: 0.1, beta1: 0.9, beta2: 0.99, eps: 1e-6, weight_decay: 0.2, step };
        gradient::adamw(&mut p, g.view(), [&mut m, &mut v], adam, 1.0);
    }
    close(&p, ADAMW);
    let mut p = array![[1.0, -2.0, 0.5]];
    let mut velocity = Array2::zeros((1, 3));
    for g in &gradients {
        let sgd = Sgd { lr: 0.1, momentum: 0.9, weight_decay: 0.2 };
        gradient::sgd(&mut p, g.view(), Some(&mut velocity), sgd, 1.0);
    }
    close(&p, SGD);
    assert_eq!(gradient::clip_factor(4.0, 4.0), 1.0);
    assert!((gradient::clip_factor(16.0, 1.0) - 0.25).abs() < 1e-6);
}

const ADAMW: [f32; 3] = [0.9182398, -2.1121438, 0.5729365];
const SGD: [f32; 3] = [0.9636, -1.9324, 0.4976];

#[test]
fn dropped_elements_are_a_fraction_and_repeat() {
    let dropout = Dropout { p: 0.3, seed: 0x1234_5678_9abc_def0 };
    let x = Array2::from_elem((100, 1000), 2.0);
    let (mut first, mut second) = (x.clone(), x.clone());
    gradient::dropout(&mut first, dropout);
    gradient::dropout(&mut second, dropout);
    assert_eq!(first, second);
    let dropped = first.iter().filter(|v| **v == 0.0).count() as f64 / 1e5;
    assert!((dropped - 0.3).abs() < 0.005, "{dropped}");
    assert!(first.iter().all(|&v| v == 0.0 || (v - 2.0 / 0.7).abs() < 1e-6));
    // Neighbours and other seeds have other masks.
    second.fill(2.0);
    gradient::dropout(&mut second, Dropout { seed: dropout.seed + 1, ..dropout });
    let same = first.iter().zip(&second).filter(|(a, b)| a == b).count() as f64 / 1e5;
    assert!((same - (0.49 + 0.09)).abs() < 0.01, "{same}");
}
