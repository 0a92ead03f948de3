//! Rounding to nearest: formats, loading, refusals.

mod common;

use common::{novels, tiny::Tiny};
use ndarray::{Array2, Axis};
use opt_backend::{
    HostMatrix,
    quant::{Groups, Levels, NF4, Zeros},
};
use opt_core::{
    CacheDType, CancelToken, ErrorKind, Load, Opt,
    checkpoint::Checkpoint,
    generation::Random,
    quantize::{
        QuantFormat, QuantSpec, QuantizeOptions, TableFormat, calibration_sequences, compare, packed_bytes,
        quantize_weights,
    },
};
use std::{ops::ControlFlow, sync::Arc};

/// Normal numbers (Box and Muller).
fn normal(rows: usize, columns: usize, seed: u64) -> Array2<f32> {
    let mut random = Random::new(seed, 0);
    Array2::from_shape_simple_fn((rows, columns), || {
        let (u, v) = (1.0 - random.uniform(), random.uniform());
        ((-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()) as f32
    })
}

fn mean_error(spec: &QuantSpec, weight: &Array2<f32>) -> f64 {
    let made = spec.quantize("w", HostMatrix::F32(weight.view())).unwrap().dequantize();
    (&made - weight).iter().map(|e| f64::from(e.abs())).sum::<f64>() / weight.len() as f64
}

#[test]
fn nf4_and_fp4_err_on_normal_numbers_as_bitsandbytes_does() {
    // Of bitsandbytes' tests/test_functional.py: the mean |error| on 1024 x 1024 normal numbers.
    let weight = normal(1024, 1024, 5);
    for (spec, expected) in [
        (QuantSpec::nf4(), 0.072_798),
        (QuantSpec::nf4().group_size(128), 0.076_831),
        (QuantSpec::new(QuantFormat::Fp4), 0.096_543),
    ] {
        let found = mean_error(&spec, &weight);
        assert!((found - expected).abs() < 3e-4, "{spec:?}: {found}, expected {expected}");
        let twice = mean_error(&spec.double_quant(true), &weight);
        assert!((twice - found).abs() < 5e-4, "{spec:?}: {twice} with double quantization");
    }
}

#[test]
fn integers_stay_within_half_a_step() {
    let weight = normal(16, 128, 9);
    for format in [QuantFormat::Int2, QuantFormat::Int3, QuantFormat::Int4, QuantFormat::Int8] {
        let spec = QuantSpec::new(format).zero_points(true);
        let made = spec.quantize("w", HostMatrix::F32(weight.view())).unwrap();
        assert_eq!(made.groups(), &Groups::Runs(32));
        assert!(matches!(made.zeros(), Zeros::Each(_)));
        let values = made.dequantize();
        for ((o, i), w) in weight.indexed_iter() {
            // Half a step, half of one more where the zero point was rounded, and the rounding of the scale.
            let step = made.scales()[[o, i / 32]];
            assert!((values[[o, i]] - w).abs() <= step * 1.02, "{format}: {w} became {}", values[[o, i]]);
        }
    }
    let made = QuantSpec::int8().quantize("w", HostMatrix::F32(weight.view())).unwrap();
    assert_eq!((made.zeros(), made.levels()), (&Zeros::Same(128), Levels::Integers { bits: 8 }));
    let most = weight.row(0).iter().take(32).fold(0.0_f32, |m, w| m.max(w.abs()));
    assert_eq!(made.scales()[[0, 0]], half(most / 127.0));
    // Symmetric int4 errs no more than either usual scale.
    let error = |scale: &dyn Fn(&[f32]) -> f32| {
        let each = weight.as_slice().unwrap().chunks(32).flat_map(|group| {
            let scale = half(scale(group));
            group.iter().map(move |w| {
                let code = ((w / scale).round_ties_even() + 8.0).clamp(0.0, 15.0);
                f64::from(scale * (code - 8.0) - w).powi(2)
            })
        });
        each.sum::<f64>()
    };
    let largest = |group: &[f32]| group.iter().fold(0.0_f32, |m, w| m.max(w.abs()));
    let signed =
        |group: &[f32]| group.iter().fold(0.0_f32, |m, w| if w.abs() > f32::abs(m) { *w } else { m });
    let made = QuantSpec::int4().quantize("w", HostMatrix::F32(weight.view())).unwrap().dequantize();
    let ours: f64 = (&made - &weight).iter().map(|e| f64::from(*e).powi(2)).sum();
    let others =
        [error(&|g| largest(g) / 7.0), error(&|g| signed(g) / -8.0), error(&|g| 2.0 * largest(g) / 15.0)];
    assert!(others.iter().all(|other| ours <= other * 1.000_001), "{ours}, {others:?}");
}

fn half(x: f32) -> f32 {
    half::f16::from_f32(x).to_f32()
}

/// Large weights are rounded by several threads, some rows at a time: each row to what it is rounded to alone.
#[test]
fn many_rows_are_rounded_as_each_alone() {
    let weight = normal(1003, 96, 9);
    let specs = [QuantSpec::int8(), QuantSpec::int4(), QuantSpec::int4().zero_points(true), QuantSpec::nf4()];
    for spec in specs.map(|spec| spec.group_size(32)) {
        let whole = spec.quantize("w", HostMatrix::F32(weight.view())).unwrap();
        let values = whole.dequantize();
        for (row, expected) in weight.outer_iter().zip(values.outer_iter()) {
            let alone = spec.quantize("w", HostMatrix::F32(row.insert_axis(Axis(0)))).unwrap();
            assert_eq!(alone.dequantize().row(0), expected, "{spec:?}");
        }
        // Of several rows that cannot be rounded, the first one is told.
        let mut broken = weight.clone();
        (broken[[900, 1]], broken[[3, 7]]) = (f32::NAN, f32::INFINITY);
        for _ in 0..20 {
            let error = spec.quantize("w", HostMatrix::F32(broken.view())).unwrap_err().to_string();
            assert!(error.contains("found inf at [3, 7]"), "{error}");
        }
    }
}

#[test]
fn scales_that_f16_cannot_hold_stay_in_f32() {
    let tiny = Array2::from_elem((1, 32), 1e-6_f32);
    for spec in [QuantSpec::int8(), QuantSpec::int4(), QuantSpec::int4().zero_points(true)] {
        let made = spec.quantize("w", HostMatrix::F32(tiny.view())).unwrap();
        assert!((made.dequantize()[[0, 0]] - 1e-6).abs() < 1e-9, "{spec:?}");
        // Zeros are zeros.
        let none = Array2::<f32>::zeros((1, 32));
        let made = spec.quantize("w", HostMatrix::F32(none.view())).unwrap();
        assert!(made.dequantize().iter().all(|w| *w == 0.0), "{spec:?}");
    }
    // A group of tiny weights among others does not cost the others their f16.
    let mut mixed = Array2::from_elem((2, 32), 0.5_f32);
    mixed.row_mut(1).fill(1e-6);
    for spec in [QuantSpec::int8(), QuantSpec::int4(), QuantSpec::int4().zero_points(true)] {
        let made = spec.quantize("w", HostMatrix::F32(mixed.view())).unwrap();
        assert!(made.scales().iter().all(|scale| half(*scale) == *scale), "{spec:?}");
        assert!((made.dequantize()[[1, 0]] - 1e-6).abs() < 1e-6, "{spec:?}");
    }
    let made = QuantSpec::nf4().group_size(32).quantize("w", HostMatrix::F32(tiny.view())).unwrap();
    assert_eq!((made.levels(), made.scales()[[0, 0]]), (Levels::Table(NF4), 1e-6));
}

#[test]
fn refusals_name_tensor_expected_and_found() {
    for bad in [f32::NAN, f32::INFINITY] {
        let mut weight = Array2::<f32>::zeros((2, 64));
        weight[[1, 3]] = bad;
        for spec in [QuantSpec::int8(), QuantSpec::int4(), QuantSpec::nf4()] {
            let error = spec.quantize("fc1", HostMatrix::F32(weight.view())).unwrap_err();
            let expected = format!("tensor fc1: expected finite weights, found {bad} at [1, 3]");
            assert_eq!((error.kind(), error.to_string()), (ErrorKind::Checkpoint, expected));
        }
    }
    let error = "int5".parse::<QuantFormat>().unwrap_err();
    let expected = "quantization format: expected one of int8, int4, int3, int2, nf4, fp4, found \"int5\"";
    assert_eq!(error.to_string(), expected);
    assert!(QuantFormat::integer(5).unwrap_err().to_string().contains("found 5"));
    for (spec, part) in [
        (QuantSpec::int4().group_size(0), "group size: expected at least 1, found 0"),
        (QuantSpec::nf4().zero_points(true), "expected an integer format, found nf4"),
        (QuantSpec::int4().double_quant(true), "expected nf4 or fp4, found int4"),
    ] {
        assert!(spec.validate().unwrap_err().to_string().contains(part));
    }
    let tiny = Tiny::default();
    // What is not quantized itself must be finite, too.
    let mut file = tiny.weights();
    let header = 8 + u64::from_le_bytes(*file.first_chunk().unwrap()) as usize;
    let (_, read) = safetensors::SafeTensors::read_metadata(&file).unwrap();
    let start = read.info("model.decoder.layers.1.fc2.bias").unwrap().data_offsets.0;
    file[header + start + 8..][..4].copy_from_slice(&f32::INFINITY.to_le_bytes());
    let checkpoint = Checkpoint::from_bytes(&tiny.config(), vec![file]).unwrap();
    let error = quantize_weights(&checkpoint, &QuantSpec::nf4().group_size(32), QuantizeOptions::default())
        .unwrap_err();
    let expected = "tensor layers.1.fc2.bias: expected finite numbers, found inf at 2";
    assert_eq!((error.kind(), error.to_string()), (ErrorKind::Checkpoint, expected.to_owned()));

    let checkpoint = Checkpoint::from_bytes(&tiny.config(), vec![tiny.weights()]).unwrap();
    let load = Load::default().quantize(QuantSpec::int4().group_size(24));
    let error = Opt::assemble(&checkpoint, None, None, load).err().unwrap();
    let expected = "tensor layers.0.self_attn.q_proj.weight: expected a group size that divides the 32 inputs of a row, \
                    found 24";
    assert_eq!((error.kind(), error.to_string()), (ErrorKind::Option, expected.to_owned()));
    let error = calibration_sequences(&[1; 99], 100, 4).unwrap_err();
    assert_eq!(
        error.to_string(),
        "calibration text: expected at least 100 tokens (one full sequence), found 99"
    );
    assert_eq!(calibration_sequences(&(0..10).collect::<Vec<_>>(), 2, 2).unwrap(), [[0, 1], [4, 5]]);
    let cancelled = QuantizeOptions::default().progress(|_| ControlFlow::Break(()));
    let error = quantize_weights(&checkpoint, &QuantSpec::int4(), cancelled).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Cancelled);
}

