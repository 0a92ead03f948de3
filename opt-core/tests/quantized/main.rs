//! Quantized checkpoints: what the packers of other libraries wrote is read as they meant it, what is written is what
//! they would have, what does not fit is refused by one line.

mod bad;
mod files;
mod reading;
mod writing;

#[path = "../common/mod.rs"]
mod common;

use ndarray::Array2;
use opt_backend::quant::Quantized;
use opt_core::checkpoint::{Checkpoint, Weight};
use std::{collections::BTreeMap, path::PathBuf};

/// The fixtures of `fixtures/quantized`, which `make_quantized.py` makes.
const FIXTURES: [&str; 9] = [
    "gptq_4bit",
    "gptq_3bit_act_order",
    "gptq_v2_2bit",
    "gptq_8bit_pickle",
    "awq",
    "bnb_int8",
    "bnb_nf4_nested",
    "bnb_nf4",
    "bnb_fp4",
];

fn fixture(name: &str) -> PathBuf {
    common::fixtures().join("quantized").join(name)
}

/// The packed weights of a checkpoint, by name.
fn weights(checkpoint: &Checkpoint) -> BTreeMap<String, Quantized> {
    let matrices = checkpoint.config().tensor_shapes().into_iter().filter(|(_, shape)| shape.len() == 2);
    let packed = matrices.filter_map(|(name, shape)| {
        let Weight::Quantized(weight) = checkpoint.weight(&name, [shape[0], shape[1]]).unwrap() else {
            return None;
        };
        Some((name, weight))
    });
    packed.collect()
}

/// The same numbers, bit for bit.
fn same_bits(a: &Array2<f32>, b: &Array2<f32>) -> bool {
    a.dim() == b.dim() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
}
