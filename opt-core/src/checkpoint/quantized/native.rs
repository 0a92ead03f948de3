//! This project's own layout, which holds every [`Quantized`] as it is.
//!
//! ```text
//! NAME.codes  [out, bytes] u8          8 bits: one code a byte; 3 and 4 bits: two, the first in the low half; 2 bits:
//!                                      four, the first in the lowest bits; every row starts a byte
//! NAME.scales [out, groups] f16 or f32
//! NAME.zeros  [out, groups] u8 or u16  where the description has no "zero" and the levels are integers
//! NAME.groups [in] u32                 where the description has no "group_size"
//! ```
//!
//! `NAME` is the weight's whole name, `model.decoder.layers.0.fc1.weight`. The description of each is in the
//! configuration's `weights`.

use super::{
    bits::{Nibbles, pack_nibbles, unpack_nibbles},
    part::{Part, Parts, collapse, int},
};
use crate::{Error, ErrorKind, Result, checkpoint::FileDType, config::is_linear};
use ndarray::Array2;
use opt_backend::quant::{FP4, Groups, Levels, NF4, Quantized, Zeros};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::{collections::BTreeMap, fmt};

/// The number of this layout in a configuration.
pub(super) const VERSION: u64 = 1;

/// What stands in a configuration for one weight.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Description {
    /// Of integers 2, 3, 4 or 8; of a table 4.
    bits: u32,
    /// "integers", "nf4", "fp4" or the sixteen levels.
    levels: Named,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    group_size: Option<usize>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    zero: Option<u16>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    outlier_threshold: Option<f32>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
enum Named {
    Name(String),
    Table([f32; 16]),
}

impl Description {
    pub(super) fn of(weight: &Quantized) -> Self {
        let (bits, levels) = match weight.levels() {
            Levels::Integers { bits } => (bits, Named::Name("integers".to_owned())),
            Levels::Table(NF4) => (4, Named::Name("nf4".to_owned())),
            Levels::Table(FP4) => (4, Named::Name("fp4".to_owned())),
            Levels::Table(table) => (4, Named::Table(table)),
            _ => (0, Named::Name("unknown".to_owned())),
        };
        let group_size = match weight.groups() {
            Groups::Runs(size) => Some(*size),
            _ => None,
        };
        let zero = match weight.zeros() {
            Zeros::Same(zero) => Some(*zero),
            _ => None,
        };
        Self { bits, levels, group_size, zero, outlier_threshold: weight.outlier_threshold() }
    }

    fn levels(&self) -> Result<Levels> {
        let fail = |expected: &str, found: String| {
            Err(Error::new(ErrorKind::Unsupported, format_args!("expected {expected}, found {found}")))
        };
        let table = match &self.levels {
            Named::Name(name) if name == "integers" => {
                return match self.bits {
                    bits @ (2 | 3 | 4 | 8) => Ok(Levels::Integers { bits }),
                    bits => fail("bits 2, 3, 4 or 8", bits.to_string()),
                };
            }
            Named::Name(name) if name == "nf4" => NF4,
            Named::Name(name) if name == "fp4" => FP4,
            Named::Name(name) => {
                let found = super::brief(&Value::String(name.clone()));
                return fail("levels \"integers\", \"nf4\", \"fp4\" or 16 numbers", found);
            }
            Named::Table(table) => *table,
        };
        if self.bits != 4 || table.iter().any(|level| !level.is_finite()) {
            return fail("16 finite levels of 4 bits", format!("{} bits", self.bits));
        }
        Ok(Levels::Table(table))
    }

    fn check(&self) -> Result<()> {
        self.levels()?;
        if self.group_size == Some(0) {
            return Err(Error::new(ErrorKind::Unsupported, "group_size: expected at least 1, found 0"));
        }
        if let Some(threshold) = self.outlier_threshold
            && !(threshold > 0.0 && threshold.is_finite())
        {
            let message = format_args!("outlier_threshold: expected a positive number, found {threshold}");
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        Ok(())
    }
}

/// The weights of a configuration, by their canonical names.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Native {
    weights: BTreeMap<String, Description>,
}

impl fmt::Display for Native {
    /// The linears' form where all have one.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("opt-rs")?;
        let linears = || self.weights.iter().filter(|(name, _)| is_linear(name)).map(|(_, linear)| linear);
        let Some(first) = linears().next() else { return Ok(()) };
        if linears().any(|other| (other.bits, &other.levels) != (first.bits, &first.levels)) {
            return f.write_str(", several formats");
        }
        match &first.levels {
            Named::Name(name) if name == "integers" => write!(f, ", {} bits", first.bits)?,
            Named::Name(name) => write!(f, ", {name}")?,
            Named::Table(_) => f.write_str(", 16 levels")?,
        }
        match first.group_size {
            Some(size) if linears().all(|other| other.group_size == Some(size)) => {
                write!(f, ", groups of {size}")
            }
            _ => Ok(()),
        }
    }
}

impl Native {
    pub(super) fn parse(config: &Value) -> Result<Self> {
        int(config, "version", &[VERSION])?;
        let weights = config.get("weights").cloned().unwrap_or_default();
        let weights: BTreeMap<String, Description> =
            serde_json::from_value(weights).map_err(|e| crate::checkpoint::json::error("weights", &e))?;
        for (name, description) in &weights {
            description.check().map_err(|e| e.at(crate::checkpoint::entry::shown(name)))?;
        }
        Ok(Self { weights })
    }

