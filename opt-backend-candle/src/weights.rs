//! Weights: taken over from the host, held in their format on the device, read back.

use crate::{
    error::convert,
    host::{count, dtype, reserve},
    quant::Tiles,
};
use candle_core::{Device, Tensor, WithDType};
use half::{bf16, f16};
use opt_backend::{
    DType, Error, ErrorKind, HostLinear, HostMatrix, HostNorm, HostVector, NormParams, Result, check,
    ndarray::{Array1, Array2},
};
use opt_kernels::host;
use std::{fmt, ops::Range};

/// A matrix `[out, in]` on the device, in the format it is held in.
pub(crate) struct Weight {
    pub(crate) data: Tensor,
    pub(crate) shape: [usize; 2],
}

/// A matrix `[out, in]`, however it is held.
pub(crate) enum Kept {
    Dense(Weight),
    /// Quantized, for the CPU's kernels.
    Host(Box<host::Weight>),
    /// Quantized, for candle's own ops.
    Tiles(Box<Tiles>),
}

/// Weight and bias of a linear.
pub struct Linear {
    pub(crate) weight: Kept,
    /// `[out]`: rounded as the weight is, but held as f32, in which it is added.
    pub(crate) bias: Option<Tensor>,
}

/// An embedding table that also serves as LM head.
pub struct Table(pub(crate) Kept);

/// Parameters of a LayerNorm.
pub struct Norm {
    pub(crate) width: usize,
    pub(crate) eps: f32,
    /// Whether there are a weight and a bias.
    given: [bool; 2],
    /// Scale and shift on the device, absent ones as 1 and 0.
    pub(crate) scale: Tensor,
    pub(crate) shift: Tensor,
}

impl fmt::Debug for Linear {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { weight, bias } = self;
        f.debug_struct("Linear")
            .field("shape", &weight.shape())
            .field("held", &weight.held())
            .field("bias", &bias.is_some())
            .finish()
    }
}

impl fmt::Debug for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Table").field("shape", &self.0.shape()).field("held", &self.0.held()).finish()
    }
}

impl fmt::Debug for Norm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Norm").field("width", &self.width).field("eps", &self.eps).finish_non_exhaustive()
    }
}

impl Kept {
    pub(crate) fn shape(&self) -> [usize; 2] {
        match self {
            Kept::Dense(weight) => weight.shape,
            Kept::Host(weight) => weight.shape(),
            Kept::Tiles(tiles) => tiles.shape,
        }
    }

    fn held(&self) -> &'static str {
        match self {
            Kept::Dense(weight) => weight.data.dtype().as_str(),
            Kept::Host(_) | Kept::Tiles(_) => "quantized",
        }
    }

    /// The rows `rows` as f32.
    pub(crate) fn read(&self, op: &'static str, rows: Range<usize>) -> Result<Array2<f32>> {
        let [outputs, inputs] = self.shape();
        check::range(op, &rows, outputs)?;
        let shape = [rows.len(), inputs];
        let data = match self {
            _ if count(op, shape)? == 0 => Vec::new(),
            Kept::Dense(weight) => weight.read(rows).map_err(|error| convert(op, error))?,
            Kept::Host(weight) => weight.read(op, rows)?,
            Kept::Tiles(tiles) => tiles.read(rows).map_err(|error| convert(op, error))?,
        };
        Array2::from_shape_vec(shape, data).map_err(|error| Error::shape(op, error))
    }
}

/// What comes of a weight that another value has made, which computes in another way.
pub(crate) fn foreign(op: &'static str) -> Error {
    Error::new(ErrorKind::Unsupported, op, "this weight was made for another device or way of computing")
}

impl Weight {
    pub(crate) fn new(
        op: &'static str,
        device: &Device,
        source: HostMatrix<'_>,
        held: DType,
    ) -> Result<Self> {
        let shape = source.shape();
        let data = match dtype(op, held)? {
            candle_core::DType::F16 => match source {
                HostMatrix::F16(m) => upload(op, device, shape, m.iter().copied())?,
                other => upload_from_f32(op, device, other, f16::from_f32)?,
            },
            candle_core::DType::BF16 => match source {
                HostMatrix::BF16(m) => upload(op, device, shape, m.iter().copied())?,
                other => upload_from_f32(op, device, other, bf16::from_f32)?,
            },
            _ => upload_from_f32(op, device, source, |v| v)?,
        };
        Ok(Self { data, shape })
    }

