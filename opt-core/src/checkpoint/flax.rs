//! Reading `flax_model.msgpack`: nested maps whose leaves are arrays.
//!
//! MessagePack after <https://github.com/msgpack/msgpack/blob/master/spec.md>. What Flax puts into it
//! (`flax.serialization`): an array is the extension type 1 around `[shape, dtype name, bytes]`; one beyond 1 GiB is a
//! map of flat chunks. Flax keeps a linear's kernel as `[in, out]`, torch its weight as `[out, in]`.

use super::entry::{Entry, FileDType, byte_length, damaged, fail, shown};
use crate::Result;
use std::{collections::HashSet, ops::Range};

/// A model's tree is 7 deep.
const MOST_DEPTH: usize = 32;
/// No array of a model has more axes than 2.
const MOST_AXES: usize = 8;
/// Far above what a model needs: an array is 5 values and a name.
const MOST_VALUES: usize = 1 << 20;
const CHUNKED: &str = "__msgpack_chunked_array__";
const NDARRAY: u8 = 1;

/// The parts of MessagePack that a checkpoint is made of.
#[derive(Debug)]
enum Value<'a> {
    Map(Vec<(&'a str, Value<'a>)>),
    List(Vec<Value<'a>>),
    Int(u64),
    Str(&'a str),
    Bytes(Range<usize>),
    Array(Array),
    Other,
}

#[derive(Debug)]
struct Array {
    dtype: FileDType,
    shape: Vec<usize>,
    bytes: Range<usize>,
}

struct Reader<'a> {
    file: &'a [u8],
    at: usize,
    values: usize,
}

/// The tensors of a Flax file, named and shaped as torch has them.
pub(super) fn read(file: &[u8]) -> Result<Vec<Entry>> {
    let mut reader = Reader { file, at: 0, values: 0 };
    let top = reader.value(0).map_err(|e| e.at(format_args!("msgpack at byte {}", reader.at)))?;
    if reader.at != file.len() {
        return fail(format_args!("msgpack: {} bytes after the end", file.len() - reader.at));
    }
    let Value::Map(items) = top else { return fail("msgpack: expected a map of parameters at the top") };
    let mut found = Found { entries: Vec::new(), names: HashSet::new() };
    found.walk(&mut String::new(), &items)?;
    Ok(found.entries)
}

struct Found {
    entries: Vec<Entry>,
    names: HashSet<String>,
}

