//! Quantized weights in device memory: codes in words and, in a second buffer, what they are worth. `packed.wgsl` says
//! how it lies there.

use crate::{
    gpu::Gpu,
    kernels::Format,
    pool::Buffer,
    template::Defines,
    weights::{Held, Matrix, MatrixPart},
};
use half::f16;
use opt_backend::{
    Error, ErrorKind, Result,
    ndarray::{Array1, Array2, ArrayView2, s},
    quant::{Levels, Quantized, Regular, Zeros},
};
use std::{borrow::Cow, ops::Range, sync::Arc};

/// Codes that kernels take at a time: groups are made multiples of it.
const STEP: usize = 8;
/// Bytes that are packed before they are uploaded.
const PIECE: usize = 8 << 20;

/// What decides the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Packed {
    /// Bits of a code: 4 or 8.
    pub(crate) bits: u32,
    /// Whether codes stand for levels; for integers otherwise.
    pub(crate) table: bool,
    /// Whether every scale has a zero point.
    pub(crate) zeros: bool,
    /// Whether scales and zero points are held as f16.
    pub(crate) half: bool,
    /// Words that a thread reads at once: 1, 2 or 4.
    vector: u32,
}

impl Packed {
    /// Words of four scales.
    pub(crate) fn entry(self) -> usize {
        if self.half { 2 } else { 4 }
    }

    /// Entries before the first scale.
    pub(crate) fn header(self) -> usize {
        1 + if self.table { 16 / self.entry() } else { 0 }
    }

    /// Codes of a word.
    fn codes(self) -> usize {
        32 / self.bits as usize
    }

    /// The same, for kernels that read single words.
    pub(crate) fn single(self) -> Self {
        Self { vector: 1, ..self }
    }

    /// What shaders need to know.
    pub(crate) fn define(self, defines: &mut Defines) {
        let on = |holds: bool| u32::from(holds).to_string();
        let words = |count| {
            let name = match count {
                1 => "u32",
                2 => "vec2<u32>",
                _ => "vec4<u32>",
            };
            name.to_owned()
        };
        defines.insert("PACKED", on(true));
        defines.insert("NATIVE", on(false));
        defines.insert("BITS8", on(self.bits == 8));
        defines.insert("TABLE", on(self.table));
        defines.insert("ZEROS", on(self.zeros));
        defines.insert("HALF", on(self.half));
        defines.insert("VECTOR", self.vector.to_string());
        defines.insert("ONE_WORD", on(self.vector == 1));
        defines.insert("QUAD", words(self.vector));
        defines.insert("ENTRY", words(self.entry() as u32));
        defines.insert("WORD_QUADS", (self.codes() / 4).to_string());
        defines.insert("HEADER", self.header().to_string());
    }

    /// All there can be.
    #[cfg(test)]
    pub(crate) fn all() -> impl Iterator<Item = Self> {
        let kinds =
            [(4, false, false), (4, false, true), (4, true, false), (8, false, false), (8, false, true)];
        kinds.into_iter().flat_map(|(bits, table, zeros)| {
            [false, true]
                .into_iter()
                .flat_map(move |half| [1, 2, 4].map(move |vector| Self { bits, table, zeros, half, vector }))
        })
    }
}

/// The order of a row's codes where it is not that of its elements.
pub(crate) struct Order {
    /// The element at each place, [`Regular::PADDING`] for none.
    pub(crate) inputs: Vec<u32>,
    /// The same for kernels.
    pub(crate) buffer: Buffer,
    /// For kernels that go the other way: the place of each element, in whole quads.
    pub(crate) back: Buffer,
}

impl Order {
    /// Codes of a row.
    pub(crate) fn places(&self) -> usize {
        self.inputs.len()
    }
}

/// How a quantized matrix lies in memory.
#[derive(Debug, Clone)]
pub(crate) struct Layout {
    pub(crate) packed: Packed,
    /// Groups of a row.
    pub(crate) groups: usize,
    /// Codes of a group.
    pub(crate) group: usize,
    /// Whether biases follow the scales.
    bias: bool,
    /// Words of the list of places, for tables in another order.
    places: usize,
    /// What all scales are multiples of, a power of two.
    pub(crate) unit: f32,
    /// The zero point where there is one for all.
    pub(crate) zero: u16,
    pub(crate) levels: [f32; 16],
}

