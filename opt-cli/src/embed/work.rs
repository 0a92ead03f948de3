//! The file beside an output in which vectors are gathered until all are there.
//!
//! A line of JSON says of what they are; then come records: the number of rows and a CRC-32, four bytes each, and the
//! numbers in f32. What was being written when the process ended is told by its length or its sum, and is cut off.

use super::input::Content;
use crate::out::Failure;
use opt_core::{
    embedding::{Embedding, Identity, Precision},
    ndarray::Array2,
};
use serde::{Deserialize, Serialize};
use std::{
    fs::{File, OpenOptions},
    io::{self, BufRead, BufReader, Read, Write},
    path::{Path, PathBuf},
};

/// What vectors must have in common to stand in one file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Head {
    pub(super) format: String,
    pub(super) input: Content,
    pub(super) precision: Precision,
    /// What became of long texts.
    pub(super) truncate: String,
    pub(super) max_tokens: usize,
    pub(super) embedder: Identity,
}

/// What the first line begins with.
pub(super) const FORMAT: &str = "opt-embed-1";

/// An output that is not whole yet.
pub(super) struct Work {
    path: PathBuf,
    file: File,
    head: Head,
    /// How many items it holds.
    pub(super) done: u64,
}

impl Work {
    /// The place of what belongs to `output`.
    pub(super) fn place(output: &Path) -> PathBuf {
        let mut name = output.as_os_str().to_owned();
        name.push(".part");
        PathBuf::from(name)
    }

    /// Refuses to begin anew where something was left to go on with.
    pub(super) fn check_free(output: &Path) -> Result<(), Failure> {
        let path = Self::place(output);
        if !path.exists() {
            return Ok(());
        }
        Err(Failure::failed(format!(
            "{}: an unfinished output is there: --resume goes on with it; delete it to begin anew",
            path.display()
        )))
    }

    /// Begins, or goes on with what is there.
    pub(super) fn open(output: &Path, head: Head, resume: bool) -> Result<Self, Failure> {
        let path = Self::place(output);
        let failed = |e: io::Error| Failure::failed(format!("{}: cannot be written: {e}", path.display()));
        if !(resume && path.exists()) {
            let mut file = OpenOptions::new().read(true).write(true).create_new(true).open(&path);
            let line = serde_json::to_string(&head).map_err(|e| Failure::failed(format!("JSON: {e}")))?;
            if let Ok(file) = &mut file {
                writeln!(file, "{line}").map_err(failed)?;
            }
            let file = file.map_err(failed)?;
            return Ok(Self { file, head, done: 0, path });
        }
        let place = path.display();
        let mut records = Records::open(&path, head.embedder.width)?;
        records.head.check(&head).map_err(|failure| failure.at(&place))?;
        let mut done = 0;
        while done < head.input.items && records.next()?.is_some() {
            done += 1;
        }
        let whole = records.whole;
        let file = OpenOptions::new().read(true).append(true).open(&path).map_err(failed)?;
        file.set_len(whole).map_err(failed)?;
        Ok(Self { file, head, done, path })
    }

    /// Adds embeddings, all or (if the process ends) some of them.
    pub(super) fn append(&mut self, embeddings: &[Embedding]) -> Result<(), Failure> {
        let mut bytes = Vec::new();
        for embedding in embeddings {
            let values: Vec<u8> = embedding.rows.iter().flat_map(|v| v.to_le_bytes()).collect();
            bytes.extend((embedding.rows.nrows() as u32).to_le_bytes());
            bytes.extend(crc32fast::hash(&values).to_le_bytes());
            bytes.extend(values);
        }
        self.file
            .write_all(&bytes)
            .map_err(|e| Failure::failed(format!("{}: cannot be written: {e}", self.path.display())))?;
        self.done += embeddings.len() as u64;
        Ok(())
    }

    /// Its records, from the first.
    pub(super) fn records(&self) -> Result<Records, Failure> {
        Records::open(&self.path, self.head.embedder.width)
    }