impl Found {
    fn walk(&mut self, path: &mut String, items: &[(&str, Value<'_>)]) -> Result<()> {
        for (key, value) in items {
            let length = path.len();
            if !path.is_empty() {
                path.push('.');
            }
            path.push_str(key);
            match value {
                Value::Map(inner) if inner.iter().any(|(key, _)| *key == CHUNKED) => {
                    self.add(path, &chunked(inner).map_err(|e| e.at(shown(path)))?)?;
                }
                Value::Map(inner) => self.walk(path, inner)?,
                Value::Array(array) => self.add(
                    path,
                    &Chunked {
                        dtype: array.dtype,
                        shape: array.shape.clone(),
                        pieces: vec![array.bytes.clone()],
                    },
                )?,
                _ => {}
            }
            path.truncate(length);
        }
        Ok(())
    }

    fn add(&mut self, path: &str, array: &Chunked) -> Result<()> {
        let leaf = path.rsplit('.').next().unwrap_or(path);
        let name = torch_name(path);
        if !self.names.insert(name.clone()) {
            return fail(format_args!("tensor {} is there twice", shown(&name)));
        }
        let (shape, strides) = match (leaf, &array.shape[..]) {
            ("kernel", &[inputs, outputs]) => (vec![outputs, inputs], Some([1, outputs])),
            _ => (array.shape.clone(), None),
        };
        self.entries.push(Entry { name, dtype: array.dtype, shape, pieces: array.pieces.clone(), strides });
        Ok(())
    }
}

/// torch's name for a Flax path, whose parts a slash or a dot may separate.
pub(super) fn torch_name(path: &str) -> String {
    let path = path.replace('/', ".");
    match path.rsplit_once('.') {
        Some((module, "kernel" | "scale" | "embedding")) => format!("{module}.weight"),
        _ => path,
    }
}

struct Chunked {
    dtype: FileDType,
    shape: Vec<usize>,
    pieces: Vec<Range<usize>>,
}

/// `{CHUNKED: true, "shape": {"0": n, ...}, "chunks": {"0": array, ...}}`.
fn chunked(items: &[(&str, Value<'_>)]) -> Result<Chunked> {
    let numbered = |name: &str| -> Option<Vec<&Value<'_>>> {
        let (_, value) = items.iter().find(|(key, _)| *key == name)?;
        let Value::Map(entries) = value else { return None };
        let mut numbered = entries
            .iter()
            .map(|(key, value)| Some((key.parse::<usize>().ok()?, value)))
            .collect::<Option<Vec<_>>>()?;
        numbered.sort_by_key(|(index, _)| *index);
        Some(numbered.into_iter().map(|(_, value)| value).collect())
    };
    let (Some(sizes), Some(chunks)) = (numbered("shape"), numbered("chunks")) else {
        return fail("a chunked array without shape or chunks");
    };
    if sizes.len() > MOST_AXES {
        return fail(format_args!("an array of {} axes", sizes.len()));
    }
    let size = |value: &&Value<'_>| match value {
        Value::Int(n) => usize::try_from(*n).ok(),
        _ => None,
    };
    let Some(shape) = sizes.iter().map(size).collect::<Option<Vec<_>>>() else {
        return fail("a chunked array's shape is not made of numbers");
    };
    let mut dtype = None;
    let mut pieces = Vec::with_capacity(chunks.len());
    for chunk in chunks {
        let Value::Array(array) = chunk else { return fail("a chunk is not an array") };
        if *dtype.get_or_insert(array.dtype) != array.dtype {
            return fail("the chunks of an array differ in dtype");
        }
        pieces.push(array.bytes.clone());
    }
    let Some(dtype) = dtype else { return fail("a chunked array without chunks") };
    let found: usize = pieces.iter().map(Range::len).sum();
    match byte_length(&shape, dtype) {
        Some(bytes) if bytes == found => Ok(Chunked { dtype, shape, pieces }),
        _ => fail(format_args!("chunks of {found} bytes for {dtype} {shape:?}")),
    }
}

impl<'a> Reader<'a> {
    fn range(&mut self, length: usize) -> Result<Range<usize>> {
        match self.at.checked_add(length).filter(|&end| end <= self.file.len()) {
            Some(end) => Ok(std::mem::replace(&mut self.at, end)..end),
            None => fail(format_args!("truncated: expected {length} bytes more")),
        }
    }

    fn bytes(&mut self, length: usize) -> Result<&'a [u8]> {
        let range = self.range(length)?;
        Ok(self.file.get(range).unwrap_or_default())
    }

    /// A big-endian number of `length` bytes.
    fn number(&mut self, length: usize) -> Result<u64> {
        Ok(self.bytes(length)?.iter().fold(0, |number, &byte| number << 8 | u64::from(byte)))
    }

    /// A length of `width` bytes; nothing in a file is longer than the file.
    fn length(&mut self, width: usize) -> Result<usize> {
        let length = self.number(width)?;
        usize::try_from(length).map_err(|_| damaged(format_args!("a length of {length}")))
    }

    fn str(&mut self, length: usize) -> Result<&'a str> {
        std::str::from_utf8(self.bytes(length)?).or_else(|e| fail(format_args!("a string is not UTF-8: {e}")))
    }

