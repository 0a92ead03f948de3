use crate::{
    FIXTURES,
    common::{
        Arrays, assert_close,
        backend::{self, assert_within},
    },
    fixture, weights,
};
use opt_backend::{
    conformance::Tolerance,
    quant::{Groups, Levels, Zeros},
};
use opt_core::{
    DType, Load, Opt,
    checkpoint::{Checkpoint, ConvertOptions, convert, inspect},
};
use serde_json::Value;
use std::{collections::BTreeMap, fs};

fn expected(name: &str) -> Value {
    serde_json::from_str(&fs::read_to_string(fixture(name).join("expected.json")).unwrap()).unwrap()
}

#[test]
fn weights_are_bit_equal_to_the_packer_s() {
    for name in FIXTURES {
        let checkpoint = Checkpoint::open(fixture(name)).unwrap();
        assert_eq!(checkpoint.validate().unwrap(), [], "{name}");
        let expected: BTreeMap<String, Value> =
            expected(name)["weights"].as_object().unwrap().clone().into_iter().collect();
        let found = weights(&checkpoint);
        assert_eq!(found.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>(), "{name}");
        for (weight, expected) in found.values().zip(expected.values()) {
            let numbers = weight.dequantize();
            let first: Vec<f32> = numbers.iter().copied().take(4).collect();
            let theirs: Vec<f32> =
                expected["first"].as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect();
            assert_eq!(first, theirs, "{name}");
            let bytes: Vec<u8> = numbers.iter().flat_map(|v| v.to_le_bytes()).collect();
            assert_eq!(u64::from(crc32fast::hash(&bytes)), expected["crc32"].as_u64().unwrap(), "{name}");
        }
    }
}

#[test]
fn models_compute_what_transformers_does_with_the_same_weights() {
    for name in FIXTURES {
        let ids: Vec<u32> = serde_json::from_value(expected(name)["ids"].clone()).unwrap();
        let arrays = Arrays::read(fixture(name).join("expected.safetensors"));
        // The reference's default bodies hold every weight in f32: what is compared is the reading.
        let opt =
            Opt::load(fixture(name), Load::on(opt_backend::Reference::new()).dtype(DType::F32)).unwrap();
        assert_close(opt.logits(&ids).unwrap().view(), arrays.matrix("logits").view(), name);
        let opt = Opt::load(fixture(name), backend::load_exact().dtype(DType::F32)).unwrap();
        assert_close(opt.logits(&ids).unwrap().view(), arrays.matrix("logits").view(), name);
        // With activations rounded to sixteen bits, where the backend does that.
        let opt = Opt::load(fixture(name), backend::load().dtype(DType::F32)).unwrap();
        let rounded = Tolerance::INT16_ACTIVATIONS;
        assert_within(rounded, opt.logits(&ids).unwrap().view(), arrays.matrix("logits").view(), name);
    }
}

#[test]
fn each_layout_keeps_what_it_says() {
    let open = |name: &str| weights(&Checkpoint::open(fixture(name)).unwrap());
    let fc2 = "layers.1.fc2.weight";
    assert_eq!(*open("gptq_4bit")[fc2].groups(), Groups::Runs(32));
    assert!(matches!(open("gptq_4bit")[fc2].zeros(), Zeros::Each(_)));
    assert!(matches!(open("gptq_3bit_act_order")[fc2].groups(), Groups::Index(index) if index.len() == 96));
    // Symmetric, one scale a row.
    let weight = &open("gptq_8bit_pickle")[fc2];
    assert_eq!((weight.zeros(), weight.groups()), (&Zeros::Same(128), &Groups::Runs(96)));
    let weight = &open("bnb_int8")[fc2];
    assert_eq!(weight.levels(), Levels::Integers { bits: 8 });
    assert_eq!((weight.zeros(), weight.outlier_threshold()), (&Zeros::Same(128), Some(6.0)));
    // Blocks of 64 over rows of 96.
    assert_eq!(*open("bnb_nf4_nested")[fc2].groups(), Groups::Runs(32));
    assert!(open("bnb_nf4").contains_key("project_in.weight"));
}

