//! AdamW's moments in eight bits.

/// Both moments of [`crate::Train::adamw8`], in 2.7 bytes a parameter, where two tensors in f32 take 8.
///
/// They are quantized in blocks of [`BLOCK`] elements that follow each other in row order (arXiv 2110.02861): an element
/// is a code of a [`DynamicMap`], times the largest magnitude of its block. Tensors hold f32, of which every integer of
/// 24 bits is one, so three codes lie in each: those of elements 3i, 3i + 1 and 3i + 2 of a block are the digits of
/// column i in base 256, lowest first. Digits without an element are 0.
///
/// Tensors of zeros are moments of zero.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Moments8<T> {
    /// Codes of the first moment in [`SIGNED`], `[blocks, PACKED]`.
    pub first: T,
    /// Codes of the second moment in [`UNSIGNED`], `[blocks, PACKED]`.
    pub second: T,
    /// The largest magnitudes of first and second moment in each block, `[blocks, 2]`.
    pub scales: T,
}

/// Elements that are scaled together.
pub const BLOCK: usize = 256;

/// Numbers that hold the codes of a block.
pub const PACKED: usize = BLOCK.div_ceil(3);

impl<T> Moments8<T> {
    /// What `f` makes of each tensor.
    ///
    /// # Errors
    /// The first of `f`.
    pub fn try_map<U, E>(self, mut f: impl FnMut(T) -> Result<U, E>) -> Result<Moments8<U>, E> {
        Ok(Moments8 { first: f(self.first)?, second: f(self.second)?, scales: f(self.scales)? })
    }

    /// What `f` makes of each tensor, lent.
    ///
    /// # Errors
    /// The first of `f`.
    pub fn parts_of<'a, U, E>(&'a self, f: impl FnMut(&'a T) -> Result<U, E>) -> Result<Moments8<U>, E> {
        Moments8 { first: &self.first, second: &self.second, scales: &self.scales }.try_map(f)
    }

    /// First, second and scales.
    pub fn parts(&self) -> [&T; 3] {
        [&self.first, &self.second, &self.scales]
    }
}

impl Moments8<[usize; 2]> {
    /// The shapes for a parameter of this shape.
    #[must_use]
    pub const fn shapes([rows, width]: [usize; 2]) -> Self {
        let blocks = rows.saturating_mul(width).div_ceil(BLOCK);
        Self { first: [blocks, PACKED], second: [blocks, PACKED], scales: [blocks, 2] }
    }
}

/// Which number a code stands for: the dynamic quantization of arXiv 1511.04561, as bitsandbytes' `create_dynamic_map` has
/// it, bit for bit.
///
/// In each of seven decades below 1 the levels are evenly spaced, twice as many as in the decade below.
#[derive(Debug, Clone, PartialEq)]
pub struct DynamicMap {
    /// The number of each code, in ascending order; the last is 1.
    pub levels: [f32; 256],
    /// The middles between neighbours; after the last of them, infinity.
    pub bounds: [f32; 256],
    /// For each bin of magnitudes, how many bounds are below all of it, of numbers of either sign: within it there is at
    /// most one more.
    below: [[u8; BINS]; 2],
}

/// Of -0.993 to 1, for the first moment.
pub static SIGNED: DynamicMap = DynamicMap::new(true);

/// Of 0 to 1, for the second moment.
pub static UNSIGNED: DynamicMap = DynamicMap::new(false);

const DECADES: [f32; 7] = [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0];

/// The end of the `k`-th of `n` parts of 0.1 to 1, as `torch.linspace` has it: from whichever end is nearer.
const fn edge(k: usize, n: usize) -> f32 {
    let step = ((1.0 - 0.1_f32) / n as f32) as f64;
    let edge = if k < n.div_ceil(2) { 0.1_f32 as f64 + step * k as f64 } else { 1.0 - step * (n - k) as f64 };
    edge as f32
}

/// Bits of a number below those that say which bin it is in: seven of the fraction are above them.
const BIN_BITS: u32 = 16;
/// The bin of 2⁻²³, which is below the lowest bound, and that of 1.
const BIN_FIRST: u32 = (127 - 23) << 7;
const BIN_LAST: u32 = 127 << 7;
const BINS: usize = (BIN_LAST - BIN_FIRST + 1) as usize;

/// The least magnitude of a bin.
const fn bin_start(bin: usize) -> f32 {
    f32::from_bits((BIN_FIRST + bin as u32) << BIN_BITS)
}

impl DynamicMap {
    const fn new(signed: bool) -> Self {
        let mut levels = [0.0; 256];
        let zero = if signed { 127 } else { 0 };
        let mut code = zero + 1;
        let mut decade = 0;
        while decade < DECADES.len() {
            let parts = if signed { 1 << decade } else { 2 << decade };
            let mut part = 0;
            while part < parts {
                let middle = (edge(part, parts) + edge(part + 1, parts)) / 2.0;
                levels[code] = DECADES[decade] * middle;
                if signed {
                    levels[2 * zero - code] = -levels[code];
                }
                (code, part) = (code + 1, part + 1);
            }
            decade += 1;
        }
        levels[code] = 1.0;
        let mut bounds = [f32::INFINITY; 256];
        let mut i = 0;
        while i < 255 {
            bounds[i] = (levels[i] + levels[i + 1]) / 2.0;
            i += 1;
        }
        let mut below = [[0; BINS]; 2];
        let (mut positive, mut negative) = (0, 0);
        let mut bin = 0;
        while bin < BINS {
            while bounds[positive] < bin_start(bin) {
                positive += 1;
            }
            below[0][bin] = positive as u8;
            // Upwards here, too: from the bin of the largest magnitudes.
            while bounds[negative] <= -bin_start(BINS - bin) {
                negative += 1;
            }
            below[1][BINS - 1 - bin] = negative as u8;
            bin += 1;
        }
        Self { levels, bounds, below }
    }

