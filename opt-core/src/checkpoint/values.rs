//! Writing safetensors of values that are asked for one at a time.

use super::{
    Checkpoint, FileDType, TensorInfo, convert::side_files, source::io, write::safetensors_header,
    zip::cannot_write,
};
use crate::Result;
use ndarray::Array2;
use opt_backend::DType;
use std::{
    collections::BTreeSet,
    fs::File,
    io::{BufWriter, Write},
    path::Path,
};

/// What the names of heads' tensors begin with: a model has one.
const HEADS: [&str; 2] = ["score.", "qa_outputs."];

/// Gives the value of a tensor by its name; vectors are `[1, width]`.
pub(crate) type Values<'a> = &'a mut dyn FnMut(&str) -> Result<Array2<f32>>;

/// Writes f32 tensors, of these names and shapes, to a file that is not there yet.
pub(crate) fn write_arrays(path: &Path, tensors: &[(String, Vec<usize>)], values: Values<'_>) -> Result<()> {
    let items = tensors.iter().map(|(name, shape)| (name.clone(), FileDType::F32, shape.clone()));
    let mut out = create(path)?;
    out.write_all(&safetensors_header(items)?).map_err(cannot_write)?;
    tensors.iter().try_for_each(|(name, _)| write_array(&values(name)?, &mut out))?;
    out.flush().map_err(cannot_write)
}

/// A safetensors file in memory, of matrices and (where the shape has one number) vectors.
pub(crate) fn array_bytes(tensors: &[(String, Vec<usize>, Array2<f32>)]) -> Result<Vec<u8>> {
    let items = tensors.iter().map(|(name, shape, _)| (name.clone(), FileDType::F32, shape.clone()));
    let mut bytes = safetensors_header(items)?;
    tensors.iter().try_for_each(|(_, _, values)| write_array(values, &mut bytes))?;
    Ok(bytes)
}

/// Writes the weights of `base` with those in `replaced`, canonical names, as `values` has them, in f32, and `added`, the
/// tensors of a head with their shapes, likewise and in the place of those of another head.
pub(crate) fn write_replaced(
    path: &Path,
    base: &Checkpoint,
    replaced: &BTreeSet<String>,
    added: &[(String, Vec<usize>)],
    values: Values<'_>,
) -> Result<()> {
    let mut written = base.written();
    // A head in the place of another.
    if !added.is_empty() {
        written.retain(|(info, _)| !HEADS.iter().any(|head| info.name.starts_with(head)));
    }
    let dtype = |info: &TensorInfo| if replaced.contains(&info.name) { FileDType::F32 } else { info.dtype };
    // Tensors of wider numbers come first, so that all are aligned.
    written.sort_by_key(|(info, _)| std::cmp::Reverse(dtype(info).size()));
    let mut out = create(path)?;
    let items = written.iter().map(|(info, name)| (name.clone(), dtype(info), info.shape.clone()));
    let added_items = added.iter().map(|(name, shape)| (name.clone(), FileDType::F32, shape.clone()));
    out.write_all(&safetensors_header(added_items.chain(items))?).map_err(cannot_write)?;
    added.iter().try_for_each(|(name, _)| write_array(&values(name)?, &mut out))?;
    for (info, _) in written {
        if replaced.contains(&info.name) {
            write_array(&values(&info.name)?, &mut out)?;
        } else {
            out.write_all(base.read(info)?.bytes()).map_err(cannot_write)?;
        }
    }
    out.flush().map_err(cannot_write)
}

/// config.json and what else belongs to a model, by name; with a number format, config.json says that.
pub(crate) fn model_files(base: &Checkpoint, dtype: Option<DType>) -> Result<Vec<(String, Vec<u8>)>> {
    let files = side_files(base, dtype)?.into_iter();
    Ok(files.map(|(name, contents)| (name.to_owned(), contents)).collect())
}

fn create(path: &Path) -> Result<BufWriter<File>> {
    let file = File::create_new(path).map_err(|e| io("cannot create", path, e))?;
    Ok(BufWriter::with_capacity(1 << 20, file))
}

fn write_array(values: &Array2<f32>, out: &mut impl Write) -> Result<()> {
    match values.as_slice() {
        Some(values) if cfg!(target_endian = "little") => {
            out.write_all(bytemuck::cast_slice(values)).map_err(cannot_write)
        }
        _ => values.iter().try_for_each(|v| out.write_all(&v.to_le_bytes()).map_err(cannot_write)),
    }
}
