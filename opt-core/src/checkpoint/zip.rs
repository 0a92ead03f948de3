//! The part of the zip format that `torch.save` uses: stored (uncompressed) records, with the 64-bit extension.
//!
//! Layout after PKWARE's APPNOTE 6.3.9, sections 4.3.7 (local header), 4.3.12 (central directory), 4.3.14 to 4.3.16
//! (ends) and 4.5.3 (64-bit sizes).

use super::entry::{damaged, fail, shown};
use crate::Result;
use std::{
    collections::BTreeMap,
    io::{self, Seek, SeekFrom, Write},
    ops::Range,
};

const LOCAL: u32 = 0x0403_4b50;
const CENTRAL: u32 = 0x0201_4b50;
const END: u32 = 0x0605_4b50;
const END64: u32 = 0x0606_4b50;
const LOCATOR64: u32 = 0x0706_4b50;
const END_LENGTH: usize = 22;

/// Whether a file starts as a zip archive does.
pub(super) fn is_zip(file: &[u8]) -> bool {
    file.starts_with(&LOCAL.to_le_bytes())
}

/// Little-endian numbers out of a file; every read is checked.
struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn array<const N: usize>(&self, at: usize) -> Result<[u8; N]> {
        let bytes = at.checked_add(N).and_then(|end| self.0.get(at..end)).and_then(|b| b.try_into().ok());
        bytes.ok_or_else(|| {
            damaged(format_args!("truncated: expected {N} bytes at {at}, the file has {}", self.0.len()))
        })
    }

    fn u16(&self, at: usize) -> Result<usize> {
        Ok(u16::from_le_bytes(self.array(at)?).into())
    }

    fn u32(&self, at: usize) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array(at)?))
    }

    fn u64(&self, at: usize) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array(at)?))
    }
}

fn size(value: u64) -> Result<usize> {
    usize::try_from(value).map_err(|_| damaged(format_args!("zip: size {value} is beyond this machine")))
}

/// The records of an archive: name to the range of its bytes.
#[derive(Debug)]
pub(super) struct Archive(BTreeMap<String, Range<usize>>);

impl Archive {
    pub(super) fn read(file: &[u8]) -> Result<Self> {
        let reader = Reader(file);
        let (count, mut at, stop) = directory(&reader)?;
        let mut records = BTreeMap::new();
        for _ in 0..count {
            if at >= stop {
                return fail(format_args!("zip: expected {count} records, found {}", records.len()));
            }
            let (name, range, next) = record(&reader, at)?;
            if records.insert(name.clone(), range).is_some() {
                return fail(format_args!("zip: record {} is there twice", shown(&name)));
            }
            at = next;
        }
        Ok(Self(records))
    }

    pub(super) fn get(&self, name: &str) -> Option<Range<usize>> {
        self.0.get(name).cloned()
    }

    /// The record names.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }
}

/// Number of records, and start and end of the central directory.
fn directory(reader: &Reader<'_>) -> Result<(u64, usize, usize)> {
    let file = reader.0;
    let end = (0..=u16::MAX as usize)
        .filter_map(|comment| file.len().checked_sub(END_LENGTH + comment).map(|at| (comment, at)))
        .find(|&(comment, at)| {
            matches!((reader.u32(at), reader.u16(at + 20)), (Ok(END), Ok(length)) if length == comment)
        });
    let Some((_, end)) = end else {
        return fail("zip: no central directory; the file is truncated");
    };
    let count = reader.u16(end + 10)? as u64;
    let (length, start) = (reader.u32(end + 12)?, reader.u32(end + 16)?);
    let wide = count == 0xffff || length == u32::MAX || start == u32::MAX;
    let (count, start) = match end.checked_sub(20) {
        Some(locator) if wide && reader.u32(locator)? == LOCATOR64 => {
            let end64 = size(reader.u64(locator + 8)?)?;
            if reader.u32(end64)? != END64 {
                return fail("zip: no 64-bit end of the central directory where the locator says");
            }
            let field = |offset: usize| reader.u64(end64.saturating_add(offset));
            (field(32)?, size(field(48)?)?)
        }
        _ => (count, start as usize),
    };
    if start > end {
        return fail(format_args!("zip: central directory starts at {start}, past its end {end}"));
    }
    Ok((count, start, end))
}

