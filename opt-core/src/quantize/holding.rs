use super::{QuantSpec, QuantizedWeights};
use crate::{Error, ErrorKind, Result, checkpoint::Checkpoint, config::OptConfig};
use opt_backend::{DType, quant::Quantized};
use std::{borrow::Cow, sync::Arc};

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

impl Holding {
    /// Refuses before anything is loaded what cannot be done to a model of this shape.
    pub(crate) fn check(&self, config: &OptConfig) -> Result<()> {
        self.spec.iter().try_for_each(|spec| spec.check(config))
    }

    /// The weight `[out, in]` of this canonical name as it is to be held, if that is quantized.
    pub(crate) fn quantized(
        &self,
        checkpoint: &Checkpoint,
        name: &str,
        shape: [usize; 2],
    ) -> Result<Option<Cow<'_, Quantized>>> {
        if let Some(weight) = self.given(name) {
            if weight.shape() != shape {
                let message = format!("tensor {name}: expected shape {shape:?}, found {:?}", weight.shape());
                return Err(Error::new(ErrorKind::Checkpoint, message));
            }
            return Ok(Some(Cow::Borrowed(weight)));
        }
        let Some(spec) = self.spec.and_then(|spec| spec.of_tensor(name)) else { return Ok(None) };
        let weight = checkpoint.tensor(name, &shape)?;
        Ok(Some(Cow::Owned(spec.quantize(name, weight.matrix()?)?)))
    }

    fn given(&self, name: &str) -> Option<&Quantized> {
        self.given.as_ref().and_then(|given| given.get(name))
    }

    /// Bytes that a tensor takes in memory.
    pub(crate) fn bytes(&self, name: &str, shape: &[usize]) -> u64 {
        if let Some(weight) = self.given(name) {
            return super::packed_bytes(weight);
        }
        match (self.spec.and_then(|spec| spec.of_tensor(name)), shape) {
            (Some(spec), &[out, inputs]) => spec.bytes([out, inputs]),
            _ => {
                let count = shape.iter().fold(1u64, |count, n| count.saturating_mul(*n as u64));
                count.saturating_mul(if shape.len() == 2 { self.dtype.size() as u64 } else { 4 })
            }
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