    /// The rows `rows` as f32, end to end; of elements there must be some.
    fn read(&self, rows: Range<usize>) -> candle_core::Result<Vec<f32>> {
        let part = self.data.narrow(0, rows.start, rows.len())?;
        part.to_dtype(candle_core::DType::F32)?.flatten_all()?.to_vec1::<f32>()
    }
}

/// Copies numbers to the device.
fn upload<T: WithDType>(
    op: &'static str,
    device: &Device,
    shape: [usize; 2],
    numbers: impl Iterator<Item = T>,
) -> Result<Tensor> {
    let mut data = reserve(op, count(op, shape)?)?;
    data.extend(numbers);
    Tensor::from_vec(data, &shape, device).map_err(|error| convert(op, error))
}

/// Copies a matrix of any format, row by row through f32.
fn upload_from_f32<T: WithDType>(
    op: &'static str,
    device: &Device,
    source: HostMatrix<'_>,
    to: impl Fn(f32) -> T,
) -> Result<Tensor> {
    let shape = source.shape();
    let mut data = reserve(op, count(op, shape)?)?;
    let mut wide = vec![0.0; shape[1]];
    for row in 0..shape[0] {
        source.row_f32(row, &mut wide);
        data.extend(wide.iter().map(|&v| to(v)));
    }
    Tensor::from_vec(data, &shape, device).map_err(|error| convert(op, error))
}

fn vector(op: &'static str, device: &Device, data: Vec<f32>) -> Result<Tensor> {
    let len = data.len();
    Tensor::from_vec(data, len, device).map_err(|error| convert(op, error))
}

impl Linear {
    pub(crate) fn new(
        device: &Device,
        weight: HostMatrix<'_>,
        bias: Option<HostVector<'_>>,
        dtype: DType,
    ) -> Result<Self> {
        let op = "new_linear";
        if let Some(bias) = &bias {
            check::length(op, "bias", bias.len(), weight.shape()[0])?;
        }
        let bias = bias
            .map(|bias| vector(op, device, bias.to_f32().iter().map(|&b| dtype.round(b)).collect()))
            .transpose()?;
        Ok(Self { weight: Kept::Dense(Weight::new(op, device, weight, dtype)?), bias })
    }

    /// Of a quantized weight, which is held already.
    pub(crate) fn quantized(device: &Device, weight: Kept, bias: Option<HostVector<'_>>) -> Result<Self> {
        let op = "new_linear";
        if let Some(bias) = &bias {
            check::length(op, "bias", bias.len(), weight.shape()[0])?;
        }
        let bias = bias.map(|bias| vector(op, device, bias.to_f32().to_vec())).transpose()?;
        Ok(Self { weight, bias })
    }

    pub(crate) fn read(&self) -> Result<HostLinear> {
        let op = "read_linear";
        let weight = self.weight.read(op, 0..self.weight.shape()[0])?;
        let bias = self.bias.as_ref().map(|bias| bias.to_vec1::<f32>()).transpose();
        Ok(HostLinear { weight, bias: bias.map_err(|error| convert(op, error))?.map(Array1::from_vec) })
    }
}

impl Norm {
    pub(crate) fn new(device: &Device, params: NormParams<'_>) -> Result<Self> {
        let op = "new_norm";
        let NormParams { width, eps, weight, bias } = params;
        for (what, vector) in [("weight", &weight), ("bias", &bias)] {
            if let Some(vector) = vector {
                check::length(op, what, vector.len(), width)?;
            }
        }
        let [weight, bias] = [weight, bias].map(|v| v.map(|v| v.to_f32()));
        let on_device = |v: &Option<Array1<f32>>, absent: f32| {
            vector(op, device, v.as_ref().map_or_else(|| vec![absent; width], |v| v.to_vec()))
        };
        let (scale, shift) = (on_device(&weight, 1.0)?, on_device(&bias, 0.0)?);
        Ok(Self { width, eps, given: [weight.is_some(), bias.is_some()], scale, shift })
    }

    /// Of a weight and a bias on the device, `[width]` each.
    pub(crate) fn of(width: usize, scale: Tensor, shift: Tensor, eps: f32) -> Self {
        Self { width, eps, given: [true; 2], scale, shift }
    }

    pub(crate) fn read(&self) -> Result<HostNorm> {
        let read = |vector: &Tensor, given: bool| {
            let vector = given.then(|| vector.to_vec1::<f32>()).transpose();
            Ok(vector.map_err(|error| convert("read_norm", error))?.map(Array1::from_vec))
        };
        let [weighted, biased] = self.given;
        let (weight, bias) = (read(&self.scale, weighted)?, read(&self.shift, biased)?);
        Ok(HostNorm { eps: self.eps, weight, bias, width: self.width })
    }
}
