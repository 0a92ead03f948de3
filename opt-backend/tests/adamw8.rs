//! AdamW with moments in eight bits against bitsandbytes (fixtures/make_adamw8.py).

use ndarray::Array2;
use opt_backend::{
    AdamW, Moments8,
    moments::{BLOCK, PACKED, SIGNED, UNSIGNED},
    oracle::gradient,
};
use serde::Deserialize;

#[derive(Deserialize)]
struct Fixture {
    shape: [usize; 2],
    settings: Settings,
    signed: Vec<f32>,
    unsigned: Vec<f32>,
    after: Vec<After>,
}

#[derive(Deserialize)]
struct Settings {
    lr: f32,
    beta1: f32,
    beta2: f32,
    eps: f32,
    weight_decay: f32,
}

#[derive(Deserialize)]
struct After {
    step: u64,
    first: Vec<u8>,
    second: Vec<u8>,
    first_scales: Vec<f32>,
    second_scales: Vec<f32>,
    param: Vec<f32>,
}

fn fixture() -> Fixture {
    serde_json::from_str(include_str!("fixtures/adamw8.json")).unwrap()
}

/// As the script's `numbers`.
fn numbers(shape: [usize; 2], seed: u64) -> Array2<f32> {
    let mut index = 0_u32;
    Array2::from_shape_simple_fn(shape, || {
        let bits = index.wrapping_mul(2_654_435_761).wrapping_add((seed * 40503) as u32);
        let bits = (bits ^ (bits >> 15)).wrapping_mul(2_246_822_519);
        index += 1;
        ((bits >> 16) as f32 - 32768.0) / 32768.0
    })
}

fn new_gradient(shape: [usize; 2], step: u64) -> Array2<f32> {
    let mut g = numbers(shape, step);
    for (i, g) in g.iter_mut().enumerate() {
        *g *= [1.0, 2.0_f32.powi(-5), 2.0_f32.powi(-12)][i % 3];
        if (512..768).contains(&i) {
            *g = 0.0;
        }
    }
    g
}

/// The codes of `count` elements.
fn codes(packed: &Array2<f32>, count: usize) -> Vec<u8> {
    let digits = packed.outer_iter().flat_map(|row| {
        let digits: Vec<u8> =
            row.iter().flat_map(|&v| (v as u32).to_le_bytes().into_iter().take(3)).collect();
        digits.into_iter().take(BLOCK)
    });
    digits.take(count).collect()
}

fn close(what: &str, found: &[f32], expected: &[f32]) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        assert!(
            (found - expected).abs() <= 2e-6 * expected.abs().max(1e-3),
            "{what}, element {i}: expected {expected}, found {found}"
        );
    }
}

#[test]
fn the_maps_are_those_of_bitsandbytes() {
    let Fixture { signed, unsigned, .. } = fixture();
    assert_eq!(SIGNED.levels[..], signed);
    assert_eq!(UNSIGNED.levels[..], unsigned);
}

#[test]
fn twenty_steps_are_those_of_bitsandbytes() {
    let Fixture { shape, settings, after, .. } = fixture();
    let Settings { lr, beta1, beta2, eps, weight_decay } = settings;
    let count = shape[0] * shape[1];
    let mut param = numbers(shape, 0);
    let Ok(mut moments) = Moments8::shapes(shape).try_map(|shape| Ok::<_, ()>(Array2::zeros(shape))) else {
        unreachable!("zeros cannot fail")
    };
    assert_eq!(moments.first.dim(), (4, PACKED));
    let mut compared = 0;
    for step in 1..=20 {
        let adam = AdamW { lr, beta1, beta2, eps, weight_decay, step };
        gradient::adamw8(&mut param, new_gradient(shape, step).view(), &mut moments, adam, 1.0);
        let Some(after) = after.iter().find(|after| after.step == step) else { continue };
        compared += 1;
        close("parameters", param.as_slice().unwrap(), &after.param);
        for (which, expected) in [&after.first_scales, &after.second_scales].into_iter().enumerate() {
            // It has 1 where all of a block is zero.
            let scale = |v: &f32| if *v == 0.0 { 1.0 } else { *v };
            let found: Vec<f32> = moments.scales.column(which).iter().map(scale).collect();
            close("scales", &found, expected);
        }
        assert_eq!(codes(&moments.first, count), after.first, "first moment after step {step}");
        assert_eq!(codes(&moments.second, count), after.second, "second moment after step {step}");
    }
    assert_eq!(compared, 3);
}
