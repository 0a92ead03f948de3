//! Weights: matrices in quads, split by rows where one binding cannot hold them, each part with its biases. What is
//! quantized is in [`crate::packed`].

use crate::{
    gpu::Gpu,
    kernels::Format,
    packed::{Layout, Order},
    pool::{Buffer, Slice},
    tensor::{Tensor, quads},
    unpack::PackedRows,
};
use half::{bf16, f16, slice::HalfFloatSliceExt};
use opt_backend::{
    DType, Error, ErrorKind, HostMatrix, Result,
    ndarray::{Array1, Array2},
};
use std::{ops::Range, sync::Arc};

/// How weights can be held.
pub(crate) const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

/// Bytes that are packed before they are uploaded.
const PIECE: usize = 8 << 20;

/// Rows of a matrix in one buffer.
pub(crate) struct MatrixPart {
    pub(crate) buffer: Buffer,
    /// Scales and whatever else goes with codes.
    pub(crate) parameters: Option<Buffer>,
    pub(crate) rows: Range<usize>,
    /// Quad (of the parameters: entry) at which the biases begin, or `u32::MAX`.
    pub(crate) bias_at: u32,
}

/// What a matrix is made of.
pub(crate) enum Held {
    /// Numbers.
    Plain(DType),
    /// Codes.
    Packed(Layout),
}

/// A matrix `[rows, width]` as kernels read it.
pub(crate) struct Matrix {
    pub(crate) held: Held,
    pub(crate) shape: [usize; 2],
    pub(crate) parts: Vec<MatrixPart>,
    /// The order of columns, if it is another.
    pub(crate) order: Option<Order>,
}

/// Weight `[out, in]` and bias `[out]` of a linear.
pub struct Linear {
    pub(crate) weight: Matrix,
    /// As the device holds it; for reading it back.
    pub(crate) bias: Option<Bias>,
}

/// The bias of a linear, besides the copy that lies with its weight.
pub(crate) enum Bias {
    Host(Array1<f32>),
    /// `[1, out]`, to be rounded to how the weight is held.
    Device(Tensor, DType),
}

/// An embedding table `[entries, width]` that is LM head as well.
pub struct Table(pub(crate) Matrix);

/// Parameters of a LayerNorm: scales, then shifts.
pub struct Norm {
    pub(crate) width: usize,
    pub(crate) eps: f32,
    pub(crate) parameters: Parameters,
    pub(crate) buffer: Buffer,
}

/// The parameters of a LayerNorm for reading them back.
pub(crate) enum Parameters {
    Host {
        weight: Option<Array1<f32>>,
        bias: Option<Array1<f32>>,
    },
    /// They are nowhere but in the buffer, both of them.
    Device,
}

impl std::fmt::Debug for Linear {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (shape, bias) = (self.weight.shape, self.bias.is_some());
        f.debug_struct("Linear").field("shape", &shape).field("bias", &bias).finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Table").field("shape", &self.0.shape).finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Norm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Norm").field("width", &self.width).field("eps", &self.eps).finish_non_exhaustive()
    }
}

impl Matrix {
    /// What kernels need to know.
    pub(crate) fn format(&self) -> Format {
        match &self.held {
            Held::Plain(dtype) => Format::Plain(*dtype),
            Held::Packed(layout) => layout.format(),
        }
    }

    /// What a thread reads at once, that many times to a row.
    pub(crate) fn steps(&self) -> usize {
        match &self.held {
            Held::Plain(_) => quads(self.shape[1]),
            Held::Packed(layout) => layout.row_vectors(),
        }
    }

