//! bitsandbytes' files.
//!
//! ```text
//! Linear8bitLt   weight [out, in] i8, SCB [out] f32, weight_format u8 (0)    W[o, i] = SCB[o] / 127 * weight[o, i]
//! Linear4bit     weight [out * in / 2, 1] u8 (any format of that many bytes), the first of two elements in the high
//!                half of a byte; weight.absmax, weight.quant_map [16] f32, weight.quant_state.bitsandbytes__nf4 (or
//!                fp4): JSON as bytes                                         W[n] = absmax[n / blocksize] * map[code[n]]
//! ```
//!
//! Blocks run over the flattened matrix and so across the ends of rows. With double quantization `weight.absmax` is u8
//! and means `weight.nested_absmax[n / nested_blocksize] * weight.nested_quant_map[absmax[n]] + nested_offset`.

use super::{
    bits::{Nibbles, pack_nibbles, unpack_nibbles},
    part::{Part, Parts, Stored},
};
use crate::{Error, ErrorKind, Result, checkpoint::FileDType, checkpoint::json};
use ndarray::Array2;
use opt_backend::quant::{FP4, Groups, Levels, NF4, Quantized, Zeros};
use serde::Deserialize;
use serde_json::Value;

/// What a configuration says about all weights.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct BitsAndBytes {
    pub(super) eight_bits: bool,
    /// Activations from this magnitude on stay as they are; 0 is none.
    pub(super) threshold: f32,
}

/// As bitsandbytes has it where a configuration says nothing.
const THRESHOLD: f32 = 6.0;

/// The kinds of 4-bit weights, as the last part of a tensor's name has them.
const KINDS: [&str; 2] = ["nf4", "fp4"];

