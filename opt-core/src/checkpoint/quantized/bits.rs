//! Codes packed into words and bytes.

use ndarray::{Array2, ArrayView2};

/// Numbers packed together: this many, whatever their bits, fill whole 32-bit words.
pub(super) const UNIT: usize = 32;

/// What `UNIT` codes of 8 bits take.
type Words = [u32; 8];

/// The codes of one unit: a stream of `bits` a code, the lowest bits of a word first. Codes of 3 bits straddle words.
fn unpack_unit(words: &Words, bits: u32) -> [u8; UNIT] {
    let mask = (1_u64 << bits) - 1;
    std::array::from_fn(|code| {
        let at = code as u32 * bits;
        let word = |word: u32| u64::from(words.get(word as usize).copied().unwrap_or_default());
        // At most 8 bits, of which the lowest is in the first word.
        let two = word(at / 32) | word(at / 32 + 1) << 32;
        (two >> (at % 32) & mask) as u8
    })
}

fn pack_unit(codes: &[u8; UNIT], bits: u32) -> Words {
    let mut words = Words::default();
    for (at, code) in (0..).step_by(bits as usize).zip(codes) {
        let two = u64::from(*code) << (at % 32);
        let first = at / 32;
        // The second half of a code in the last word is empty.
        for (word, half) in words.iter_mut().skip(first).zip([two as u32, (two >> 32) as u32]) {
            *word |= half;
        }
    }
    words
}

/// Units handled together, so that both sides stay in the cache.
const TILE: usize = 32;

/// Unpacks `[rows / 32 * bits, columns]`, packed down the columns, into `[columns, rows]`: GPTQ's weight.
///
/// Rows must be a multiple of [`UNIT`].
pub(super) fn unpack_down(packed: ArrayView2<'_, i32>, bits: u32) -> Array2<u8> {
    let columns = packed.ncols();
    let units = packed.nrows() / bits as usize;
    let mut codes = Array2::zeros((columns, units * UNIT));
    for first in (0..columns).step_by(TILE) {
        for unit in 0..units {
            for column in first..columns.min(first + TILE) {
                let mut words = Words::default();
                let row = unit * bits as usize;
                for (offset, word) in words.iter_mut().take(bits as usize).enumerate() {
                    *word = packed.get((row + offset, column)).map_or(0, |word| *word as u32);
                }
                let target = codes.row_mut(column);
                let target = target.into_slice().and_then(|row| row.get_mut(unit * UNIT..(unit + 1) * UNIT));
                if let Some(target) = target {
                    target.copy_from_slice(&unpack_unit(&words, bits));
                }
            }
        }
    }
    codes
}

/// The inverse of [`unpack_down`].
pub(super) fn pack_down(codes: ArrayView2<'_, u8>, bits: u32) -> Array2<i32> {
    let (columns, rows) = codes.dim();
    let mut packed = Array2::zeros((rows / UNIT * bits as usize, columns));
    for (column, codes) in codes.outer_iter().enumerate() {
        for unit in 0..rows / UNIT {
            let unit_codes = std::array::from_fn(|i| codes.get(unit * UNIT + i).copied().unwrap_or_default());
            for (offset, word) in pack_unit(&unit_codes, bits).iter().take(bits as usize).enumerate() {
                if let Some(target) = packed.get_mut((unit * bits as usize + offset, column)) {
                    *target = *word as i32;
                }
            }
        }
    }
    packed
}

/// Unpacks `[rows, columns / 32 * bits]`, packed along the rows, into `[columns, rows]`: GPTQ's zero points.
pub(super) fn unpack_along(packed: ArrayView2<'_, i32>, bits: u32) -> Array2<u8> {
    unpack_down(packed.reversed_axes(), bits).t().as_standard_layout().into_owned()
}

/// The inverse of [`unpack_along`].
pub(super) fn pack_along(codes: ArrayView2<'_, u8>, bits: u32) -> Array2<i32> {
    pack_down(codes.reversed_axes(), bits).t().as_standard_layout().into_owned()
}

/// Two codes a byte: which of a pair is in the low half.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Nibbles {
    LowFirst,
    HighFirst,
}

/// `count` codes out of bytes that hold two each. Bytes that are missing read as 0.
pub(super) fn unpack_nibbles(bytes: &[u8], count: usize, order: Nibbles) -> Vec<u8> {
    let pair = |byte: &u8| match order {
        Nibbles::LowFirst => [byte & 15, byte >> 4],
        Nibbles::HighFirst => [byte >> 4, byte & 15],
    };
    let mut codes: Vec<u8> = bytes.iter().take(count.div_ceil(2)).flat_map(pair).collect();
    codes.resize(count, 0);
    codes
}

/// The inverse of [`unpack_nibbles`]; the second half of an odd number's last byte is 0.
pub(super) fn pack_nibbles(codes: impl IntoIterator<Item = u8>, order: Nibbles) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut codes = codes.into_iter();
    while let Some(first) = codes.next() {
        let second = codes.next().unwrap_or_default();
        bytes.push(match order {
            Nibbles::LowFirst => first | second << 4,
            Nibbles::HighFirst => first << 4 | second,
        });
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_bits_straddle_words() {
        // The 11th code (index 10) has two bits in the first word and one in the second, the 22nd one and two.
        let mut codes = [0; UNIT];
        (codes[10], codes[21]) = (0b101, 0b110);
        let words = pack_unit(&codes, 3);
        assert_eq!(words[..4], [1 << 30, 1, 0b11, 0]);
        assert_eq!(unpack_unit(&words, 3), codes);
    }

    #[test]
    fn what_is_packed_comes_back() {
        for bits in [2, 3, 4, 8] {
            let codes =
                Array2::from_shape_fn((33, 96), |(o, i)| ((o * 41 + i * 7) as u32 % (1 << bits)) as u8);
            let packed = pack_down(codes.view(), bits);
            assert_eq!(packed.dim(), (96 / 32 * bits as usize, 33));
            assert_eq!(unpack_down(packed.view(), bits), codes);
            let along = pack_along(codes.t(), bits);
            assert_eq!(along.dim(), (33, 96 / 32 * bits as usize));
            assert_eq!(unpack_along(along.view(), bits), codes.t());
        }
        let zeros = Array2::from_shape_fn((64, 3), |(o, g)| ((o + g) % 16) as u8);
        let packed = pack_along(zeros.view(), 4);
        assert_eq!(packed.dim(), (3, 8));
        assert_eq!(unpack_along(packed.view(), 4), zeros);
    }

    #[test]
    fn nibbles() {
        assert_eq!(unpack_nibbles(&[0x21, 0x03], 3, Nibbles::LowFirst), [1, 2, 3]);
        assert_eq!(unpack_nibbles(&[0x21, 0x30], 3, Nibbles::HighFirst), [2, 1, 3]);
        assert_eq!(pack_nibbles([1, 2, 3], Nibbles::LowFirst), [0x21, 0x03]);
        assert_eq!(pack_nibbles([1, 2, 3], Nibbles::HighFirst), [0x12, 0x30]);
    }
}