    /// Where it is.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The output is whole: this is needed no more.
    pub(super) fn remove(self) -> Result<(), Failure> {
        std::fs::remove_file(&self.path)
            .map_err(|e| Failure::failed(format!("{}: cannot be removed: {e}", self.path.display())))
    }
}

impl Head {
    /// Whether what was begun with `self` can go on with `now`.
    fn check(&self, now: &Self) -> Result<(), Failure> {
        let fail = |what: &str, expected: &dyn std::fmt::Display, found: &dyn std::fmt::Display| {
            Err(Failure::failed(format!(
                "it was begun with other settings: {what}: expected {expected}, found {found}"
            )))
        };
        if self.input != now.input {
            let of = |input: &Content| {
                let json = serde_json::to_string(input).unwrap_or_default();
                json.replace(['"', '{', '}'], "")
            };
            return fail("input", &of(&self.input), &of(&now.input));
        }
        self.embedder
            .check(&now.embedder)
            .map_err(|e| Failure::from(e).at("it was begun with another embedder"))?;
        if self.precision != now.precision {
            return fail("--output-dtype", &self.precision, &now.precision);
        }
        if self.truncate != now.truncate {
            return fail("--truncate", &self.truncate, &now.truncate);
        }
        if self.max_tokens != now.max_tokens {
            return fail("--max-tokens", &self.max_tokens, &now.max_tokens);
        }
        Ok(())
    }
}

/// The records of a file, one after the other, as far as they are whole.
pub(super) struct Records {
    reader: BufReader<File>,
    place: String,
    head: Head,
    width: usize,
    /// Bytes up to the last whole record.
    whole: u64,
}

impl Records {
    fn open(path: &Path, width: usize) -> Result<Self, Failure> {
        let place = path.display().to_string();
        let failed = |e: io::Error| Failure::failed(format!("{place}: cannot be read: {e}"));
        let mut reader = BufReader::with_capacity(1 << 16, File::open(path).map_err(failed)?);
        let mut line = Vec::new();
        reader.read_until(b'\n', &mut line).map_err(failed)?;
        let head: Option<Head> = serde_json::from_slice(&line).ok();
        let Some(head) = head.filter(|head| head.format == FORMAT && line.ends_with(b"\n")) else {
            return Err(Failure::failed(format!(
                "{place}: expected an unfinished output of `opt embed`, found something else; delete it to begin anew"
            )));
        };
        Ok(Self { reader, place, head, width, whole: line.len() as u64 })
    }

    /// The next record, if it is whole.
    pub(super) fn next(&mut self) -> Result<Option<Array2<f32>>, Failure> {
        let mut begin = [0; 8];
        if !self.fill(&mut begin)? {
            return Ok(None);
        }
        let [a, b, c, d, e, f, g, h] = begin;
        let (rows, crc) = (u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h]));
        // Not more than a text can have: what was cut off in the middle may say anything.
        let len = (rows as usize).checked_mul(self.width * size_of::<f32>()).filter(|_| rows < 1 << 24);
        let Some(len) = len else { return Ok(None) };
        let mut values = Vec::new();
        self.reader
            .by_ref()
            .take(len as u64)
            .read_to_end(&mut values)
            .map_err(|e| Failure::failed(format!("{}: cannot be read: {e}", self.place)))?;
        if values.len() < len || crc32fast::hash(&values) != crc {
            return Ok(None);
        }
        self.whole += (begin.len() + len) as u64;
        let numbers = values.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
        Ok(Array2::from_shape_vec((rows as usize, self.width), numbers).ok())
    }

    /// Whether there was as much to read.
    fn fill(&mut self, bytes: &mut [u8]) -> Result<bool, Failure> {
        match self.reader.read_exact(bytes) {
            Ok(()) => Ok(true),
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
            Err(e) => Err(Failure::failed(format!("{}: cannot be read: {e}", self.place))),
        }
    }
}
