//! Reading and writing what `torch.save` makes of a state dict: a zip archive with a pickle and one record a storage.

mod machine;
pub(super) mod write;

use super::{
    entry::{Entry, byte_length, damaged, fail, shown},
    zip::{self, Archive},
};
use crate::{Error, ErrorKind, Result};
use machine::{Built, Node, Tensor, Value};
use std::{collections::HashSet, ops::Range};

/// A state dict's pickle holds names and shapes: 200 bytes a tensor.
const MOST_PICKLE: usize = 8 << 20;

/// Where training scripts put the state dict in what they save.
const WRAPPERS: [&str; 4] = ["state_dict", "model_state_dict", "model", "module"];

/// The tensors of a PyTorch file.
pub(super) fn read(file: &[u8]) -> Result<Vec<Entry>> {
    if !zip::is_zip(file) {
        let message = "expected the zip format that torch has written since 1.6; if this is an older file, re-save it \
            in Python: torch.save(torch.load(path, weights_only=True), path)";
        return Err(Error::new(ErrorKind::Unsupported, message));
    }
    let archive = Archive::read(file)?;
    let Some(prefix) = archive.names().find_map(|name| name.strip_suffix("data.pkl")) else {
        return fail("no data.pkl in the archive: not written by torch.save");
    };
    let record = |name: &str| archive.get(&format!("{prefix}{name}"));
    let contents = |range: Range<usize>| file.get(range).unwrap_or_default();
    if record("byteorder").is_some_and(|range| contents(range) == b"big") {
        return Err(Error::new(ErrorKind::Unsupported, "numbers are big-endian; expected little-endian"));
    }
    let program = contents(record("data.pkl").unwrap_or_default());
    entries(program, |key| record(&format!("data/{key}")))
}

/// The tensors of a pickle whose storages `record` finds.
pub(super) fn entries(program: &[u8], record: impl Fn(&str) -> Option<Range<usize>>) -> Result<Vec<Entry>> {
    if program.len() > MOST_PICKLE {
        let message = format_args!("data.pkl: expected at most {MOST_PICKLE} bytes, found {}", program.len());
        return fail(message);
    }
    let built = machine::run(program)?;
    let mut names = HashSet::new();
    let mut entries = Vec::new();
    for (name, tensor) in state_dict(&built)? {
        if !names.insert(name) {
            return fail(format_args!("tensor {} is there twice", shown(name)));
        }
        entries.push(entry(name, tensor, &record).map_err(|e| e.at(format_args!("tensor {}", shown(name))))?);
    }
    Ok(entries)
}

/// Names and tensors of the top dict, or of the state dict inside it.
fn state_dict<'b, 'a>(built: &'b Built<'a>) -> Result<Vec<(&'a str, &'b Tensor<'a>)>> {
    let Some(Node::Dict(top)) = built.node(built.top) else {
        return fail("expected a state dict at the top");
    };
    let tensors = |items: &[(Value<'a>, Value<'a>)]| -> Vec<_> {
        let tensor = |&(key, value): &(Value<'a>, Value<'a>)| match (key, built.node(value)) {
            (Value::Str(name), Some(Node::Tensor(tensor))) => Some((name, tensor)),
            _ => None,
        };
        items.iter().filter_map(tensor).collect()
    };
    let found = tensors(top);
    if !found.is_empty() {
        return Ok(found);
    }
    let inner = WRAPPERS.iter().find_map(|wrapper| {
        let (_, value) = top.iter().find(|(key, _)| *key == Value::Str(wrapper))?;
        match built.node(*value) {
            Some(Node::Dict(items)) => Some(tensors(items)),
            _ => None,
        }
    });
    Ok(inner.unwrap_or_default())
}

fn entry(name: &str, tensor: &Tensor<'_>, record: &impl Fn(&str) -> Option<Range<usize>>) -> Result<Entry> {
    let Tensor { storage, offset, shape, strides } = tensor;
    let dtype = storage.dtype;
    let Some(range) = record(storage.key) else {
        return fail(format_args!("its record data/{} is missing", storage.key.escape_debug()));
    };
    if storage.length.checked_mul(dtype.size()) != Some(range.len()) {
        return fail(format_args!(
            "expected a record of {} {dtype} numbers, found {} bytes",
            storage.length,
            range.len()
        ));
    }
    if shape.len() != strides.len() {
        return fail(format_args!("shape {shape:?} and strides {strides:?} differ in length"));
    }
    let count = byte_length(shape, dtype).map(|bytes| bytes / dtype.size());
    let extent = extent(shape, strides);
    let fits = |numbers: Option<usize>| {
        numbers.and_then(|n| n.checked_add(*offset)).is_some_and(|end| end <= storage.length)
    };
    // A view that repeats numbers (strides of 0) could claim more memory than the file has.
    if !fits(extent) || count.is_none_or(|count| count > storage.length) {
        return fail(format_args!(
            "{shape:?} with strides {strides:?} at {offset} does not lie within {} numbers",
            storage.length
        ));
    }
    let contiguous = is_contiguous(shape, strides);
    let strides = match (contiguous, &shape[..], &strides[..]) {
        (true, ..) => None,
        (false, [_, _], &[row, column]) => Some([row, column]),
        (false, [_], &[step]) => Some([0, step]),
        _ => return Err(damaged(format_args!("strides {strides:?} of {shape:?} are not supported"))),
    };
    let start = range.start + offset * dtype.size();
    let end = start + extent.unwrap_or(0) * dtype.size();
    // One range of bytes, not a list of numbers.
    #[allow(clippy::single_range_in_vec_init)]
    let pieces = vec![start..end];
    Ok(Entry { name: name.to_owned(), dtype, shape: shape.clone(), pieces, strides })
}

/// How many numbers lie between the first and the last of a view, both included.
fn extent(shape: &[usize], strides: &[usize]) -> Option<usize> {
    if shape.contains(&0) {
        return Some(0);
    }
    let last = shape
        .iter()
        .zip(strides)
        .try_fold(0usize, |last, (n, stride)| last.checked_add((n - 1).checked_mul(*stride)?))?;
    last.checked_add(1)
}

/// Whether numbers lie row after row; the stride of an axis with one entry says nothing.
fn is_contiguous(shape: &[usize], strides: &[usize]) -> bool {
    let mut expected = 1usize;
    shape.iter().zip(strides).rev().all(|(&n, &stride)| {
        let fits = n <= 1 || stride == expected;
        expected = expected.saturating_mul(n);
        fits
    }) || shape.contains(&0)
}
