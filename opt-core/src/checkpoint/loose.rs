//! Tensors of a file that is no model: an adapter's.

use super::{
    files::Format,
    source::Source,
    tensor::{Tensor, TensorInfo},
};
use crate::{Error, ErrorKind, Result};
use ndarray::{ArrayD, IxDyn};
use opt_backend::DType;
use opt_backend::half::{bf16, f16};
use std::path::Path;

/// Names and numbers of all tensors of a safetensors or pickle file.
pub(crate) fn read_tensors(path: &Path) -> Result<Vec<(String, ArrayD<f32>)>> {
    let source = Source::map(path)?;
    let format = Format::of(path).unwrap_or_else(|| Format::sniff(source.bytes()));
    read(&source, format)
}

/// [`read_tensors`] of a file in memory.
pub(crate) fn tensors_from_bytes(bytes: Vec<u8>) -> Result<Vec<(String, ArrayD<f32>)>> {
    let format = Format::sniff(&bytes);
    read(&Source::memory("the adapter's weights".to_owned(), bytes), format)
}

fn read(source: &Source, format: Format) -> Result<Vec<(String, ArrayD<f32>)>> {
    let entries = format.read(source)?;
    let tensors = entries.into_iter().map(|entry| {
        let name = entry.name.clone();
        let info = TensorInfo::new(name.clone(), source.name.clone(), 0, entry);
        Ok((name, floats(&Tensor::new(&info, source)?)?))
    });
    tensors.collect()
}

/// A tensor as f32.
fn floats(tensor: &Tensor<'_>) -> Result<ArrayD<f32>> {
    let values: Vec<f32> = match tensor.dtype()? {
        DType::F16 => tensor.typed::<f16>()?.iter().map(|v| v.to_f32()).collect(),
        DType::BF16 => tensor.typed::<bf16>()?.iter().map(|v| v.to_f32()).collect(),
        _ => tensor.typed::<f32>()?.to_vec(),
    };
    ArrayD::from_shape_vec(IxDyn(tensor.shape()), values)
        .map_err(|e| Error::because(ErrorKind::Checkpoint, tensor.info().place(), e))
}
