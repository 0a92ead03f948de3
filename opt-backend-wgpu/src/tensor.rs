//! Activations: rows in one buffer, or in several where one binding cannot hold them all.
//!
//! A row takes whole quads (vec4); what pads it is zero, and every kernel keeps it so. Buffers end at multiples of 16
//! rows, which begin at offsets that any device can bind. An op works through the ranges of rows in which each of its
//! operands lies in one buffer; almost always that is one range.

use crate::{
    gpu::Gpu,
    pool::{Buffer, Slice},
    recorder::Recorder,
};
use opt_backend::{
    Error, Result,
    ndarray::{Array2, ArrayView2},
};
use std::{ops::Range, sync::Arc};

/// Rows whose bytes are a multiple of every offset alignment (256), whatever the width.
const ROWS_ALIGNED: usize = 16;

/// Rows in one buffer.
#[derive(Clone)]
struct Part {
    buffer: Arc<Buffer>,
    /// Byte at which they begin.
    offset: u64,
    rows: Range<usize>,
}

/// Activations `[rows, width]` on the device.
#[derive(Clone)]
pub struct Tensor {
    shape: [usize; 2],
    parts: Vec<Part>,
}

impl std::fmt::Debug for Tensor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tensor").field("shape", &self.shape).finish_non_exhaustive()
    }
}

/// Quads of a row of `width` elements.
pub(crate) fn quads(width: usize) -> usize {
    width.div_ceil(4)
}

impl Tensor {
    pub(crate) fn shape(&self) -> [usize; 2] {
        self.shape
    }

    pub(crate) fn rows(&self) -> usize {
        self.shape[0]
    }

    pub(crate) fn width(&self) -> usize {
        self.shape[1]
    }

    /// Quads of a row.
    pub(crate) fn quads(&self) -> usize {
        quads(self.shape[1])
    }

    /// Bytes of a row.
    fn row_bytes(&self) -> u64 {
        16 * self.quads() as u64
    }

    /// A tensor that holds anything, padding included: for kernels to write.
    pub(crate) fn new(gpu: &Arc<Gpu>, op: &'static str, shape: [usize; 2]) -> Result<Self> {
        Self::made_of(gpu, op, shape, |bytes| gpu.scratch(op, bytes))
    }

    fn made_of(
        gpu: &Arc<Gpu>,
        op: &'static str,
        shape: [usize; 2],
        buffer: impl Fn(u64) -> Result<Buffer>,
    ) -> Result<Self> {
        let [rows, width] = shape;
        let row = 16 * quads(width) as u64;
        let most = gpu.max_binding().checked_div(row).map_or(usize::MAX, |rows| rows as usize);
        let most = if most >= rows { rows } else { most / ROWS_ALIGNED * ROWS_ALIGNED };
        if most == 0 && rows > 0 {
            let found =
                format_args!("rows of {width} elements do not fit a binding of {}", gpu.max_binding());
            return Err(gpu.out_of_memory(op, found));
        }
        let mut parts = Vec::with_capacity(1);
        let mut first = 0;
        while first < rows && row > 0 {
            let end = rows.min(first + most);
            let buffer = Arc::new(buffer((end - first) as u64 * row)?);
            parts.push(Part { buffer, offset: 0, rows: first..end });
            first = end;
        }
        Ok(Self { shape, parts })
    }

    /// `N` tensors of one shape in one buffer, end to end, and the quads from one to the next; `None` if they do not
    /// fit a binding.
    pub(crate) fn several<const N: usize>(
        gpu: &Arc<Gpu>,
        op: &'static str,
        shape: [usize; 2],
    ) -> Result<Option<([Self; N], usize)>> {
        let [rows, width] = shape;
        let bytes = (16 * quads(width) as u64 * rows as u64).next_multiple_of(256);
        if bytes == 0 || bytes.saturating_mul(N as u64) > gpu.max_binding() {
            return Ok(None);
        }
        let buffer = Arc::new(gpu.scratch(op, N as u64 * bytes)?);
        let tensors = std::array::from_fn(|i| {
            let part = Part { buffer: Arc::clone(&buffer), offset: i as u64 * bytes, rows: 0..rows };
            Self { shape, parts: vec![part] }
        });
        Ok(Some((tensors, (bytes / 16) as usize)))
    }