    /// Takes over a matrix, to be held as `dtype`, and a bias.
    pub(crate) fn new(
        gpu: &Arc<Gpu>,
        op: &'static str,
        source: HostMatrix<'_>,
        bias: Option<&Array1<f32>>,
        dtype: DType,
    ) -> Result<Self> {
        if !DTYPES.contains(&dtype) {
            return Err(Error::new(ErrorKind::Unsupported, op, format_args!("no weights held as {dtype}")));
        }
        let shape = source.shape();
        let mut matrix = Self { held: Held::Plain(dtype), shape, parts: Vec::new(), order: None };
        let [rows, width] = shape;
        let row = row_bytes(width, dtype);
        let bias_bytes = if bias.is_some() { dtype.size() } else { 0 };
        let most = Self::rows_most(gpu, op, shape, dtype, bias.is_some())?;
        let mut first = 0;
        while first < rows {
            let end = rows.min(first.saturating_add(most));
            let padded = (end - first).next_multiple_of(4);
            let buffer = gpu.buffer(op, (padded * (row + bias_bytes)) as u64)?;
            pack(gpu, op, source, first..end, dtype, row, &buffer)?;
            // What pads the rows, then the biases.
            let mut rest = vec![0; (padded + first - end) * row];
            let mut bias_at = u32::MAX;
            if let Some(bias) = bias {
                let mut values: Vec<f32> = bias.iter().copied().skip(first).take(end - first).collect();
                values.resize(padded, 0.0);
                extend(&mut rest, &values, dtype);
                bias_at = (padded * quads(width)) as u32;
            }
            gpu.write(op, &buffer, ((end - first) * row) as u64, &rest)?;
            matrix.parts.push(MatrixPart { buffer, parameters: None, rows: first..end, bias_at });
            first = end;
        }
        Ok(matrix)
    }

    /// The most rows of a part of a matrix that is held as `dtype`, whole quads of them.
    pub(crate) fn rows_most(
        gpu: &Gpu,
        op: &'static str,
        [rows, width]: [usize; 2],
        dtype: DType,
        bias: bool,
    ) -> Result<usize> {
        let row = row_bytes(width, dtype) + if bias { dtype.size() } else { 0 };
        // Kernels take four rows at a time.
        let most = (gpu.max_binding() as usize / row.max(1)) / 4 * 4;
        if most == 0 && rows > 0 {
            let found =
                format_args!("four rows of {width} do not fit a binding of {} bytes", gpu.max_binding());
            return Err(gpu.out_of_memory(op, found));
        }
        Ok(most)
    }

    /// Starts to read rows; the bytes of the slices, once they are here, become the rows in f32.
    pub(crate) fn rows(
        &self,
        op: &'static str,
        rows: &Range<usize>,
    ) -> (Vec<Slice<'_>>, impl FnOnce(&[u8]) -> Result<Array2<f32>> + Send + use<>) {
        let shape = [rows.len(), self.shape[1]];
        let (dtype, packed, slices) = match &self.held {
            Held::Plain(dtype) => (*dtype, None, self.slices(rows, row_bytes(shape[1], *dtype) as u64)),
            Held::Packed(layout) => {
                let (packed, slices) = PackedRows::new(self, layout, rows);
                (DType::F32, Some(packed), slices)
            }
        };
        let decode = move |bytes: &[u8]| match packed {
            Some(packed) => packed.decode(op, bytes),
            None => decode(op, dtype, shape, bytes),
        };
        (slices, decode)
    }

    /// The bytes of the rows `rows`, of `row` bytes each.
    fn slices(&self, rows: &Range<usize>, row: u64) -> Vec<Slice<'_>> {
        let slice = |part: &'_ MatrixPart| {
            let (start, end) = (part.rows.start.max(rows.start), part.rows.end.min(rows.end));
            (start < end).then(|| (start - part.rows.start, end - start))
        };
        self.parts
            .iter()
            .filter_map(|part| {
                slice(part).map(|(at, count)| part.buffer.slice(at as u64 * row, count as u64 * row))
            })
            .collect()
    }
}

/// Bytes of a row of numbers.
fn row_bytes(width: usize, dtype: DType) -> usize {
    4 * quads(width) * dtype.size()
}