/// Rows of a matrix that lie in one pair of buffers, and the bytes of these.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Extent {
    rows: Range<usize>,
    codes: u64,
    parameters: u64,
}

/// The power of two by which scales become numbers that f16 holds, none of them subnormal (which GPUs may take for
/// zero); 1 if there is none, and whether there is.
fn unit(scales: &Array2<f32>) -> (f32, bool) {
    let largest = scales.iter().fold(0f32, |most, scale| most.max(scale.abs()));
    if largest == 0.0 {
        return (1.0, true);
    }
    // The largest lands in 2^14..2^15.
    let exponent = (largest.to_bits() >> 23) as i32 - 127;
    let shift = 14 - exponent;
    if !(-126..=126).contains(&shift) {
        return (1.0, false);
    }
    let power = |exponent: i32| f32::from_bits(((exponent + 127) as u32) << 23);
    let fits = |scale: &f32| {
        let held = f16::from_f32(scale * power(shift));
        (*scale == 0.0 || held.is_normal()) && (held.to_f32() * power(-shift)).to_bits() == scale.to_bits()
    };
    if scales.iter().all(fits) { (power(-shift), true) } else { (1.0, false) }
}

impl Layout {
    /// The layout of a weight; `None` for what there is no kernel for.
    fn new(weight: &Regular<'_>, bias: bool, table: bool) -> Option<Self> {
        let (bits, levels) = match weight.levels {
            Levels::Integers { bits: 8 } => (8, None),
            Levels::Integers { bits: 0..=4 } => (4, None),
            Levels::Table(levels) => (4, Some(levels)),
            _ => return None,
        };
        let (unit, half) = unit(&weight.scales);
        // Zero points are at most 256, which f16 holds.
        let zero = match &weight.zeros {
            Zeros::Each(_) => None,
            Zeros::Same(zero) => Some(*zero),
            _ => return None,
        };
        let words = weight.group * bits / 32;
        let vector = [4, 2].into_iter().find(|vector| words.is_multiple_of(*vector)).unwrap_or(1) as u32;
        Some(Self {
            packed: Packed {
                bits: bits as u32,
                table: levels.is_some(),
                zeros: zero.is_none(),
                half,
                vector,
            },
            groups: weight.scales.ncols(),
            group: weight.group,
            bias,
            places: weight.inputs.as_ref().filter(|_| table).map_or(0, Vec::len),
            unit: if half { unit } else { 1.0 },
            zero: zero.unwrap_or(0),
            levels: levels.unwrap_or_default(),
        })
    }

    pub(crate) fn format(&self) -> Format {
        Format::Packed(self.packed)
    }

    /// Bytes of a row of codes.
    pub(crate) fn row_bytes(&self) -> usize {
        4 * self.group / self.packed.codes() * self.groups
    }

    /// Codes of a row.
    pub(crate) fn codes(&self) -> usize {
        self.groups * self.group
    }

    /// Vectors of codes of a group, for a kernel that reads such.
    pub(crate) fn group_vectors(&self, packed: Packed) -> usize {
        self.group_words() / packed.vector as usize
    }

    /// Words of codes of a group.
    pub(crate) fn group_words(&self) -> usize {
        self.group / self.packed.codes()
    }

    /// Vectors of codes of a row.
    pub(crate) fn row_vectors(&self) -> usize {
        self.groups * self.group_vectors(self.packed)
    }

    /// Entry at which the zero points of a part of so many rows begin.
    pub(crate) fn zeros_at(&self, rows: usize) -> usize {
        self.packed.header() + rows.div_ceil(4) * self.groups
    }

    fn bias_at(&self, rows: usize) -> usize {
        self.zeros_at(rows) + if self.packed.zeros { rows.div_ceil(4) * self.groups } else { 0 }
    }

    /// Entry at which the list of places begins.
    pub(crate) fn places_at(&self, rows: usize) -> usize {
        self.bias_at(rows) + if self.bias { rows.div_ceil(4) * 4 / self.packed.entry() } else { 0 }
    }

