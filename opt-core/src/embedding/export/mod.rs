//! Embeddings for other programs: numpy's .npy, JSON lines, Parquet, and what vector databases take.
//!
//! | format | a record |
//! |---|---|
//! | [`Format::Npy`] | a row of one array `[records, width]`, `<f4` or `<f2`, in C order |
//! | [`Format::Jsonl`] | `{"index": 0, "id": given, "embedding": [...]}`; without pooling `[[...], ...]`, one list a token |
//! | [`Format::Parquet`] | columns `id` (given, else the index), `text`, `metadata` (JSON), `embedding`, a `FixedSizeList` |
//! | [`Format::Pinecone`] | a line `{"id": "0", "values": [...], "metadata": {..., "text": ...}}` to upsert |
//! | [`Format::Weaviate`] | a line `{"class": ..., "id": UUID, "vector": [...], "properties": {..., "text": ...}}` |
//!
//! ```
//! use ndarray::arr2;
//! use opt_core::embedding::{Precision, export::{Exporter, Format, Layout, Record}};
//!
//! let layout = Layout::new(Format::Npy, 2, 1).precision(Precision::F16);
//! let mut exporter = Exporter::new(Vec::new(), layout)?;
//! exporter.write(&Record::new(0, arr2(&[[1.0, 2.0]]).view()))?;
//! let bytes = exporter.finish()?;
//! assert_eq!((&bytes[1..6], &bytes[128..]), (&b"NUMPY"[..], &[0x00, 0x3c, 0x00, 0x40][..]));
//! # Ok::<(), opt_core::Error>(())
//! ```

#[cfg(feature = "parquet")]
mod parquet;
mod uuid;
#[cfg(not(target_arch = "wasm32"))]
mod whole;

#[cfg(not(target_arch = "wasm32"))]
pub use whole::Whole;

use super::{Embedder, Pooling, Precision};
use crate::{Error, ErrorKind, Result};
use ndarray::ArrayView2;
use opt_backend::half::f16;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::{fmt, io::Write};

/// A file format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Format {
    /// numpy's .npy.
    Npy,
    /// JSON lines; the only one that has room for embeddings that are not pooled.
    Jsonl,
    /// Apache Parquet with Arrow's schema; in builds with the feature `parquet`.
    Parquet,
    /// JSON lines of what Pinecone's `upsert` takes.
    Pinecone,
    /// JSON lines of what Weaviate's batch import takes.
    Weaviate,
}

/// What a file is to hold.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Layout {
    /// Its format.
    pub format: Format,
    /// The width of a vector.
    pub width: usize,
    /// The number of records.
    pub records: u64,
    /// The number format; JSON has none of its own.
    pub precision: Precision,
    /// Whether a record has one vector, rather than one for each token.
    pub pooled: bool,
    /// The class of objects in Weaviate.
    pub class: String,
}

impl Layout {
    /// A layout of pooled vectors in f32.
    pub fn new(format: Format, width: usize, records: u64) -> Self {
        Self { format, width, records, precision: Precision::F32, pooled: true, class: "Text".to_owned() }
    }

    /// The layout of what an embedder makes.
    pub fn of(embedder: &Embedder, format: Format, records: u64) -> Self {
        let options = embedder.options();
        let pooled = options.pooling != Pooling::None;
        Self { precision: options.precision, pooled, ..Self::new(format, embedder.width(), records) }
    }

    /// Sets [`Layout::precision`].
    #[must_use]
    pub fn precision(self, precision: Precision) -> Self {
        Self { precision, ..self }
    }

    /// Sets [`Layout::pooled`].
    #[must_use]
    pub fn pooled(self, pooled: bool) -> Self {
        Self { pooled, ..self }
    }

    /// Sets [`Layout::class`].
    #[must_use]
    pub fn class(self, class: impl Into<String>) -> Self {
        Self { class: class.into(), ..self }
    }

