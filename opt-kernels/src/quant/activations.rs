//! Rows of activations in one or two bytes.

use super::{Compute, FINE, RUN};
use crate::{
    Machine,
    memory::{Shared, reserve},
    simd::{Kernel, Simd},
};
use opt_backend::Result;

/// Rows `[rows, places]`: x ≈ scale * code per row and run of [`RUN`] places. A code is one byte, from -127 to 127, or two:
/// [`FINE`] times the first and the second.
///
/// Rows are interleaved by tiles of [`Rows::tile`], so that a kernel reads one stream; missing rows of the last tile are
/// zeros.
pub(super) struct Rows {
    /// `[tiles, runs, bytes, RUN / 4, tile, 4]`
    pub(super) codes: Vec<i8>,
    /// Bytes of a code: 1 or 2.
    pub(super) bytes: usize,
    /// `[tiles, runs, tile]`
    pub(super) scales: Vec<f32>,
    /// The sum of each run's codes, `[tiles, runs, tile]`.
    pub(super) sums: Vec<i32>,
    /// Rows of a tile.
    pub(super) tile: usize,
    /// Places of a row: a multiple of [`RUN`].
    pub(super) places: usize,
    /// What was kept out of the codes: row, place and value, in their order.
    pub(super) outliers: Vec<(usize, usize, f32)>,
}

impl Rows {
    pub(super) fn runs(&self) -> usize {
        self.places / RUN
    }

    /// Quantizes `[rows, width]`. Elements of at least `threshold` in magnitude are set aside.
    pub(super) fn new(
        machine: Machine<'_>,
        x: &[f32],
        [rows, width]: [usize; 2],
        tile: usize,
        threshold: Option<f32>,
    ) -> Result<Self> {
        let places = width.next_multiple_of(RUN);
        let (runs, padded) = (places / RUN, rows.next_multiple_of(tile));
        let bytes = if machine.compute == Compute::Int8 { 1 } else { 2 };
        let mut codes = reserve("linear", padded * places * bytes)?;
        codes.resize(padded * places * bytes, 0_i8);
        let mut scales = reserve("linear", padded * runs)?;
        scales.resize(padded * runs, 0.0_f32);
        let mut sums = reserve("linear", padded * runs)?;
        sums.resize(padded * runs, 0_i32);
        let outliers = match threshold {
            Some(threshold) => {
                let each = x.iter().enumerate().filter(|(_, x)| x.abs() >= threshold);
                each.map(|(at, &x)| (at / width, at % width, x)).collect()
            }
            None => Vec::new(),
        };
        let threshold = threshold.unwrap_or(f32::INFINITY);
        let targets = (Shared(codes.as_mut_ptr()), Shared(scales.as_mut_ptr()), Shared(sums.as_mut_ptr()));
        let body = |t: usize| {
            let (codes, scales, sums) = targets;
            // SAFETY: what belongs to this tile belongs to this task alone.
            let (codes, scales, sums) = unsafe {
                (
                    std::slice::from_raw_parts_mut(
                        codes.at(t * tile * places * bytes),
                        tile * places * bytes,
                    ),
                    std::slice::from_raw_parts_mut(scales.at(t * tile * runs), tile * runs),
                    std::slice::from_raw_parts_mut(sums.at(t * tile * runs), tile * runs),
                )
            };
            for row in t * tile..rows.min((t + 1) * tile) {
                let x = &x[row * width..][..width];
                let (lane, codes, scales, sums) = (row - t * tile, &mut *codes, &mut *scales, &mut *sums);
                machine.level.run(Quantize { x, threshold, lane, tile, bytes, codes, scales, sums });
            }
        };
        // A region costs more than a few rows.
        let tiles = padded / tile;
        if rows * width < 1 << 14 {
            (0..tiles).for_each(body);
        } else {
            machine.pool.run(tiles, &body)?;
        }
        Ok(Self { codes, bytes, scales, sums, tile, places, outliers })
    }
}

/// One row into its lane of a tile.
struct Quantize<'a> {
    x: &'a [f32],
    threshold: f32,
    lane: usize,
    tile: usize,
    bytes: usize,
    codes: &'a mut [i8],
    scales: &'a mut [f32],
    sums: &'a mut [i32],
}

impl Kernel for Quantize<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { lane, tile, bytes, .. } = self;
        let runs = self.codes.chunks_exact_mut(RUN * tile * bytes).zip(self.scales.chunks_exact_mut(tile));
        for (i, ((codes, scales), sums)) in runs.zip(self.sums.chunks_exact_mut(tile)).enumerate() {
            let mut copy = [0.0; RUN];
            let x: &[f32; RUN] = match self.x.get(i * RUN..).and_then(<[f32]>::first_chunk) {
                Some(x) if self.threshold.is_infinite() => x,
                _ => {
                    for (to, &x) in copy.iter_mut().zip(&self.x[i * RUN..]) {
                        // An infinity is no outlier where there are none.
                        let outlier = self.threshold.is_finite() && x.abs() >= self.threshold;
                        *to = if outlier { 0.0 } else { x };
                    }
                    &copy
                }
            };
            // As integers, magnitudes keep their order, and NaN is the largest: it must not get lost.
            let mut largest = 0;
            for x in x {
                largest = largest.max(x.to_bits() & 0x7fff_ffff);
            }
            let largest = f32::from_bits(largest);
            // Codes of 0 times a scale that is not finite are NaN, as the product would be; what is too small to have
            // a reciprocal is 0.
            let inverse = if largest.is_finite() && largest > 1e-36 { 127.0 / largest } else { 0.0 };
            let unit = if bytes == 1 { 127.0 } else { 127.0 * FINE as f32 };
            scales[lane] = if largest > 1e-36 || !largest.is_finite() { largest / unit } else { 0.0 };
            if inverse == 0.0 {
                continue;
            }
            let mut integers = [0.0; RUN];
            for byte in 0..bytes {
                let mut sum = s.splat(0.0);
                // SAFETY: a run is a whole number of vectors.
                unsafe {
                    for at in (0..RUN).step_by(S::LANES) {
                        let mut x = s.mul(s.load(x.as_ptr().add(at)), s.splat(inverse));
                        if byte == 1 {
                            let first = s.load(integers.as_ptr().add(at));
                            x = s.mul(s.sub(x, first), s.splat(FINE as f32));
                        }
                        let integer = s.round(x);
                        s.store(integers.as_mut_ptr().add(at), integer);
                        sum = s.add(sum, integer);
                    }
                }
                let unit = if byte == 0 && bytes == 2 { FINE } else { 1 };
                sums[lane] += unit * s.sum(sum) as i32;
                // SAFETY: by the choice of `inverse`, no integer is larger than 127.
                unsafe { put(&integers, &mut codes[byte * RUN * tile..], lane, tile) };
            }
        }
    }
}