/// One record of the central directory: its name, the range of its bytes, and where the next one is.
fn record(reader: &Reader<'_>, at: usize) -> Result<(String, Range<usize>, usize)> {
    if reader.u32(at)? != CENTRAL {
        return fail(format_args!("zip: no record of the central directory at {at}"));
    }
    let [name_length, extra_length, comment] =
        [reader.u16(at + 28)?, reader.u16(at + 30)?, reader.u16(at + 32)?];
    let name_start = at + 46;
    let extra = name_start + name_length..name_start + name_length + extra_length;
    let name = reader.0.get(name_start..extra.start).map(|name| String::from_utf8_lossy(name).into_owned());
    let Some(name) = name else {
        return fail(format_args!(
            "truncated: a record's name ends past the file of {} bytes",
            reader.0.len()
        ));
    };
    let (flags, method) = (reader.u16(at + 8)?, reader.u16(at + 10)?);
    if method != 0 || flags & 1 != 0 {
        return fail(format_args!(
            "zip: record {} is compressed or encrypted; torch.save stores records as they are",
            shown(&name)
        ));
    }
    let narrow = [reader.u32(at + 24)?, reader.u32(at + 20)?, reader.u32(at + 42)?];
    let [length, stored, header] = sizes(reader, extra.clone(), narrow)?;
    if length != stored {
        let message = format_args!("zip: record {}: stored size {stored}, size {length}", shown(&name));
        return fail(message);
    }
    let (header, length) = (size(header)?, size(length)?);
    if reader.u32(header)? != LOCAL {
        return fail(format_args!("zip: record {} has no header at {header}", shown(&name)));
    }
    let start = header + 30 + reader.u16(header + 26)? + reader.u16(header + 28)?;
    match start.checked_add(length).filter(|&end| end <= reader.0.len()) {
        Some(end) => Ok((name, start..end, extra.end + comment)),
        None => fail(format_args!(
            "zip: record {} expects {length} bytes at {start}, the file has {}",
            shown(&name),
            reader.0.len()
        )),
    }
}

/// Size, stored size and header offset; those that do not fit in 32 bits are in the extra field 1, in this order.
fn sizes(reader: &Reader<'_>, extra: Range<usize>, narrow: [u32; 3]) -> Result<[u64; 3]> {
    let mut wide = narrow.map(u64::from);
    if !narrow.contains(&u32::MAX) {
        return Ok(wide);
    }
    let mut at = extra.start;
    while at + 4 <= extra.end {
        let (id, length) = (reader.u16(at)?, reader.u16(at + 2)?);
        if id == 1 {
            let mut field = at + 4;
            for value in wide.iter_mut().filter(|value| **value == u64::from(u32::MAX)) {
                if field + 8 > at + 4 + length {
                    return fail("zip: a 64-bit size is missing");
                }
                *value = reader.u64(field)?;
                field += 8;
            }
            return Ok(wide);
        }
        at += 4 + length;
    }
    Ok(wide)
}

/// Writes an archive of stored records, each aligned as torch aligns them so that it can be mapped.
pub(super) struct Writer<W> {
    out: W,
    directory: Vec<u8>,
    count: u64,
    /// Sizes from here on take the 64-bit form; lower than u32::MAX only in tests.
    narrow: u64,
}

const ALIGNMENT: u64 = 64;

impl<W: Write + Seek> Writer<W> {
    pub(super) fn new(out: W) -> Self {
        Self { out, directory: Vec::new(), count: 0, narrow: u32::MAX.into() }
    }

    #[cfg(test)]
    pub(super) fn with_wide_sizes(out: W) -> Self {
        Self { narrow: 0, ..Self::new(out) }
    }

    /// Adds a record of exactly `length` bytes, which `write` writes.
    pub(super) fn record(
        &mut self,
        name: &str,
        length: u64,
        write: impl FnOnce(&mut dyn Write) -> Result<()>,
    ) -> Result<()> {
        let header = self.out.stream_position().map_err(cannot_write)?;
        let wide = length >= self.narrow || header >= self.narrow;
        let sizes = if wide { wide_field(&[length, length]) } else { Vec::new() };
        // "FB" is torch's own id for the field that only pads.
        let unpadded = header + 30 + (name.len() + sizes.len() + 4) as u64;
        let padding = (ALIGNMENT - unpadded % ALIGNMENT) % ALIGNMENT;
        let mut extra = sizes;
        extra.extend(b"FB");
        extra.extend((padding as u16).to_le_bytes());
        extra.resize(extra.len() + padding as usize, b'Z');
        let crc_at = header + 14;
        self.out.write_all(&local(name, 0, length, wide, &extra)).map_err(cannot_write)?;
        let mut counted = Counted { out: &mut self.out, crc: crc32fast::Hasher::new(), length: 0 };
        write(&mut counted)?;
        let (crc, written) = (counted.crc.finalize(), counted.length);
        if written != length {
            return fail(format_args!("record {name}: expected to write {length} bytes, wrote {written}"));
        }
        let end = self.out.stream_position().map_err(cannot_write)?;
        self.out.seek(SeekFrom::Start(crc_at)).map_err(cannot_write)?;
        self.out.write_all(&crc.to_le_bytes()).map_err(cannot_write)?;
        self.out.seek(SeekFrom::Start(end)).map_err(cannot_write)?;
        self.list(name, crc, length, header, wide);
        Ok(())
    }

    fn list(&mut self, name: &str, crc: u32, length: u64, header: u64, wide: bool) {
        let extra = if wide { wide_field(&[length, length, header]) } else { Vec::new() };
        let at = if wide { u32::MAX } else { header as u32 };
        let directory = &mut self.directory;
        directory.extend(CENTRAL.to_le_bytes());
        directory.extend([0, 0]);
        directory.extend(common(name, crc, length, wide, extra.len()));
        directory.extend([0; 10]);
        directory.extend(at.to_le_bytes());
        directory.extend(name.as_bytes());
        directory.extend(extra);
        self.count += 1;
    }

