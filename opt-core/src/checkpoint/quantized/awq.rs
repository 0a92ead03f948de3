//! AWQ's files, as AutoAWQ writes them in its version "gemm".
//!
//! ```text
//! qweight [in, out / 8] i32      codes of 4 bits, packed along the outputs in the order 0 2 4 6 1 3 5 7
//! qzeros  [groups, out / 8] i32  zero points, likewise
//! scales  [groups, out] f16
//! W[o, i] = scales[i / group_size, o] * (qweight[i, o] - qzeros[i / group_size, o])
//! ```

use super::part::{Part, Parts, collapse, int};
use crate::{Error, ErrorKind, Result, checkpoint::FileDType};
use ndarray::{Array2, ArrayView2};
use opt_backend::quant::{Groups, Levels, Quantized};
use serde_json::Value;

/// Codes of a word.
const PER_WORD: usize = 8;

/// Where in a word, in units of 4 bits, each of eight neighbouring outputs lies.
const PLACES: [u32; PER_WORD] = [0, 4, 1, 5, 2, 6, 3, 7];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Awq {
    pub(super) group_size: Option<usize>,
}

impl Awq {
    /// `config` has the keys of transformers or those of AutoAWQ's own quant_config.json.
    pub(super) fn parse(config: &Value) -> Result<Self> {
        int(config, if config.get("bits").is_some() { "bits" } else { "w_bit" }, &[4])?;
        let key = if config.get("group_size").is_some() { "group_size" } else { "q_group_size" };
        let group_size = super::group_size(config, key)?;
        let version = config.get("version").and_then(Value::as_str).unwrap_or("gemm");
        if !version.eq_ignore_ascii_case("gemm") {
            let message = format_args!("version: expected \"gemm\", found {version:?}");
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        Ok(Self { group_size })
    }

    fn groups(self, input: usize) -> usize {
        self.group_size.map_or(1, |size| input.div_ceil(size))
    }

    pub(super) fn parts(self, [out, input]: [usize; 2]) -> Vec<Part> {
        let groups = self.groups(input);
        vec![
            Part::new("qweight", &[FileDType::I32], [input, out / PER_WORD]),
            Part::new("qzeros", &[FileDType::I32], [groups, out / PER_WORD]),
            Part::new("scales", Part::FLOATS, [groups, out]),
        ]
    }

    pub(super) fn misfit([out, _]: [usize; 2]) -> Option<String> {
        (!out.is_multiple_of(PER_WORD))
            .then(|| format!("AWQ's layout has a multiple of {PER_WORD} outputs, found {out}"))
    }

    pub(super) fn read(self, parts: &Parts<'_>, [out, input]: [usize; 2]) -> Result<Quantized> {
        let groups = self.groups(input);
        let codes = unpack(parts.required("qweight")?.matrix()?);
        let zeros = unpack(parts.required("qzeros")?.matrix()?).mapv(u16::from);
        let scales = parts.required("scales")?.floats()?;
        let scales = ArrayView2::from_shape((groups, out), &scales)
            .map_err(|e| Error::because(ErrorKind::Checkpoint, "scales", e))?;
        let scales = scales.t().as_standard_layout().into_owned();
        let groups = Groups::Runs(self.group_size.unwrap_or(input));
        parts.build(codes, scales, collapse(zeros), Levels::Integers { bits: 4 }, groups)
    }
}

/// Rows unpacked together, so that both sides stay in the cache.
const TILE: usize = 64;

/// `[rows, columns / 8]` words into `[columns, rows]`.
pub(super) fn unpack(packed: ArrayView2<'_, i32>) -> Array2<u8> {
    let (rows, words) = packed.dim();
    let mut codes = Array2::zeros((words * PER_WORD, rows));
    for first in (0..rows).step_by(TILE) {
        for word in 0..words {
            for row in first..rows.min(first + TILE) {
                let packed = packed.get((row, word)).map_or(0, |word| *word as u32);
                for (column, place) in PLACES.iter().enumerate() {
                    if let Some(code) = codes.get_mut((word * PER_WORD + column, row)) {
                        *code = (packed >> (4 * place) & 15) as u8;
                    }
                }
            }
        }
    }
    codes
}
