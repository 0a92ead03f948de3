//! The numbers of candle's CPU tensors as slices.

use crate::error::convert;
use candle_core::{CpuStorage, DType, Device, InplaceOp1, Layout, Storage, Tensor, WithDType};
use half::{bf16, f16};
use opt_backend::{Error, ErrorKind, Result};
use std::{cell::Cell, marker::PhantomData};

/// Elements of tensors that are read and written here.
pub(crate) trait Element: WithDType {
    /// The whole memory of a tensor of these elements.
    fn memory(storage: &mut CpuStorage) -> Option<&mut [Self]>;
}

macro_rules! element {
    ($($type:ty, $variant:ident;)*) => { $(
        impl Element for $type {
            fn memory(storage: &mut CpuStorage) -> Option<&mut [Self]> {
                if let CpuStorage::$variant(data) = storage { Some(data) } else { None }
            }
        }
    )* };
}

element! { f32, F32; f16, F16; bf16, BF16; u8, U8; }

/// The numbers of a contiguous tensor in main memory. `storage` and `layout` are those of
/// [`Tensor::storage_and_layout`]: a lock is held for as long as the slice lives.
pub(crate) fn numbers<'a, T: WithDType>(
    op: &'static str,
    storage: &'a Storage,
    layout: &Layout,
) -> Result<&'a [T]> {
    let Storage::Cpu(storage) = storage else {
        return Err(Error::new(ErrorKind::Device, op, "expected a tensor in main memory"));
    };
    let data = storage.as_slice::<T>().map_err(|error| convert(op, error))?;
    let range = layout.contiguous_offsets().and_then(|(start, end)| data.get(start..end));
    range.ok_or_else(|| Error::new(ErrorKind::Device, op, "expected a contiguous tensor"))
}

/// A tensor of `data` in main memory, without a copy.
pub(crate) fn tensor<T: WithDType>(op: &'static str, data: Vec<T>, shape: &[usize]) -> Result<Tensor> {
    Tensor::from_vec(data, shape, &Device::Cpu).map_err(|error| convert(op, error))
}

/// Lets `change` write to the numbers of a tensor in main memory whose storage no other tensor shares.
pub(crate) fn change<T: Element, R>(
    op: &'static str,
    x: &Tensor,
    change: impl FnOnce(&mut [T]) -> R,
) -> Result<R> {
    let call = Change { op, change: Cell::new(Some(change)), result: Cell::new(None), of: PhantomData };
    x.inplace_op1(&call).map_err(|error| convert(op, error))?;
    call.result.into_inner().ok_or_else(|| Error::new(ErrorKind::Device, op, "a tensor was not changed"))
}

struct Change<T, F, R> {
    op: &'static str,
    /// Taken out when it is called, once.
    change: Cell<Option<F>>,
    result: Cell<Option<R>>,
    of: PhantomData<T>,
}

impl<T: Element, R, F: FnOnce(&mut [T]) -> R> InplaceOp1 for Change<T, F, R> {
    fn name(&self) -> &'static str {
        self.op
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let range = layout.contiguous_offsets();
        let data = T::memory(storage).zip(range).and_then(|(data, (start, end))| data.get_mut(start..end));
        let Some(data) = data else { candle_core::bail!("expected a contiguous tensor of {:?}", T::DTYPE) };
        self.result.set(self.change.take().map(|change| change(data)));
        Ok(())
    }
}

/// An empty vector with room for `len` elements.
pub(crate) fn reserve<T>(op: &'static str, len: usize) -> Result<Vec<T>> {
    let mut data = Vec::new();
    match data.try_reserve_exact(len) {
        Ok(()) => Ok(data),
        Err(_) => {
            let bytes = len.saturating_mul(size_of::<T>());
            Err(Error::new(ErrorKind::OutOfMemory, op, format_args!("cannot allocate {bytes} bytes")))
        }
    }
}

/// `len` zeros.
pub(crate) fn zeros<T: Copy + Default>(op: &'static str, len: usize) -> Result<Vec<T>> {
    let mut data = reserve(op, len)?;
    data.resize(len, T::default());
    Ok(data)
}

/// `a * b` elements, if that can be addressed.
pub(crate) fn count(op: &'static str, [a, b]: [usize; 2]) -> Result<usize> {
    a.checked_mul(b).filter(|n| isize::try_from(*n).is_ok()).ok_or_else(|| {
        Error::new(ErrorKind::OutOfMemory, op, format_args!("{a} x {b} elements cannot be addressed"))
    })
}

/// candle's name of a format.
pub(crate) fn dtype(op: &'static str, dtype: opt_backend::DType) -> Result<DType> {
    match dtype {
        opt_backend::DType::F32 => Ok(DType::F32),
        opt_backend::DType::F16 => Ok(DType::F16),
        opt_backend::DType::BF16 => Ok(DType::BF16),
        other => {
            let message = format_args!("this backend does not hold weights as {other}");
            Err(Error::new(ErrorKind::Unsupported, op, message))
        }
    }
}
