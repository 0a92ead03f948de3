use half::{bf16, f16};
use ndarray::{Array2, ArrayView1, ArrayView2, Axis};
use std::{fmt, str::FromStr};

/// How numbers are held. Arithmetic accumulates in f32 whatever the storage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum DType {
    /// IEEE single precision.
    #[default]
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of an f32.
    BF16,
}

impl DType {
    /// Bytes of one number.
    pub fn size(self) -> usize {
        match self {
            DType::F32 => 4,
            DType::F16 | DType::BF16 => 2,
        }
    }

    /// The nearest number that this format can hold, ties to even; past its largest is infinity.
    pub fn round(self, value: f32) -> f32 {
        match self {
            DType::F32 => value,
            DType::F16 => f16::from_f32(value).to_f32(),
            DType::BF16 => bf16::from_f32(value).to_f32(),
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DType::F32 => "f32",
            DType::F16 => "f16",
            DType::BF16 => "bf16",
        })
    }
}

impl FromStr for DType {
    type Err = String;

    /// Accepts the short names and those of torch (`float16`, `torch.bfloat16`, ...).
    fn from_str(name: &str) -> Result<Self, String> {
        match name.strip_prefix("torch.").unwrap_or(name) {
            "f32" | "float32" | "float" => Ok(DType::F32),
            "f16" | "float16" | "half" => Ok(DType::F16),
            "bf16" | "bfloat16" => Ok(DType::BF16),
            _ => Err(format!("unknown dtype {name:?}; expected f32, f16 or bf16")),
        }
    }
}

/// A matrix in host memory, `[rows, columns]`, borrowed for as long as a backend needs to take it over.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub enum HostMatrix<'a> {
    /// Single precision.
    F32(ArrayView2<'a, f32>),
    /// Half precision.
    F16(ArrayView2<'a, f16>),
    /// bfloat16.
    BF16(ArrayView2<'a, bf16>),
}

/// A vector in host memory.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub enum HostVector<'a> {
    /// Single precision.
    F32(ArrayView1<'a, f32>),
    /// Half precision.
    F16(ArrayView1<'a, f16>),
    /// bfloat16.
    BF16(ArrayView1<'a, bf16>),
}

impl HostMatrix<'_> {
    /// `[rows, columns]`.
    pub fn shape(&self) -> [usize; 2] {
        match self {
            HostMatrix::F32(m) => [m.nrows(), m.ncols()],
            HostMatrix::F16(m) => [m.nrows(), m.ncols()],
            HostMatrix::BF16(m) => [m.nrows(), m.ncols()],
        }
    }

    /// How the numbers lie in memory.
    pub fn dtype(&self) -> DType {
        match self {
            HostMatrix::F32(_) => DType::F32,
            HostMatrix::F16(_) => DType::F16,
            HostMatrix::BF16(_) => DType::BF16,
        }
    }

    /// Writes row `row` as f32 into `out`, whose length is the number of columns.
    pub fn row_f32(&self, row: usize, out: &mut [f32]) {
        fn copy<T: Copy>(row: ArrayView1<'_, T>, out: &mut [f32], to: impl Fn(T) -> f32) {
            out.iter_mut().zip(row).for_each(|(o, &v)| *o = to(v));
        }
        match self {
            HostMatrix::F32(m) => copy(m.index_axis(Axis(0), row), out, |v| v),
            HostMatrix::F16(m) => copy(m.index_axis(Axis(0), row), out, f16::to_f32),
            HostMatrix::BF16(m) => copy(m.index_axis(Axis(0), row), out, bf16::to_f32),
        }
    }

    /// A copy in f32.
    pub fn to_f32(&self) -> Array2<f32> {
        match self {
            HostMatrix::F32(m) => m.to_owned(),
            HostMatrix::F16(m) => m.mapv(f16::to_f32),
            HostMatrix::BF16(m) => m.mapv(bf16::to_f32),
        }
    }
}

impl HostVector<'_> {
    /// A copy in f32.
    pub fn to_f32(&self) -> ndarray::Array1<f32> {
        match self {
            HostVector::F32(v) => v.to_owned(),
            HostVector::F16(v) => v.mapv(f16::to_f32),
            HostVector::BF16(v) => v.mapv(bf16::to_f32),
        }
    }

    /// The number of elements.
    pub fn len(&self) -> usize {
        match self {
            HostVector::F32(v) => v.len(),
            HostVector::F16(v) => v.len(),
            HostVector::BF16(v) => v.len(),
        }
    }

    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