/// Host memory from the bytes of rows of numbers.
fn decode(op: &'static str, dtype: DType, shape: [usize; 2], bytes: &[u8]) -> Result<Array2<f32>> {
    let [rows, width] = shape;
    let mut data = Vec::with_capacity(rows * width);
    for bytes in bytes.chunks_exact(row_bytes(width, dtype).max(1)) {
        match dtype {
            DType::F16 => {
                let each = bytes.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32());
                data.extend(each.take(width));
            }
            DType::BF16 => {
                let each = bytes.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32());
                data.extend(each.take(width));
            }
            _ => {
                let each = bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
                data.extend(each.take(width));
            }
        }
    }
    Array2::from_shape_vec(shape, data).map_err(|error| Error::shape(op, error))
}

/// Appends numbers, rounded to `dtype`.
fn extend(bytes: &mut Vec<u8>, values: &[f32], dtype: DType) {
    match dtype {
        DType::F16 => {
            let mut halves = vec![f16::ZERO; values.len()];
            halves.convert_from_f32_slice(values);
            bytes.extend_from_slice(bytemuck::cast_slice(&halves));
        }
        DType::BF16 => {
            let mut halves = vec![bf16::ZERO; values.len()];
            halves.convert_from_f32_slice(values);
            bytes.extend_from_slice(bytemuck::cast_slice(&halves));
        }
        _ => bytes.extend_from_slice(bytemuck::cast_slice(values)),
    }
}

/// Uploads rows of `source` as `dtype`, `row` bytes each.
fn pack(
    gpu: &Gpu,
    op: &'static str,
    source: HostMatrix<'_>,
    rows: Range<usize>,
    dtype: DType,
    row: usize,
    buffer: &Buffer,
) -> Result<()> {
    let width = source.shape()[1];
    let mut values = vec![0.0f32; width];
    let mut bytes: Vec<u8> = Vec::with_capacity(PIECE.min(rows.len() * row) + row);
    let mut written = 0;
    for index in rows {
        let start = bytes.len();
        match (source, dtype) {
            (HostMatrix::F16(m), DType::F16) => {
                bytes.extend(m.row(index).iter().flat_map(|v| v.to_le_bytes()))
            }
            (HostMatrix::BF16(m), DType::BF16) => {
                bytes.extend(m.row(index).iter().flat_map(|v| v.to_le_bytes()))
            }
            (source, dtype) => {
                source.row_f32(index, &mut values);
                extend(&mut bytes, &values, dtype);
            }
        }
        bytes.resize(start + row, 0);
        if bytes.len() >= PIECE {
            gpu.write(op, buffer, written, &bytes)?;
            written += bytes.len() as u64;
            bytes.clear();
        }
    }
    gpu.write(op, buffer, written, &bytes)
}

impl Norm {
    /// Takes over the parameters; absent ones are 1 and 0.
    pub(crate) fn new(gpu: &Arc<Gpu>, params: opt_backend::NormParams<'_>) -> Result<Self> {
        let width = params.width;
        let [weight, bias] = [params.weight, params.bias].map(|v| v.map(|v| v.to_f32()));
        let padded = 4 * quads(width);
        let mut values = vec![0.0f32; 2 * padded];
        let (scales, shifts) = values.split_at_mut(padded);
        match &weight {
            Some(weight) => scales.iter_mut().zip(weight).for_each(|(to, &v)| *to = v),
            None => scales.iter_mut().take(width).for_each(|to| *to = 1.0),
        }
        if let Some(bias) = &bias {
            shifts.iter_mut().zip(bias).for_each(|(to, &v)| *to = v);
        }
        let buffer = gpu.buffer("new_norm", 4 * values.len() as u64)?;
        gpu.write("new_norm", &buffer, 0, bytemuck::cast_slice(&values))?;
        Ok(Self { width, eps: params.eps, parameters: Parameters::Host { weight, bias }, buffer })
    }
}
