use crate::{Error, ErrorKind, Result};
use serde::Serialize;
use std::{fmt, ops::Range};

/// The number formats a file may hold. Models run from [`F32`](FileDType::F32), [`F16`](FileDType::F16) and
/// [`BF16`](FileDType::BF16); the others may stand in a file beside them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[non_exhaustive]
pub enum FileDType {
    /// IEEE double precision.
    F64,
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of an f32.
    BF16,
    /// Signed 64-bit integers.
    I64,
    /// Signed 32-bit integers.
    I32,
    /// Signed 16-bit integers.
    I16,
    /// Signed bytes.
    I8,
    /// Unsigned 64-bit integers.
    U64,
    /// Unsigned 32-bit integers.
    U32,
    /// Unsigned 16-bit integers.
    U16,
    /// Bytes.
    U8,
    /// Truth values, one a byte.
    BOOL,
}

impl FileDType {
    const ALL: [Self; 13] = [
        Self::F64,
        Self::F32,
        Self::F16,
        Self::BF16,
        Self::I64,
        Self::I32,
        Self::I16,
        Self::I8,
        Self::U64,
        Self::U32,
        Self::U16,
        Self::U8,
        Self::BOOL,
    ];

    /// Bytes of one number.
    pub fn size(self) -> usize {
        match self {
            Self::F64 | Self::I64 | Self::U64 => 8,
            Self::F32 | Self::I32 | Self::U32 => 4,
            Self::F16 | Self::BF16 | Self::I16 | Self::U16 => 2,
            Self::I8 | Self::U8 | Self::BOOL => 1,
        }
    }

    /// By the name safetensors uses.
    pub(super) fn from_safetensors(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|d| format!("{d:?}") == name)
    }

    /// By the name numpy uses (and ml_dtypes, for bfloat16).
    pub(super) fn from_numpy(name: &str) -> Option<Self> {
        Some(match name {
            "float64" => Self::F64,
            "float32" => Self::F32,
            "float16" => Self::F16,
            "bfloat16" => Self::BF16,
            "int64" => Self::I64,
            "int32" => Self::I32,
            "int16" => Self::I16,
            "int8" => Self::I8,
            "uint64" => Self::U64,
            "uint32" => Self::U32,
            "uint16" => Self::U16,
            "uint8" => Self::U8,
            "bool" => Self::BOOL,
            _ => return None,
        })
    }

    /// The format in which a backend can take it, if any.
    pub fn float(self) -> Option<opt_backend::DType> {
        match self {
            Self::F32 => Some(opt_backend::DType::F32),
            Self::F16 => Some(opt_backend::DType::F16),
            Self::BF16 => Some(opt_backend::DType::BF16),
            _ => None,
        }
    }
}

impl From<opt_backend::DType> for FileDType {
    fn from(dtype: opt_backend::DType) -> Self {
        match dtype {
            opt_backend::DType::F16 => Self::F16,
            opt_backend::DType::BF16 => Self::BF16,
            _ => Self::F32,
        }
    }
}

impl fmt::Display for FileDType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

/// One tensor as its file describes it: every range lies inside the file and holds the shape, or there is no entry.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Entry {
    pub(super) name: String,
    pub(super) dtype: FileDType,
    pub(super) shape: Vec<usize>,
    /// Where the numbers lie, in order: one range, several for an array stored in chunks.
    pub(super) pieces: Vec<Range<usize>>,
    /// For a matrix not stored row after row: the distance, in numbers, between rows and between columns.
    pub(super) strides: Option<[usize; 2]>,
}

/// The bytes that `shape` takes, if that is a number.
pub(super) fn byte_length(shape: &[usize], dtype: FileDType) -> Option<usize> {
    shape.iter().try_fold(dtype.size(), |bytes, &n| bytes.checked_mul(n))
}

/// A damaged or lying file.
pub(super) fn damaged(message: impl fmt::Display) -> Error {
    Error::new(ErrorKind::Checkpoint, message)
}

pub(super) fn fail<T>(message: impl fmt::Display) -> Result<T> {
    Err(damaged(message))
}

/// A string out of a file, for a message: quoted, control characters escaped, cut when long.
pub(super) fn shown(text: &str) -> String {
    const MOST: usize = 120;
    match text.char_indices().nth(MOST) {
        Some((cut, _)) => format!("{:?}...", text.get(..cut).unwrap_or_default()),
        None => format!("{text:?}"),
    }
}