#[test]
fn quantized_while_loading_or_before_is_the_same() {
    let tiny = Tiny { embed: 32, ..Tiny::default() };
    let checkpoint = Checkpoint::from_bytes(&tiny.config(), vec![tiny.weights()]).unwrap();
    for spec in [QuantSpec::int8(), QuantSpec::int4().zero_points(true), QuantSpec::nf4().group_size(32)] {
        let weights = quantize_weights(&checkpoint, &spec, QuantizeOptions::default()).unwrap();
        assert_eq!(weights.contains_key("embed_tokens.weight"), spec.table == TableFormat::Int8);
        let bytes: u64 = weights.values().map(packed_bytes).sum();
        let expected: u64 =
            weights.iter().map(|(name, weight)| spec.of_tensor(name).unwrap().bytes(weight.shape())).sum();
        assert!(bytes <= expected, "{spec:?}: {bytes}, expected {expected}");
        let open = |load| Opt::assemble(&checkpoint, None, None, load).unwrap();
        let loaded = open(Load::default().quantize(spec));
        let replaced = open(Load::default().replace(Arc::new(weights)));
        let (a, b) = (loaded.logits(&[5, 9, 60]).unwrap(), replaced.logits(&[5, 9, 60]).unwrap());
        assert_eq!(a, b);
        assert_ne!(a, open(Load::default()).logits(&[5, 9, 60]).unwrap());
    }
}

