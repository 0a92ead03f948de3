//! Packed tensors that lie, and configurations that nothing here reads.

use crate::{FIXTURES, files::Parts, fixture, weights};
use opt_core::{
    Error, ErrorKind,
    checkpoint::{Checkpoint, Weight},
};
use proptest::prelude::*;
use safetensors::Dtype;
use serde_json::json;
use std::fs;

fn one_line(error: &Error) -> String {
    let text = error.to_string();
    assert!(text.len() < 900 && !text.chars().any(char::is_control), "{text:?}");
    text
}

/// What reading every weight of the model says first.
fn reading(checkpoint: &Checkpoint) -> Option<Error> {
    let matrices = checkpoint.config().tensor_shapes().into_iter().filter(|(_, shape)| shape.len() == 2);
    matrices.filter_map(|(name, shape)| checkpoint.weight(&name, [shape[0], shape[1]]).err()).next()
}

#[test]
fn configurations_that_are_not_read() {
    for (fixture_name, key, value, message) in [
        (
            "gptq_4bit",
            "quant_method",
            json!("hqq"),
            r#"quant_method: expected "gptq", "bitsandbytes", "awq" or "opt-rs", found "hqq""#,
        ),
        ("gptq_4bit", "quant_method", json!(null), "quant_method: expected"),
        ("gptq_4bit", "quant_method", json!(7), "quant_method: expected"),
        ("gptq_4bit", "bits", json!(5), "bits: expected 2, 3, 4, 8, found 5"),
        ("gptq_4bit", "bits", json!("4"), "bits: expected 2, 3, 4, 8"),
        ("gptq_4bit", "group_size", json!(0), "group_size: expected -1 or at least 1, found 0"),
        ("gptq_4bit", "group_size", json!(-2), "group_size"),
        ("gptq_4bit", "group_size", json!(1_u64 << 60), "group_size"),
        (
            "gptq_4bit",
            "checkpoint_format",
            json!("marlin"),
            r#"checkpoint_format: expected "gptq" or "gptq_v2", found "marlin""#,
        ),
        ("gptq_4bit", "is_marlin_format", json!(true), "is_marlin_format: expected false"),
        ("awq", "version", json!("gemv"), r#"version: expected "gemm", found "gemv""#),
        ("awq", "bits", json!(3), "bits: expected 4, found 3"),
        ("bnb_nf4", "load_in_8bit", json!(true), "expected one of load_in_8bit and load_in_4bit"),
        ("bnb_int8", "llm_int8_threshold", json!(-1), "llm_int8_threshold: expected 0 or above, found -1"),
        ("bnb_int8", "llm_int8_threshold", json!("\u{1b}[0m"), "llm_int8_threshold"),
    ] {
        let mut parts = Parts::read(&fixture(fixture_name));
        parts.config["quantization_config"][key] = value;
        let error = parts.open().unwrap_err();
        let text = one_line(&error);
        assert!(text.contains("config.json: quantization_config: ") && text.contains(message), "{text}");
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{text}");
    }
    let mut parts = Parts::read(&fixture("awq"));
    parts.config["quantization_config"] = json!([1]);
    assert!(one_line(&parts.open().unwrap_err()).contains("expected an object, found an array"));
}

#[test]
fn native_configurations_that_are_not_read() {
    let mut parts = Parts::read(&fixture("awq"));
    for (value, message) in [
        (json!({"version": 2, "weights": {}}), "version: expected 1, found 2"),
        (json!({"version": 1}), "weights"),
        (
            json!({"version": 1, "weights": {"a": {"bits": 5, "levels": "integers"}}}),
            r#""a": expected bits 2, 3, 4 or 8, found 5"#,
        ),
        (json!({"version": 1, "weights": {"a": {"bits": 4, "levels": "nf5"}}}), r#"found "nf5""#),
        (json!({"version": 1, "weights": {"a": {"bits": 8, "levels": "nf4"}}}), "16 finite levels of 4 bits"),
        (json!({"version": 1, "weights": {"a": {"bits": 4, "levels": [1, 2]}}}), "weights"),
        (
            json!({"version": 1, "weights": {"a": {"bits": 4, "levels": "nf4", "group_size": 0}}}),
            "group_size",
        ),
        (json!({"version": 1, "weights": {"a": {"bits": 4, "levels": "nf4", "more": 0}}}), "unknown field"),
        (
            json!({"version": 1, "weights": {"a": {"bits": 8, "levels": "integers", "outlier_threshold": -1e39}}}),
            "outlier_threshold: expected a positive number, found -inf",
        ),
    ] {
        parts.config["quantization_config"] = value;
        parts.config["quantization_config"]["quant_method"] = json!("opt-rs");
        let text = one_line(&parts.open().unwrap_err());
        assert!(text.contains(message), "{text}");
    }
}

/// A change to a checkpoint's tensors and what is said of it.
type Case = (&'static str, &'static str, fn(&mut Parts), &'static str);

const FC1: &str = "model.decoder.layers.1.fc1";

fn edit(parts: &mut Parts, suffix: &str, change: impl FnOnce(&mut (Dtype, Vec<usize>, Vec<u8>))) {
    change(parts.tensors.get_mut(&format!("{FC1}.{suffix}")).unwrap());
}

/// Cuts a tensor to a shape that is smaller.
fn cut(parts: &mut Parts, suffix: &str, shape: &[usize]) {
    edit(parts, suffix, |(_, found, bytes)| {
        let (old, new): (usize, usize) = (found.iter().product(), shape.iter().product());
        bytes.truncate(bytes.len() / old * new);
        *found = shape.to_vec();
    });
}

fn state(parts: &mut Parts, kind: &str, text: &str) {
    edit(parts, &format!("weight.quant_state.bitsandbytes__{kind}"), |tensor| {
        *tensor = (Dtype::U8, vec![text.len()], text.as_bytes().to_vec());
    });
}

#[test]
fn shapes_that_do_not_fit_are_faults() {
    let cases: [Case; 15] = [
        (
            "gptq_3bit_act_order",
            "g_idx",
            |p| drop(p.tensors.remove(&format!("{FC1}.g_idx"))),
            "layers.1.fc1.g_idx [64] is missing",
        ),
        ("gptq_4bit", "qweight", |p| cut(p, "qweight", &[8, 95]), "expected shape [8, 96], found [8, 95]"),
        ("gptq_4bit", "qzeros", |p| cut(p, "qzeros", &[1, 12]), "expected shape [2, 12], found [1, 12]"),
        ("gptq_4bit", "g_idx", |p| cut(p, "g_idx", &[63]), "expected shape [64], found [63]"),
        ("gptq_4bit", "qweight", |p| edit(p, "qweight", |t| t.0 = Dtype::U32), "expected I32, found U32"),
        (
            "gptq_4bit",
            "scales",
            |p| drop(p.tensors.remove(&format!("{FC1}.scales"))),
            "layers.1.fc1.scales [2, 96] is missing",
        ),
        (
            "gptq_4bit",
            "qweight",
            |p| p.config["quantization_config"]["bits"] = json!(8),
            "expected shape [16, 64], found [8, 64]",
        ),
        ("awq", "scales", |p| cut(p, "scales", &[2, 88]), "expected shape [2, 96], found [2, 88]"),
        ("bnb_int8", "SCB", |p| cut(p, "SCB", &[95]), "expected shape [96], found [95]"),
        ("bnb_int8", "weight", |p| edit(p, "weight", |t| t.0 = Dtype::U8), "expected I8, found U8"),
        ("bnb_nf4_nested", "weight", |p| cut(p, "weight", &[3071, 1]), "expected 3072 bytes, found 3071"),
        (
            "bnb_nf4_nested",
            "weight.absmax",
            |p| cut(p, "weight.absmax", &[95]),
            "expected shape [96], found [95]",
        ),
        (
            "bnb_nf4_nested",
            "weight.nested_quant_map",
            |p| cut(p, "weight.nested_quant_map", &[255]),
            "expected shape [256], found [255]",
        ),
        (
            "bnb_fp4",
            "weight.quant_map",
            |p| cut(p, "weight.quant_map", &[15]),
            "expected shape [16], found [15]",
        ),
        (
            "bnb_fp4",
            "weight.absmax",
            |p| edit(p, "weight.absmax", |t| t.0 = Dtype::I32),
            "expected F32, found I32",
        ),
    ];
    for (name, suffix, change, message) in cases {
        let mut parts = Parts::read(&fixture(name));
        change(&mut parts);
        let checkpoint = parts.open().unwrap();
        let error = checkpoint.validate().unwrap_err();
        let text = one_line(&error);
        assert!(text.contains(suffix) && text.contains(message), "{name}: {text}");
        assert_eq!(error.kind(), ErrorKind::Checkpoint);
        let error = reading(&checkpoint).unwrap();
        assert!(one_line(&error).contains(message) || message.contains("bits"), "{name}: {error}");
    }
}

#[test]
fn contents_that_cannot_be_meant() {
    let cases: [Case; 13] = [
        (
            "gptq_4bit",
            "g_idx",
            |p| edit(p, "g_idx", |t| t.2[8] = 2),
            "expected groups from 0 to 1, found 2 at 2",
        ),
        ("gptq_4bit", "g_idx", |p| edit(p, "g_idx", |t| t.2[7] = 0x80), "at 1"),
        (
            "gptq_4bit",
            "scales",
            |p| edit(p, "scales", |t| t.2[5] = 0x7e),
            "expected finite numbers, found NaN at 2",
        ),
        ("awq", "scales", |p| edit(p, "scales", |t| t.2[..2].copy_from_slice(&[0, 0x7c])), "found inf at 0"),
        (
            "bnb_int8",
            "SCB",
            |p| edit(p, "SCB", |t| t.2[..4].copy_from_slice(&f32::NAN.to_le_bytes())),
            "found NaN at 0",
        ),
        (
            "bnb_int8",
            "weight_format",
            |p| edit(p, "weight_format", |t| t.2[0] = 2),
            "expected 0 (row after row)",
        ),
        (
            "bnb_fp4",
            "quant_map",
            |p| edit(p, "weight.quant_map", |t| t.2[..4].copy_from_slice(&f32::NAN.to_le_bytes())),
            "found NaN at 0",
        ),
        ("bnb_fp4", "quant_state", |p| state(p, "fp4", "{"), "EOF"),
        ("bnb_fp4", "quant_state", |p| state(p, "fp4", "\u{1b}[31m"), "quant_state"),
        (
            "bnb_fp4",
            "quant_state",
            |p| state(p, "fp4", r#"{"quant_type":"nf4","blocksize":64,"shape":[96,64]}"#),
            r#"quant_type: expected "fp4", found "nf4""#,
        ),
        (
            "bnb_fp4",
            "quant_state",
            |p| state(p, "fp4", r#"{"quant_type":"fp4","blocksize":0,"shape":[96,64]}"#),
            "blocksize: expected 1 to 16777216, found 0",
        ),
        (
            "bnb_fp4",
            "quant_state",
            |p| state(p, "fp4", r#"{"quant_type":"fp4","blocksize":64,"shape":[64,96]}"#),
            "shape: expected [96, 64], found [64, 96]",
        ),
        (
            "bnb_fp4",
            "quant_state",
            |p| {
                state(p, "fp4", r#"{"quant_type":"fp4","blocksize":64,"shape":[96,64],"nested_blocksize":0}"#)
            },
            "blocksize",
        ),
    ];
    for (name, suffix, change, message) in cases {
        let mut parts = Parts::read(&fixture(name));
        change(&mut parts);
        let checkpoint = parts.open().unwrap();
        let text = one_line(&reading(&checkpoint).unwrap_or_else(|| panic!("{name}: {message}")));
        assert!(text.contains(suffix) && text.contains(message), "{name}: {text}");
    }
}

#[test]
fn a_model_of_another_shape_is_named() {
    let mut parts = Parts::read(&fixture("gptq_4bit"));
    parts.config["ffn_dim"] = json!(128);
    let text = one_line(&parts.open().unwrap().validate().unwrap_err());
    assert!(
        text.contains("fc1.qweight") && text.contains("expected shape [8, 128], found [8, 96]"),
        "{text}"
    );
    // Widths that the layout does not have.
    parts.config["ffn_dim"] = json!(100);
    let text = one_line(&parts.open().unwrap().validate().unwrap_err());
    assert!(text.contains("layers.0.fc1.weight: GPTQ's layout has multiples of 32"), "{text}");
}

#[test]
fn without_its_configuration_a_packed_file_is_refused() {
    let mut parts = Parts::read(&fixture("gptq_4bit"));
    parts.config.as_object_mut().unwrap().remove("quantization_config");
    let text = one_line(&parts.open().unwrap().validate().unwrap_err());
    assert!(text.contains("fc1.weight [96, 64] is missing"), "{text}");
}

#[test]
fn tensors_that_do_not_belong_are_warned_of() {
    let mut parts = Parts::read(&fixture("gptq_4bit"));
    let spare = parts.tensors[&format!("{FC1}.g_idx")].clone();
    parts.tensors.insert("model.decoder.layers.9.fc1.g_idx".to_owned(), spare);
    let warnings = parts.open().unwrap().validate().unwrap();
    assert_eq!(warnings.len(), 1);
    assert!(warnings[0].to_string().contains("layers.9.fc1.g_idx"), "{}", warnings[0]);
}

/// A checkpoint whose files are `change`d is answered, whatever the answer.
fn answered(name: &str, config: &str, file: Vec<u8>) {
    let Ok(checkpoint) = Checkpoint::from_bytes(config, vec![file]) else { return };
    let _ = (checkpoint.validate(), checkpoint.weight_bytes(opt_core::DType::F32));
    for (tensor, shape) in checkpoint.config().tensor_shapes() {
        let &[out, input] = &shape[..] else { continue };
        if let Ok(Weight::Quantized(weight)) = checkpoint.weight(&tensor, [out, input]) {
            assert_eq!(weight.shape(), [out, input], "{name}: {tensor}");
            assert!(weight.scales().iter().all(|scale| scale.is_finite()));
        }
    }
}

#[test]
fn files_that_end_early_are_answered() {
    for name in FIXTURES {
        let file = if name.contains("pickle") { "pytorch_model.bin" } else { "model.safetensors" };
        let bytes = fs::read(fixture(name).join(file)).unwrap();
        let config = fs::read_to_string(fixture(name).join("config.json")).unwrap();
        for length in (0..bytes.len()).step_by(bytes.len() / 16) {
            answered(name, &config, bytes[..length].to_vec());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn garbled_files_are_answered(
        name in prop::sample::select(FIXTURES.to_vec()),
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..40),
        in_header in any::<bool>(),
    ) {
        prop_assume!(!name.contains("pickle"));
        let mut bytes = fs::read(fixture(name).join("model.safetensors")).unwrap();
        let config = fs::read_to_string(fixture(name).join("config.json")).unwrap();
        let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        for (at, byte) in edits {
            let at = if in_header { at.index(header) } else { header + at.index(bytes.len() - header) };
            // In the header digits and letters, so that it stays JSON now and then.
            bytes[at] = if in_header { b"0123456789abcdefIFU"[usize::from(byte) % 19] } else { byte };
        }
        answered(name, &config, bytes);
    }

    #[test]
    fn garbled_quantization_states_are_answered(
        text in r#"\{"quant_type": ?"(nf4|fp4|x)", ?"blocksize": ?(-?[0-9]{1,20}|64|1e9), ?"shape": ?\[(96, 64|[0-9]{1,19}, [0-9]{1,3})\](, "nested_blocksize": ?([0-9]{1,20}|256))?(, "nested_offset": ?(1e39|0.5|null))?\}?"#,
        name in prop::sample::select(vec!["bnb_nf4", "bnb_nf4_nested"]),
    ) {
        let mut parts = Parts::read(&fixture(name));
        state(&mut parts, "nf4", &text);
        answered(name, &parts.config.to_string(), parts.bytes());
    }
}

#[test]
fn garbled_configurations_are_answered() {
    let parts = Parts::read(&fixture("gptq_4bit"));
    let bytes = parts.bytes();
    for value in [json!(1_u64 << 40), json!(-1), json!(7), json!(1), json!(33)] {
        for key in ["group_size", "bits"] {
            let mut config = parts.config.clone();
            config["quantization_config"][key] = value.clone();
            answered("gptq_4bit", &config.to_string(), bytes.clone());
        }
    }
    assert_eq!(weights(&parts.open().unwrap()).len(), 12);
}