    /// The buffer that the tensors of [`Tensor::several`] share.
    pub(crate) fn shared(&self) -> Option<Slice<'_>> {
        self.parts.first().map(|part| part.buffer.whole())
    }

    /// A copy of host memory.
    pub(crate) fn upload(gpu: &Arc<Gpu>, op: &'static str, x: ArrayView2<'_, f32>) -> Result<Self> {
        let tensor = Self::made_of(gpu, op, x.dim().into(), |bytes| gpu.fresh(op, bytes))?;
        for part in &tensor.parts {
            let rows = x.slice(opt_backend::ndarray::s![part.rows.clone(), ..]);
            match rows.as_slice() {
                Some(dense) if tensor.width().is_multiple_of(4) => {
                    gpu.write(op, &part.buffer, part.offset, bytemuck::cast_slice(dense))?;
                }
                _ => {
                    let mut padded = vec![0.0f32; part.rows.len() * 4 * tensor.quads()];
                    for (to, from) in padded.chunks_exact_mut(4 * tensor.quads()).zip(rows.outer_iter()) {
                        to.iter_mut().zip(from).for_each(|(to, &from)| *to = from);
                    }
                    gpu.write(op, &part.buffer, part.offset, bytemuck::cast_slice(&padded))?;
                }
            }
        }
        Ok(tensor)
    }

    /// The bytes of all rows, part after part.
    pub(crate) fn slices(&self) -> Vec<Slice<'_>> {
        self.parts
            .iter()
            .map(|part| part.buffer.slice(part.offset, part.rows.len() as u64 * self.row_bytes()))
            .collect()
    }

    /// Host memory from the bytes of [`Tensor::slices`].
    pub(crate) fn decode(op: &'static str, shape: [usize; 2], bytes: &[u8]) -> Result<Array2<f32>> {
        let [rows, width] = shape;
        let mut data = Vec::with_capacity(rows * width);
        for row in bytes.chunks_exact((16 * quads(width)).max(1)) {
            data.extend(
                row.chunks_exact(4).take(width).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])),
            );
        }
        Array2::from_shape_vec(shape, data).map_err(|error| Error::shape(op, error))
    }

    /// The rows `rows`, which lie in one part (see [`ranges`]), as a kernel binds them.
    pub(crate) fn slice(&self, rows: &Range<usize>) -> Option<Slice<'_>> {
        let part = self.parts.iter().find(|part| part.rows.contains(&rows.start))?;
        let offset = part.offset + (rows.start - part.rows.start) as u64 * self.row_bytes();
        Some(part.buffer.slice(offset, rows.len() as u64 * self.row_bytes()))
    }

    /// The rows `rows` as a tensor that shares their memory; they begin at a multiple of [`Tensor::ROWS_ALIGNED`].
    pub(crate) fn view(&self, rows: Range<usize>) -> Self {
        let parts = self.parts.iter().filter_map(|part| {
            let (start, end) = (part.rows.start.max(rows.start), part.rows.end.min(rows.end));
            (start < end).then(|| Part {
                buffer: Arc::clone(&part.buffer),
                offset: part.offset + (start - part.rows.start) as u64 * self.row_bytes(),
                rows: start - rows.start..end - rows.start,
            })
        });
        Self { shape: [rows.len(), self.width()], parts: parts.collect() }
    }

    /// Whether it has no elements, and so no memory that kernels could bind.
    pub(crate) fn is_empty(&self) -> bool {
        self.shape.contains(&0)
    }

    /// Sees to it that nothing else sees its memory, so that kernels may change it: what it shares is copied.
    pub(crate) fn own(&mut self, gpu: &Arc<Gpu>, op: &'static str) -> Result<()> {
        let row = self.row_bytes();
        for part in &mut self.parts {
            if Arc::get_mut(&mut part.buffer).is_some() {
                continue;
            }
            let bytes = part.rows.len() as u64 * row;
            let buffer = gpu.scratch(op, bytes)?;
            gpu.record(op, 0, 0)?.copy(gpu, part.buffer.slice(part.offset, bytes), buffer.slice(0, bytes));
            (part.buffer, part.offset) = (Arc::new(buffer), 0);
        }
        Ok(())
    }

    /// Records copies of the rows `rows` of another tensor of the same width to the rows from `at` on. Memory of the
    /// two is not shared.
    pub(crate) fn copy_rows(
        &self,
        gpu: &Gpu,
        recorder: &mut Recorder,
        from: &Self,
        rows: &Range<usize>,
        at: usize,
    ) {
        let row = self.row_bytes();
        for source in &from.parts {
            let (start, end) = (source.rows.start.max(rows.start), source.rows.end.min(rows.end));
            for part in &self.parts {
                // In rows of `from`.
                let shift = |row: usize| (row + rows.start).saturating_sub(at);
                let first = start.max(shift(part.rows.start));
                let last = end.min(shift(part.rows.end));
                if first >= last {
                    continue;
                }
                let bytes = (last - first) as u64 * row;
                let offset = source.offset + (first - source.rows.start) as u64 * row;
                let to = part.offset + (first + at - rows.start - part.rows.start) as u64 * row;
                recorder.copy(gpu, source.buffer.slice(offset, bytes), part.buffer.slice(to, bytes));
            }
        }
    }

    /// See [`Tensor::view`].
    pub(crate) const ROWS_ALIGNED: usize = ROWS_ALIGNED;
}

/// Ranges that cover the rows of tensors of equally many rows, so that each lies in one buffer of every tensor.
pub(crate) fn ranges(tensors: &[&Tensor]) -> Vec<Range<usize>> {
    let rows = tensors.first().map_or(0, |tensor| tensor.rows());
    if tensors.iter().all(|tensor| tensor.parts.len() <= 1) {
        return if rows == 0 { Vec::new() } else { std::iter::once(0..rows).collect() };
    }
    let mut ends: Vec<usize> =
        tensors.iter().flat_map(|tensor| tensor.parts.iter().map(|part| part.rows.end)).collect();
    ends.sort_unstable();
    ends.dedup();
    let mut first = 0;
    ends.into_iter().map(|end| std::mem::replace(&mut first, end)..end).collect()
}
