//! The tensors of each layout, and its configuration.

use super::{
    QuantLayout, bitsandbytes,
    gptq::{self, Gptq},
    native, stored_name,
    write::{Item, NATIVE, option},
};
use crate::{
    Error, ErrorKind, Result,
    checkpoint::{Checkpoint, FileDType, Warning, names},
};
use half::f16;
use opt_backend::quant::{Groups, Levels, Quantized, Zeros};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

/// The packed tensors of all weights, and the `quantization_config`.
pub(super) fn items(
    layout: QuantLayout,
    base: &Checkpoint,
    weights: &BTreeMap<String, Quantized>,
    warnings: &mut Vec<Warning>,
) -> Result<Written> {
    match layout {
        QuantLayout::Native => native_items(weights),
        QuantLayout::Gptq => gptq_items(base, weights, warnings),
        QuantLayout::BitsAndBytes => bitsandbytes_items(base, weights),
    }
}

/// `layers.0.fc1` of `layers.0.fc1.weight`.
fn module(name: &str) -> &str {
    name.strip_suffix(".weight").unwrap_or(name)
}

fn le<const N: usize, T: Copy>(values: impl IntoIterator<Item = T>, bytes: impl Fn(T) -> [u8; N]) -> Vec<u8> {
    values.into_iter().flat_map(bytes).collect()
}

/// The scales in f16, if that is exact.
fn as_f16<'a>(scales: impl Iterator<Item = &'a f32> + Clone) -> Option<Vec<u8>> {
    let exact = scales.clone().all(|scale| f16::from_f32(*scale).to_f32().to_bits() == scale.to_bits());
    exact.then(|| le(scales, |scale| f16::from_f32(*scale).to_le_bytes()))
}

pub(super) type Written = (Vec<Item<'static>>, Value);

fn native_items(weights: &BTreeMap<String, Quantized>) -> Result<Written> {
    let (mut items, mut descriptions) = (Vec::new(), Map::new());
    for (name, weight) in weights {
        let part = |suffix: &str| stored_name(name, suffix);
        let [out, input] = weight.shape();
        let bits = native::bits_of(weight.levels());
        let codes = native::pack_codes(weight, bits);
        let shape = [out, native::row_bytes(input, bits)];
        items.push(Item::new(part("codes"), FileDType::U8, shape, codes));
        let scales = weight.scales();
        let (dtype, bytes) = match as_f16(scales.iter()) {
            Some(bytes) => (FileDType::F16, bytes),
            None => (FileDType::F32, le(scales.iter(), |scale| scale.to_le_bytes())),
        };
        items.push(Item::new(part("scales"), dtype, scales.shape(), bytes));
        if let (Zeros::Each(zeros), Levels::Integers { .. }) = (weight.zeros(), weight.levels()) {
            let (dtype, bytes) = if zeros.iter().all(|zero| *zero <= 255) {
                (FileDType::U8, zeros.iter().map(|zero| *zero as u8).collect())
            } else {
                (FileDType::U16, le(zeros.iter(), |zero| zero.to_le_bytes()))
            };
            items.push(Item::new(part("zeros"), dtype, zeros.shape(), bytes));
        }
        if let Groups::Index(index) = weight.groups() {
            let bytes = le(index.iter(), |group| group.to_le_bytes());
            items.push(Item::new(part("groups"), FileDType::U32, [input], bytes));
        }
        let description = serde_json::to_value(native::Description::of(weight))
            .map_err(|e| Error::because(ErrorKind::Io, "cannot write JSON", e))?;
        descriptions.insert(name.clone(), description);
    }
    Ok((items, json!({ "quant_method": NATIVE, "version": native::VERSION, "weights": descriptions })))
}

/// Which of the weights of layers' linears are not among `weights`.
fn left_plain<'a>(
    base: &Checkpoint,
    weights: &'a BTreeMap<String, Quantized>,
) -> impl Iterator<Item = String> + 'a {
    let shapes = base.config.tensor_shapes().into_iter();
    let linears = shapes
        .filter(|(name, shape)| shape.len() == 2 && !name.starts_with("embed_") && name != "lm_head.weight");
    linears.map(|(name, _)| name).filter(|name| !weights.contains_key(name))
}

