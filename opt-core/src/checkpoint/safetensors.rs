//! Reading safetensors: an 8-byte length, a JSON header, the tensors' bytes end to end.
//!
//! The format is that of <https://github.com/huggingface/safetensors>; the checks are stricter than a reader needs,
//! because each of them tells a damaged file from a good one before anything is allocated.

use super::{
    entry::{Entry, FileDType, byte_length, damaged, fail, shown},
    json::{self, Unique},
};
use crate::Result;
use serde::{
    Deserialize,
    de::{Deserializer, MapAccess, Visitor},
};
use std::{collections::HashSet, fmt};

/// The limit that the format's own library sets.
const MOST_HEADER: u64 = 100_000_000;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: [usize; 2],
}

/// The header; its `__metadata__` is checked and dropped, since nothing depends on it.
struct Header(Vec<(String, Stored)>);

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Header;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object that maps tensor names to dtype, shape and data_offsets")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Header, A::Error> {
                let (mut seen, mut tensors) = (HashSet::new(), Vec::new());
                while let Some(name) = map.next_key::<String>()? {
                    if !seen.insert(name.clone()) {
                        return Err(json::duplicate(&name));
                    }
                    if name == "__metadata__" {
                        map.next_value::<Unique<String>>()?;
                    } else {
                        tensors.push((name, map.next_value()?));
                    }
                }
                Ok(Header(tensors))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

/// The tensors of a safetensors file, in the order of their bytes.
pub(super) fn read(file: &[u8]) -> Result<Vec<Entry>> {
    let Some((length, rest)) = file.split_first_chunk::<8>() else {
        return fail(format_args!("truncated: expected 8 bytes of header length, found {}", file.len()));
    };
    let length = u64::from_le_bytes(*length);
    if length > MOST_HEADER {
        return fail(format_args!("header length: expected at most {MOST_HEADER}, found {length}"));
    }
    let Some((header, data)) = rest.split_at_checked(length as usize) else {
        return fail(format_args!("truncated: expected {length} bytes of header, found {}", rest.len()));
    };
    let header =
        std::str::from_utf8(header).map_err(|e| damaged(format_args!("header is not UTF-8: {e}")))?;
    if !header.starts_with('{') {
        return fail("header: expected a JSON object");
    }
    let Header(stored) = serde_json::from_str(header).map_err(|e| json::error("header", &e))?;
    let mut entries = stored
        .into_iter()
        .map(|(name, stored)| {
            entry(&name, stored, data.len()).map_err(|e| e.at(format_args!("tensor {}", shown(&name))))
        })
        .collect::<Result<Vec<_>>>()?;
    // Stable, and empty tensors before the one that starts where they lie.
    let place = |entry: &Entry| entry.pieces.first().map_or((0, 0), |range| (range.start, range.end));
    entries.sort_by_key(place);
    cover(&entries, data.len())?;
    let data_start = 8 + length as usize;
    for range in entries.iter_mut().flat_map(|entry| &mut entry.pieces) {
        *range = range.start + data_start..range.end + data_start;
    }
    Ok(entries)
}

fn entry(name: &str, stored: Stored, data: usize) -> Result<Entry> {
    let Stored { dtype, shape, data_offsets: [start, end] } = stored;
    let Some(dtype) = FileDType::from_safetensors(&dtype) else {
        return fail(format_args!("unknown dtype {}", shown(&dtype)));
    };
    if start > end || end > data {
        let message =
            format_args!("data_offsets: expected a range within {data} bytes of data, found {start}..{end}");
        return fail(message);
    }
    match byte_length(&shape, dtype) {
        Some(bytes) if bytes == end - start => {}
        Some(bytes) => {
            return fail(format_args!(
                "expected {bytes} bytes for {dtype} {shape:?}, found data_offsets {start}..{end}"
            ));
        }
        None => return fail(format_args!("shape: {dtype} {shape:?} overflows")),
    }
    // `start..end` is one range of bytes, not a list of numbers.
    #[allow(clippy::single_range_in_vec_init)]
    let pieces = vec![start..end];
    Ok(Entry { name: name.to_owned(), dtype, shape, pieces, strides: None })
}

/// Fails unless the tensors lie end to end and fill the data.
fn cover(entries: &[Entry], data: usize) -> Result<()> {
    let mut end = 0;
    for entry in entries {
        let Some(range) = entry.pieces.first() else { continue };
        let place = format_args!("tensor {}", shown(&entry.name)).to_string();
        if range.start < end {
            return fail(format_args!("{place} starts at {}, inside the one before it", range.start));
        }
        if range.start > end {
            return fail(format_args!("{place} starts at {}, leaving a hole after {end}", range.start));
        }
        end = range.end;
    }
    if end != data {
        return fail(format_args!("expected {end} bytes of data, found {data}"));
    }
    Ok(())
}
