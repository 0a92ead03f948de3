use super::{QuantSpec, QuantizedWeights};
use crate::{
    Error, ErrorKind, Result,
    checkpoint::{Checkpoint, Tensor, Weight},
    config::held_bytes,
};
use opt_backend::{DType, quant::Quantized};
use std::{borrow::Cow, collections::BTreeMap, sync::Arc};

/// How the weights of a checkpoint are to be held.
#[derive(Debug, Clone, Default)]
pub(crate) struct Holding {
    /// Matrices that are not quantized.
    pub(crate) dtype: DType,
    /// Rounds while loading.
    pub(crate) spec: Option<QuantSpec>,
    /// Weights in the place of the checkpoint's.
    pub(crate) given: Option<Arc<QuantizedWeights>>,
}

/// A weight as it is to be held.
#[allow(clippy::large_enum_variant)] // one at a time
pub(crate) enum Held<'a> {
    /// In [`Holding::dtype`].
    Plain(Tensor<'a>),
    /// Packed.
    Quantized(Cow<'a, Quantized>),
}

impl Holding {
    /// Refuses before anything is loaded what cannot be done to a checkpoint.
    pub(crate) fn check(&self, checkpoint: &Checkpoint) -> Result<()> {
        let Some(spec) = self.spec else { return Ok(()) };
        if let Some(found) = checkpoint.quantization() {
            let message = format_args!("expected weights that are not quantized yet, found {found}");
            return Err(Error::new(ErrorKind::Option, message));
        }
        spec.check(checkpoint.config())
    }

    /// The weight `[out, in]` of this canonical name.
    pub(crate) fn weight<'a>(
        &'a self,
        checkpoint: &'a Checkpoint,
        name: &str,
        shape: [usize; 2],
    ) -> Result<Held<'a>> {
        if let Some(weight) = self.given(name) {
            if weight.shape() != shape {
                let message = format!("tensor {name}: expected shape {shape:?}, found {:?}", weight.shape());
                return Err(Error::new(ErrorKind::Checkpoint, message));
            }
            return Ok(Held::Quantized(Cow::Borrowed(weight)));
        }
        let weight = match checkpoint.weight(name, shape)? {
            Weight::Plain(weight) => weight,
            Weight::Quantized(weight) => return Ok(Held::Quantized(Cow::Owned(weight))),
        };
        Ok(match self.spec.and_then(|spec| spec.of_tensor(name)) {
            Some(spec) => Held::Quantized(Cow::Owned(spec.quantize(name, weight.matrix()?)?)),
            None => Held::Plain(weight),
        })
    }

    fn given(&self, name: &str) -> Option<&Quantized> {
        self.given.as_ref().and_then(|given| given.get(name))
    }

    /// Bytes that all weights take in memory.
    pub(crate) fn total_bytes(&self, checkpoint: &Checkpoint) -> u64 {
        self.sizes(checkpoint).values().fold(0, |sum, bytes| sum.saturating_add(*bytes))
    }

    /// Bytes that each weight takes in memory, by its canonical name.
    pub(crate) fn sizes(&self, checkpoint: &Checkpoint) -> BTreeMap<String, u64> {
        let size = |(name, shape): (String, Vec<usize>)| {
            let packed =
                if self.given(&name).is_some() { None } else { checkpoint.packed_bytes(&name, &shape) };
            let bytes = packed.unwrap_or_else(|| self.bytes(&name, &shape));
            (name, bytes)
        };
        checkpoint.config().tensor_shapes().into_iter().map(size).collect()
    }

    fn bytes(&self, name: &str, shape: &[usize]) -> u64 {
        if let Some(weight) = self.given(name) {
            return super::packed_bytes(weight);
        }
        match (self.spec.and_then(|spec| spec.of_tensor(name)), shape) {
            (Some(spec), &[out, inputs]) => spec.bytes([out, inputs]),
            _ => held_bytes(shape, self.dtype),
        }
    }

    /// For messages.
    pub(crate) fn name(&self) -> String {
        match self.spec {
            Some(spec) => spec.format.to_string(),
            None if self.given.is_some() => "quantized".to_owned(),
            None => self.dtype.to_string(),
        }
    }
}
