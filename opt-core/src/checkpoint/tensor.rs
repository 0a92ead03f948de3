use super::{
    entry::{Entry, FileDType, damaged, fail, shown},
    source::Source,
};
use crate::{Error, ErrorKind, Result};
use bytemuck::AnyBitPattern;
use ndarray::{ArrayView1, ArrayView2};
use opt_backend::{DType, HostMatrix, HostVector};
use std::ops::Range;

/// What a checkpoint knows of a tensor before its numbers are read.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct TensorInfo {
    /// The canonical name, without prefix: `layers.0.fc1.weight`.
    pub name: String,
    /// The name in the file.
    pub stored_name: String,
    /// How the file holds the numbers.
    pub dtype: FileDType,
    /// The shape as torch has it; a linear's weight is `[out, in]`.
    pub shape: Vec<usize>,
    /// The file's name.
    pub file: String,
    pub(super) source: usize,
    pieces: Vec<Range<usize>>,
    strides: Option<[usize; 2]>,
}

impl TensorInfo {
    pub(super) fn new(name: String, file: String, source: usize, entry: Entry) -> Self {
        let Entry { name: stored_name, dtype, shape, pieces, strides } = entry;
        Self { name, stored_name, dtype, shape, file, source, pieces, strides }
    }

    /// The number of numbers.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether there is no number.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The bytes its numbers take in the file.
    pub fn bytes(&self) -> usize {
        self.len() * self.dtype.size()
    }

    /// Tensor and file, for a message.
    pub(super) fn place(&self) -> String {
        format!("{}: tensor {}", self.file, shown(&self.stored_name))
    }
}

/// A tensor's numbers, row after row.
///
/// They stay in the mapped file where that is possible and are copied where it is not: when they are not aligned for
/// their type, or stored column after column as Flax does. Dropping it gives the file's pages back to the system, so
/// that a model that is handed to a backend tensor by tensor is never in memory twice.
#[derive(Debug)]
pub struct Tensor<'a> {
    info: &'a TensorInfo,
    source: &'a Source,
    numbers: Numbers<'a>,
}

#[derive(Debug)]
enum Numbers<'a> {
    Borrowed(&'a [u8]),
    /// In u64, whose alignment suits every number; the length in bytes.
    Owned(Vec<u64>, usize),
}

impl<'a> Tensor<'a> {
    pub(super) fn new(info: &'a TensorInfo, source: &'a Source) -> Result<Self> {
        let numbers = numbers(info, source.bytes()).map_err(|e| e.at(info.place()))?;
        Ok(Self { info, source, numbers })
    }

    /// Name, shape and place.
    pub fn info(&self) -> &TensorInfo {
        self.info
    }

    /// The shape.
    pub fn shape(&self) -> &[usize] {
        &self.info.shape
    }

    /// The numbers as bytes, little-endian, row after row.
    pub fn bytes(&self) -> &[u8] {
        match &self.numbers {
            Numbers::Borrowed(bytes) => bytes,
            Numbers::Owned(words, length) => {
                let bytes = bytemuck::cast_slice(words);
                bytes.get(..*length).unwrap_or(bytes)
            }
        }
    }

    /// The number format.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] unless it is f32, f16 or bf16.
    pub fn dtype(&self) -> Result<DType> {
        self.info.dtype.float().ok_or_else(|| {
            let message =
                format_args!("{}: expected F32, F16 or BF16, found {}", self.info.place(), self.info.dtype);
            Error::new(ErrorKind::Unsupported, message)
        })
    }