    /// # Errors
    /// [`ErrorKind::Option`] for a format without room for what is not pooled, and a class that Weaviate refuses;
    /// [`ErrorKind::Unsupported`] for one that this build does not have.
    pub fn check(&self) -> Result<()> {
        let fail = |message: fmt::Arguments<'_>| Err(Error::new(ErrorKind::Option, message));
        if !self.pooled && self.format != Format::Jsonl {
            return fail(format_args!("pooling none: expected JSON lines, found {:?}", self.format));
        }
        let mut letters = self.class.chars();
        let first = letters.next().is_some_and(|first| first.is_ascii_uppercase());
        if !(first && letters.all(|letter| letter.is_ascii_alphanumeric() || letter == '_')) {
            return fail(format_args!(
                "class: expected a name of letters that begins with a capital one, found {:?}",
                self.class
            ));
        }
        if self.format == Format::Parquet && !cfg!(feature = "parquet") {
            let message = "Parquet is not part of this build: enable the feature `parquet` of opt-core";
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        Ok(())
    }
}

/// What a record is called.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum RecordId {
    /// A number.
    Number(u64),
    /// A text.
    Text(String),
}

impl fmt::Display for RecordId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(number) => write!(f, "{number}"),
            Self::Text(text) => f.write_str(text),
        }
    }
}

/// One embedding and what belongs to it.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct Record<'a> {
    /// Its place, from 0.
    pub index: u64,
    /// The vector `[1, width]`, or one for each token.
    pub rows: ArrayView2<'a, f32>,
    /// What it is called, if that is not its index.
    pub id: Option<&'a RecordId>,
    /// The text that it was made of.
    pub text: Option<&'a str>,
    /// What else is known.
    pub metadata: Option<&'a Map<String, Value>>,
}

impl<'a> Record<'a> {
    /// A record without name, text or metadata.
    pub fn new(index: u64, rows: ArrayView2<'a, f32>) -> Self {
        Self { index, rows, id: None, text: None, metadata: None }
    }

    /// Sets [`Record::id`].
    #[must_use]
    pub fn id(self, id: Option<&'a RecordId>) -> Self {
        Self { id, ..self }
    }

    /// Sets [`Record::text`].
    #[must_use]
    pub fn text(self, text: Option<&'a str>) -> Self {
        Self { text, ..self }
    }

    /// Sets [`Record::metadata`].
    #[must_use]
    pub fn metadata(self, metadata: Option<&'a Map<String, Value>>) -> Self {
        Self { metadata, ..self }
    }

    /// The id, or the index in its place.
    fn name(&self) -> String {
        self.id.map_or_else(|| self.index.to_string(), RecordId::to_string)
    }

    /// The metadata, with the text.
    fn properties(&self) -> Map<String, Value> {
        let mut all = self.metadata.cloned().unwrap_or_default();
        if let Some(text) = self.text {
            all.entry("text").or_insert_with(|| text.into());
        }
        all
    }
}

/// Writes records to a file, one after the other.
pub struct Exporter<W: Write + Send> {
    layout: Layout,
    to: To<W>,
    written: u64,
}

enum To<W: Write + Send> {
    Plain(W),
    #[cfg(feature = "parquet")]
    Parquet(Box<parquet::Writer<W>>),
}

impl<W: Write + Send> Exporter<W> {
    /// Begins a file.
    ///
    /// # Errors
    /// Those of [`Layout::check`], and [`ErrorKind::Io`].
    pub fn new(mut out: W, layout: Layout) -> Result<Self> {
        layout.check()?;
        let to = match layout.format {
            #[cfg(feature = "parquet")]
            Format::Parquet => To::Parquet(Box::new(parquet::Writer::new(out, &layout)?)),
            Format::Npy => {
                out.write_all(&npy_header(&layout)).map_err(failed)?;
                To::Plain(out)
            }
            _ => To::Plain(out),
        };
        Ok(Self { layout, to, written: 0 })
    }

