//! nf4 and fp4, as bitsandbytes rounds to them.

use super::{
    QuantFormat, QuantSpec,
    rows::{Rounded, each_row},
};
use crate::Result;
use ndarray::Array2;
use opt_backend::{
    HostMatrix,
    quant::{FP4, Groups, Levels, NF4, Quantized, Zeros},
};

/// Scales that share a scale of their own under double quantization.
const NESTED_BLOCK: usize = 256;

/// Rounds a weight to the nearest levels. Ties go to the level below (for fp4: nearer to 0), as in bitsandbytes.
pub(super) fn quantize(spec: &QuantSpec, weight: HostMatrix<'_>) -> Result<Quantized> {
    let group = spec.groups(weight.shape()[1])?;
    let table = if spec.format == QuantFormat::Nf4 { NF4 } else { FP4 };
    let nearest = Nearest::new(&table);
    let Rounded { codes, mut scales, .. } = each_row(&weight, group, |weights, row| {
        let groups = weights.chunks(group).zip(row.codes.chunks_mut(group));
        for ((weights, codes), scale) in groups.zip(row.scales) {
            *scale = weights.iter().fold(0.0_f32, |most, w| most.max(w.abs()));
            // The levels span -1..1, and so do weights over the largest of them.
            let divisor = if *scale == 0.0 { 1.0 } else { *scale };
            codes.iter_mut().zip(weights).for_each(|(code, &w)| *code = nearest.code(w / divisor));
        }
    })?;
    if spec.double_quant {
        // Codes were chosen by the scales as they were, as bitsandbytes chooses them.
        double_quantize(&mut scales);
    }
    Ok(Quantized::new(codes, scales, Zeros::Same(0), Levels::Table(table), Groups::Runs(group))?)
}

/// Finds the nearest of some levels.
struct Nearest {
    /// In ascending order, with their codes.
    codes: Vec<u8>,
    /// Between one level and the next.
    midpoints: Vec<f32>,
    /// Whether a level and its negative differ in the highest bit: then magnitudes are looked up.
    signed: bool,
}

impl Nearest {
    fn new(table: &[f32; 16]) -> Self {
        // fp4 has a sign bit and two zeros; the order of its magnitudes is found, and the sign put back.
        let signed = table.iter().filter(|level| **level == 0.0).count() == 2;
        let count = if signed { 8 } else { 16 };
        let mut levels: Vec<(f32, u8)> = table.iter().take(count).copied().zip(0..).collect();
        levels.sort_by(|a, b| a.0.total_cmp(&b.0));
        let next = levels.iter().skip(1);
        let midpoints = levels.iter().zip(next).map(|(a, b)| (a.0 + b.0) / 2.0).collect();
        Self { codes: levels.into_iter().map(|(_, code)| code).collect(), midpoints, signed }
    }

    fn code(&self, x: f32) -> u8 {
        let magnitude = if self.signed { x.abs() } else { x };
        let place = self.midpoints.partition_point(|midpoint| *midpoint < magnitude);
        let code = self.codes.get(place).copied().unwrap_or_default();
        if self.signed && x < 0.0 { code | 8 } else { code }
    }
}

/// Rounds scales to what 8 bits hold of them: their mean apart, in blocks of [`NESTED_BLOCK`] the nearest value of the
/// dynamic map times the block's largest magnitude.
fn double_quantize(scales: &mut Array2<f32>) {
    let count = scales.len().max(1) as f64;
    let offset = (scales.iter().map(|&s| f64::from(s)).sum::<f64>() / count) as f32;
    let map = dynamic_map();
    let Some(scales) = scales.as_slice_mut() else { return };
    for block in scales.chunks_mut(NESTED_BLOCK) {
        let largest = block.iter().fold(0.0_f32, |most, s| most.max((s - offset).abs()));
        for scale in block {
            let x = if largest == 0.0 { 0.0 } else { (*scale - offset) / largest };
            *scale = nearest_in(&map, x) * largest + offset;
        }
    }
}

/// bitsandbytes' signed dynamic map of 8 bits (arXiv 2110.02861), ascending: for each of seven decades below 1 twice as
/// many values as for the one before, evenly spaced, with both signs; and 0 and 1.
fn dynamic_map() -> Vec<f32> {
    let mut map = vec![0.0, 1.0];
    for decade in 0..7_i32 {
        let count = 1 << decade;
        let step = 0.9 / f64::from(count);
        for i in 0..count {
            let value = (10_f64.powi(decade - 6) * (0.1 + (f64::from(i) + 0.5) * step)) as f32;
            map.extend([value, -value]);
        }
    }
    map.sort_by(f32::total_cmp);
    map
}

/// The value of an ascending list that is nearest to `x`, the lower one of two.
fn nearest_in(values: &[f32], x: f32) -> f32 {
    let above = values.partition_point(|value| *value < x);
    let below = above.checked_sub(1).and_then(|i| values.get(i));
    match (below, values.get(above)) {
        (Some(&below), Some(&above)) => {
            if above - x < x - below {
                above
            } else {
                below
            }
        }
        (Some(&value), None) | (None, Some(&value)) => value,
        (None, None) => 0.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_dynamic_map_has_256_values() {
        let map = dynamic_map();
        assert_eq!(map.len(), 256);
        assert!(map.is_sorted());
        // Of bitsandbytes' create_dynamic_map(): the ends and the middle.
        assert!((map[0] + 0.992_968_7).abs() < 1e-6 && map[255] == 1.0 && map[127] == 0.0);
        assert!((map[128] - 5.5e-7).abs() < 1e-12);
    }
}