/// Puts integers into lane `lane` of `codes`, `[RUN / 4, tile, 4]`.
///
/// # Safety
/// They are within -127..=127.
#[inline(always)]
unsafe fn put(integers: &[f32; RUN], codes: &mut [i8], lane: usize, tile: usize) {
    let mut bytes = [0; RUN];
    for (byte, x) in bytes.iter_mut().zip(integers) {
        // SAFETY: the caller's promise.
        *byte = unsafe { x.to_int_unchecked::<i32>() } as i8;
    }
    for (to, quad) in codes.chunks_exact_mut(4 * tile).zip(bytes.chunks_exact(4)) {
        to[4 * lane..4 * lane + 4].copy_from_slice(quad);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Compute, memory::Guards, pool::Pool, simd::SimdLevel};

    #[test]
    fn every_level_gives_the_same_codes() {
        let (pool, guards) = (Pool::new(1).unwrap(), Guards::new(false));
        let mut x: Vec<f32> = (0..4 * 70).map(|i| ((i * 37 % 101) as f32 - 50.0) * 0.37).collect();
        x[3] = 0.0;
        x[40..70].fill(0.0);
        x[66] = f32::INFINITY;
        x[71] = 1e30;
        x[150] = f32::NAN;
        x[250] = 1e-41;
        let quantize = |level, compute| {
            let machine = Machine { pool: &pool, guards: &guards, level, compute };
            Rows::new(machine, &x, [4, 70], 3, None).unwrap()
        };
        // Two bytes say what one says, and the rest.
        let fine = quantize(SimdLevel::Scalar, Compute::Int16);
        for (row, x) in x.chunks(70).enumerate() {
            for (place, &x) in x.iter().enumerate() {
                let (tile, lane) = (row / 3, row % 3);
                let scale = fine.scales[(tile * 3 + place / RUN) * 3 + lane];
                let at = |byte: usize| {
                    let run = (tile * 3 + place / RUN) * 2 + byte;
                    i32::from(fine.codes[((run * 8 + place % RUN / 4) * 3 + lane) * 4 + place % 4])
                };
                let code = FINE * at(0) + at(1);
                if scale.is_finite() {
                    assert!((x - scale * code as f32).abs() <= scale * 0.6 + x.abs() * 1e-6 + 1e-36, "{x}");
                }
            }
        }
        let expected = quantize(SimdLevel::Scalar, Compute::Int8);
        assert_eq!((expected.places, expected.runs()), (96, 3));
        for (row, x) in x.chunks(70).enumerate() {
            for (place, &x) in x.iter().enumerate() {
                let (tile, lane) = (row / 3, row % 3);
                let scale = expected.scales[(tile * 3 + place / RUN) * 3 + lane];
                let code = expected.codes[((tile * 24 + place / 4) * 3 + lane) * 4 + place % 4];
                if scale.is_finite() {
                    assert!((x - scale * f32::from(code)).abs() <= scale * 0.5001 + 1e-36, "{x}");
                }
                assert!(code != i8::MIN);
            }
        }
        // x[150] is in row 2, run 0.
        assert!(expected.scales[2].is_nan());
        // x[66] is in row 0, run 2, which is not whole.
        assert!(expected.scales[6].is_infinite());
        for level in SimdLevel::ALL.into_iter().filter(|level| level.is_available()) {
            let found = quantize(level, Compute::Int8);
            assert_eq!(quantize(level, Compute::Int16).codes, fine.codes, "{level}");
            assert_eq!((&found.codes, &found.sums), (&expected.codes, &expected.sums), "{level}");
            let bits = |rows: &Rows| rows.scales.iter().map(|s| s.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&found), bits(&expected), "{level}");
        }
    }

    #[test]
    fn outliers_are_set_aside() {
        let (pool, guards) = (Pool::new(1).unwrap(), Guards::new(false));
        let machine =
            Machine { pool: &pool, guards: &guards, level: SimdLevel::Scalar, compute: Compute::Int8 };
        let rows = Rows::new(machine, &[1.0, -7.0, 2.0, 6.0], [2, 2], 1, Some(6.0)).unwrap();
        assert_eq!(rows.outliers, [(0, 1, -7.0), (1, 1, 6.0)]);
        assert_eq!((rows.codes[0], rows.codes[1], rows.codes[32], rows.codes[33]), (127, 0, 127, 0));
    }
}
