//! Weights as kernels want them: column panels.
//!
//! A weight `[out, in]` is held as ceil(out / width) panels of `[in, width]`, `width` being two vectors, so that a
//! kernel streams memory from first to last byte whether it computes one row (decode) or hundreds (prefill). Packing
//! happens once, panel by panel from the caller's view: no second copy of the matrix exists at any time. Outputs past
//! the last are zeros.

use crate::{
    memory::{Aligned, Guards, Shared},
    pool::Pool,
    simd::Weight,
};
use half::{bf16, f16};
use opt_backend::{DType, Error, ErrorKind, HostMatrix, Result};

/// A packed matrix of one element type.
pub(crate) struct Panels<W: Weight> {
    data: Aligned<W>,
    outputs: usize,
    depth: usize,
    width: usize,
}

impl<W: Weight> Panels<W> {
    fn new(
        pool: &Pool,
        guards: &Guards,
        weight: HostMatrix<'_>,
        width: usize,
        what: &'static str,
    ) -> Result<Self> {
        let [outputs, depth] = weight.shape();
        let panels = outputs.div_ceil(width);
        let size = panels.checked_mul(width).and_then(|n| n.checked_mul(depth));
        let size = size.ok_or_else(|| crate::memory::out_of_memory(what, usize::MAX))?;
        let mut data = Aligned::<W>::zeroed(guards, size, what)?;
        let target = Shared(data.as_mut_slice().as_mut_ptr());
        pool.run(if depth == 0 { 0 } else { panels }, &|panel| {
            let rows = panel * width..outputs.min((panel + 1) * width);
            let mut row = vec![0.0; depth];
            for (column, j) in rows.enumerate() {
                weight.row_f32(j, &mut row);
                for (k, &x) in row.iter().enumerate() {
                    // SAFETY: within this task's own panel of depth * width elements.
                    unsafe { *target.at((panel * depth + k) * width + column) = W::from_f32(x) };
                }
            }
        })?;
        Ok(Self { data, outputs, depth, width })
    }

    /// Number of panels.
    pub(crate) fn count(&self) -> usize {
        self.outputs.div_ceil(self.width)
    }

    /// The elements of panel `panel`, `[depth, width]`.
    pub(crate) fn panel(&self, panel: usize) -> &[W] {
        let size = self.depth * self.width;
        &self.data.as_slice()[panel * size..(panel + 1) * size]
    }

    /// Writes row `output` of the matrix, `depth` elements, to `row`.
    fn read_row(&self, output: usize, row: &mut [f32]) {
        let column = output % self.width;
        let elements = self.panel(output / self.width).chunks_exact(self.width);
        row.iter_mut().zip(elements).for_each(|(x, k)| *x = k[column].to_f32());
    }
}

/// A packed matrix `[outputs, depth]`.
pub(crate) enum Packed {
    F32(Panels<f32>),
    F16(Panels<f16>),
    BF16(Panels<bf16>),
}

/// Calls `$body` with `$panels` bound to the panels of whatever type.
macro_rules! for_each_dtype {
    ($packed:expr, $panels:ident => $body:expr) => {
        match $packed {
            $crate::pack::Packed::F32($panels) => $body,
            $crate::pack::Packed::F16($panels) => $body,
            $crate::pack::Packed::BF16($panels) => $body,
        }
    };
}
pub(crate) use for_each_dtype;

impl Packed {
    /// Packs `weight` as `dtype` into panels of `width` columns.
    pub(crate) fn new(
        pool: &Pool,
        guards: &Guards,
        weight: HostMatrix<'_>,
        dtype: DType,
        width: usize,
        what: &'static str,
    ) -> Result<Self> {
        Ok(match dtype {
            DType::F32 => Packed::F32(Panels::new(pool, guards, weight, width, what)?),
            DType::F16 => Packed::F16(Panels::new(pool, guards, weight, width, what)?),
            DType::BF16 => Packed::BF16(Panels::new(pool, guards, weight, width, what)?),
            other => {
                return Err(Error::new(
                    ErrorKind::Unsupported,
                    what,
                    format_args!("expected f32, f16 or bf16, found {other}"),
                ));
            }
        })
    }

    /// `[outputs, depth]`.
    pub(crate) fn shape(&self) -> [usize; 2] {
        for_each_dtype!(self, panels => [panels.outputs, panels.depth])
    }

    /// Number of panels.
    pub(crate) fn panels(&self) -> usize {
        for_each_dtype!(self, panels => panels.count())
    }

    /// Bytes of one panel.
    pub(crate) fn panel_bytes(&self) -> usize {
        fn bytes<W: Weight>(panels: &Panels<W>) -> usize {
            panels.depth * panels.width * size_of::<W>()
        }
        for_each_dtype!(self, panels => bytes(panels))
    }

    /// Writes row `output`, `depth` elements, to `row`.
    pub(crate) fn read_row(&self, output: usize, row: &mut [f32]) {
        for_each_dtype!(self, panels => panels.read_row(output, row))
    }
}
