//! The tensors that make up one quantized weight: what is expected of each, and reading them.

use crate::{
    Error, ErrorKind, Result,
    checkpoint::{
        Checkpoint, FileDType, Tensor,
        entry::{damaged, fail},
        write::convert,
    },
};
use bytemuck::AnyBitPattern;
use ndarray::{Array2, ArrayView2};
use opt_backend::quant::{Groups, Levels, Quantized, Zeros};
use serde_json::Value;
use std::fmt;

/// One tensor of a packed weight.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Part {
    /// What follows the module's name and a dot: `qweight`, `weight.absmax`.
    pub(super) suffix: String,
    /// The number formats it may have; empty for any.
    pub(super) dtypes: &'static [FileDType],
    /// `None` where only the number of bytes is fixed, by [`Part::bytes`].
    pub(super) shape: Option<Vec<usize>>,
    pub(super) bytes: Option<usize>,
    pub(super) required: bool,
}

impl Part {
    pub(super) const FLOATS: &'static [FileDType] = &[FileDType::F16, FileDType::BF16, FileDType::F32];

    pub(super) fn new(suffix: &str, dtypes: &'static [FileDType], shape: impl Into<Vec<usize>>) -> Self {
        let (suffix, shape) = (suffix.to_owned(), Some(shape.into()));
        Self { suffix, dtypes, shape, bytes: None, required: true }
    }

    /// So many bytes, whatever they are called.
    pub(super) fn bytes(suffix: &str, bytes: usize) -> Self {
        Self { suffix: suffix.to_owned(), dtypes: &[], shape: None, bytes: Some(bytes), required: true }
    }

    /// A tensor whose shape is known only once it is read.
    pub(super) fn any(suffix: &str) -> Self {
        Self { suffix: suffix.to_owned(), dtypes: &[], shape: None, bytes: None, required: true }
    }

    pub(super) fn optional(self) -> Self {
        Self { required: false, ..self }
    }

    /// What is wrong with the tensor of this part, if anything is.
    pub(super) fn fault(&self, checkpoint: &Checkpoint, module: &str) -> Option<String> {
        let name = format!("{module}.{}", self.suffix);
        let Some(info) = checkpoint.tensors.get(&name) else {
            return self.required.then(|| match &self.shape {
                Some(shape) => format!("{name} {shape:?} is missing"),
                None => format!("{name} is missing"),
            });
        };
        let place = info.place();
        if let Some(shape) = self.shape.as_ref().filter(|shape| **shape != info.shape) {
            return Some(format!("{place}: expected shape {shape:?}, found {:?}", info.shape));
        }
        if let Some(bytes) = self.bytes.filter(|bytes| *bytes != info.bytes()) {
            return Some(format!("{place}: expected {bytes} bytes, found {}", info.bytes()));
        }
        if !self.dtypes.is_empty() && !self.dtypes.contains(&info.dtype) {
            let names: Vec<String> = self.dtypes.iter().map(ToString::to_string).collect();
            return Some(format!("{place}: expected {}, found {}", names.join(" or "), info.dtype));
        }
        None
    }
}

/// The tensors of one module in a checkpoint.
#[derive(Debug, Clone, Copy)]
pub(super) struct Parts<'a> {
    checkpoint: &'a Checkpoint,
    /// `layers.0.fc1`.
    pub(super) module: &'a str,
}

impl<'a> Parts<'a> {
    pub(super) fn new(checkpoint: &'a Checkpoint, module: &'a str) -> Self {
        Self { checkpoint, module }
    }

    pub(super) fn has(&self, suffix: &str) -> bool {
        self.checkpoint.tensors.contains_key(&format!("{}.{suffix}", self.module))
    }

    pub(super) fn required(&self, suffix: &str) -> Result<Stored<'a>> {
        self.optional(suffix)?.ok_or_else(|| {
            Error::new(ErrorKind::NotFound, format_args!("tensor {}.{suffix} is missing", self.module))
        })
    }

    pub(super) fn optional(&self, suffix: &str) -> Result<Option<Stored<'a>>> {
        let info = self.checkpoint.tensors.get(&format!("{}.{suffix}", self.module));
        info.map(|info| self.checkpoint.read(info).map(Stored)).transpose()
    }

    /// Puts the weight together; what does not fit is this module's fault.
    pub(super) fn build(
        &self,
        codes: Array2<u8>,
        scales: Array2<f32>,
        zeros: Zeros,
        levels: Levels,
        groups: Groups,
    ) -> Result<Quantized> {
        Quantized::new(codes, scales, zeros, levels, groups)
            .map_err(|e| damaged(format_args!("{}.weight: {e}", self.module)))
    }
}

/// A tensor of a packed weight.
#[derive(Debug)]
pub(super) struct Stored<'a>(pub(super) Tensor<'a>);

impl Stored<'_> {
    pub(super) fn fail<T>(&self, message: impl fmt::Display) -> Result<T> {
        fail(format_args!("{}: {message}", self.0.info().place()))
    }

    pub(super) fn place(&self) -> String {
        self.0.info().place()
    }

    pub(super) fn bytes(&self) -> &[u8] {
        self.0.bytes()
    }

    pub(super) fn dtype(&self) -> FileDType {
        self.0.info().dtype
    }

    /// The second of two axes.
    pub(super) fn columns(&self) -> Option<usize> {
        let &[_, columns] = self.0.shape() else { return None };
        Some(columns)
    }

    /// The numbers as they are; `T` is the type that the caller checked the tensor to have.
    pub(super) fn numbers<T: AnyBitPattern>(&self) -> Result<&[T]> {
        self.0.typed()
    }

    pub(super) fn matrix<T: AnyBitPattern>(&self) -> Result<ArrayView2<'_, T>> {
        let &[rows, columns] = self.0.shape() else {
            return self.fail(format_args!("expected 2 axes, found shape {:?}", self.0.shape()));
        };
        self.0.view2(rows, columns)
    }

    /// The numbers in f32, which must be finite.
    pub(super) fn floats(&self) -> Result<Vec<f32>> {
        let mut bytes = Vec::new();
        convert(self.bytes(), self.dtype(), FileDType::F32, &mut bytes)
            .map_err(|e| e.at(self.0.info().place()))?;
        let floats: Vec<f32> = bytemuck::pod_collect_to_vec(&bytes);
        match floats.iter().position(|value| !value.is_finite()) {
            Some(at) => {
                let found = floats.get(at).copied().unwrap_or(f32::NAN);
                self.fail(format_args!("expected finite numbers, found {found} at {at}"))
            }
            None => Ok(floats),
        }
    }
}

/// One zero point for all where they are equal: less to hold and to read.
pub(super) fn collapse(zeros: Array2<u16>) -> Zeros {
    match zeros.first() {
        Some(first) if zeros.iter().all(|zero| zero == first) => Zeros::Same(*first),
        _ => Zeros::Each(zeros),
    }
}

/// A whole number of a configuration, one of `choices`.
pub(super) fn int(config: &Value, key: &str, choices: &[u64]) -> Result<u64> {
    let found = config.get(key);
    match found.and_then(Value::as_u64).filter(|found| choices.contains(found)) {
        Some(found) => Ok(found),
        None => {
            let choices: Vec<String> = choices.iter().map(ToString::to_string).collect();
            let found = found.map_or("none".to_owned(), super::brief);
            let message = format_args!("{key}: expected {}, found {found}", choices.join(", "));
            Err(Error::new(ErrorKind::Unsupported, message))
        }
    }
}