fn gptq_items(
    base: &Checkpoint,
    weights: &BTreeMap<String, Quantized>,
    warnings: &mut Vec<Warning>,
) -> Result<Written> {
    let bits = match weights.values().next().map(Quantized::levels) {
        Some(Levels::Integers { bits }) => bits,
        _ => 4,
    };
    let group_size = group_size(weights)?;
    let all = |test: &dyn Fn(&Quantized) -> bool| weights.values().all(test);
    let v2 = !all(&|weight| gptq::holds_zeros(weight, bits, false));
    let middle = 1 << (bits - 1);
    let sym = all(&|weight| match weight.zeros() {
        Zeros::Same(zero) => *zero == middle,
        Zeros::Each(zeros) => zeros.iter().all(|zero| *zero == middle),
        _ => false,
    });
    let desc_act = !all(&|weight| matches!(weight.groups(), Groups::Runs(_)));
    let gptq = Gptq { bits, group_size, v2, scattered: desc_act };
    if v2 {
        let message = "zero points of 0 need the format gptq_v2, which GPTQModel reads and AutoGPTQ does not";
        warnings.push(Warning::Other(message.to_owned()));
    }
    let mut items = Vec::new();
    for (name, weight) in weights {
        let [out, input] = weight.shape();
        if !name.starts_with("layers.") {
            return Err(option(name, "GPTQ's layout holds the linears of layers only"));
        }
        if weight.levels() != (Levels::Integers { bits }) {
            let found = weight.levels();
            return Err(option(
                name,
                format_args!("expected integers of {bits} bits as the others, found {found:?}"),
            ));
        }
        if let Some(message) = Gptq::misfit([out, input]) {
            return Err(option(name, message));
        }
        if !gptq::holds_zeros(weight, bits, v2) {
            let message = "GPTQ's layout holds zero points of as many bits as the codes only; these are more";
            return Err(option(name, message));
        }
        if gptq.groups(input) != weight.scales().ncols() {
            let found = weight.scales().ncols();
            return Err(option(
                name,
                format_args!("expected groups of {group_size:?} inputs, found {found} groups"),
            ));
        }
        let packed = gptq::pack(weight, bits, v2);
        let Some(scales) = as_f16(packed.scales.iter()) else {
            return Err(option(name, "GPTQ's layout has scales in f16, which these are not"));
        };
        let part = |suffix: &str| stored_name(module(name), suffix);
        let words = |words: &ndarray::Array2<i32>| le(words.iter(), |word| word.to_le_bytes());
        items.push(Item::new(
            part("qweight"),
            FileDType::I32,
            packed.qweight.shape(),
            words(&packed.qweight),
        ));
        items.push(Item::new(part("qzeros"), FileDType::I32, packed.qzeros.shape(), words(&packed.qzeros)));
        items.push(Item::new(part("scales"), FileDType::F16, packed.scales.shape(), scales));
        let g_idx = le(packed.g_idx.iter(), |group| group.to_le_bytes());
        items.push(Item::new(part("g_idx"), FileDType::I32, [input], g_idx));
    }
    let plain = left_plain(base, weights).filter(|name| name.starts_with("layers.")).collect::<Vec<_>>();
    if let Some(first) = plain.first() {
        let message =
            format!("{first} and {} more stay plain, which AutoGPTQ does not read", plain.len() - 1);
        warnings.push(Warning::Other(message));
    }
    Ok((items, gptq::describe(gptq, desc_act, sym)))
}

/// The one group size of all weights, `None` for one scale a row.
fn group_size(weights: &BTreeMap<String, Quantized>) -> Result<Option<usize>> {
    let size = |weight: &Quantized| match weight.groups() {
        Groups::Runs(size) => *size,
        Groups::Index(index) => {
            let mut counts = vec![0; weight.scales().ncols()];
            for group in index {
                if let Some(count) = counts.get_mut(*group as usize) {
                    *count += 1;
                }
            }
            counts.into_iter().max().unwrap_or(1)
        }
        _ => 0,
    };
    // Where a group is a whole row, its size says nothing.
    let in_rows = |weight: &Quantized| size(weight) < weight.shape()[1];
    let mut sizes = weights.iter().filter(|(_, weight)| in_rows(weight));
    let Some((_, first)) = sizes.next() else { return Ok(None) };
    let expected = size(first);
    for (name, weight) in weights {
        let found = size(weight);
        if found != expected && (in_rows(weight) || weight.shape()[1] > expected) {
            return Err(option(
                name,
                format_args!("expected groups of {expected} as the others, found {found}"),
            ));
        }
    }
    Ok(Some(expected))
}

