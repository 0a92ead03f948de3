//! Quantized weights row by row, for devices that a tensor library knows and this crate does not.
//!
//! What a library's own ops can expand, on any of its devices: bytes that index a table, then per group a difference
//! and a product. A backend holds these as tensors and expands [`TILE`] elements at a time.
//!
//! ```text
//! byte    b = bytes[o, p / per_byte]
//! element   = scale[o, p / group] * (levels[b, p % per_byte] - zero[o, p / group])     p = place[i]
//! ```

use half::f16;
use opt_backend::quant::{Levels, Quantized, Regular, Zeros};

/// Elements to expand at a time: 8 MiB.
pub const TILE: usize = 2 << 20;

/// A quantized weight `[out, in]`.
pub struct Rows {
    pub shape: [usize; 2],
    /// `[out, places / per_byte]`, earlier places in lower halves.
    pub bytes: Vec<u8>,
    /// Codes in a byte: 1, or 2 of four bits and fewer.
    pub per_byte: usize,
    /// What the codes of a byte stand for, `[256, per_byte]`; less the zero point if all have the same.
    pub levels: Vec<f32>,
    /// `[out, groups]`
    pub scales: Numbers,
    /// Zero points, `[out, groups]`, if they differ.
    pub zeros: Option<Numbers>,
    /// Places that share a scale.
    pub group: usize,
    /// Places of a row, a multiple of the group.
    pub places: usize,
    /// The place of each input, unless they are in order and all there is.
    pub order: Option<Vec<u32>>,
}

/// Numbers, in half precision where that loses nothing.
pub enum Numbers {
    Half(Vec<f16>),
    Single(Vec<f32>),
}

impl Numbers {
    fn new(numbers: impl Iterator<Item = f32> + Clone) -> Self {
        let half = |number: f32| f16::from_f32(number);
        if numbers.clone().all(|number| half(number).to_f32().to_bits() == number.to_bits()) {
            Numbers::Half(numbers.map(half).collect())
        } else {
            Numbers::Single(numbers.collect())
        }
    }
}

impl Rows {
    pub fn new(weight: &Quantized) -> Self {
        let per_byte = if weight.levels() == (Levels::Integers { bits: 8 }) { 1 } else { 2 };
        let regular = weight.regular(per_byte);
        let places = regular.places();
        let Regular { inputs, codes, scales, zeros, levels, group, .. } = regular;
        // In row order, and rows are whole bytes.
        let codes: Vec<u8> = codes.into_iter().collect();
        let bytes = if per_byte == 1 {
            codes
        } else {
            codes
                .chunks_exact(2)
                .map(|pair| pair.iter().rev().fold(0, |byte, code| byte << 4 | code))
                .collect()
        };
        let same = match &zeros {
            Zeros::Same(zero) => f32::from(*zero),
            _ => 0.0,
        };
        let level = |code: u8| match levels {
            Levels::Table(table) => table.get(usize::from(code)).copied().unwrap_or(0.0),
            _ => f32::from(code) - same,
        };
        let levels = (0..=u8::MAX)
            .flat_map(|byte| if per_byte == 1 { vec![byte] } else { vec![byte & 15, byte >> 4] })
            .map(level)
            .collect();
        let zeros = match &zeros {
            Zeros::Each(zeros) => Some(Numbers::new(zeros.iter().map(|&zero| f32::from(zero)))),
            _ => None,
        };
        let shape = weight.shape();
        let order = inputs.map(|inputs| {
            let mut order = vec![0; shape[1]];
            for (place, input) in inputs.into_iter().enumerate() {
                // Padding is no input.
                if let Some(at) = order.get_mut(input as usize) {
                    *at = place as u32;
                }
            }
            order
        });
        let scales = Numbers::new(scales.iter().copied());
        Self { shape, bytes, per_byte, levels, scales, zeros, group, places, order }
    }

    /// Rows of a tile.
    pub fn tile(&self) -> usize {
        (TILE / self.places.max(1)).max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use opt_backend::{
        ndarray::Array2,
        quant::{Groups, NF4},
    };

    fn expand(rows: &Rows) -> Array2<f32> {
        let number = |numbers: &Numbers, at: usize| match numbers {
            Numbers::Half(numbers) => numbers[at].to_f32(),
            Numbers::Single(numbers) => numbers[at],
        };
        Array2::from_shape_fn(rows.shape, |(o, i)| {
            let p = rows.order.as_ref().map_or(i, |order| order[i] as usize);
            let byte = usize::from(rows.bytes[(o * rows.places + p) / rows.per_byte]);
            let level = rows.levels[byte * rows.per_byte + p % rows.per_byte];
            let beside = (o * rows.places + p) / rows.group;
            number(&rows.scales, beside) * (level - rows.zeros.as_ref().map_or(0.0, |z| number(z, beside)))
        })
    }

    #[test]
    fn rows_are_worth_what_the_weight_is() {
        for levels in [Levels::Integers { bits: 8 }, Levels::Integers { bits: 3 }, Levels::Table(NF4)] {
            let most = if levels == (Levels::Integers { bits: 3 }) { 8 } else { 16 };
            for (groups, count) in [
                (Groups::Runs(4), 3),
                (Groups::Runs(5), 2),
                (Groups::Runs(100), 1),
                (Groups::Index(vec![0, 1, 1, 0, 2, 0, 1, 2, 0]), 3),
            ] {
                let codes = Array2::from_shape_fn((4, 9), |(o, i)| ((o * 5 + i * 3) % most) as u8);
                for fraction in [0.25, 0.3] {
                    let scales =
                        Array2::from_shape_fn((4, count), |(o, g)| fraction * (o + 2 * g + 1) as f32);
                    let each = Array2::from_shape_fn((4, count), |(o, g)| (2 * o + g) as u16);
                    for zeros in [Zeros::Same(4), Zeros::Each(each)] {
                        let weight =
                            Quantized::new(codes.clone(), scales.clone(), zeros, levels, groups.clone());
                        let weight = weight.unwrap();
                        assert_eq!(expand(&Rows::new(&weight)), weight.dequantize(), "{levels:?} {groups:?}");
                    }
                }
            }
        }
    }
}
