//! Integers: the scale and zero point of a group, and rounding to nearest.

use super::{
    QuantSpec,
    rows::{Rounded, each_row},
};
use crate::{Error, ErrorKind, Result};
use half::f16;
use opt_backend::{
    HostMatrix,
    quant::{Groups, Levels, Quantized, Zeros},
};
use std::sync::atomic::{AtomicBool, Ordering};

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
                let [first, second, third] = scales.map(around_zero);
                let grids = [first?, second?, third?];
                let mut best: Option<(f32, Self)> = None;
                for (error, grid) in squared_errors(&grids, weights).into_iter().zip(grids) {
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
        // A code has at most eight bits, so that this is cut off behind what counts, and rounded as the sum is.
        let steps = (weight / self.scale).clamp(-1024.0, 1024.0);
        ((steps + INTEGERS) - INTEGERS + self.zero).clamp(0.0, self.most)
    }

    /// What a code is worth.
    pub(super) fn value(&self, code: f32) -> f32 {
        self.scale * (code - self.zero)
    }
}

/// Sums with this number have no bits behind the point, and are rounded to even: as [`f32::round_ties_even`], which
/// without SSE4.1 is a call for each number.
const INTEGERS: f32 = (3 << 22) as f32;

/// The sums of squared errors of weights, each in their order.
fn squared_errors<const N: usize>(grids: &[Grid; N], weights: &[f32]) -> [f32; N] {
    const SOME: usize = 64;
    let mut sums = [0.0; N];
    for weights in weights.chunks(SOME) {
        let mut squares = [[0.0; SOME]; N];
        for (squares, grid) in squares.iter_mut().zip(grids) {
            for (square, &w) in squares.iter_mut().zip(weights) {
                *square = (grid.value(grid.code(w)) - w).powi(2);
            }
        }
        for i in 0..weights.len() {
            for (sum, squares) in sums.iter_mut().zip(&squares) {
                *sum += squares[i];
            }
        }
    }
    sums
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
    let group = spec.groups(weight.shape()[1])?;
    let bits = spec.format.bits();
    let rule = match (spec.zero_points, bits) {
        (true, _) => Rule::MinMax,
        (false, 8) => Rule::AbsMax,
        (false, _) => Rule::Best,
    };
    let fits = AtomicBool::new(true);
    let Rounded { codes, scales, zeros } = each_row(&weight, group, |weights, row| {
        let groups = weights.chunks(group).zip(row.codes.chunks_mut(group));
        for ((weights, codes), (scale, zero)) in groups.zip(row.scales.iter_mut().zip(row.zeros)) {
            let Some(grid) = Grid::fit(weights, bits, rule, half) else {
                return fits.store(false, Ordering::Relaxed);
            };
            codes.iter_mut().zip(weights).for_each(|(code, &w)| *code = grid.code(w) as u8);
            (*scale, *zero) = (grid.scale, grid.zero as u16);
        }
    })?;
    if !fits.into_inner() {
        return Ok(None);
    }
    // Where no scale is a normal number, all of them would be of little precision.
    let largest = scales.iter().fold(0.0_f32, |most, scale| most.max(scale.abs()));
    if half && largest > 0.0 && largest < f16::MIN_POSITIVE.to_f32() {
        return Ok(None);
    }
    let zeros = if spec.zero_points { Zeros::Each(zeros) } else { Zeros::Same(1 << (bits - 1)) };
    Ok(Some(Quantized::new(codes, scales, zeros, Levels::Integers { bits }, Groups::Runs(group))?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_the_nearest_ones_and_ties_even() {
        for (zero, most) in [(128.0, 255.0), (8.0, 15.0), (0.0, 255.0)] {
            for scale in [1.0, -0.25, 3e-5, 65504.0] {
                let grid = Grid { scale, zero, most };
                let quarters = (-5000..5000).map(|i| i as f32 * 0.25);
                let far = [1e6, -1e9, 3e37, f32::MAX, f32::MIN, 1e-40];
                for steps in quarters.chain(far) {
                    let weight = steps * scale;
                    let expected = ((weight / scale).round_ties_even() + zero).clamp(0.0, most);
                    assert_eq!(grid.code(weight), expected, "{weight} of {scale} around {zero}");
                }
            }
        }
    }
}
