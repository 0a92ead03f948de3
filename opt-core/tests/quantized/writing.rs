use crate::{FIXTURES, files, files::Parts, fixture, same_bits, weights};
use ndarray::Array2;
use opt_backend::quant::{FP4, Groups, Levels, NF4, Quantized, Zeros};
use opt_core::{
    Opt,
    checkpoint::{Checkpoint, QuantLayout, Weight, write_quantized},
};
use proptest::prelude::*;
use serde_json::{Map, Value, json};
use std::{collections::BTreeMap, fs, path::Path};

fn write(
    output: &Path,
    base: &Checkpoint,
    weights: &BTreeMap<String, Quantized>,
    layout: QuantLayout,
) -> opt_core::Result<opt_core::checkpoint::Converted> {
    write_quantized(
        output,
        base,
        weights,
        layout,
        &Map::from_iter([("damp_percent".to_owned(), json!(0.01))]),
    )
}

#[test]
fn files_are_byte_equal_to_the_reference_packers() {
    for (name, layout) in [
        ("gptq_4bit", QuantLayout::Gptq),
        ("gptq_3bit_act_order", QuantLayout::Gptq),
        ("bnb_int8", QuantLayout::BitsAndBytes),
        ("bnb_nf4", QuantLayout::BitsAndBytes),
        ("bnb_fp4", QuantLayout::BitsAndBytes),
    ] {
        let parts = Parts::read(&fixture(name));
        let quantized = parts.open().unwrap();
        let base = parts.plain(&quantized).open().unwrap();
        let folder = tempfile::tempdir().unwrap();
        let output = folder.path().join("out");
        let written = write(&output, &base, &weights(&quantized), layout).unwrap();
        assert!(written.warnings.is_empty() && written.files.iter().all(|file| file.is_file()), "{name}");
        let found = files::tensors(&output.join("model.safetensors"));
        let names = |tensors: &BTreeMap<String, files::Raw>| tensors.keys().cloned().collect::<Vec<_>>();
        assert_eq!(names(&found), names(&parts.tensors), "{name}");
        for (tensor, raw) in &parts.tensors {
            assert!(found[tensor] == *raw, "{name}: {tensor}");
        }
        let config: Value =
            serde_json::from_str(&fs::read_to_string(output.join("config.json")).unwrap()).unwrap();
        let theirs = parts.config["quantization_config"].as_object().unwrap();
        for (key, value) in theirs {
            let nullable = ["llm_int8_skip_modules", "bnb_4bit_compute_dtype"].contains(&&key[..]);
            assert!(nullable || config["quantization_config"][key] == *value, "{name}: {key}");
        }
        assert_eq!(config["quantization_config"]["damp_percent"], json!(0.01));
        let beside = output.join("quantize_config.json");
        assert_eq!(beside.is_file(), layout == QuantLayout::Gptq);
        if layout == QuantLayout::Gptq {
            let beside: Value = serde_json::from_str(&fs::read_to_string(beside).unwrap()).unwrap();
            assert_eq!(beside, config["quantization_config"]);
        }
    }
}

/// Writes and reads again.
fn again(
    base: &Checkpoint,
    packed: &BTreeMap<String, Quantized>,
    layout: QuantLayout,
) -> BTreeMap<String, Quantized> {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("out");
    write(&output, base, packed, layout).unwrap();
    let checkpoint = Checkpoint::open(&output).unwrap();
    assert_eq!(checkpoint.validate().unwrap(), []);
    assert!(Opt::open(&output).is_ok());
    weights(&checkpoint)
}

#[test]
fn every_layout_comes_back_from_the_native_one() {
    for name in FIXTURES.into_iter().filter(|name| !name.contains("pickle")) {
        let parts = Parts::read(&fixture(name));
        let quantized = parts.open().unwrap();
        let (base, packed) = (parts.plain(&quantized).open().unwrap(), weights(&quantized));
        assert_eq!(again(&base, &packed, QuantLayout::Native), packed, "{name}");
    }
}