    /// Bytes of the parameters of so many rows.
    fn parameter_bytes(&self, rows: usize) -> usize {
        4 * (self.places_at(rows) * self.packed.entry() + self.places.next_multiple_of(self.packed.entry()))
    }

    /// The parts of a matrix of so many rows, where a binding holds `most` bytes; none if it cannot hold four rows.
    fn extents(&self, rows: usize, most: u64) -> Option<Vec<Extent>> {
        let most = usize::try_from(most).unwrap_or(usize::MAX);
        let fixed = self.parameter_bytes(0);
        let four = (4 * self.row_bytes()).max(1);
        let four_parameters = (self.parameter_bytes(4) - fixed).max(1);
        // Kernels take four rows at a time.
        let count = 4 * (most / four).min(most.saturating_sub(fixed) / four_parameters);
        if count == 0 && rows > 0 {
            return None;
        }
        let extent = |first: usize| {
            let end = rows.min(first.saturating_add(count));
            let padded = (end - first).next_multiple_of(4);
            Extent {
                rows: first..end,
                codes: (padded * self.row_bytes()) as u64,
                parameters: self.parameter_bytes(padded) as u64,
            }
        };
        Some((0..rows).step_by(count.max(1)).map(extent).collect())
    }

    /// Four numbers as an entry.
    fn push(&self, words: &mut Vec<u32>, numbers: [f32; 4]) {
        if self.packed.half {
            let [a, b, c, d] = numbers.map(|v| u32::from(f16::from_f32(v).to_bits()));
            words.extend([a | b << 16, c | d << 16]);
        } else {
            words.extend(numbers.map(f32::to_bits));
        }
    }

    /// The parameters of some rows.
    fn parameters(&self, weight: &Regular<'_>, bias: Option<&Array1<f32>>, rows: &Range<usize>) -> Vec<u32> {
        let mut words = vec![self.unit.to_bits(), f32::from(self.zero).to_bits()];
        words.resize(self.packed.entry(), 0);
        if self.packed.table {
            words.extend(self.levels.map(f32::to_bits));
        }
        let quads = || rows.clone().step_by(4).map(|first| [first, first + 1, first + 2, first + 3]);
        let rows_of = |quad: [usize; 4]| quad.map(|row| (row < rows.end).then_some(row));
        for quad in quads().map(rows_of) {
            for group in 0..self.groups {
                let scale = |row: Option<usize>| row.and_then(|row| weight.scales.get([row, group]));
                self.push(&mut words, quad.map(|row| scale(row).map_or(0.0, |scale| scale / self.unit)));
            }
        }
        if let (true, Zeros::Each(zeros)) = (self.packed.zeros, &weight.zeros) {
            for quad in quads().map(rows_of) {
                for group in 0..self.groups {
                    let zero = |row: Option<usize>| row.and_then(|row| zeros.get([row, group]));
                    self.push(&mut words, quad.map(|row| zero(row).map_or(0.0, |zero| f32::from(*zero))));
                }
            }
        }
        if let Some(bias) = bias {
            let value = |row: Option<usize>| row.and_then(|row| bias.get(row)).copied().unwrap_or(0.0);
            words.extend(quads().map(rows_of).flat_map(|quad| quad.map(value)).map(f32::to_bits));
        }
        if let (1.., Some(inputs)) = (self.places, &weight.inputs) {
            let mut places = vec![0; self.places.next_multiple_of(self.packed.entry())];
            for (place, &input) in inputs.iter().enumerate() {
                // Not for padding.
                if let Some(to) = places.get_mut(input as usize) {
                    *to = place as u32;
                }
            }
            words.extend(places);
        }
        words
    }

    /// Uploads the codes of some rows, and zeros after them.
    fn write_codes(
        &self,
        gpu: &Gpu,
        op: &'static str,
        codes: ArrayView2<'_, u8>,
        buffer: &Buffer,
    ) -> Result<()> {
        let mut bytes: Vec<u8> = Vec::with_capacity(PIECE.min(buffer.size() as usize) + self.row_bytes());
        let mut written = 0;
        for row in codes.outer_iter() {
            let row = row.to_slice().map_or_else(|| Cow::Owned(row.to_vec()), Cow::Borrowed);
            if self.packed.bits == 8 {
                bytes.extend_from_slice(&row);
            } else {
                // Rows are whole words.
                bytes.extend(row.chunks_exact(2).map(|pair| pair[0] | pair[1] << 4));
            }
            if bytes.len() >= PIECE {
                gpu.write(op, buffer, written, &bytes)?;
                written += bytes.len() as u64;
                bytes.clear();
            }
        }
        bytes.resize(buffer.size().saturating_sub(written) as usize, 0);
        gpu.write(op, buffer, written, &bytes)
    }
}