#[test]
fn models_are_compared() {
    let base = Opt::open(novels()).unwrap();
    let text = "It was the best of times, it was the worst of times, and the old house stood by the river.";
    let ids = base.require_tokenizer().unwrap().encode(text, opt_core::tokenizer::Bos::Model).unwrap();
    let mut quiet = |_: opt_core::Progress<'_>| ControlFlow::Continue(());
    let same = compare(&base, &base, CacheDType::F32, &ids, 16, &CancelToken::new(), &mut quiet).unwrap();
    assert_eq!((same.kl, same.base_perplexity), (0.0, same.perplexity));
    let windows = ids.chunks(16).map(|w| opt_core::ScoreInput::all(w.to_vec())).collect::<Vec<_>>();
    let sum: f64 = base.score(&windows).unwrap().iter().map(|s| s.log_prob).sum();
    let expected = (-sum / same.tokens as f64).exp();
    assert!((same.perplexity / expected - 1.0).abs() < 1e-5, "{}, expected {expected}", same.perplexity);
    let other = Opt::load(novels(), Load::default().quantize(QuantSpec::nf4())).unwrap();
    let off = compare(&base, &other, CacheDType::F32, &ids, 16, &CancelToken::new(), &mut quiet).unwrap();
    assert!(off.kl > 0.0 && off.kl < 0.2, "{off:?}");
}