    /// As a matrix `[rows, columns]`.
    ///
    /// # Errors
    /// [`ErrorKind::Checkpoint`] for another number of axes, [`ErrorKind::Unsupported`] for another number format
    /// than f32, f16 or bf16.
    pub fn matrix(&self) -> Result<HostMatrix<'_>> {
        let &[rows, columns] = self.shape() else { return Err(self.axes(2)) };
        Ok(match self.dtype()? {
            DType::F16 => HostMatrix::F16(self.view2(rows, columns)?),
            DType::BF16 => HostMatrix::BF16(self.view2(rows, columns)?),
            _ => HostMatrix::F32(self.view2(rows, columns)?),
        })
    }

    /// As a vector.
    ///
    /// # Errors
    /// As [`Tensor::matrix`].
    pub fn vector(&self) -> Result<HostVector<'_>> {
        let &[_] = self.shape() else { return Err(self.axes(1)) };
        Ok(match self.dtype()? {
            DType::F16 => HostVector::F16(ArrayView1::from(self.typed()?)),
            DType::BF16 => HostVector::BF16(ArrayView1::from(self.typed()?)),
            _ => HostVector::F32(ArrayView1::from(self.typed()?)),
        })
    }

    fn axes(&self, expected: usize) -> Error {
        let (place, shape) = (self.info.place(), self.shape());
        damaged(format_args!("{place}: expected {expected} axes, found shape {shape:?}"))
    }

    pub(super) fn view2<T: AnyBitPattern>(&self, rows: usize, columns: usize) -> Result<ArrayView2<'_, T>> {
        ArrayView2::from_shape((rows, columns), self.typed()?)
            .map_err(|e| Error::because(ErrorKind::Checkpoint, self.info.place(), e))
    }

    pub(super) fn typed<T: AnyBitPattern>(&self) -> Result<&[T]> {
        bytemuck::try_cast_slice(self.bytes())
            .map_err(|e| damaged(format_args!("{}: cannot be read in place: {e}", self.info.place())))
    }
}

impl Drop for Tensor<'_> {
    fn drop(&mut self) {
        self.info.pieces.iter().for_each(|piece| self.source.release(piece.clone()));
    }
}

fn numbers<'a>(info: &TensorInfo, file: &'a [u8]) -> Result<Numbers<'a>> {
    let piece = |range: &Range<usize>| {
        file.get(range.clone()).ok_or_else(|| damaged("the file has shrunk since it was opened"))
    };
    if let (Some([rows, columns]), Some(strides)) = (matrix_shape(&info.shape), info.strides) {
        let copied;
        let stored = match &info.pieces[..] {
            [one] => piece(one)?,
            _ => {
                copied = joined(info, piece)?;
                bytemuck::cast_slice(&copied)
            }
        };
        let mut words = words(info.bytes());
        let out: &mut [u8] = bytemuck::cast_slice_mut(&mut words);
        gather(stored, info.dtype.size(), [rows, columns], strides, out)?;
        return Ok(Numbers::Owned(words, info.bytes()));
    }
    match &info.pieces[..] {
        [one] => {
            let bytes = piece(one)?;
            if bytes.as_ptr().addr() % info.dtype.size() == 0 {
                return Ok(Numbers::Borrowed(bytes));
            }
            Ok(Numbers::Owned(joined(info, piece)?, info.bytes()))
        }
        _ => Ok(Numbers::Owned(joined(info, piece)?, info.bytes())),
    }
}

/// Rows and columns of a shape with strides; a vector is one row.
fn matrix_shape(shape: &[usize]) -> Option<[usize; 2]> {
    match *shape {
        [rows, columns] => Some([rows, columns]),
        [columns] => Some([1, columns]),
        _ => None,
    }
}

fn words(bytes: usize) -> Vec<u64> {
    vec![0; bytes.div_ceil(8)]
}

/// The pieces, copied end to end.
fn joined<'a>(info: &TensorInfo, piece: impl Fn(&Range<usize>) -> Result<&'a [u8]>) -> Result<Vec<u64>> {
    let mut words = words(info.pieces.iter().map(Range::len).sum());
    let mut rest: &mut [u8] = bytemuck::cast_slice_mut(&mut words);
    for range in &info.pieces {
        let bytes = piece(range)?;
        let Some((here, after)) = rest.split_at_mut_checked(bytes.len()) else {
            return fail("pieces are longer than the tensor");
        };
        here.copy_from_slice(bytes);
        rest = after;
    }
    Ok(words)
}

/// Copies a strided matrix row after row, in tiles so that both sides stay in the cache.
fn gather(
    stored: &[u8],
    size: usize,
    [rows, columns]: [usize; 2],
    [row_stride, column_stride]: [usize; 2],
    out: &mut [u8],
) -> Result<()> {
    const TILE: usize = 32;
    for row_tile in (0..rows).step_by(TILE) {
        for column_tile in (0..columns).step_by(TILE) {
            for row in row_tile..rows.min(row_tile + TILE) {
                for column in column_tile..columns.min(column_tile + TILE) {
                    let from = (row * row_stride + column * column_stride) * size;
                    let to = (row * columns + column) * size;
                    let (Some(from), Some(to)) = (stored.get(from..from + size), out.get_mut(to..to + size))
                    else {
                        return fail("strides reach outside the tensor");
                    };
                    to.copy_from_slice(from);
                }
            }
        }
    }
    Ok(())
}
