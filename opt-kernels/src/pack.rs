//! Weights as kernels want them: column panels.
//!
//! A weight `[out, in]` is held as ceil(out / width) panels of `[in, width]`, `width` being two vectors, so that a
//! kernel streams memory from first to last byte whether it computes one row (decode) or hundreds (prefill). Packing
//! happens once, panel by panel from the caller's view: no second copy of the matrix exists at any time. Outputs past
//! the last are zeros.
//!
//! Where weights of bf16 are multiplied by dot products of bf16, the bf16 of two neighbouring inputs lie side by side,
//! `[in / 2, width, 2]`: a place of a panel is then two inputs, the last of which is 0 where their number is odd.

use crate::{
    Machine,
    gemm::{DEPTH, Wide},
    matmul::{Columns, Right},
    memory::Aligned,
    quant::Codes,
    simd::{Bf16x2, Kernel, Operand, Simd, Weight},
};
use half::{bf16, f16};
use opt_backend::{DType, Error, ErrorKind, HostMatrix, Result, ndarray::ArrayView2, quant::Quantized};

/// Column panels, however their elements are held.
pub trait Source: Sync {
    /// What rows consist of that are multiplied by these panels.
    type Operand: Operand;
    /// What elements are held as, where kernels can load them one after the other.
    type Element: Weight<Operand = Self::Operand>;
    /// Number of panels.
    fn count(&self) -> usize;
    /// Bytes of `places` places of a panel.
    fn bytes(&self, places: usize) -> usize;
    /// Where the elements of a panel are held, from place `start` on; need not exist.
    fn address(&self, panel: usize, start: usize) -> *const u8;
    /// The elements of a panel from place `start` on, `[places, width]`, if they can be loaded as they lie.
    fn elements(&self, panel: usize, start: usize) -> Option<*const Self::Element>;
    /// Writes the places `start..start + block` of a panel as operands, `[block, width]`.
    ///
    /// # Safety
    /// The panel has these places, no more than `wide` has room for, and `S` is the level it was packed for.
    unsafe fn widen<S: Simd>(
        &self,
        s: S,
        panel: usize,
        start: usize,
        block: usize,
        wide: &mut Wide<Self::Operand>,
    );
}

/// A packed matrix of one element type.
pub struct Panels<W: Weight> {
    /// `[panel, places, width]`
    data: Aligned<W>,
    outputs: usize,
    depth: usize,
    width: usize,
}

impl<W: Weight> Panels<W> {
    fn new(machine: Machine<'_>, weight: HostMatrix<'_>, what: &'static str) -> Result<Self> {
        let width = machine.level.sizes().panel;
        let [outputs, depth] = weight.shape();
        let size = width
            .checked_mul(depth.div_ceil(W::INPUTS))
            .ok_or_else(|| crate::memory::out_of_memory(what, usize::MAX))?;
        let data =
            Aligned::<W>::filled(machine, [outputs.div_ceil(width), size], what, &|panel, elements| {
                let rows = panel * width..outputs.min((panel + 1) * width);
                let mut row = vec![0.0; depth];
                for (column, j) in rows.enumerate() {
                    weight.row_f32(j, &mut row);
                    let inputs = row.chunks(W::INPUTS);
                    elements.chunks_exact_mut(width).zip(inputs).for_each(|(p, x)| p[column] = W::pack(x));
                }
            })?;
        Ok(Self { data, outputs, depth, width })
    }

    /// As [`Panels::new`], of rows that lie end to end in memory.
    fn of_rows(
        machine: Machine<'_>,
        data: &[f32],
        [outputs, depth]: [usize; 2],
        what: &'static str,
    ) -> Result<Self> {
        let width = machine.level.sizes().panel;
        let size = width
            .checked_mul(depth.div_ceil(W::INPUTS))
            .ok_or_else(|| crate::memory::out_of_memory(what, usize::MAX))?;
        let columns = &Columns { data, depth, outputs };
        let data =
            Aligned::<W>::filled(machine, [outputs.div_ceil(width), size], what, &|panel, elements| {
                machine.level.run(Fill { columns, panel, elements });
            })?;
        Ok(Self { data, outputs, depth, width })
    }

    /// The elements of panel `panel`, `[places, width]`.
    pub fn panel(&self, panel: usize) -> &[W] {
        let size = self.places() * self.width;
        &self.data.as_slice()[panel * size..(panel + 1) * size]
    }

    fn shape(&self) -> [usize; 2] {
        [self.outputs, self.depth]
    }

    fn places(&self) -> usize {
        self.depth.div_ceil(W::INPUTS)
    }

    /// Writes row `output` of the matrix, `depth` elements, to `row`.
    fn read_row(&self, output: usize, row: &mut [f32]) {
        let column = output % self.width;
        let elements = self.panel(output / self.width).chunks_exact(self.width);
        row.chunks_mut(W::INPUTS).zip(elements).for_each(|(x, place)| place[column].unpack(x));
    }
}

/// One panel of rows that lie end to end.
struct Fill<'a, W> {
    columns: &'a Columns<'a>,
    panel: usize,
    elements: &'a mut [W],
}