    fn value(&mut self, depth: usize) -> Result<Value<'a>> {
        if depth > MOST_DEPTH {
            return fail(format_args!("nested deeper than {MOST_DEPTH}"));
        }
        self.values += 1;
        if self.values > MOST_VALUES {
            return fail(format_args!("more than {MOST_VALUES} values"));
        }
        let tag = self.number(1)? as u8;
        Ok(match tag {
            0x00..=0x7f => Value::Int(tag.into()),
            0x80..=0x8f => self.map((tag & 0x0f).into(), depth)?,
            0x90..=0x9f => self.list((tag & 0x0f).into(), depth)?,
            0xa0..=0xbf => Value::Str(self.str((tag & 0x1f).into())?),
            0xc0 | 0xc2 | 0xc3 | 0xe0..=0xff => Value::Other,
            0xc4..=0xc6 => {
                let length = self.length(1 << (tag - 0xc4))?;
                Value::Bytes(self.range(length)?)
            }
            0xc7..=0xc9 => {
                let length = self.length(1 << (tag - 0xc7))?;
                self.extension(length, depth)?
            }
            0xca | 0xd2 => self.skip(4)?,
            0xcb | 0xd3 => self.skip(8)?,
            0xcc..=0xcf => Value::Int(self.number(1 << (tag - 0xcc))?),
            0xd0 => self.skip(1)?,
            0xd1 => self.skip(2)?,
            0xd4..=0xd8 => self.extension(1 << (tag - 0xd4), depth)?,
            0xd9..=0xdb => {
                let length = self.length(1 << (tag - 0xd9))?;
                Value::Str(self.str(length)?)
            }
            0xdc | 0xdd => {
                let length = self.length(2 << (tag - 0xdc))?;
                self.list(length, depth)?
            }
            0xde | 0xdf => {
                let length = self.length(2 << (tag - 0xde))?;
                self.map(length, depth)?
            }
            0xc1 => return fail("byte 0xc1, which MessagePack never uses"),
        })
    }

    fn skip(&mut self, length: usize) -> Result<Value<'a>> {
        self.range(length).map(|_| Value::Other)
    }

    // Not allocated by the announced length: a short file may announce four billion.
    fn list(&mut self, length: usize, depth: usize) -> Result<Value<'a>> {
        let mut items = Vec::new();
        for _ in 0..length {
            items.push(self.value(depth + 1)?);
        }
        Ok(Value::List(items))
    }

    fn map(&mut self, length: usize, depth: usize) -> Result<Value<'a>> {
        let mut items = Vec::new();
        for _ in 0..length {
            match self.value(depth + 1)? {
                Value::Str(key) => items.push((key, self.value(depth + 1)?)),
                _ => return fail("a map's key is not a string"),
            }
        }
        Ok(Value::Map(items))
    }

    fn extension(&mut self, length: usize, depth: usize) -> Result<Value<'a>> {
        let kind = self.number(1)? as u8;
        let range = self.range(length)?;
        if kind != NDARRAY {
            return Ok(Value::Other);
        }
        let end = range.end;
        self.at = range.start;
        let array = self.array(depth)?;
        if self.at != end {
            return fail(format_args!("an array of {length} bytes ends elsewhere"));
        }
        Ok(Value::Array(array))
    }

    fn array(&mut self, depth: usize) -> Result<Array> {
        let Value::List(fields) = self.value(depth + 1)? else { return fail("an array is not a list") };
        let [Value::List(sizes), Value::Str(dtype), Value::Bytes(bytes)] = &fields[..] else {
            return fail("an array is not [shape, dtype, bytes]");
        };
        if sizes.len() > MOST_AXES {
            return fail(format_args!("an array of {} axes", sizes.len()));
        }
        let Some(dtype) = FileDType::from_numpy(dtype) else {
            return fail(format_args!("unknown dtype {}", shown(dtype)));
        };
        let size = |value: &Value<'_>| match value {
            Value::Int(n) => usize::try_from(*n).ok(),
            _ => None,
        };
        let Some(shape) = sizes.iter().map(size).collect::<Option<Vec<_>>>() else {
            return fail("an array's shape is not made of numbers");
        };
        match byte_length(&shape, dtype) {
            Some(length) if length == bytes.len() => Ok(Array { dtype, shape, bytes: bytes.clone() }),
            _ => fail(format_args!("{} bytes for {dtype} {shape:?}", bytes.len())),
        }
    }
}