    /// Writes one record.
    ///
    /// # Errors
    /// [`ErrorKind::Option`] for one of another shape than the layout says, [`ErrorKind::Io`].
    pub fn write(&mut self, record: &Record<'_>) -> Result<()> {
        let layout = &self.layout;
        let (vectors, width) = record.rows.dim();
        if width != layout.width || layout.pooled && vectors != 1 {
            let message = format_args!(
                "record {}: expected {} of {} numbers, found {vectors} of {width}",
                record.index,
                if layout.pooled { "one vector" } else { "vectors" },
                layout.width
            );
            return Err(Error::new(ErrorKind::Option, message));
        }
        self.written += 1;
        let out = match &mut self.to {
            #[cfg(feature = "parquet")]
            To::Parquet(writer) => return writer.write(record),
            To::Plain(out) => out,
        };
        let vector = || record.rows.iter().copied().collect::<Vec<f32>>();
        let line = match layout.format {
            Format::Npy => {
                let bytes: Vec<u8> = match layout.precision {
                    Precision::F32 => record.rows.iter().flat_map(|v| v.to_le_bytes()).collect(),
                    Precision::F16 => {
                        record.rows.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect()
                    }
                };
                return out.write_all(&bytes).map_err(failed);
            }
            Format::Pinecone => {
                #[derive(Serialize)]
                struct Line {
                    id: String,
                    values: Vec<f32>,
                    #[serde(skip_serializing_if = "Map::is_empty")]
                    metadata: Map<String, Value>,
                }
                let metadata = record.properties();
                serde_json::to_string(&Line { id: record.name(), values: vector(), metadata })
            }
            Format::Weaviate => {
                #[derive(Serialize)]
                struct Line<'a> {
                    class: &'a str,
                    id: String,
                    vector: Vec<f32>,
                    properties: Map<String, Value>,
                }
                let mut properties = record.properties();
                let name = record.name();
                let id = match uuid::is_uuid(&name) {
                    true => name.to_ascii_lowercase(),
                    false => uuid::of_name(&name),
                };
                // `id` itself is a reserved name there.
                properties.entry("source_id").or_insert_with(|| name.into());
                serde_json::to_string(&Line { class: &layout.class, id, vector: vector(), properties })
            }
            _ => {
                #[derive(Serialize)]
                struct Line<'a, E: Serialize> {
                    index: u64,
                    #[serde(skip_serializing_if = "Option::is_none")]
                    id: Option<&'a RecordId>,
                    embedding: E,
                }
                let (index, id) = (record.index, record.id);
                match layout.pooled {
                    true => serde_json::to_string(&Line { index, id, embedding: vector() }),
                    false => {
                        let rows: Vec<Vec<f32>> =
                            record.rows.outer_iter().map(|row| row.iter().copied().collect()).collect();
                        serde_json::to_string(&Line { index, id, embedding: rows })
                    }
                }
            }
        };
        let line = line.map_err(|e| Error::because(ErrorKind::Io, "JSON", e))?;
        writeln!(out, "{line}").map_err(failed)
    }

    /// Ends the file and gives back what it was written to.
    ///
    /// # Errors
    /// [`ErrorKind::Option`] if not as many records came as were announced, [`ErrorKind::Io`].
    pub fn finish(self) -> Result<W> {
        if self.written != self.layout.records {
            let message = format_args!("expected {} records, found {}", self.layout.records, self.written);
            return Err(Error::new(ErrorKind::Option, message));
        }
        match self.to {
            To::Plain(mut out) => {
                out.flush().map_err(failed)?;
                Ok(out)
            }
            #[cfg(feature = "parquet")]
            To::Parquet(writer) => writer.finish(),
        }
    }
}

fn failed(error: std::io::Error) -> Error {
    Error::because(ErrorKind::Io, "cannot write", error)
}