    /// Writes the central directory.
    pub(super) fn finish(mut self) -> Result<W> {
        let start = self.out.stream_position().map_err(cannot_write)?;
        let length = self.directory.len() as u64;
        let wide = self.count >= 0xffff || start >= self.narrow || length >= self.narrow;
        let mut end = std::mem::take(&mut self.directory);
        if wide {
            end.extend(END64.to_le_bytes());
            end.extend(44u64.to_le_bytes());
            end.extend([45, 0, 45, 0]);
            end.extend([0; 8]);
            for value in [self.count, self.count, length, start] {
                end.extend(value.to_le_bytes());
            }
            end.extend(LOCATOR64.to_le_bytes());
            end.extend([0; 4]);
            end.extend((start + length).to_le_bytes());
            end.extend(1u32.to_le_bytes());
        }
        let narrow16 = if wide { 0xffff } else { self.count as u16 };
        let narrow32 = |value: u64| if wide { u32::MAX } else { value as u32 };
        end.extend(END.to_le_bytes());
        end.extend([0; 4]);
        end.extend(narrow16.to_le_bytes());
        end.extend(narrow16.to_le_bytes());
        end.extend(narrow32(length).to_le_bytes());
        end.extend(narrow32(start).to_le_bytes());
        end.extend([0; 2]);
        self.out.write_all(&end).map_err(cannot_write)?;
        Ok(self.out)
    }
}

/// The fields that the local header and the central directory share, from "version needed" to "extra length".
fn common(name: &str, crc: u32, length: u64, wide: bool, extra: usize) -> Vec<u8> {
    let mut header = Vec::with_capacity(26);
    let version: u16 = if wide { 45 } else { 20 };
    let narrow = if wide { u32::MAX } else { length as u32 };
    header.extend(version.to_le_bytes());
    // No flags, stored, and the first day that the format knows.
    header.extend([0, 0, 0, 0, 0, 0, 0x21, 0]);
    header.extend(crc.to_le_bytes());
    header.extend(narrow.to_le_bytes());
    header.extend(narrow.to_le_bytes());
    header.extend((name.len() as u16).to_le_bytes());
    header.extend((extra as u16).to_le_bytes());
    header
}

fn local(name: &str, crc: u32, length: u64, wide: bool, extra: &[u8]) -> Vec<u8> {
    let mut header = LOCAL.to_le_bytes().to_vec();
    header.extend(common(name, crc, length, wide, extra.len()));
    header.extend(name.as_bytes());
    header.extend(extra);
    header
}

fn wide_field(values: &[u64]) -> Vec<u8> {
    let mut field = 1u16.to_le_bytes().to_vec();
    field.extend(((values.len() * 8) as u16).to_le_bytes());
    values.iter().for_each(|value| field.extend(value.to_le_bytes()));
    field
}

struct Counted<'a, W> {
    out: &'a mut W,
    crc: crc32fast::Hasher,
    length: u64,
}

impl<W: Write> Write for Counted<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.out.write(bytes)?;
        self.crc.update(bytes.get(..n).unwrap_or(bytes));
        self.length += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

pub(super) fn cannot_write(error: io::Error) -> crate::Error {
    crate::Error::because(crate::ErrorKind::Io, "cannot write", error)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Cursor;

    /// An archive with and without 64-bit sizes; no test can afford the 4 GiB that make them necessary.
    #[test]
    fn records_are_found_again_aligned_whatever_the_width_of_sizes() {
        for wide in [false, true] {
            let out = Cursor::new(Vec::new());
            let mut writer = if wide { Writer::with_wide_sizes(out) } else { Writer::new(out) };
            let records: [(&str, &[u8]); 3] =
                [("a/data.pkl", b"first"), ("a/data/0", &[7; 99]), ("a/version", b"")];
            for (name, bytes) in records {
                let write = |out: &mut dyn Write| out.write_all(bytes).map_err(cannot_write);
                writer.record(name, bytes.len() as u64, write).unwrap();
            }
            let file = writer.finish().unwrap().into_inner();
            let archive = Archive::read(&file).unwrap();
            for (name, bytes) in records {
                let range = archive.get(name).unwrap();
                assert_eq!((&file[range.clone()], range.start % 64), (bytes, 0), "{name}");
            }
            assert_eq!(archive.names().count(), 3);
        }
    }

    #[test]
    fn a_record_of_another_length_than_announced_is_refused() {
        let mut writer = Writer::new(Cursor::new(Vec::new()));
        let error = writer.record("a", 3, |out| out.write_all(b"ab").map_err(cannot_write)).unwrap_err();
        assert_eq!(error.to_string(), "record a: expected to write 3 bytes, wrote 2");
    }
}
