//! Quantized weights as kernels want them.
//!
//! The panels of [`crate::pack`], with four inputs of one output side by side, as instructions for dot products of
//! bytes take them: quad `k` of a panel is `[width, 4]`. Codes of four bits (and of fewer) are two to a byte, quads
//! `2 k` in the lower halves and `2 k + 1` in the upper. Scales and zero points lie beside them, `[group, width]`.

use super::{Compute, RUN};
use crate::{
    Machine,
    gemm::Wide,
    memory::{Aligned, Shared},
    pack::Source,
    simd::{Simd, Weight},
};
use half::f16;
use opt_backend::{
    Result,
    quant::{Levels, Quantized, Regular, Zeros},
};

/// A packed quantized matrix.
pub struct Codes {
    pub(super) shape: [usize; 2],
    places: usize,
    width: usize,
    /// Whether two codes share a byte.
    pub(super) nibbles: bool,
    codes: Aligned<u8>,
    pub(super) scales: Scales,
    pub(super) zeros: Offsets,
    pub(super) table: Option<Table>,
    order: Option<Vec<u32>>,
    /// Places that share a scale, a multiple of [`RUN`].
    pub(super) group: usize,
    pub(super) outlier_threshold: Option<f32>,
}

/// `[panel, group, width]`, in half precision where that loses nothing.
pub(super) enum Scales {
    Half(Aligned<f16>),
    Single(Aligned<f32>),
}

/// What is taken off codes.
pub(super) enum Offsets {
    Same(i32),
    /// `[panel, group, width]`; f16 holds integers to 2048.
    Each(Aligned<f16>),
}

/// Levels that are no integers.
pub(super) struct Table {
    pub(super) levels: [f32; 16],
    /// The same as codes of eight bits with the zero point 128 ...
    pub(super) bytes: [u8; 16],
    /// ... which are worth so much each.
    pub(super) unit: f32,
}

impl Table {
    fn new(levels: [f32; 16]) -> Self {
        let largest = levels.iter().fold(0.0_f32, |most, level| most.max(level.abs()));
        let unit = if largest > 0.0 { largest / 127.0 } else { 1.0 };
        Self { levels, bytes: levels.map(|level| ((level / unit).round() + 128.0) as u8), unit }
    }
}

impl Codes {
    pub(crate) fn new(machine: Machine<'_>, weight: &Quantized, what: &'static str) -> Result<Self> {
        let Machine { guards, level, .. } = machine;
        let width = level.sizes().panel;
        let Regular { inputs, codes, scales, zeros, levels, group, .. } = weight.regular(RUN);
        let (outputs, places) = codes.dim();
        let (panels, groups) = (outputs.div_ceil(width), places / group);
        let nibbles = !matches!(levels, Levels::Integers { bits: 8 });
        let size = width * places / if nibbles { 2 } else { 1 };
        let packed = Aligned::<u8>::filled(machine, [panels, size], what, &|panel, elements| {
            for (column, output) in (panel * width..outputs.min((panel + 1) * width)).enumerate() {
                for (place, &code) in codes.row(output).iter().enumerate() {
                    let (at, shift) = locate(nibbles, width, column, place);
                    elements[at] |= code << shift;
                }
            }
        })?;
        // One value for each scale, whichever it is.
        let beside = |value: &dyn Fn(usize, usize) -> f32, half: &mut [f16], single: &mut [f32]| {
            for output in 0..outputs {
                for group in 0..groups {
                    let at = (output / width * groups + group) * width + output % width;
                    half.get_mut(at).into_iter().for_each(|v| *v = f16::from_f32(value(output, group)));
                    single.get_mut(at).into_iter().for_each(|v| *v = value(output, group));
                }
            }
        };
        let size = panels * groups * width;
        let scale = |output: usize, group: usize| scales[[output, group]];
        let scales = if scales.iter().all(|&scale| f16::from_f32(scale).to_f32() == scale) {
            let mut half = Aligned::zeroed(guards, size, what)?;
            beside(&scale, half.as_mut_slice(), &mut []);
            Scales::Half(half)
        } else {
            let mut single = Aligned::zeroed(guards, size, what)?;
            beside(&scale, &mut [], single.as_mut_slice());
            Scales::Single(single)
        };
        let zeros = match zeros {
            Zeros::Each(zeros) => {
                let mut half = Aligned::zeroed(guards, size, what)?;
                beside(&|output, group| f32::from(zeros[[output, group]]), half.as_mut_slice(), &mut []);
                Offsets::Each(half)
            }
            Zeros::Same(zero) => Offsets::Same(i32::from(zero)),
            _ => Offsets::Same(0),
        };
        let table = match levels {
            Levels::Table(levels) => Some(Table::new(levels)),
            _ => None,
        };
        let (shape, outlier_threshold) = (weight.shape(), weight.outlier_threshold());
        Ok(Self {
            shape,
            places,
            width,
            nibbles,
            codes: packed,
            scales,
            zeros,
            table,
            order: inputs,
            group,
            outlier_threshold,
        })
    }

