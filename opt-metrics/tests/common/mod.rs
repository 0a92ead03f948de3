//! Fixtures of the Python packages.

#![allow(dead_code)]

use serde_json::Value;
use std::path::Path;

pub(crate) fn read(name: &str) -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name);
    serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap()
}

/// Hypotheses and their references.
pub(crate) fn pairs() -> (Vec<String>, Vec<Vec<String>>) {
    let pairs: Vec<(String, Vec<String>)> = serde_json::from_value(read("pairs.json")).unwrap();
    pairs.into_iter().unzip()
}

pub(crate) fn of<T: serde::de::DeserializeOwned>(value: &Value) -> T {
    serde_json::from_value(value.clone()).unwrap()
}

pub(crate) fn rows(value: &Value) -> &[Value] {
    value.as_array().unwrap()
}

/// 10⁻⁹, of values beyond 1 in size relatively.
#[track_caller]
pub(crate) fn close(found: f64, expected: f64, what: &str) {
    let tolerance = 1e-9 * expected.abs().max(1.0);
    assert!((found - expected).abs() <= tolerance, "{what}: {found} found, {expected} expected");
}