impl Matrix {
    /// Takes over a quantized matrix and a bias; `table` says that its rows will be gathered.
    pub(crate) fn packed(
        gpu: &Arc<Gpu>,
        op: &'static str,
        source: &Quantized,
        bias: Option<&Array1<f32>>,
        table: bool,
    ) -> Result<Self> {
        let shape = source.shape();
        let weight = source.regular(STEP);
        let Some(layout) = Layout::new(&weight, bias.is_some(), table) else {
            let found = format_args!("no kernel for {:?}", source.levels());
            return Err(Error::new(ErrorKind::Unsupported, op, found));
        };
        let Some(extents) = layout.extents(shape[0], gpu.max_binding()) else {
            let (width, most) = (shape[1], gpu.max_binding());
            let found = format_args!("four rows of {width} do not fit a binding of {most} bytes");
            return Err(gpu.out_of_memory(op, found));
        };
        let mut parts = Vec::with_capacity(extents.len());
        for Extent { rows, codes, parameters } in extents {
            let buffer = gpu.buffer(op, codes)?;
            layout.write_codes(gpu, op, weight.codes.slice(s![rows.clone(), ..]), &buffer)?;
            let beside = gpu.buffer(op, parameters)?;
            gpu.write(op, &beside, 0, bytemuck::cast_slice(&layout.parameters(&weight, bias, &rows)))?;
            let bias_at = if bias.is_some() { layout.bias_at(rows.len()) as u32 } else { u32::MAX };
            parts.push(MatrixPart { buffer, parameters: Some(beside), rows, bias_at });
        }
        let order = match weight.inputs {
            Some(inputs) => {
                let buffer = gpu.buffer(op, 4 * inputs.len() as u64)?;
                gpu.write(op, &buffer, 0, bytemuck::cast_slice(&inputs))?;
                let mut places = vec![u32::MAX; shape[1].next_multiple_of(4)];
                for (place, &input) in inputs.iter().enumerate() {
                    // Not for padding.
                    if let Some(to) = places.get_mut(input as usize) {
                        *to = place as u32;
                    }
                }
                let back = gpu.buffer(op, 4 * places.len() as u64)?;
                gpu.write(op, &back, 0, bytemuck::cast_slice(&places))?;
                Some(Order { inputs, buffer, back })
            }
            None => None,
        };
        Ok(Self { held: Held::Packed(layout), shape, parts, order })
    }

    /// Whether a kernel that multiplies by both at once can take this one and another.
    pub(crate) fn alike(&self, other: &Self) -> bool {
        self.shape == other.shape
            && self.format() == other.format()
            && match (&self.held, &other.held) {
                (Held::Packed(a), Held::Packed(b)) => a.groups == b.groups && a.group == b.group,
                _ => true,
            }
            && inputs_equal(self.order.as_ref(), other.order.as_ref())
    }
}

