//! GGML's blocks q4_0 and q8_0: 32 elements that share an f16 scale.
//!
//! ```text
//! q4_0  18 bytes: scale f16, 16 bytes; element j in the low half of byte j, element j + 16 in the high half
//!       W[i] = scale * (code[i] - 8)
//! q8_0  34 bytes: scale f16, 32 signed bytes
//!       W[i] = scale * code[i]
//! ```
//!
//! GGUF files hold them; those are not read here.

use crate::{Error, ErrorKind, Result};
use half::f16;
use ndarray::{Array2, ArrayView2};
use opt_backend::quant::{Groups, Levels, Quantized, Zeros};

/// Elements of a block.
pub const BLOCK: usize = 32;

/// The kinds of blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Kind {
    /// 4 bits: 18 bytes a block.
    Q4_0,
    /// 8 bits: 34 bytes a block.
    Q8_0,
}

impl Kind {
    /// Bytes of a block.
    pub fn block_bytes(self) -> usize {
        match self {
            Kind::Q4_0 => 18,
            Kind::Q8_0 => 34,
        }
    }

    fn bits(self) -> u32 {
        match self {
            Kind::Q4_0 => 4,
            Kind::Q8_0 => 8,
        }
    }

    fn zero(self) -> u8 {
        match self {
            Kind::Q4_0 => 8,
            Kind::Q8_0 => 128,
        }
    }
}

/// Rounds a weight `[out, in]` to blocks as GGML's reference does.
///
/// ```
/// use opt_core::{checkpoint::ggml::{Kind, quantize}, ndarray::Array2};
///
/// let weight = Array2::from_shape_fn((1, 32), |(_, i)| i as f32 - 16.0);
/// let quantized = quantize(weight.view(), Kind::Q8_0)?;
/// assert!((quantized.dequantize()[[0, 5]] + 11.0).abs() < 0.1);
/// # Ok::<(), opt_core::Error>(())
/// ```
///
/// # Errors
/// [`ErrorKind::Option`] unless the inputs are a multiple of [`BLOCK`], and weights and scales (in f16) finite.
pub fn quantize(weight: ArrayView2<'_, f32>, kind: Kind) -> Result<Quantized> {
    let (out, input) = weight.dim();
    if !input.is_multiple_of(BLOCK) {
        let message = format_args!("expected a multiple of {BLOCK} inputs, found {input}");
        return Err(Error::new(ErrorKind::Option, message));
    }
    if let Some(found) = weight.iter().find(|value| !value.is_finite()) {
        return Err(Error::new(ErrorKind::Option, format_args!("expected finite weights, found {found}")));
    }
    let (mut codes, mut scales) = (Vec::with_capacity(out * input), Vec::with_capacity(out * input / BLOCK));
    for row in weight.outer_iter() {
        for block in row.to_vec().chunks(BLOCK) {
            // The value of the largest magnitude, the first of equal ones.
            let largest = block.iter().fold(0f32, |most, v| if v.abs() > most.abs() { *v } else { most });
            let scale = match kind {
                Kind::Q4_0 => largest / -8.0,
                Kind::Q8_0 => largest.abs() / 127.0,
            };
            let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
            codes.extend(block.iter().map(|value| match kind {
                Kind::Q4_0 => (value * inverse + 8.5).clamp(0.0, 15.0) as u8,
                Kind::Q8_0 => ((value * inverse).round().clamp(-127.0, 127.0) + 128.0) as u8,
            }));
            scales.push(f16::from_f32(scale).to_f32());
        }
    }
    build(codes, scales, [out, input], kind).map_err(|e| Error::new(ErrorKind::Option, e))
}

/// Reads the blocks of a weight `[out, in]`, row after row.
///
/// # Errors
/// [`ErrorKind::Checkpoint`] for another number of bytes than the shape takes and scales that are not finite.
pub fn unpack(bytes: &[u8], [out, input]: [usize; 2], kind: Kind) -> Result<Quantized> {
    let expected = out.checked_mul(input / BLOCK).and_then(|blocks| blocks.checked_mul(kind.block_bytes()));
    if !input.is_multiple_of(BLOCK) || expected != Some(bytes.len()) {
        let message = format_args!(
            "expected {} bytes for each {BLOCK} elements of [{out}, {input}], found {} bytes in all",
            kind.block_bytes(),
            bytes.len()
        );
        return Err(Error::new(ErrorKind::Checkpoint, message));
    }
    let (mut codes, mut scales) = (Vec::with_capacity(out * input), Vec::with_capacity(out * input / BLOCK));
    for block in bytes.chunks(kind.block_bytes()) {
        let Some((scale, block)) = block.split_first_chunk() else { break };
        scales.push(f16::from_le_bytes(*scale).to_f32());
        match kind {
            Kind::Q4_0 => {
                codes.extend(block.iter().map(|byte| byte & 15));
                codes.extend(block.iter().map(|byte| byte >> 4));
            }
            Kind::Q8_0 => codes.extend(block.iter().map(|byte| byte.wrapping_add(128))),
        }
    }
    build(codes, scales, [out, input], kind).map_err(|e| Error::new(ErrorKind::Checkpoint, e))
}

