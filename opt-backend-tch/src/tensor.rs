//! Activations, and the way to and from host memory.

use crate::error::torch;
use opt_backend::{
    DType, Error, HostMatrix, HostVector, Result,
    half::{bf16, f16},
    ndarray::{Array1, Array2, ArrayView, Dimension, Ix1, Ix2},
};
use std::{borrow::Borrow, fmt, ops::Deref, sync::Arc};
use tch::{Device, Kind, kind::Element};

/// A tensor of LibTorch that may be read from several threads at once.
#[derive(Debug)]
pub(crate) struct Held(tch::Tensor);

// SAFETY: `tch::Tensor` is a pointer to a counted reference to a C++ tensor. Counting is atomic, and LibTorch allows
// any number of threads to read a tensor at once; what it does not allow is a write beside them, and autograd, whose
// graph is changed by reading. No tensor of this crate requires gradients. Through `&Held` this crate calls only ops
// that read their operand and give a new tensor or a view. In-place ops need `&mut tch::Tensor`, which no `&Held`
// gives; this crate writes to a tensor in an unshared `Arc<Held>` (`Tensor::into_f32`, `Tensor::own`), to results that
// nobody else has seen, and to views of a cache's storage onto positions that no other cache counts as its own (see
// `cache`).
unsafe impl Sync for Held {}

impl Held {
    pub(crate) fn new(tensor: tch::Tensor) -> Self {
        Self(tensor)
    }
}

impl Deref for Held {
    type Target = tch::Tensor;

    fn deref(&self) -> &tch::Tensor {
        &self.0
    }
}

/// Activations `[rows, width]`.
///
/// They are f32, except what a linear of bf16 or f16 weights gives and no residual was added to: that is in the
/// format of the weights until an op widens it. The three results of a `qkv` share one buffer.
pub struct Tensor {
    data: Arc<Held>,
    kind: Kind,
    shape: [usize; 2],
    /// Of the first element, in elements of the buffer.
    offset: usize,
    /// From one row to the next.
    stride: usize,
    /// Whether these rows are the buffer's tensor as it is.
    whole: bool,
}

/// A matrix of LibTorch, borrowed where there is one.
pub(crate) enum Matrix<'a> {
    Whole(&'a tch::Tensor),
    Own(tch::Tensor),
}

impl Deref for Matrix<'_> {
    type Target = tch::Tensor;

    fn deref(&self) -> &tch::Tensor {
        match self {
            Matrix::Whole(tensor) => tensor,
            Matrix::Own(tensor) => tensor,
        }
    }
}

impl Borrow<tch::Tensor> for Matrix<'_> {
    fn borrow(&self) -> &tch::Tensor {
        self
    }
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tensor").field("shape", &self.shape).field("kind", &self.kind).finish_non_exhaustive()
    }
}

impl Tensor {
    /// A result of an op: contiguous, of elements `kind`, in a buffer of its own.
    pub(crate) fn new(data: tch::Tensor, kind: Kind, shape: [usize; 2]) -> Self {
        Self { data: Arc::new(Held::new(data)), kind, shape, offset: 0, stride: shape[1], whole: true }
    }

    /// The columns of `[rows, widths * N]`, dealt out.
    pub(crate) fn columns<const N: usize>(
        data: tch::Tensor,
        kind: Kind,
        [rows, width]: [usize; 2],
    ) -> [Self; N] {
        let data = Arc::new(Held::new(data));
        std::array::from_fn(|i| Self {
            data: Arc::clone(&data),
            kind,
            shape: [rows, width],
            offset: i * width,
            stride: N * width,
            whole: N == 1,
        })
    }

    pub(crate) fn shape(&self) -> [usize; 2] {
        self.shape
    }

    pub(crate) fn kind(&self) -> Kind {
        self.kind
    }