impl BitsAndBytes {
    pub(super) fn parse(config: &Value) -> Result<Self> {
        let on = |names: [&str; 2]| {
            names.iter().any(|name| config.get(*name).and_then(Value::as_bool).unwrap_or(false))
        };
        let eight_bits = on(["load_in_8bit", "_load_in_8bit"]);
        if eight_bits == on(["load_in_4bit", "_load_in_4bit"]) {
            let message = "expected one of load_in_8bit and load_in_4bit to be true";
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        let threshold = match config.get("llm_int8_threshold") {
            None | Some(Value::Null) => THRESHOLD,
            Some(found) => match found.as_f64().map(|value| value as f32) {
                Some(value) if value >= 0.0 && value.is_finite() => value,
                _ => {
                    let found = super::brief(found);
                    let message = format_args!("llm_int8_threshold: expected 0 or above, found {found}");
                    return Err(Error::new(ErrorKind::Unsupported, message));
                }
            },
        };
        Ok(Self { eight_bits, threshold })
    }
}

/// What `quant_state` says of one weight.
#[derive(Debug, Clone, Deserialize)]
struct State {
    quant_type: String,
    blocksize: usize,
    shape: Vec<usize>,
    #[serde(default)]
    nested_blocksize: Option<usize>,
    #[serde(default)]
    nested_offset: Option<f32>,
}

impl State {
    fn read(parts: &Parts<'_>, kind: &str, shape: [usize; 2]) -> Result<Self> {
        let stored = parts.required(&state_suffix(kind))?;
        let state: Self =
            serde_json::from_slice(stored.bytes()).map_err(|e| json::error(&stored.place(), &e))?;
        if state.quant_type != kind {
            return stored.fail(format_args!(
                "quant_type: expected {kind:?}, found {}",
                super::brief(&Value::String(state.quant_type))
            ));
        }
        if state.shape != shape {
            return stored.fail(format_args!("shape: expected {shape:?}, found {}", short(&state.shape)));
        }
        let blocks = [state.blocksize, state.nested_blocksize.unwrap_or(1)];
        if let Some(found) = blocks.into_iter().find(|size| !(1..=1 << 24).contains(size)) {
            return stored.fail(format_args!("blocksize: expected 1 to {}, found {found}", 1 << 24));
        }
        if state.nested_offset.is_some_and(|offset| !offset.is_finite()) {
            return stored.fail("nested_offset: expected a finite number");
        }
        Ok(state)
    }
}

/// A shape out of a file, for a message.
fn short(shape: &[usize]) -> String {
    format!("{:?}", shape.get(..shape.len().min(4)).unwrap_or_default())
}

fn state_suffix(kind: &str) -> String {
    format!("weight.quant_state.bitsandbytes__{kind}")
}

/// Which kind of 4-bit weight a module has, if it has one.
fn kind(parts: &Parts<'_>) -> Option<&'static str> {
    KINDS.into_iter().find(|kind| parts.has(&state_suffix(kind)))
}

/// Whether a module's weight is quantized.
pub(super) fn is_packed(parts: &Parts<'_>) -> bool {
    parts.has("SCB") || kind(parts).is_some()
}

/// The tensors of a module's weight.
pub(super) fn parts(parts: &Parts<'_>, shape: [usize; 2]) -> Result<Vec<Part>> {
    let [out, input] = shape;
    let Some(kind) = kind(parts) else {
        return Ok(vec![
            Part::new("weight", &[FileDType::I8], [out, input]),
            Part::new("SCB", &[FileDType::F32], [out]),
            Part::any("weight_format").optional(),
        ]);
    };
    let state = State::read(parts, kind, shape)?;
    let count = out * input;
    let blocks = count.div_ceil(state.blocksize);
    let mut expected = vec![
        Part::bytes("weight", count.div_ceil(2)),
        Part::new("weight.quant_map", &[FileDType::F32], [16]),
        Part::any(&state_suffix(kind)),
    ];
    match state.nested_blocksize {
        None => expected.push(Part::new("weight.absmax", &[FileDType::F32], [blocks])),
        Some(size) => expected.extend([
            Part::new("weight.absmax", &[FileDType::U8], [blocks]),
            Part::new("weight.nested_absmax", &[FileDType::F32], [blocks.div_ceil(size)]),
            Part::new("weight.nested_quant_map", &[FileDType::F32], [256]),
        ]),
    }
    Ok(expected)
}

impl BitsAndBytes {
    pub(super) fn read(self, parts: &Parts<'_>, shape: [usize; 2]) -> Result<Quantized> {
        match kind(parts) {
            Some(kind) => four_bits(parts, shape, kind),
            None => self.int8(parts, shape),
        }
    }

    fn int8(self, parts: &Parts<'_>, [out, input]: [usize; 2]) -> Result<Quantized> {
        if let Some(format) = parts.optional("weight_format")? {
            // Others are orders of elements that only a GPU's own kernels had.
            if format.bytes().iter().any(|byte| *byte != 0) {
                return format.fail("expected 0 (row after row), found another order of elements");
            }
        }
        let codes = parts.required("weight")?.matrix::<i8>()?.mapv(|code| (i16::from(code) + 128) as u8);
        let scales: Vec<f32> =
            parts.required("SCB")?.floats()?.into_iter().map(|absmax| absmax / 127.0).collect();
        let scales = array([out, 1], scales)?;
        let levels = Levels::Integers { bits: 8 };
        let weight = parts.build(codes, scales, Zeros::Same(128), levels, Groups::Runs(input))?;
        Ok(if self.threshold > 0.0 { weight.keep_outliers(self.threshold) } else { weight })
    }
}

fn four_bits(parts: &Parts<'_>, shape: [usize; 2], kind: &str) -> Result<Quantized> {
    let [out, input] = shape;
    let state = State::read(parts, kind, shape)?;
    let map = parts.required("weight.quant_map")?;
    let Ok(table) = <[f32; 16]>::try_from(map.floats()?) else {
        return map.fail("expected 16 numbers");
    };
    let absmax = parts.required("weight.absmax")?;
    let absmax = match state.nested_blocksize {
        None => absmax.floats()?,
        Some(size) => {
            let (scales, map) =
                (parts.required("weight.nested_absmax")?, parts.required("weight.nested_quant_map")?);
            nested(&absmax, &scales.floats()?, &map.floats()?, size, state.nested_offset.unwrap_or(0.0))?
        }
    };
    let codes = unpack_nibbles(parts.required("weight")?.bytes(), out * input, Nibbles::HighFirst);
    let run = gcd(input, state.blocksize).max(1);
    let scales =
        (0..out * input / run).map(|n| absmax.get(n * run / state.blocksize).copied().unwrap_or_default());
    let scales = array([out, input / run], scales.collect())?;
    parts.build(array([out, input], codes)?, scales, Zeros::Same(0), Levels::Table(table), Groups::Runs(run))
}

/// The scales of blocks, out of their own quantization.
fn nested(absmax: &Stored<'_>, scales: &[f32], map: &[f32], size: usize, offset: f32) -> Result<Vec<f32>> {
    let value = |(at, code): (usize, &u8)| {
        let (scale, level) = (scales.get(at / size), map.get(usize::from(*code)));
        scale.zip(level).map(|(scale, level)| level * scale + offset)
    };
    match absmax.bytes().iter().enumerate().map(value).collect() {
        Some(values) => Ok(values),
        None => absmax.fail("expected a nested scale and level for each block"),
    }
}

fn array<T>([rows, columns]: [usize; 2], values: Vec<T>) -> Result<Array2<T>> {
    Array2::from_shape_vec((rows, columns), values)
        .map_err(|e| Error::because(ErrorKind::Checkpoint, "a packed weight", e))
}

pub(super) fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// The `SCB` of a scale: the number of which it is 1/127. Where several are, the one of the shortest fraction, since
/// an absmax of weights in f16 has 10 bits; where none is, the nearest.
pub(super) fn scb(scale: f32) -> f32 {
    let near = scale * 127.0;
    let bits = near.to_bits();
    let candidates =
        [bits, bits.wrapping_sub(1), bits.wrapping_add(1), bits.wrapping_sub(2), bits.wrapping_add(2)];
    let exact = candidates.into_iter().filter(|bits| f32::from_bits(*bits) / 127.0 == scale);
    exact.max_by_key(|bits| bits.trailing_zeros()).map_or(near, f32::from_bits)
}

/// A 4-bit weight as bitsandbytes has it.
pub(super) struct Packed {
    pub(super) kind: &'static str,
    pub(super) blocksize: usize,
    pub(super) weight: Vec<u8>,
    pub(super) absmax: Vec<f32>,
    pub(super) table: [f32; 16],
}

/// Packs a weight of levels; says why if that cannot be.
pub(super) fn pack(weight: &Quantized) -> std::result::Result<Packed, String> {
    let Levels::Table(table) = weight.levels() else {
        return Err("expected NF4 or FP4 levels, or int8 with one scale a row".to_owned());
    };
    let kind = match table {
        NF4 => "nf4",
        FP4 => "fp4",
        _ => return Err("expected the levels of NF4 or FP4, found others".to_owned()),
    };
    let [_, input] = weight.shape();
    let Groups::Runs(size) = weight.groups() else {
        return Err("expected runs of inputs that share a scale, found groups in another order".to_owned());
    };
    // Units never straddle a row or a group, so that each has one scale.
    let unit = if *size >= input { input } else { gcd(input, *size) }.max(1);
    let scales: Vec<f32> = (weight.scales().outer_iter())
        .flat_map(|row| (0..input / unit).map(move |u| row.get(u * unit / size).copied().unwrap_or_default()))
        .collect();
    // The sizes that bitsandbytes has, the largest first: blocks whose units agree.
    let fits = |block: &usize| {
        let per_block = block / unit;
        if block.is_multiple_of(unit) {
            scales
                .chunks(per_block.max(1))
                .all(|block| block.iter().all(|scale| Some(scale) == block.first()))
        } else {
            unit.is_multiple_of(*block)
        }
    };
    let Some(blocksize) = [4096, 2048, 1024, 512, 256, 128, 64, 32].into_iter().find(fits) else {
        return Err(format!(
            "expected scales for blocks of 32, 64, ... 4096 elements, found groups of {size}"
        ));
    };
    let count = weight.codes().len();
    let absmax =
        (0..count.div_ceil(blocksize)).map(|n| scales.get(n * blocksize / unit).copied().unwrap_or_default());
    Ok(Packed {
        kind,
        blocksize,
        weight: pack_nibbles(weight.codes().iter().copied(), Nibbles::HighFirst),
        absmax: absmax.collect(),
        table,
    })
}

/// The bytes of `quant_state`, as Python's json writes them.
pub(super) fn state(packed: &Packed, dtype: &str, [out, input]: [usize; 2]) -> Vec<u8> {
    let Packed { kind, blocksize, .. } = packed;
    format!(
        "{{\"quant_type\": \"{kind}\", \"blocksize\": {blocksize}, \"dtype\": \"{dtype}\", \"shape\": [{out}, {input}]}}"
    )
    .into_bytes()
}