/// Writes a weight as blocks, row after row.
///
/// # Errors
/// [`ErrorKind::Option`] for a weight that such blocks cannot hold: other groups than of [`BLOCK`] inputs, other zero
/// points than the kind's, scales that are no f16.
pub fn pack(weight: &Quantized, kind: Kind) -> Result<Vec<u8>> {
    let [_, input] = weight.shape();
    let scales = weight.scales();
    let holds = weight.levels() == Levels::Integers { bits: kind.bits() }
        && *weight.zeros() == Zeros::Same(u16::from(kind.zero()))
        && *weight.groups() == Groups::Runs(BLOCK)
        && input.is_multiple_of(BLOCK)
        && scales.iter().all(|scale| f16::from_f32(*scale).to_f32() == *scale);
    if !holds {
        let message = format_args!(
            "{kind:?}: expected integers of {} bits with zero {}, groups of {BLOCK} and scales in f16",
            kind.bits(),
            kind.zero()
        );
        return Err(Error::new(ErrorKind::Option, message));
    }
    let mut bytes = Vec::with_capacity(scales.len() * kind.block_bytes());
    for (codes, scales) in weight.codes().outer_iter().zip(scales.outer_iter()) {
        for (block, scale) in codes.to_vec().chunks(BLOCK).zip(scales) {
            bytes.extend(f16::from_f32(*scale).to_le_bytes());
            match kind {
                Kind::Q4_0 => {
                    let (low, high) = block.split_at(BLOCK / 2);
                    bytes.extend(low.iter().zip(high).map(|(low, high)| low | high << 4));
                }
                Kind::Q8_0 => bytes.extend(block.iter().map(|code| code.wrapping_sub(128))),
            }
        }
    }
    Ok(bytes)
}

fn build(
    codes: Vec<u8>,
    scales: Vec<f32>,
    [out, input]: [usize; 2],
    kind: Kind,
) -> std::result::Result<Quantized, String> {
    let codes = Array2::from_shape_vec((out, input), codes).map_err(|e| e.to_string())?;
    let scales = Array2::from_shape_vec((out, input / BLOCK), scales).map_err(|e| e.to_string())?;
    let levels = Levels::Integers { bits: kind.bits() };
    Quantized::new(codes, scales, Zeros::Same(u16::from(kind.zero())), levels, Groups::Runs(BLOCK))
        .map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The data and the measure of GGML's own test (tests/test-quantize-fns.cpp): root of the sum of squares over n.
    #[test]
    fn is_as_exact_as_ggml() {
        let weight = Array2::from_shape_fn((1, 4096), |(_, i)| 0.1 + 2.0 * (i as f32).cos());
        for (kind, expected) in [(Kind::Q4_0, 0.00112), (Kind::Q8_0, 7.4e-5)] {
            let found = quantize(weight.view(), kind).unwrap();
            let squares: f64 = (&found.dequantize() - &weight).iter().map(|d| f64::from(*d).powi(2)).sum();
            let error = squares.sqrt() / 4096.0;
            assert!((error / expected - 1.0).abs() < 0.01, "{kind:?}: {error}");
            let bytes = pack(&found, kind).unwrap();
            assert_eq!(bytes.len(), 4096 / BLOCK * kind.block_bytes());
            assert_eq!(unpack(&bytes, [1, 4096], kind).unwrap(), found);
            assert!(unpack(&bytes[1..], [1, 4096], kind).is_err());
            assert!(unpack(&bytes, [2, 4096], kind).is_err());
        }
    }

    #[test]
    fn blocks_of_zeros_and_of_infinities() {
        let zeros = quantize(Array2::zeros((2, 32)).view(), Kind::Q4_0).unwrap();
        assert_eq!(zeros.dequantize(), Array2::<f32>::zeros((2, 32)));
        for kind in [Kind::Q4_0, Kind::Q8_0] {
            for bad in [f32::INFINITY, 1e38] {
                assert!(quantize(Array2::from_elem((1, 32), bad).view(), kind).is_err());
            }
            assert!(quantize(Array2::zeros((1, 31)).view(), kind).is_err());
            assert!(unpack(&[0xff; 34][..kind.block_bytes()], [1, 32], kind).is_err(), "a scale of NaN");
        }
    }
}