    /// `[rows, width]`, in the format it is in.
    pub(crate) fn matrix(&self, op: &'static str) -> Result<Matrix<'_>> {
        if self.whole {
            return Ok(Matrix::Whole(&self.data));
        }
        let [rows, width] = sizes(self.shape);
        Ok(Matrix::Own(self.strided(op, [rows, width], [self.stride as i64, 1], 0)?))
    }

    /// `[rows, width]`, in `kind`.
    pub(crate) fn matrix_as(&self, op: &'static str, kind: Kind) -> Result<Matrix<'_>> {
        let matrix = self.matrix(op)?;
        if self.kind == kind {
            return Ok(matrix);
        }
        Ok(Matrix::Own(matrix.f_totype(kind).map_err(torch(op))?))
    }

    /// The rows `start..start + len`, in the same buffer.
    pub(crate) fn rows(&self, start: usize, len: usize) -> Self {
        let data = Arc::clone(&self.data);
        let offset = self.offset + start * self.stride;
        Self { data, kind: self.kind, shape: [len, self.shape[1]], offset, stride: self.stride, whole: false }
    }

    /// A tensor of f32 to write to: this one, if nobody else holds its buffer, or a copy.
    pub(crate) fn into_f32(self, op: &'static str) -> Result<tch::Tensor> {
        if self.kind == Kind::Float && self.whole {
            return match Arc::try_unwrap(self.data) {
                Ok(Held(tensor)) => Ok(tensor),
                Err(shared) => shared.f_to_dtype(Kind::Float, false, true).map_err(torch(op)),
            };
        }
        self.matrix(op)?.f_to_dtype(Kind::Float, false, true).map_err(torch(op))
    }

    /// This tensor's own memory, to write to: contiguous f32 that nobody else holds. What is shared, strided or in
    /// another format is copied first; where this fails, everything is as it was.
    pub(crate) fn own(&mut self, op: &'static str) -> Result<&mut tch::Tensor> {
        let suits = self.kind == Kind::Float && self.whole && self.data.is_contiguous();
        if !suits || Arc::get_mut(&mut self.data).is_none() {
            let copy = self.matrix(op)?.f_to_dtype(Kind::Float, false, true);
            let copy = copy.and_then(|copy| copy.f_contiguous()).map_err(torch(op))?;
            *self = Self::new(copy, Kind::Float, self.shape);
        }
        match Arc::get_mut(&mut self.data) {
            Some(Held(tensor)) => Ok(tensor),
            None => Err(Error::new(opt_backend::ErrorKind::Device, op, "a tensor of one owner has two")),
        }
    }

    /// As [`Tensor::own`], for those who own this.
    pub(crate) fn into_own(mut self, op: &'static str) -> Result<tch::Tensor> {
        self.own(op)?;
        self.into_f32(op)
    }

    /// A tensor to write to, in the format these elements are in.
    pub(crate) fn into_kind(self, op: &'static str) -> Result<(tch::Tensor, Kind)> {
        let kind = self.kind;
        if kind == Kind::Float {
            return Ok((self.into_f32(op)?, kind));
        }
        if !self.whole {
            return Ok((self.matrix(op)?.f_to_dtype(kind, false, true).map_err(torch(op))?, kind));
        }
        match Arc::try_unwrap(self.data) {
            Ok(Held(tensor)) => Ok((tensor, kind)),
            Err(shared) => Ok((shared.f_to_dtype(kind, false, true).map_err(torch(op))?, kind)),
        }
    }

    /// The rows in `kind`, in this tensor's memory where they lie so.
    pub(crate) fn hold(&self, op: &'static str, kind: Kind) -> Result<Arc<Held>> {
        if self.whole && self.kind == kind && self.data.is_contiguous() {
            return Ok(Arc::clone(&self.data));
        }
        let copy = self.matrix(op)?.f_to_dtype(kind, false, true).and_then(|copy| copy.f_contiguous());
        Ok(Arc::new(Held::new(copy.map_err(torch(op))?)))
    }

    /// The same numbers, in the same memory until one of the two is written to.
    pub(crate) fn share(&self) -> Self {
        let Self { kind, shape, offset, stride, whole, .. } = *self;
        Self { data: Arc::clone(&self.data), kind, shape, offset, stride, whole }
    }

    /// Heads of the rows from `row` on, `[sequences, heads, rows, head_dim]`, as a view.
    pub(crate) fn heads(
        &self,
        op: &'static str,
        row: usize,
        [sequences, rows, heads, head_dim]: [usize; 4],
    ) -> Result<tch::Tensor> {
        let size = sizes([sequences, heads, rows, head_dim]);
        let stride = sizes([rows * self.stride, head_dim, self.stride, 1]);
        self.strided(op, size, stride, row * self.stride)
    }

    /// Heads of these rows and those of `other`, `[2, sequences, heads, rows, head_dim]`: a view if both lie in one
    /// buffer.
    pub(crate) fn heads_with(
        &self,
        other: &Self,
        op: &'static str,
        row: usize,
        shape: [usize; 4],
    ) -> Result<tch::Tensor> {
        let [sequences, rows, heads, head_dim] = shape;
        if Arc::ptr_eq(&self.data, &other.data) && self.offset <= other.offset && self.stride == other.stride
        {
            let size = sizes([2, sequences, heads, rows, head_dim]);
            let apart = other.offset - self.offset;
            let stride = sizes([apart, rows * self.stride, head_dim, self.stride, 1]);
            return self.strided(op, size, stride, row * self.stride);
        }
        let [a, b] = [self, other].map(|x| x.heads(op, row, shape));
        tch::Tensor::f_stack(&[a?, b?], 0).map_err(torch(op))
    }

    fn strided<const N: usize>(
        &self,
        op: &'static str,
        size: [i64; N],
        stride: [i64; N],
        from: usize,
    ) -> Result<tch::Tensor> {
        self.data.f_as_strided(&size[..], &stride[..], (self.offset + from) as i64).map_err(torch(op))
    }
}

pub(crate) fn kind_of(dtype: DType) -> Result<Kind> {
    match dtype {
        DType::F32 => Ok(Kind::Float),
        DType::F16 => Ok(Kind::Half),
        DType::BF16 => Ok(Kind::BFloat16),
        other => Err(Error::new(
            opt_backend::ErrorKind::Unsupported,
            "dtype",
            format_args!("expected f32, f16 or bf16, found {other}"),
        )),
    }
}

pub(crate) fn sizes<const N: usize>(shape: [usize; N]) -> [i64; N] {
    shape.map(|n| n as i64)
}

/// Copies an array of the host to a device.
pub(crate) fn upload<T: Element + Copy, D: Dimension>(
    op: &'static str,
    array: ArrayView<'_, T, D>,
    device: Device,
) -> Result<tch::Tensor> {
    let size: Vec<i64> = array.shape().iter().map(|n| *n as i64).collect();
    let standard = array.as_standard_layout();
    let flat = match standard.as_slice() {
        Some(elements) => tch::Tensor::f_from_slice(elements),
        None => return Err(Error::shape(op, "expected an array in standard layout")),
    };
    let tensor = flat.and_then(|flat| flat.f_reshape(&size[..])).map_err(torch(op))?;
    if device == Device::Cpu { Ok(tensor) } else { tensor.f_to(device).map_err(torch(op)) }
}

/// tch 0.26 takes `half::bf16` for f16; the bits are right.
fn as_bf16(op: &'static str, tensor: tch::Tensor) -> Result<tch::Tensor> {
    tensor.f_view_dtype(Kind::BFloat16).map_err(torch(op))
}

/// Copies a matrix of the host to a device, in the format it is in.
pub(crate) fn upload_matrix(op: &'static str, matrix: HostMatrix<'_>, device: Device) -> Result<tch::Tensor> {
    match matrix {
        HostMatrix::F32(matrix) => upload::<f32, Ix2>(op, matrix, device),
        HostMatrix::F16(matrix) => upload::<f16, Ix2>(op, matrix, device),
        HostMatrix::BF16(matrix) => as_bf16(op, upload::<bf16, Ix2>(op, matrix, device)?),
        other => upload::<f32, Ix2>(op, other.to_f32().view(), device),
    }
}

/// Copies a vector of the host to a device, in the format it is in.
pub(crate) fn upload_vector(op: &'static str, vector: HostVector<'_>, device: Device) -> Result<tch::Tensor> {
    match vector {
        HostVector::F32(vector) => upload::<f32, Ix1>(op, vector, device),
        HostVector::F16(vector) => upload::<f16, Ix1>(op, vector, device),
        HostVector::BF16(vector) => as_bf16(op, upload::<bf16, Ix1>(op, vector, device)?),
        other => upload::<f32, Ix1>(op, other.to_f32().view(), device),
    }
}

/// The `len` elements of a tensor of any format as f32 in host memory.
pub(crate) fn read(op: &'static str, tensor: &tch::Tensor, len: usize) -> Result<Vec<f32>> {
    let mut data = host_memory(op, len)?;
    let wide = tensor.f_to_dtype(Kind::Float, false, false).map_err(torch(op))?;
    wide.f_copy_data(&mut data, len).map_err(torch(op))?;
    Ok(data)
}

/// `len` zeros.
fn host_memory(op: &'static str, len: usize) -> Result<Vec<f32>> {
    let mut data = Vec::new();
    data.try_reserve_exact(len).map_err(|_| {
        let message = format_args!("no host memory for {len} numbers");
        Error::new(opt_backend::ErrorKind::OutOfMemory, op, message)
    })?;
    data.resize(len, 0.0);
    Ok(data)
}

/// A matrix as f32 in host memory.
pub(crate) fn read_matrix(op: &'static str, tensor: &tch::Tensor, shape: [usize; 2]) -> Result<Array2<f32>> {
    let data = read(op, tensor, shape[0] * shape[1])?;
    Array2::from_shape_vec(shape, data).map_err(|error| Error::shape(op, error))
}

/// A vector as f32 in host memory.
pub(crate) fn read_vector(op: &'static str, tensor: &tch::Tensor, len: usize) -> Result<Array1<f32>> {
    Ok(Array1::from_vec(read(op, tensor, len)?))
}