    /// The code of the nearest level; of two that are equally near, the lower.
    #[inline(always)]
    pub fn code(&self, x: f32) -> u8 {
        let bin = (x.abs().to_bits() >> BIN_BITS).clamp(BIN_FIRST, BIN_LAST) - BIN_FIRST;
        let below = self.below[usize::from(x < 0.0)][bin as usize];
        below + u8::from(self.bounds[usize::from(below)] < x)
    }

    /// The elements of a block whose largest magnitude is `scale`.
    #[inline(always)]
    pub fn decode(&self, packed: &[f32], scale: f32, values: &mut [f32]) {
        for (three, packed) in values.chunks_mut(3).zip(packed) {
            let digits = (*packed as u32).to_le_bytes();
            for (value, digit) in three.iter_mut().zip(digits) {
                *value = self.levels[usize::from(digit)] * scale;
            }
        }
    }

    /// Writes the codes of a block's elements; gives their largest magnitude.
    #[inline(always)]
    pub fn encode(&self, values: &[f32], packed: &mut [f32]) -> f32 {
        // Eight maxima side by side, and codes apart from packs: for the compiler to vectorise.
        let (eights, rest) = values.as_chunks::<8>();
        let mut most = [0.0_f32; 8];
        for eight in eights {
            most.iter_mut().zip(eight).for_each(|(most, v)| *most = most.max(v.abs()));
        }
        let scale = most.iter().chain(rest).fold(0.0_f32, |most, v| most.max(v.abs()));
        // Where all are zero, so that zero times it is.
        let inverse = scale.max(f32::MIN_POSITIVE).recip();
        let mut codes = [0; 3 * PACKED];
        codes.iter_mut().zip(values).for_each(|(code, v)| *code = self.code(v * inverse));
        for (packed, [low, middle, high]) in packed.iter_mut().zip(codes.as_chunks().0) {
            *packed = u32::from_le_bytes([*low, *middle, *high, 0]) as f32;
        }
        scale
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_ascend_and_are_their_own_codes() {
        for map in [&SIGNED, &UNSIGNED] {
            assert!(map.levels.is_sorted_by(|a, b| a < b) && map.bounds.is_sorted_by(|a, b| a < b));
            for (code, level) in map.levels.iter().enumerate() {
                assert_eq!(usize::from(map.code(*level)), code);
            }
            let edges = (0..BINS).map(bin_start).chain(map.bounds).filter(|edge| edge.is_finite());
            for x in edges.flat_map(|edge| [edge, edge.next_up(), edge.next_down()]) {
                for x in [x, -x, x / 3.0, -x / 3.0] {
                    let below = map.bounds.iter().filter(|bound| **bound < x).count();
                    assert_eq!(usize::from(map.code(x)), below, "{x:e}");
                }
            }
            assert_eq!(map.code(0.0), if map == &SIGNED { 127 } else { 0 });
            assert_eq!([map.code(-2.0), map.code(f32::INFINITY)], [0, 255]);
        }
    }

    #[test]
    fn blocks_keep_what_the_map_has() {
        for (map, count) in [(&SIGNED, 256), (&UNSIGNED, 256), (&SIGNED, 7), (&UNSIGNED, 1)] {
            let values: Vec<f32> = (0..count).map(|i| 3.0 * map.levels[255 - i * 5 % 256]).collect();
            let (mut packed, mut decoded) = ([9.0; PACKED], vec![0.0; count]);
            let scale = map.encode(&values, &mut packed);
            assert_eq!(scale, 3.0);
            map.decode(&packed, scale, &mut decoded);
            assert_eq!(decoded, values);
            assert!(packed[count.div_ceil(3)..].iter().all(|v| *v == 0.0));
            assert!(packed.iter().all(|v| *v < 16_777_216.0 && v.fract() == 0.0));
        }
    }

    #[test]
    fn blocks_of_zeros_and_of_the_smallest_numbers() {
        let mut packed = [0.0; PACKED];
        for tiny in [0.0, 1e-45, 1e-39, 1.2e-38] {
            let mut decoded = [1.0; BLOCK];
            let scale = SIGNED.encode(&[0.0, tiny, -tiny, 0.0], &mut packed);
            assert_eq!(scale, tiny);
            SIGNED.decode(&packed, scale, &mut decoded);
            assert!(decoded.iter().all(|v| v.abs() <= tiny));
        }
        let mut decoded = [1.0; BLOCK];
        SIGNED.decode(&[0.0; PACKED], 0.0, &mut decoded);
        assert!(decoded.iter().all(|v| *v == 0.0));
    }
}