impl<W: Weight> Kernel for Fill<'_, W> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (mut wide, mut scratch) = (Wide::new(), Wide::new());
        for (i, elements) in self.elements.chunks_mut(DEPTH * 2 * S::LANES).enumerate() {
            let block = elements.len() / (2 * S::LANES);
            // SAFETY: the panel has these places.
            unsafe { self.columns.widen(s, [self.panel, i * DEPTH, block], &mut wide, &mut scratch) };
            for (element, &operand) in elements.iter_mut().zip(&wide.0) {
                *element = W::of(operand);
            }
        }
    }
}

impl<W: Weight> Source for Panels<W> {
    type Operand = W::Operand;
    type Element = W;

    fn count(&self) -> usize {
        self.outputs.div_ceil(self.width)
    }

    fn bytes(&self, places: usize) -> usize {
        places * self.width * size_of::<W>()
    }

    #[inline(always)]
    fn address(&self, panel: usize, start: usize) -> *const u8 {
        self.panel(panel).as_ptr().wrapping_add(start * self.width).cast()
    }

    #[inline(always)]
    fn elements(&self, panel: usize, start: usize) -> Option<*const W> {
        Some(self.panel(panel).as_ptr().wrapping_add(start * self.width))
    }

    #[inline(always)]
    unsafe fn widen<S: Simd>(
        &self,
        s: S,
        panel: usize,
        start: usize,
        block: usize,
        wide: &mut Wide<W::Operand>,
    ) {
        let elements = &self.panel(panel)[start * self.width..][..block * self.width];
        for i in (0..elements.len()).step_by(S::LANES) {
            // SAFETY: `elements` and `wide` have block * width elements, whole vectors.
            unsafe { s.store(wide.0.as_mut_ptr().add(i).cast(), W::load(s, elements.as_ptr().add(i))) };
        }
    }
}

/// A packed matrix `[outputs, inputs]`.
pub enum Packed {
    F32(Panels<f32>),
    F16(Panels<f16>),
    BF16(Panels<bf16>),
    /// Of bf16, to be multiplied by dot products of bf16.
    Bf16x2(Panels<Bf16x2>),
    Codes(Box<Codes>),
}

/// Calls `$body` with `$panels` bound to the panels of whatever type.
macro_rules! for_each_packed {
    ($packed:expr, $panels:ident => $body:expr) => {
        match $packed {
            $crate::pack::Packed::F32($panels) => $body,
            $crate::pack::Packed::F16($panels) => $body,
            $crate::pack::Packed::BF16($panels) => $body,
            $crate::pack::Packed::Bf16x2($panels) => $body,
            $crate::pack::Packed::Codes(boxed) => {
                let $panels = &**boxed;
                $body
            }
        }
    };
}

impl Packed {
    /// Packs `weight` as `dtype` into panels as wide as the machine's level wants them.
    pub fn new(
        machine: Machine<'_>,
        weight: HostMatrix<'_>,
        dtype: DType,
        what: &'static str,
    ) -> Result<Self> {
        Ok(match dtype {
            DType::F32 => Packed::F32(Panels::new(machine, weight, what)?),
            DType::F16 => Packed::F16(Panels::new(machine, weight, what)?),
            DType::BF16 if machine.multiplies_bf16() => Packed::Bf16x2(Panels::new(machine, weight, what)?),
            DType::BF16 => Packed::BF16(Panels::new(machine, weight, what)?),
            other => {
                let message = format_args!("expected f32, f16 or bf16, found {other}");
                return Err(Error::new(ErrorKind::Unsupported, what, message));
            }
        })
    }

    /// As [`Packed::new`], of the rows of `data`, end to end.
    pub fn of_rows(
        machine: Machine<'_>,
        data: &[f32],
        shape: [usize; 2],
        dtype: DType,
        what: &'static str,
    ) -> Result<Self> {
        Ok(match dtype {
            DType::F32 => Packed::F32(Panels::of_rows(machine, data, shape, what)?),
            DType::BF16 if machine.multiplies_bf16() => {
                Packed::Bf16x2(Panels::of_rows(machine, data, shape, what)?)
            }
            DType::BF16 => Packed::BF16(Panels::of_rows(machine, data, shape, what)?),
            other => {
                let view = ArrayView2::from_shape(shape, data).map_err(|e| Error::shape(what, e))?;
                return Packed::new(machine, HostMatrix::F32(view), other, what);
            }
        })
    }

    /// Packs a quantized weight.
    pub fn quantized(machine: Machine<'_>, weight: &Quantized, what: &'static str) -> Result<Self> {
        Ok(Packed::Codes(Box::new(Codes::new(machine, weight, what)?)))
    }

    /// `[outputs, inputs]`.
    pub fn shape(&self) -> [usize; 2] {
        for_each_packed!(self, panels => panels.shape())
    }

    /// Number of panels.
    pub fn panels(&self) -> usize {
        for_each_packed!(self, panels => panels.count())
    }

    /// Bytes of one panel.
    pub fn panel_bytes(&self) -> usize {
        for_each_packed!(self, panels => panels.bytes(panels.places()))
    }

    /// Writes row `output`, `depth` elements, to `row`.
    pub fn read_row(&self, output: usize, row: &mut [f32]) {
        for_each_packed!(self, panels => panels.read_row(output, row))
    }
}