    pub(super) fn has(&self, module: &str) -> bool {
        self.weights.contains_key(&format!("{module}.weight"))
    }

    fn description(&self, module: &str) -> Result<&Description> {
        self.weights.get(&format!("{module}.weight")).ok_or_else(|| {
            let message = format_args!("quantization_config: weights: {module}.weight is missing");
            Error::new(ErrorKind::NotFound, message)
        })
    }

    pub(super) fn parts(&self, parts: &Parts<'_>, [out, input]: [usize; 2]) -> Result<Vec<Part>> {
        let description = self.description(parts.module)?;
        let scales = Part::new("weight.scales", Part::FLOATS, [out, 0]);
        // Groups in any order: how many there are is for their scales to say.
        let groups = match description.group_size {
            Some(size) => Some(input.div_ceil(size)),
            None => parts.optional("weight.scales")?.and_then(|stored| stored.columns()),
        };
        let grouped = |part: Part| Part { shape: groups.map(|groups| vec![out, groups]), ..part };
        let mut expected = vec![
            Part::new("weight.codes", &[FileDType::U8], [out, row_bytes(input, description.bits)]),
            grouped(scales),
        ];
        if description.zero.is_none() && matches!(description.levels()?, Levels::Integers { .. }) {
            expected.push(grouped(Part::new("weight.zeros", &[FileDType::U8, FileDType::U16], [out, 0])));
        }
        if description.group_size.is_none() {
            expected.push(Part::new("weight.groups", &[FileDType::U32], [input]));
        }
        Ok(expected)
    }

    pub(super) fn read(&self, parts: &Parts<'_>, [out, input]: [usize; 2]) -> Result<Quantized> {
        let description = self.description(parts.module)?;
        let levels = description.levels()?;
        let stored = parts.required("weight.codes")?;
        let mut codes = Vec::with_capacity(out * input);
        for row in stored.bytes().chunks(row_bytes(input, description.bits).max(1)) {
            unpack_row(row, input, description.bits, &mut codes);
        }
        let shape = |e| Error::because(ErrorKind::Checkpoint, stored.place(), e);
        let codes = Array2::from_shape_vec((out, input), codes).map_err(shape)?;
        let stored = parts.required("weight.scales")?;
        let groups = stored.columns().unwrap_or_default();
        let scales = Array2::from_shape_vec((out, groups), stored.floats()?).map_err(shape)?;
        let zeros = match (description.zero, levels) {
            (Some(zero), _) => Zeros::Same(zero),
            (None, Levels::Table(_)) => Zeros::Same(0),
            _ => {
                let stored = parts.required("weight.zeros")?;
                let zeros = match stored.dtype() {
                    FileDType::U8 => stored.matrix::<u8>()?.mapv(u16::from),
                    _ => stored.matrix::<u16>()?.to_owned(),
                };
                collapse(zeros)
            }
        };
        let groups = match description.group_size {
            Some(size) => Groups::Runs(size),
            None => {
                let stored = parts.required("weight.groups")?;
                let index = stored.numbers::<u32>()?;
                if let Some(found) = index.iter().find(|group| **group as usize >= groups) {
                    return stored.fail(format_args!("expected groups below {groups}, found {found}"));
                }
                Groups::Index(index.to_vec())
            }
        };
        let weight = parts.build(codes, scales, zeros, levels, groups)?;
        Ok(match description.outlier_threshold {
            Some(threshold) => weight.keep_outliers(threshold),
            None => weight,
        })
    }
}

/// Bytes of a row of codes.
pub(super) fn row_bytes(input: usize, bits: u32) -> usize {
    match bits {
        2 => input.div_ceil(4),
        3 | 4 => input.div_ceil(2),
        _ => input,
    }
}

fn unpack_row(row: &[u8], input: usize, bits: u32, codes: &mut Vec<u8>) {
    match bits {
        2 => codes.extend(row.iter().flat_map(|byte| [0, 2, 4, 6].map(|at| byte >> at & 3)).take(input)),
        3 | 4 => codes.extend(unpack_nibbles(row, input, Nibbles::LowFirst)),
        _ => codes.extend(row.iter().take(input)),
    }
}

/// The codes of a weight, packed row after row.
pub(super) fn pack_codes(weight: &Quantized, bits: u32) -> Vec<u8> {
    let [out, input] = weight.shape();
    let mut bytes = Vec::with_capacity(out * row_bytes(input, bits));
    for row in weight.codes().outer_iter() {
        let row = row.to_vec();
        match bits {
            2 => bytes.extend(
                row.chunks(4)
                    .map(|four| four.iter().zip([0, 2, 4, 6]).fold(0, |byte, (code, at)| byte | code << at)),
            ),
            3 | 4 => bytes.extend(pack_nibbles(row, Nibbles::LowFirst)),
            _ => bytes.extend(row),
        }
    }
    bytes
}

/// Bits of a code of these levels.
pub(super) fn bits_of(levels: Levels) -> u32 {
    match levels {
        Levels::Integers { bits } => bits,
        _ => 4,
    }
}
