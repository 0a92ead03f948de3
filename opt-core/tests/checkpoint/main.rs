//! Checkpoint files: what other libraries wrote is read as they meant it, what is damaged is refused by one line.

mod bad;
mod convert;
mod reading;

use opt_core::checkpoint::{Checkpoint, Tensor};
use std::path::PathBuf;

/// A fixture of `fixtures/checkpoint`, which `make.py` there makes.
fn fixture(name: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "tests", "fixtures", "checkpoint", name].iter().collect()
}

/// The numbers of a tensor, as f32.
fn numbers(tensor: &Tensor<'_>) -> Vec<f32> {
    match tensor.shape().len() {
        1 => tensor.vector().unwrap().to_f32().to_vec(),
        _ => tensor.matrix().unwrap().to_f32().into_raw_vec_and_offset().0,
    }
}

/// Name, shape and numbers of every tensor, as torch has them.
fn expected() -> Vec<(String, Vec<usize>, Vec<f32>)> {
    let text = std::fs::read_to_string(fixture("expected.json")).unwrap();
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    let tensors = json.as_object().unwrap().iter().map(|(name, tensor)| {
        let shape =
            tensor["shape"].as_array().unwrap().iter().map(|n| n.as_u64().unwrap() as usize).collect();
        (name.clone(), shape, base64(tensor["f32"].as_str().unwrap()))
    });
    tensors.collect()
}

fn base64(text: &str) -> Vec<f32> {
    let alphabet = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let digit = |c: &u8| alphabet.iter().position(|a| a == c).map(|d| d as u32);
    let mut bytes = Vec::new();
    for four in text.as_bytes().chunks(4) {
        let digits: Vec<u32> = four.iter().filter_map(digit).collect();
        let word = digits.iter().fold(0, |word, digit| word << 6 | digit) << (6 * (4 - digits.len()));
        bytes.extend_from_slice(&word.to_be_bytes()[1..digits.len()]);
    }
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

/// Fails unless the checkpoint holds exactly the fixtures' model, each number passed through `rounded`.
fn assert_is_the_model(checkpoint: &Checkpoint, rounded: impl Fn(f32) -> f32) {
    assert_eq!(checkpoint.validate().unwrap(), []);
    let expected = expected();
    assert_eq!(checkpoint.config().tensor_shapes().len(), expected.len());
    for (name, shape, values) in expected {
        let tensor = checkpoint.tensor(&name, &shape).unwrap();
        let values: Vec<f32> = values.into_iter().map(&rounded).collect();
        assert_eq!(numbers(&tensor), values, "{name}");
    }
}
