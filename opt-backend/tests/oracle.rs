//! The oracle against torch in float64 (fixtures/make.py).

use ndarray::{Array1, Array2};
use opt_backend::{Activation, oracle};
use serde::Deserialize;
use std::collections::BTreeMap;

#[derive(Deserialize)]
struct Fixtures {
    layer_norm: Vec<LayerNorm>,
    linear: Vec<Linear>,
    activations: Activations,
    attention: Vec<Attention>,
    head: Vec<Head>,
}

type Rows = Vec<Vec<f64>>;

#[derive(Deserialize)]
struct LayerNorm {
    x: Rows,
    weight: Option<Vec<f64>>,
    bias: Option<Vec<f64>>,
    eps: f32,
    y: Rows,
}

#[derive(Deserialize)]
struct Linear {
    x: Rows,
    weight: Rows,
    bias: Option<Vec<f64>>,
    y: Rows,
}

#[derive(Deserialize)]
struct Activations {
    x: Vec<f64>,
    y: BTreeMap<String, Vec<f64>>,
}

#[derive(Deserialize)]
struct Attention {
    heads: usize,
    q: Rows,
    k: Rows,
    v: Rows,
    y: Rows,
    /// Heads and rows in one dimension.
    weights: Rows,
}

#[derive(Deserialize)]
struct Head {
    x: Rows,
    log_softmax: Rows,
    log_sum_exp: Vec<f64>,
    ids: Vec<Vec<u32>>,
    values: Rows,
}

fn fixtures() -> Fixtures {
    serde_json::from_str(include_str!("fixtures/oracle.json")).expect("fixtures/oracle.json")
}

fn matrix(rows: &Rows) -> Array2<f32> {
    Array2::from_shape_fn((rows.len(), rows[0].len()), |(i, j)| rows[i][j] as f32)
}

fn vector(values: &Option<Vec<f64>>) -> Option<Array1<f32>> {
    values.as_ref().map(|values| values.iter().map(|v| *v as f32).collect())
}

/// The oracle computes in f64 and rounds once: half a unit in the last of 24 bits, and a little for f64's own.
fn close<'a>(what: &str, found: impl IntoIterator<Item = &'a f32>, expected: &Rows) {
    let found: Vec<f32> = found.into_iter().copied().collect();
    let expected: Vec<f64> = expected.iter().flatten().copied().collect();
    assert_eq!(found.len(), expected.len(), "{what}");
    for (f, e) in found.iter().zip(&expected) {
        assert!((f64::from(*f) - e).abs() <= 6e-8 * e.abs() + 1e-12, "{what}: found {f:e}, expected {e:e}");
    }
}

#[test]
fn layer_norm_is_torchs() {
    for LayerNorm { x, weight, bias, eps, y } in fixtures().layer_norm {
        let (weight, bias) = (vector(&weight), vector(&bias));
        let [weight, bias] = [&weight, &bias].map(|v| v.as_ref().map(|v| v.view()));
        let found = oracle::layer_norm(matrix(&x).view(), weight, bias, eps);
        let found: Vec<f32> = found.into_iter().collect();
        // eps is an f32 here and an f64 there: 1e-5 rounds by 3e-8 of itself.
        let y: Vec<f64> = y.into_iter().flatten().collect();
        assert_eq!(found.len(), y.len());
        for (f, e) in found.iter().zip(y) {
            assert!((f64::from(*f) - e).abs() <= 7e-8 * e.abs() + 1e-11, "found {f:e}, expected {e:e}");
        }
    }
}

#[test]
fn linear_is_torchs() {
    for Linear { x, weight, bias, y } in fixtures().linear {
        let bias = vector(&bias);
        let bias = bias.as_ref().map(|bias| bias.view());
        let found = oracle::linear(matrix(&x).view(), matrix(&weight).view(), bias, None);
        close("linear", &found, &y);
    }
}

#[test]
fn activations_are_those_of_transformers() {
    let Activations { x, y } = fixtures().activations;
    let mut seen = Vec::new();
    for (name, y) in y {
        let activation: Activation = name.parse().unwrap_or_else(|error| panic!("{error}"));
        for (&x, e) in x.iter().zip(y) {
            let f = activation.apply(x);
            // gelu_fast has √(2/π) to ten digits.
            assert!((f - e).abs() <= 1e-10 * e.abs().max(1.0), "{name}({x}): found {f:e}, expected {e:e}");
        }
        seen.push(activation);
    }
    assert!(Activation::all().all(|activation| seen.contains(&activation)), "checked only {seen:?}");
}

#[test]
fn attention_is_torchs() {
    for Attention { heads, q, k, v, y, weights } in fixtures().attention {
        let (found, found_weights) =
            oracle::attend(matrix(&q).view(), matrix(&k).view(), matrix(&v).view(), heads);
        assert_eq!(found_weights.dim(), (heads, q.len(), k.len()));
        close("output", &found, &y);
        close("weights", &found_weights, &weights);
    }
}

#[test]
fn log_probabilities_and_top_k_are_torchs() {
    for Head { x, log_softmax, log_sum_exp, ids, values } in fixtures().head {
        let x = matrix(&x);
        for (i, row) in x.outer_iter().enumerate() {
            let found: Vec<f32> =
                (0..row.len()).map(|target| oracle::target_score(row, target as u32).log_prob).collect();
            close("log_softmax", &found, &vec![log_softmax[i].clone()]);
            assert!((oracle::log_sum_exp(row) - log_sum_exp[i]).abs() < 1e-11);
            let top = oracle::top_k(row, 5);
            assert_eq!(top.ids, ids[i]);
            close("top_k", &top.logits, &vec![values[i].clone()]);
            close("log_sum_exp", [&top.log_sum_exp], &vec![vec![log_sum_exp[i]]]);
            let greedy: Vec<u32> =
                (0..row.len() as u32).filter(|&target| oracle::target_score(row, target).greedy).collect();
            assert_eq!(greedy, ids[i][..1]);
        }
    }
}

/// What torch leaves open: equal values, zeros of both signs, NaN, empty rows.
#[test]
fn ties_go_to_the_lower_id_and_nan_comes_last() {
    let row = ndarray::array![-0.0f32, f32::NAN, 3.0, 0.0, 3.0, f32::NEG_INFINITY];
    assert_eq!(oracle::top_k(row.view(), 9).ids, [2, 4, 0, 3, 5, 1]);
    assert_eq!(oracle::argmax(row.view()), Some(2));
    let empty = Array1::<f32>::zeros(0);
    assert!(oracle::top_k(empty.view(), 3).ids.is_empty());
    assert_eq!(oracle::argmax(empty.view()), None);
    assert_eq!(oracle::log_sum_exp(empty.view()), f64::NEG_INFINITY);
    // All suppressed, and one certain.
    assert_eq!(
        oracle::log_sum_exp(ndarray::array![f32::NEG_INFINITY, f32::NEG_INFINITY].view()),
        f64::NEG_INFINITY
    );
    assert_eq!(oracle::target_score(ndarray::array![0.0, f32::NEG_INFINITY].view(), 0).log_prob, 0.0);
}

/// A row that sees nothing (more queries than positions) gives zeros, not NaN.
#[test]
fn a_fully_masked_row_is_zero() {
    let [q, k] = [Array2::<f32>::ones((3, 4)), Array2::ones((1, 4))];
    let (out, weights) = oracle::attend(q.view(), k.view(), k.view(), 2);
    assert_eq!(out, ndarray::array![[0.0; 4], [0.0; 4], [1.0; 4]]);
    assert_eq!(weights.sum(), 2.0);
}