/// Version 1.0 of the format, as numpy.lib.format documents it: what follows begins at a multiple of 64.
fn npy_header(layout: &Layout) -> Vec<u8> {
    let descr = match layout.precision {
        Precision::F32 => "<f4",
        Precision::F16 => "<f2",
    };
    let (records, width) = (layout.records, layout.width);
    let mut text = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': ({records}, {width}), }}");
    let start = b"\x93NUMPY\x01\x00".len() + 2;
    let len = (start + text.len() + 1).next_multiple_of(64) - start;
    text.extend(std::iter::repeat_n(' ', len - 1 - text.len()));
    text.push('\n');
    let mut header = b"\x93NUMPY\x01\x00".to_vec();
    header.extend((len as u16).to_le_bytes());
    header.extend(text.bytes());
    header
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::{Array2, arr2};
    use serde_json::json;

    fn lines(layout: Layout, records: &[Record<'_>]) -> Vec<Value> {
        let mut exporter = Exporter::new(Vec::new(), layout).unwrap();
        records.iter().for_each(|record| exporter.write(record).unwrap());
        let text = String::from_utf8(exporter.finish().unwrap()).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    #[test]
    fn lines_of_json() {
        let rows = arr2(&[[0.5f32, -2.0]]);
        let two = arr2(&[[0.5f32, -2.0], [1.0, 3.0]]);
        let id = RecordId::Text("a".to_owned());
        let number = RecordId::Number(7);
        let metadata = json!({ "year": 1890 });
        let metadata = metadata.as_object();
        let plain = Record::new(0, rows.view());
        let full = Record::new(1, rows.view()).id(Some(&id)).text(Some("A text.")).metadata(metadata);

        let found = lines(Layout::new(Format::Jsonl, 2, 3), &[plain, full, plain.id(Some(&number))]);
        assert_eq!(found[0], json!({ "index": 0, "embedding": [0.5, -2.0] }));
        assert_eq!(found[1], json!({ "index": 1, "id": "a", "embedding": [0.5, -2.0] }));
        assert_eq!(found[2]["id"], 7);
        let found = lines(Layout::new(Format::Jsonl, 2, 1).pooled(false), &[Record::new(0, two.view())]);
        assert_eq!(found[0]["embedding"], json!([[0.5, -2.0], [1.0, 3.0]]));

        let found = lines(Layout::new(Format::Pinecone, 2, 2), &[plain, full]);
        assert_eq!(found[0], json!({ "id": "0", "values": [0.5, -2.0] }));
        let metadata = json!({ "year": 1890, "text": "A text." });
        assert_eq!(found[1], json!({ "id": "a", "values": [0.5, -2.0], "metadata": metadata }));

        let found = lines(Layout::new(Format::Weaviate, 2, 1).class("Novel"), &[full]);
        let properties = json!({ "year": 1890, "text": "A text.", "source_id": "a" });
        // uuid.uuid5(uuid.NAMESPACE_DNS, "a") of Python.
        let id = "4f3f2898-69e3-5a0d-820a-c4e87987dbce";
        let vector = [0.5, -2.0];
        assert_eq!(
            found[0],
            json!({ "class": "Novel", "id": id, "vector": vector, "properties": properties })
        );
    }

    #[test]
    fn headers_of_npy_end_at_multiples_of_64() {
        for records in [0, 1, 12_345_678_901_234] {
            let header = npy_header(&Layout::new(Format::Npy, 768, records));
            assert_eq!(header.len() % 64, 0);
            assert_eq!(usize::from(u16::from_le_bytes([header[8], header[9]])), header.len() - 10);
            assert_eq!(header.last(), Some(&b'\n'));
        }
    }

    #[test]
    fn what_does_not_fit() {
        let rows = Array2::<f32>::zeros((2, 3));
        let begin = |layout| Exporter::new(Vec::new(), layout);
        for format in [Format::Npy, Format::Parquet, Format::Pinecone, Format::Weaviate] {
            let error = begin(Layout::new(format, 3, 1).pooled(false)).err().unwrap();
            assert_eq!(error.kind(), ErrorKind::Option, "{error}");
        }
        let error = begin(Layout::new(Format::Weaviate, 3, 1).class("novel")).err().unwrap();
        assert!(error.to_string().contains("capital"), "{error}");
        let mut exporter = begin(Layout::new(Format::Npy, 3, 1)).unwrap();
        let error = exporter.write(&Record::new(0, rows.view())).unwrap_err().to_string();
        assert_eq!(error, "record 0: expected one vector of 3 numbers, found 2 of 3");
        let error = exporter.finish().unwrap_err().to_string();
        assert_eq!(error, "expected 1 records, found 0");
    }
}
