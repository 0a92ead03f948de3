//! Integers: the scale and zero point of a group, and rounding to nearest.

use super::QuantSpec;
use crate::{Error, ErrorKind, Result};
use half::f16;
use ndarray::{Array2, s};
use opt_backend::{
    HostMatrix,
    quant::{Groups, Levels, Quantized, Zeros},
};

/// How the scale of a group is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Rule {
    /// From the least to the largest weight, 0 included.
    MinMax,
    /// Around 0, max |w| on the largest code.
    AbsMax,
    /// Around 0, whichever usual scale errs least.
    Best,
    /// Around 0, as GPTQ's quantizer: 2 max |w| over all codes.
    #[cfg_attr(not(feature = "quantize"), allow(dead_code))]
    Gptq,
}

/// The codes of a group.
#[derive(Debug, Clone, Copy)]
pub(super) struct Grid {
    pub(super) scale: f32,
    pub(super) zero: f32,
    most: f32,
}

impl Grid {
    /// The grid of these weights; none if the scale is to be an f16 and is too large for one.
    pub(super) fn fit(weights: &[f32], bits: u32, rule: Rule, half: bool) -> Option<Self> {
        let most = ((1_u32 << bits) - 1) as f32;
        let middle = (1_u32 << (bits - 1)) as f32;
        let (min, max) = weights.iter().fold((0.0_f32, 0.0_f32), |(min, max), &w| (min.min(w), max.max(w)));
        let largest = max.max(-min);
        let around_zero = |scale: f32| Some(Self { scale: held(scale, half)?, zero: middle, most });
        match rule {
            // GPTQ's quantizer gives a group of zeros the range -1..1.
            Rule::MinMax | Rule::Gptq if largest == 0.0 => {
                let scale = held(2.0 / most, half)?;
                let zero = if rule == Rule::Gptq { middle } else { (1.0 / scale).round_ties_even() };
                Some(Self { scale, zero, most })
            }
            Rule::MinMax => {
                let scale = held((max - min) / most, half)?;
                Some(Self { scale, zero: (-min / scale).round_ties_even().clamp(0.0, most), most })
            }
            Rule::AbsMax => around_zero(largest / (middle - 1.0)),
            Rule::Gptq => around_zero(2.0 * largest / most),
            Rule::Best => {
                let signed = if max > -min { max } else { min };
                let scales = [signed / -middle, largest / (middle - 1.0), 2.0 * largest / most];
                let mut best: Option<(f32, Self)> = None;
                for scale in scales {
                    let grid = around_zero(scale)?;
                    let error = grid.squared_error(weights);
                    if best.is_none_or(|(least, _)| error < least) {
                        best = Some((error, grid));
                    }
                }
                best.map(|(_, grid)| grid)
            }
        }
    }

    /// The code nearest to a weight.
    pub(super) fn code(&self, weight: f32) -> f32 {
        if self.scale == 0.0 {
            return self.zero;
        }
        ((weight / self.scale).round_ties_even() + self.zero).clamp(0.0, self.most)
    }

    /// What a code is worth.
    pub(super) fn value(&self, code: f32) -> f32 {
        self.scale * (code - self.zero)
    }

    fn squared_error(&self, weights: &[f32]) -> f32 {
        weights.iter().map(|&w| (self.value(self.code(w)) - w).powi(2)).sum()
    }
}

/// The least scale that is held in f16: below the least normal number, but with 5 bits of precision yet. Weights that
/// would have smaller ones are next to nothing beside the others of their tensor.
const LEAST: f32 = 1.0 / (1 << 20) as f32;

/// The scale as it will be held; none if it is too large for that.
fn held(scale: f32, half: bool) -> Option<f32> {
    if !half || scale == 0.0 {
        return Some(scale);
    }
    let rounded = f16::from_f32(scale.abs().max(LEAST).copysign(scale));
    rounded.is_finite().then(|| rounded.to_f32())
}

/// Copies row `row` of a weight, all of which must be finite.
pub(super) fn finite_row(weight: &HostMatrix<'_>, row: usize, out: &mut [f32]) -> Result<()> {
    weight.row_f32(row, out);
    match out.iter().position(|w| !w.is_finite()) {
        None => Ok(()),
        Some(column) => {
            let found = out.get(column).copied().unwrap_or(f32::NAN);
            let message = format_args!("expected finite weights, found {found} at [{row}, {column}]");
            Err(Error::new(ErrorKind::Checkpoint, message))
        }
    }
}

/// Rounds a weight to integers.
pub(super) fn quantize(spec: &QuantSpec, weight: HostMatrix<'_>) -> Result<Quantized> {
    if let Some(quantized) = quantize_held(spec, weight, true)? {
        return Ok(quantized);
    }
    let quantized = quantize_held(spec, weight, false)?;
    quantized.ok_or_else(|| Error::new(ErrorKind::Checkpoint, "expected scales that f32 can hold"))
}

/// [`quantize`] with scales in f16 or f32; nothing if they cannot be held so.
fn quantize_held(spec: &QuantSpec, weight: HostMatrix<'_>, half: bool) -> Result<Option<Quantized>> {
    let [out, inputs] = weight.shape();
    let group = spec.groups(inputs)?;
    let bits = spec.format.bits();
    let rule = match (spec.zero_points, bits) {
        (true, _) => Rule::MinMax,
        (false, 8) => Rule::AbsMax,
        (false, _) => Rule::Best,
    };
    let shape = (out, inputs.div_ceil(group));
    let (mut codes, mut scales) = (Array2::<u8>::zeros((out, inputs)), Array2::<f32>::zeros(shape));
    let mut zeros = Array2::<u16>::zeros(if spec.zero_points { shape } else { (0, 0) });
    let mut row = vec![0.0; inputs];
    for o in 0..out {
        finite_row(&weight, o, &mut row)?;
        for (g, weights) in row.chunks(group).enumerate() {
            let Some(grid) = Grid::fit(weights, bits, rule, half) else { return Ok(None) };
            let codes = codes.slice_mut(s![o, g * group..g * group + weights.len()]);
            codes.into_iter().zip(weights).for_each(|(code, &w)| *code = grid.code(w) as u8);
            if let Some(scale) = scales.get_mut((o, g)) {
                *scale = grid.scale;
            }
            if let Some(zero) = zeros.get_mut((o, g)) {
                *zero = grid.zero as u16;
            }
        }
    }
    // Where no scale is a normal number, all of them would be of little precision.
    let largest = scales.iter().fold(0.0_f32, |most, scale| most.max(scale.abs()));
    if half && largest > 0.0 && largest < f16::MIN_POSITIVE.to_f32() {
        return Ok(None);
    }
    let zeros = if spec.zero_points { Zeros::Each(zeros) } else { Zeros::Same(1 << (bits - 1)) };
    Ok(Some(Quantized::new(codes, scales, zeros, Levels::Integers { bits }, Groups::Runs(group))?))
}