#[test]
fn awq_can_be_written_as_gptq() {
    let mut parts = Parts::read(&fixture("awq"));
    // With zero points of 0 and 15: for the former "gptq" has no place.
    let zeros = parts.tensors.get_mut("model.decoder.layers.0.fc1.qzeros").unwrap();
    zeros.2[..4].copy_from_slice(&[0x00, 0xff, 0x0f, 0xf0]);
    let quantized = parts.open().unwrap();
    let (base, packed) = (parts.plain(&quantized).open().unwrap(), weights(&quantized));
    assert_eq!(again(&base, &packed, QuantLayout::Gptq), packed);
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("out");
    write(&output, &base, &packed, QuantLayout::Gptq).unwrap();
    let found = fs::read_to_string(output.join("quantize_config.json")).unwrap();
    assert!(found.contains(r#""checkpoint_format": "gptq_v2""#), "{found}");
    let words = &files::tensors(&output.join("model.safetensors"))["model.decoder.layers.0.fc1.qzeros"].2;
    // 0 0 f f f 0 0 f for the outputs 0 2 4 6 1 3 5 7, and now in their order.
    assert_eq!(words[..4], [0xf0, 0x00, 0x0f, 0xff]);
}

fn base() -> Checkpoint {
    Checkpoint::open(fixture("../models/pre_ln")).unwrap()
}

/// A weight whose numbers are of no meaning.
fn weight([out, input]: [usize; 2], levels: Levels, zeros: Option<u16>, groups: Groups) -> Quantized {
    let count = match levels {
        Levels::Integers { bits } => 1 << bits,
        _ => 16,
    };
    let codes = Array2::from_shape_fn((out, input), |(o, i)| ((o * 31 + i * 7) % count) as u8);
    let columns = match &groups {
        Groups::Runs(size) => input.div_ceil(*size),
        Groups::Index(index) => index.iter().max().map_or(0, |g| *g as usize + 1),
        _ => 0,
    };
    let scales = Array2::from_shape_fn((out, columns), |(o, g)| (1 + o % 7 + g) as f32 / 64.0);
    let each =
        || Zeros::Each(Array2::from_shape_fn((out, columns), |(o, g)| ((o * 3 + g) % count) as u16 + 1));
    Quantized::new(codes, scales, zeros.map_or_else(each, Zeros::Same), levels, groups).unwrap()
}

#[test]
fn the_native_layout_holds_tables_and_odd_groups() {
    let index: Vec<u32> = (0..32).map(|i| (i * 5) % 3).collect();
    let mut uneven = weight([97, 32], Levels::Table(NF4), Some(0), Groups::Runs(10));
    let mut levels = NF4;
    levels[3] = 0.125;
    let scales = uneven.scales().mapv(|scale| scale * 1.0001);
    uneven = Quantized::new(
        uneven.codes().clone(),
        scales,
        Zeros::Same(0),
        Levels::Table(levels),
        Groups::Runs(10),
    )
    .unwrap();
    let packed = BTreeMap::from([
        ("embed_tokens.weight".to_owned(), uneven),
        (
            "layers.0.fc1.weight".to_owned(),
            weight([64, 32], Levels::Integers { bits: 3 }, None, Groups::Index(index)),
        ),
        (
            "layers.0.fc2.weight".to_owned(),
            weight([32, 64], Levels::Integers { bits: 8 }, None, Groups::Runs(7)).keep_outliers(5.5),
        ),
        (
            "layers.1.fc1.weight".to_owned(),
            weight([64, 32], Levels::Integers { bits: 2 }, Some(2), Groups::Runs(64)),
        ),
        ("layers.1.fc2.weight".to_owned(), weight([32, 64], Levels::Table(FP4), Some(0), Groups::Runs(1))),
    ]);
    assert_eq!(again(&base(), &packed, QuantLayout::Native), packed);
}

#[test]
fn an_lm_head_of_its_own_is_held_by_the_native_layout() {
    let base = Checkpoint::open(fixture("../models/untied")).unwrap();
    let head = weight([97, 32], Levels::Integers { bits: 8 }, Some(128), Groups::Runs(32));
    let packed = BTreeMap::from([("lm_head.weight".to_owned(), head)]);
    assert_eq!(again(&base, &packed, QuantLayout::Native), packed);
}

#[test]
fn what_a_layout_cannot_hold_is_refused_by_name() {
    let integers = |bits| Levels::Integers { bits };
    let four = || weight([64, 32], integers(4), None, Groups::Runs(32));
    let fine = |scale: f32| {
        let w = four();
        let scales = w.scales().mapv(|s| s * scale);
        Quantized::new(w.codes().clone(), scales, w.zeros().clone(), w.levels(), w.groups().clone()).unwrap()
    };
    // 0 cannot be in the first version of the format, 16 not in the second.
    let both_ends = {
        let w = four();
        let zeros = Array2::from_shape_fn(w.scales().dim(), |(o, _)| if o == 0 { 0 } else { 16 });
        let zeros = Zeros::Each(zeros);
        Quantized::new(w.codes().clone(), w.scales().clone(), zeros, w.levels(), w.groups().clone()).unwrap()
    };
    let index = Groups::Index((0..32).map(|i| i % 2).collect());
    let fc1 = "layers.0.fc1.weight";
    let gptq = QuantLayout::Gptq;
    let bnb = QuantLayout::BitsAndBytes;
    let table = |levels| weight([97, 32], levels, Some(0), Groups::Runs(32));
    let mut other = NF4;
    other[1] = -0.9;
    for (layout, name, weight, message) in [
        (gptq, "embed_tokens.weight", table(integers(4)), "holds the linears of layers only"),
        (gptq, fc1, fine(1.0001), "has scales in f16"),
        (
            gptq,
            fc1,
            weight([64, 32], Levels::Table(NF4), Some(0), Groups::Runs(32)),
            "expected integers of 4 bits",
        ),
        (gptq, fc1, both_ends, "zero points"),
        (bnb, "embed_tokens.weight", table(Levels::Table(NF4)), "other than the LM head only"),
        (bnb, fc1, four(), "expected NF4 or FP4 levels"),
        (bnb, fc1, weight([64, 32], integers(8), Some(128), Groups::Runs(16)), "one scale a row"),
        (bnb, fc1, weight([64, 32], integers(8), Some(127), Groups::Runs(32)), "zero point 128"),
        (bnb, fc1, weight([64, 32], Levels::Table(other), Some(0), Groups::Runs(32)), "levels of NF4 or FP4"),
        (bnb, fc1, weight([64, 32], Levels::Table(NF4), Some(0), Groups::Runs(16)), "blocks of 32, 64"),
        (bnb, fc1, weight([64, 32], Levels::Table(NF4), Some(0), index), "in another order"),
        (
            gptq,
            fc1,
            weight([32, 32], integers(4), Some(8), Groups::Runs(32)),
            "expected shape [64, 32], found [32, 32]",
        ),
        (gptq, "layers.7.fc1.weight", four(), "the model has no such weight"),
        (QuantLayout::Native, "layers.0.fc1.bias", four(), "expected shape [64], found [64, 32]"),
        (
            QuantLayout::Native,
            "embed_positions.weight",
            weight([66, 32], integers(4), None, Groups::Runs(8)),
            "position table",
        ),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let weights = BTreeMap::from([(name.to_owned(), weight)]);
        let error = write(&folder.path().join("out"), &base(), &weights, layout).unwrap_err();
        assert_eq!(error.kind(), opt_core::ErrorKind::Option);
        let text = error.to_string();
        assert!(text.starts_with(name) && text.contains(message), "{text}");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "nothing is left behind");
    }
    let uneven = BTreeMap::from([
        (fc1.to_owned(), weight([64, 32], integers(4), None, Groups::Runs(16))),
        ("layers.1.fc1.weight".to_owned(), weight([64, 32], integers(4), None, Groups::Runs(8))),
    ]);
    let folder = tempfile::tempdir().unwrap();
    let error = write(&folder.path().join("out"), &base(), &uneven, gptq).unwrap_err();
    assert!(error.to_string().contains("expected groups of 16 as the others, found 8"), "{error}");
}

#[test]
fn the_output_and_the_base_are_checked() {
    let folder = tempfile::tempdir().unwrap();
    let packed = BTreeMap::new();
    let quantized = Checkpoint::open(fixture("awq")).unwrap();
    let error = write(&folder.path().join("out"), &quantized, &packed, QuantLayout::Native).unwrap_err();
    assert!(error.to_string().contains("expected plain weights, found AWQ"), "{error}");
    let error =
        write(&folder.path().join("out.safetensors"), &base(), &packed, QuantLayout::Native).unwrap_err();
    assert!(error.to_string().contains("expected the name of a directory"), "{error}");
    let taken = folder.path().join("taken");
    fs::create_dir(&taken).unwrap();
    fs::write(taken.join("file"), "").unwrap();
    let error = write(&taken, &base(), &packed, QuantLayout::Native).unwrap_err();
    assert!(error.to_string().contains("exists already"), "{error}");
}

#[test]
fn files_of_the_model_go_along_and_other_tensors_stay_as_they_are() {
    let folder = tempfile::tempdir().unwrap();
    let (input, output) = (folder.path().join("in"), folder.path().join("out"));
    fs::create_dir(&input).unwrap();
    for file in ["config.json", "model.safetensors"] {
        fs::copy(fixture("../models/pre_ln").join(file), input.join(file)).unwrap();
    }
    for file in ["generation_config.json", "tokenizer.json"] {
        fs::write(input.join(file), "{}").unwrap();
    }
    let base = Checkpoint::open(&input).unwrap();
    let name = "layers.0.fc1.weight";
    let packed = weight([64, 32], Levels::Integers { bits: 4 }, None, Groups::Runs(32));
    let weights = BTreeMap::from([(name.to_owned(), packed)]);
    let written = write(&output, &base, &weights, QuantLayout::Gptq).unwrap();
    assert!(written.warnings[0].to_string().contains("and 10 more stay plain"), "{:?}", written.warnings);
    for file in ["generation_config.json", "tokenizer.json"] {
        assert_eq!(fs::read_to_string(output.join(file)).unwrap(), "{}");
    }
    let (theirs, ours) = (
        files::tensors(&fixture("../models/pre_ln").join("model.safetensors")),
        files::tensors(&output.join("model.safetensors")),
    );
    for (tensor, raw) in theirs.iter().filter(|(tensor, _)| !tensor.ends_with(name)) {
        assert!(ours[tensor] == *raw, "{tensor}");
    }
    let checkpoint = Checkpoint::open(&output).unwrap();
    assert!(matches!(checkpoint.weight("layers.0.fc2.weight", [32, 64]).unwrap(), Weight::Plain(_)));
}

fn any_weight() -> impl Strategy<Value = (Quantized, QuantLayout)> {
    let runs = prop::sample::select(vec![1usize, 8, 16, 32]);
    (any::<u64>(), 0..6usize, runs, any::<bool>()).prop_map(|(seed, kind, run, shuffled)| {
        let mut state = seed | 1;
        let mut next = move |below: usize| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) as usize % below
        };
        let (levels, layout) = match kind {
            0..=3 => (Levels::Integers { bits: [2, 3, 4, 8][kind] }, QuantLayout::Gptq),
            4 => (Levels::Table(NF4), QuantLayout::BitsAndBytes),
            _ => (Levels::Integers { bits: 8 }, QuantLayout::BitsAndBytes),
        };
        let run = if layout == QuantLayout::Gptq { run } else { 32 };
        let count = if let Levels::Integers { bits } = levels { 1 << bits } else { 16 };
        let columns = 32 / run;
        let codes = Array2::from_shape_simple_fn((64, 32), || next(count) as u8);
        let scales = Array2::from_shape_simple_fn((64, columns), || match kind {
            // What int8 rounding makes: a 127th of a weight.
            5 => (1 + next(2000)) as f32 / 256.0 / 127.0,
            _ => half::f16::from_bits(0x1000 + next(0x2000) as u16).to_f32(),
        });
        let zeros = match (layout, kind) {
            (QuantLayout::Gptq, _) => {
                let each = Array2::from_shape_simple_fn((64, columns), || next(count) as u16);
                // Not all alike, which would come back as one.
                if each.iter().all(|zero| *zero == each[[0, 0]]) {
                    Zeros::Same(each[[0, 0]])
                } else {
                    Zeros::Each(each)
                }
            }
            (_, 4) => Zeros::Same(0),
            _ => Zeros::Same(128),
        };
        let groups = if shuffled && run < 32 && layout == QuantLayout::Gptq {
            // Full groups, of which the first inputs are in the last.
            Groups::Index((0..32).map(|i| (31 - i) as u32 / run as u32).collect())
        } else {
            Groups::Runs(run)
        };
        (Quantized::new(codes, scales, zeros, levels, groups).unwrap(), layout)
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn any_weight_comes_back((weight, layout) in any_weight()) {
        let packed = BTreeMap::from([("layers.0.fc1.weight".to_owned(), weight.clone())]);
        for layout in [layout, QuantLayout::Native] {
            let folder = tempfile::tempdir().unwrap();
            let output = folder.path().join("out");
            write(&output, &base(), &packed, layout).unwrap();
            let found = weights(&Checkpoint::open(&output).unwrap());
            let found = &found["layers.0.fc1.weight"];
            prop_assert!(same_bits(&found.dequantize(), &weight.dequantize()), "{layout:?}");
            prop_assert_eq!(found, &weight, "{:?}", layout);
        }
    }
}
