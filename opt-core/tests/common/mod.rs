//! What the integration tests share: where fixtures lie, how they are read, and the one tolerance.
#![allow(dead_code)] // each test program uses a part of it

use ndarray::{Array2, ArrayD, ArrayView2, Ix2, IxDyn};
use opt_core::{Load, Opt, checkpoint::Checkpoint, generation::GenerationConfig};
use safetensors::SafeTensors;
use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

pub use opt_core::ndarray;

pub fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

pub fn novels() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/opt-novels")
}

/// Data beyond the repository: `OPT_TEST_DATA`, else shared/data beside it. Says so where there is none.
pub fn test_data(part: &str) -> Option<PathBuf> {
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/data");
    let root = std::env::var_os("OPT_TEST_DATA").map_or(beside, PathBuf::from);
    let path = root.join(part);
    if path.exists() {
        return Some(path);
    }
    eprintln!("skipped: no {part} in the test data ({}); set OPT_TEST_DATA", root.display());
    None
}

pub fn json(path: &Path) -> serde_json::Value {
    let text = std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

pub fn ids(value: &serde_json::Value) -> Vec<u32> {
    value.as_array().expect("a list of ids").iter().map(|id| id.as_u64().expect("an id") as u32).collect()
}

/// The f32 arrays of a safetensors file.
pub fn arrays(path: &Path) -> HashMap<String, ArrayD<f32>> {
    let bytes = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let file = SafeTensors::deserialize(&bytes).expect("safetensors");
    let array = |view: safetensors::tensor::TensorView<'_>| {
        let data = view.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        ArrayD::from_shape_vec(IxDyn(view.shape()), data).expect("shape")
    };
    file.tensors().into_iter().map(|(name, view)| (name, array(view))).collect()
}

pub fn matrix(array: &ArrayD<f32>) -> Array2<f32> {
    array.clone().into_dimensionality::<Ix2>().expect("two dimensions")
}

/// The bounds for f32: |difference| at most 2e-5 max(1, max |value|), NMSE at most 1e-10.
pub fn assert_close(found: ArrayView2<'_, f32>, expected: ArrayView2<'_, f32>, what: &str) {
    assert_eq!(found.dim(), expected.dim(), "{what}: shape");
    let max = expected.iter().fold(1f32, |max, v| max.max(v.abs()));
    let (mut worst, mut error, mut power) = (0f32, 0f64, 0f64);
    for (f, e) in found.iter().zip(expected) {
        assert!(f.is_finite(), "{what}: found {f}");
        worst = worst.max((f - e).abs());
        error += f64::from(f - e).powi(2);
        power += f64::from(*e).powi(2);
    }
    let nmse = if power > 0.0 { error / power } else { error };
    assert!(worst <= 2e-5 * max, "{what}: largest difference {worst:e}, allowed {:e}", 2e-5 * max);
    assert!(nmse <= 1e-10, "{what}: NMSE {nmse:e}, allowed 1e-10");
}

/// The model of a fixture folder; activation variants name another folder's weights.
pub fn fixture_model(name: &str, load: Load<'_>) -> Opt {
    let dir = fixtures().join("models").join(name);
    let expected = json(&dir.join("expected.json"));
    let config = std::fs::read_to_string(dir.join("config.json")).expect("config.json");
    let weights = std::fs::read(dir.join(expected["weights"].as_str().expect("weights"))).expect("weights");
    let checkpoint = Checkpoint::from_bytes(&config, vec![weights]).expect("checkpoint");
    let generation = std::fs::read_to_string(dir.join("generation_config.json")).ok();
    let generation = generation.map(|text| GenerationConfig::from_json(&text).expect("generation_config.json"));
    Opt::assemble(&checkpoint, None, generation, load).unwrap_or_else(|e| panic!("{name}: {e}"))
}

pub fn fixture_names() -> Vec<String> {
    let folder = fixtures().join("models");
    let mut names: Vec<String> = std::fs::read_dir(&folder)
        .expect("models")
        .map(|entry| entry.expect("entry").file_name().into_string().expect("name"))
        .filter(|name| folder.join(name).join("expected.json").exists())
        .collect();
    names.sort();
    assert!(names.len() > 30, "expected the model fixtures, found {names:?}");
    names
}