fn bitsandbytes_items(base: &Checkpoint, weights: &BTreeMap<String, Quantized>) -> Result<Written> {
    let eight_bits = weights.values().any(|weight| weight.levels() == Levels::Integers { bits: 8 });
    let (mut items, mut kinds, mut thresholds) = (Vec::new(), Vec::new(), Vec::new());
    for (name, weight) in weights {
        if name.starts_with("embed_") || name == "lm_head.weight" {
            return Err(option(name, "bitsandbytes' layout holds linears other than the LM head only"));
        }
        let [out, input] = weight.shape();
        let part = |suffix: &str| stored_name(module(name), suffix);
        if eight_bits {
            let per_row = matches!(weight.groups(), Groups::Runs(size) if *size >= input);
            let held = weight.levels() == Levels::Integers { bits: 8 } && *weight.zeros() == Zeros::Same(128);
            if !held || !per_row {
                let message = "expected int8 as the others: 8 bits, zero point 128, one scale a row";
                return Err(option(name, message));
            }
            let codes = weight.codes().iter().map(|code| code.wrapping_sub(128)).collect();
            let scb = le(weight.scales().iter(), |scale| bitsandbytes::scb(*scale).to_le_bytes());
            items.push(Item::new(part("weight"), FileDType::I8, [out, input], codes));
            items.push(Item::new(part("SCB"), FileDType::F32, [out], scb));
            items.push(Item::new(part("weight_format"), FileDType::U8, [], vec![0]));
            thresholds.push(weight.outlier_threshold().unwrap_or(0.0));
        } else {
            let packed = bitsandbytes::pack(weight).map_err(|message| option(name, message))?;
            let dtype = match base.tensors.get(name).map(|info| info.dtype) {
                Some(FileDType::F16) => "float16",
                Some(FileDType::BF16) => "bfloat16",
                _ => "float32",
            };
            let state = bitsandbytes::state(&packed, dtype, [out, input]);
            let suffix = format!("weight.quant_state.bitsandbytes__{}", packed.kind);
            items.push(Item::new(part(&suffix), FileDType::U8, [state.len()], state));
            let absmax = le(packed.absmax.iter(), |value| value.to_le_bytes());
            items.push(Item::new(part("weight.absmax"), FileDType::F32, [packed.absmax.len()], absmax));
            let map = le(packed.table, f32::to_le_bytes);
            items.push(Item::new(part("weight.quant_map"), FileDType::F32, [16], map));
            items.push(Item::new(part("weight"), FileDType::U8, [packed.weight.len(), 1], packed.weight));
            kinds.push(packed.kind);
        }
    }
    if let Some(other) = thresholds.iter().find(|threshold| Some(*threshold) != thresholds.first()) {
        let message =
            format_args!("expected one threshold for outliers, found {:?} and {other}", thresholds.first());
        return Err(option("bitsandbytes' layout", message));
    }
    let kind = kinds.first().copied().unwrap_or("nf4");
    let mut skipped: Vec<String> = left_plain(base, weights).map(|name| names::full(module(&name))).collect();
    // transformers leaves the head alone only where it is not told what to leave alone.
    skipped.push("lm_head".to_owned());
    let description = json!({
        "quant_method": "bitsandbytes",
        "load_in_8bit": eight_bits,
        "load_in_4bit": !eight_bits,
        "llm_int8_threshold": thresholds.first().copied().unwrap_or(6.0),
        "llm_int8_skip_modules": skipped,
        "llm_int8_has_fp16_weight": false,
        "llm_int8_enable_fp32_cpu_offload": false,
        "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": false,
        "bnb_4bit_compute_dtype": "float32",
        "bnb_4bit_quant_storage": "uint8",
    });
    Ok((items, description))
}