#[test]
fn inspection_says_the_layout_and_the_memory() {
    for (name, layout) in [
        ("gptq_4bit", "GPTQ, 4 bits, groups of 32"),
        ("gptq_v2_2bit", "GPTQ v2, 2 bits, groups of 64"),
        ("gptq_8bit_pickle", "GPTQ, 8 bits, one scale a row"),
        ("awq", "AWQ, 4 bits, groups of 32"),
        ("bnb_int8", "bitsandbytes, 8 bits"),
        ("bnb_fp4", "bitsandbytes, 4 bits"),
    ] {
        let found = inspect(fixture(name)).unwrap();
        assert_eq!(found.quantization.as_deref(), Some(layout), "{name}");
        assert!(found.faults.is_empty() && found.warnings.is_empty(), "{name}: {found:?}");
        // What is packed takes the same in every number format.
        let [f32, _, f16] = &found.memory[..] else { panic!() };
        let tables = (97 * 64 + 18 * 64) as u64;
        assert_eq!(f32.weights - f16.weights, 2 * tables, "{name}");
        assert!(f16.weights < found.files[0].bytes + 64 * 200, "{name}");
    }
    let found = inspect(fixture("../models/pre_ln")).unwrap();
    assert_eq!(found.quantization, None);
}

#[test]
fn conversion_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let error = convert(fixture("awq"), folder.path().join("out"), ConvertOptions::default()).unwrap_err();
    assert!(
        error.to_string().contains("quantized (AWQ, 4 bits, groups of 32) and cannot be converted"),
        "{error}"
    );
    assert_eq!(error.kind(), opt_core::ErrorKind::Unsupported);
}

#[test]
fn autogptq_s_own_file_names_are_found() {
    let folder = tempfile::tempdir().unwrap();
    let from = fixture("gptq_8bit_pickle");
    for file in ["config.json", "quantize_config.json"] {
        fs::copy(from.join(file), folder.path().join(file)).unwrap();
    }
    fs::copy(from.join("pytorch_model.bin"), folder.path().join("gptq_model-8bit--1g.bin")).unwrap();
    assert_eq!(weights(&Checkpoint::open(folder.path()).unwrap()).len(), 12);
    // Two are one too many.
    fs::write(folder.path().join("gptq_model-4bit-32g.bin"), "").unwrap();
    assert_eq!(Checkpoint::open(folder.path()).unwrap_err().kind(), opt_core::ErrorKind::NotFound);
}

#[test]
fn autoawq_s_own_configuration_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let mut parts = crate::files::Parts::read(&fixture("awq"));
    parts.config.as_object_mut().unwrap().remove("quantization_config");
    fs::write(folder.path().join("config.json"), parts.config.to_string()).unwrap();
    fs::copy(fixture("awq").join("model.safetensors"), folder.path().join("model.safetensors")).unwrap();
    let theirs = r#"{"zero_point": true, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}"#;
    fs::write(folder.path().join("quant_config.json"), theirs).unwrap();
    let found = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(weights(&found), weights(&Checkpoint::open(fixture("awq")).unwrap()));
}

#[test]
fn plain_weights_run_whatever_the_configuration_says() {
    let quantized = crate::files::Parts::read(&fixture("bnb_int8"));
    let mut parts = quantized.plain(&quantized.open().unwrap());
    parts.config["quantization_config"] = quantized.config["quantization_config"].clone();
    let checkpoint = parts.open().unwrap();
    assert_eq!(checkpoint.quantization(), None);
    let warnings = checkpoint.validate().unwrap();
    assert_eq!(warnings.len(), 1);
    assert!(
        warnings[0].to_string().contains("bitsandbytes, 8 bits, but every weight is plain"),
        "{}",
        warnings[0]
    );
}

#[test]
fn four_bits_may_be_stored_as_any_numbers() {
    let mut parts = crate::files::Parts::read(&fixture("bnb_fp4"));
    let expected = weights(&parts.open().unwrap());
    let weight = parts.tensors.get_mut("model.decoder.layers.0.fc2.weight").unwrap();
    (weight.0, weight.1) = (safetensors::Dtype::BF16, vec![64 * 96 / 4, 1]);
    let checkpoint = parts.open().unwrap();
    assert_eq!(checkpoint.validate().unwrap(), []);
    assert_eq!(weights(&checkpoint), expected);
}