fn inputs_equal(a: Option<&Order>, b: Option<&Order>) -> bool {
    a.map(|order| &order.inputs) == b.map(|order| &order.inputs)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        cache,
        kernels::PAGE,
        pool::{KEPT, Pool},
        tensor,
    };
    use opt_backend::{CacheDType, quant::Groups};

    /// The layout of a weight whose groups are `group` inputs, all of them in order.
    fn layout([out, input]: [usize; 2], bits: u32, group: usize, zeros: bool, bias: bool) -> Layout {
        let groups = input / group;
        // A few rows decide as well as all.
        let rows = out.min(4);
        let zeros = match zeros {
            true => Zeros::Each(Array2::from_shape_fn((rows, groups), |(o, g)| ((o + g) % 16) as u16)),
            false => Zeros::Same(1 << (bits - 1)),
        };
        let scales = Array2::from_shape_fn((rows, groups), |(o, g)| f32::from((1 + o + g) as u16) / 4096.0);
        let codes = Array2::zeros((rows, input));
        let levels = Levels::Integers { bits };
        let weight = Quantized::new(codes, scales, zeros, levels, Groups::Runs(group)).expect("it fits");
        Layout::new(&weight.regular(STEP), bias, false).expect("there is a kernel")
    }

    fn bytes(layout: &Layout, rows: usize) -> u64 {
        let extents = layout.extents(rows, 128 << 20).expect("rows fit a binding");
        extents.iter().map(|extent| extent.codes + extent.parameters).sum()
    }

    /// OPT-1.3b in int4 with its embeddings in int8 and a cache of all 2048 positions, in what is allocated for it.
    #[test]
    fn a_model_of_1_3b_fits_two_gigabytes() {
        let (hidden, ffn, layers, heads, context) = (2048, 8192, 24, 32, 2048);
        for (group, zeros) in [(128, true), (128, false), (32, true)] {
            let linear = |out: usize, input| bytes(&layout([out, input], 4, group, zeros, true), out);
            let layer = 4 * linear(hidden, hidden) + linear(ffn, hidden) + linear(hidden, ffn);
            let table = |entries: usize| bytes(&layout([entries, hidden], 8, 32, false, false), entries);
            let norms = (2 * layers + 1) * 2 * 16 * tensor::quads(hidden);
            let weights = layers as u64 * layer + table(50272) + table(2050) + norms as u64;
            for dtype in [CacheDType::F32, CacheDType::F16] {
                let shape = cache::Shape { layers, heads, head_dim: hidden / heads, dtype };
                // Slabs double.
                let pages = (context / PAGE).next_power_of_two().max(cache::PAGES_FIRST) as u64;
                let cache = layers as u64 * Pool::class(pages * shape.page_bytes());
                // What the pool keeps of activations and of slabs that were outgrown.
                let all = weights + cache + KEPT;
                println!(
                    "groups of {group}, zero points: {zeros}: {} MB of weights, {} MB of {dtype:?} cache, {} MB in all",
                    weights / 1_000_000,
                    cache / 1_000_000,
                    all / 1_000_000
                );
                assert!(all < 2_000_000_000, "{all}");
            }
        }
    }

    #[test]
    fn parts_fit_a_binding_and_cover_all_rows() {
        for (rows, most) in [(1, 1 << 20), (50272, 2 << 20), (1000, 16 << 10), (0, 4096)] {
            for (bits, group, zeros, bias) in [(4, 32, true, true), (8, 64, false, false)] {
                let extents =
                    layout([rows, 128], bits, group, zeros, bias).extents(rows, most).expect("fits");
                let mut next = 0;
                for extent in extents {
                    assert!(extent.rows.start == next && next.is_multiple_of(4) && !extent.rows.is_empty());
                    assert!(extent.codes <= most && extent.parameters <= most, "{extent:?}");
                    next = extent.rows.end;
                }
                assert_eq!(next, rows);
            }
        }
        assert!(layout([4, 4096], 8, 32, false, false).extents(4, 4096).is_none());
    }

    /// Scales are held in half the bytes where that loses nothing, wherever f16 ends.
    #[test]
    fn scales_become_f16_if_exact() {
        let scales = |values: &[f32]| Array2::from_shape_fn((1, values.len()), |(_, i)| values[i]);
        for (values, expected) in [
            (&[0.0, 0.5, -0.25][..], true),
            (&[0.0], true),
            // Subnormal as f16, and beyond its range.
            (&[5.960_464_5e-8, 3.051_757_8e-5], true),
            (&[131_072.0, 1.0], true),
            (&[0.1], false),
            // Too far apart.
            (&[1.0, 1.0 / 2_147_483_648.0], false),
            (&[f32::MAX], false),
            (&[1.0e-42], false),
        ] {
            let scales = scales(values);
            let (unit, fits) = unit(&scales);
            assert_eq!(fits, expected, "{values:?}");
            if fits {
                for scale in &scales {
                    let held = f16::from_f32(scale / unit);
                    assert_eq!((held.to_f32() * unit).to_bits(), scale.to_bits(), "{values:?}");
                }
            }
        }
    }
}