    /// `[outputs, inputs]`.
    pub fn shape(&self) -> [usize; 2] {
        self.shape
    }

    /// Inputs of a row as they lie here, with padding.
    pub fn places(&self) -> usize {
        self.places
    }

    /// The input that each place reads, if they are not in order; [`Regular::PADDING`] reads 0.
    pub fn order(&self) -> Option<&[u32]> {
        self.order.as_deref()
    }

    /// Whether its products are sums of integers.
    ///
    /// The levels of a table are made bytes for that, which costs them what one byte costs activations: where two bytes
    /// keep these as good as f32, levels stay as they are.
    pub(crate) fn as_integers(&self, compute: Compute) -> bool {
        let levels = match compute {
            Compute::Int8 => true,
            Compute::Int16 => self.table.is_none(),
            _ => false,
        };
        levels && self.places > 0
    }

    /// The codes of a panel.
    #[inline(always)]
    pub(super) fn panel(&self, panel: usize) -> &[u8] {
        let size = self.bytes(self.places);
        &self.codes.as_slice()[panel * size..(panel + 1) * size]
    }

    /// The first index of a panel's scales and zero points.
    #[inline(always)]
    pub(super) fn beside(&self, panel: usize) -> usize {
        panel * (self.places / self.group) * self.width
    }

    /// Rows `[rows, inputs]` in the order of the places.
    pub(crate) fn in_order(
        &self,
        machine: Machine<'_>,
        x: &[f32],
        [rows, inputs]: [usize; 2],
    ) -> Result<Vec<f32>> {
        let order = self.order.as_deref().unwrap_or_default();
        let mut ordered = crate::memory::reserve("linear", rows * order.len())?;
        ordered.resize(rows * order.len(), 0.0);
        let target = Shared(ordered.as_mut_ptr());
        machine.pool.run(rows, &|row| {
            let x = &x[row * inputs..][..inputs];
            // SAFETY: this row belongs to this task alone.
            let y = unsafe { std::slice::from_raw_parts_mut(target.at(row * order.len()), order.len()) };
            y.iter_mut()
                .zip(order)
                .for_each(|(y, &input)| *y = x.get(input as usize).copied().unwrap_or(0.0));
        })?;
        Ok(ordered)
    }

    /// The weight of `output` at `place`.
    pub(super) fn value(&self, output: usize, place: usize) -> f32 {
        let (panel, column) = (output / self.width, output % self.width);
        let (at, shift) = locate(self.nibbles, self.width, column, place);
        let code = self.panel(panel)[at] >> shift & if self.nibbles { 15 } else { 255 };
        let beside = self.beside(panel) + place / self.group * self.width + column;
        let scale = match &self.scales {
            Scales::Half(scales) => scales.as_slice()[beside].to_f32(),
            Scales::Single(scales) => scales.as_slice()[beside],
        };
        let level = match (&self.table, &self.zeros) {
            (Some(table), _) => table.levels[usize::from(code)],
            (None, Offsets::Same(zero)) => (i32::from(code) - zero) as f32,
            (None, Offsets::Each(zeros)) => f32::from(code) - zeros.as_slice()[beside].to_f32(),
        };
        scale * level
    }

    /// Writes row `output`, as many elements as there are inputs, to `row`.
    pub(crate) fn read_row(&self, output: usize, row: &mut [f32]) {
        for place in 0..self.places {
            let input = self.order.as_ref().map_or(place, |order| order[place] as usize);
            if let Some(x) = row.get_mut(input) {
                *x = self.value(output, place);
            }
        }
    }
}

/// The byte of a panel that holds a code, and how far up in it.
fn locate(nibbles: bool, width: usize, column: usize, place: usize) -> (usize, usize) {
    let (quad, j) = (place / 4, place % 4);
    if nibbles {
        ((quad / 2 * width + column) * 4 + j, 4 * (quad % 2))
    } else {
        ((quad * width + column) * 4 + j, 0)
    }
}

impl Source for Codes {
    type Operand = f32;
    type Element = f32;

    fn count(&self) -> usize {
        self.shape[0].div_ceil(self.width)
    }

    #[inline(always)]
    fn bytes(&self, places: usize) -> usize {
        self.width * places / if self.nibbles { 2 } else { 1 }
    }

    #[inline(always)]
    fn address(&self, panel: usize, start: usize) -> *const u8 {
        self.panel(panel).as_ptr().wrapping_add(self.bytes(start))
    }

    #[inline(always)]
    fn elements(&self, _: usize, _: usize) -> Option<*const f32> {
        None
    }

    #[inline(always)]
    unsafe fn widen<S: Simd>(&self, s: S, panel: usize, start: usize, block: usize, wide: &mut Wide<f32>) {
        match &self.scales {
            // SAFETY: the caller's promise.
            Scales::Half(scales) => unsafe { self.widen_by(s, scales.as_slice(), panel, start, block, wide) },
            // SAFETY: the caller's promise.
            Scales::Single(scales) => unsafe {
                self.widen_by(s, scales.as_slice(), panel, start, block, wide)
            },
        }
    }
}

impl Codes {
    /// # Safety
    /// That of [`Source::widen`].
    #[inline(always)]
    unsafe fn widen_by<S: Simd, W: Weight>(
        &self,
        s: S,
        scales: &[W],
        panel: usize,
        start: usize,
        block: usize,
        wide: &mut Wide<f32>,
    ) {
        let width = 2 * S::LANES;
        let codes = self.panel(panel).as_ptr();
        for place in (start..start + block).step_by(8) {
            let beside = self.beside(panel) + place / self.group * width;
            for n in 0..2 {
                let column = n * S::LANES;
                // SAFETY: places come in multiples of 32, so that eight of them are there, with their scale and zero
                // point; `wide` has room for the block.
                unsafe {
                    let scale = W::load(s, scales.as_ptr().add(beside + column));
                    let zero = match &self.zeros {
                        Offsets::Same(zero) => s.splat(*zero as f32),
                        Offsets::Each(zeros) => s.load_f16(zeros.as_slice().as_ptr().add(beside + column)),
                    };
                    let quads = if self.nibbles {
                        let both = s.load_bytes(codes.add((place / 8 * width + column) * 4));
                        [s.low_nibbles(both), s.high_nibbles(both)]
                    } else {
                        let at = codes.add((place / 4 * width + column) * 4);
                        [s.load_bytes(at), s.load_bytes(at.add(4 * width))]
                    };
                    for (i, quad) in quads.into_iter().enumerate() {
                        let out = wide.0.as_mut_ptr().add((place - start + 4 * i) * width + column);
                        let codes =
                            [s.byte::<0>(quad), s.byte::<1>(quad), s.byte::<2>(quad), s.byte::<3>(quad)];
                        for (j, code) in codes.into_iter().enumerate() {
                            let level = match &self.table {
                                Some(table) => s.lookup(&table.levels, code),
                                None => s.sub(s.int_to_float(code), zero),
                            };
                            s.store(out.add(j * width), s.mul(scale, level));
                        }
                    }
                }
            }
        }
    }
}
