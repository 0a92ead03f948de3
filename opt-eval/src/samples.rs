//! What was asked and answered for each document: `samples_<task>.jsonl` in the layout of lm-evaluation-harness
//! (0.4.13), a line for each document and filter.
//!
//! ```
//! use opt_eval::samples::{Sample, SampleReader, SampleWriter};
//! # let folder = tempfile::tempdir()?;
//! # let path = folder.path().join("samples_piqa.jsonl");
//! let mut sample = Sample::new(0, serde_json::json!({"goal": "To open a jar"}));
//! sample.metrics = vec!["acc".to_owned()];
//! sample.values.insert("acc".to_owned(), 1.0.into());
//! let mut file = SampleWriter::create(&path)?;
//! file.write(&sample)?;
//! file.finish()?;
//!
//! let samples = SampleReader::open(&path)?.collect::<opt_eval::Result<Vec<_>>>()?;
//! assert_eq!(samples, [sample]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod python;
mod values;

pub use python::{document_hash, hash, in_words};
pub use values::SampleValues;
pub(crate) use values::{OF_LOG_LIKELIHOODS, Pairs, Unpaired};

use crate::{Error, ErrorKind, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};
use std::{
    fs::File,
    io::{BufRead, BufReader, BufWriter, Write},
    path::{Path, PathBuf},
};

/// One document, what the model was asked about it and what it answered.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Sample {
    /// The document's place in its split, from 0.
    pub doc_id: u64,
    /// The document.
    #[serde(default)]
    pub doc: Value,
    /// The right answer, as text.
    #[serde(default)]
    pub target: Value,
    /// What each request was: `{"gen_args_0": {"arg_0": context, "arg_1": continuation}}`. [`Sample::ask`] adds one.
    #[serde(default)]
    pub arguments: Map<String, Value>,
    /// What the model answered: for each request, and each repetition of it, text or `[log-likelihood, is greedy]`, all
    /// numbers in words ([`in_words`]).
    #[serde(default)]
    pub resps: Value,
    /// What the filter left of it, for each request.
    #[serde(default)]
    pub filtered_resps: Value,
    /// The filter.
    #[serde(default)]
    pub filter: String,
    /// The metrics among the values.
    #[serde(default)]
    pub metrics: Vec<String>,
    /// SHA-256 of the document ([`document_hash`]).
    #[serde(default)]
    pub doc_hash: String,
    /// SHA-256 of the first request's context ([`hash`]).
    #[serde(default)]
    pub prompt_hash: String,
    /// SHA-256 of the target ([`hash`]).
    #[serde(default)]
    pub target_hash: String,
    /// What each metric says of the document, and further keys of a file.
    #[serde(flatten)]
    pub values: Map<String, Value>,
}

impl Sample {
    /// A sample of a document, without anything else yet.
    pub fn new(doc_id: u64, doc: Value) -> Self {
        Self { doc_id, doc, filter: crate::report::NO_FILTER.to_owned(), ..Self::default() }
    }

    /// Adds a request with its arguments: context and continuation, or prompt and settings.
    pub fn ask(&mut self, arguments: impl IntoIterator<Item = Value>) {
        let named = arguments.into_iter().enumerate().map(|(i, value)| (format!("arg_{i}"), value));
        let key = format!("gen_args_{}", self.arguments.len());
        self.arguments.insert(key, Value::Object(named.collect()));
    }
}

/// The hash over the hashes of samples that reports have as `task_hashes`.
pub fn task_hash(samples: &[Sample]) -> String {
    let mut hashes = Sha256::new();
    for sample in samples {
        for part in [&sample.doc_hash, &sample.prompt_hash, &sample.target_hash] {
            hashes.update(part);
        }
    }
    python::hex(hashes)
}

/// The file of a task's samples that belongs to a report: beside it, with the report's name in its own; what the harness
/// calls `results_DATE.json` has `samples_TASK_DATE.jsonl`, and `f32.json` has `samples_TASK_f32.jsonl`.
///
/// ```
/// use opt_eval::samples::beside;
/// assert_eq!(beside("runs/f32.json", "piqa"), std::path::Path::new("runs/samples_piqa_f32.jsonl"));
/// ```
pub fn beside(report: impl AsRef<Path>, task: &str) -> PathBuf {
    let report = report.as_ref();
    let stem = report.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
    let stem = stem.strip_prefix("results_").unwrap_or(stem);
    report.with_file_name(format!("samples_{}_{stem}.jsonl", crate::report::sanitized(task)))
}

/// Writes samples one by one under a temporary name; the file appears with [`SampleWriter::finish`].
#[derive(Debug)]
pub struct SampleWriter {
    path: PathBuf,
    file: BufWriter<tempfile::NamedTempFile>,
    hashes: Sha256,
}

impl SampleWriter {
    /// Begins a file. Folders on the way are made.
    ///
    /// # Errors
    /// [`ErrorKind::Io`].
    pub fn create(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        std::fs::create_dir_all(folder).map_err(|e| unwritable(path, e))?;
        let file = tempfile::Builder::new().prefix(".samples").tempfile_in(folder);
        let file = BufWriter::new(file.map_err(|e| unwritable(path, e))?);
        Ok(Self { path: path.to_owned(), file, hashes: Sha256::new() })
    }

    /// Writes a line.
    ///
    /// # Errors
    /// [`ErrorKind::Io`].
    pub fn write(&mut self, sample: &Sample) -> Result<()> {
        for part in [&sample.doc_hash, &sample.prompt_hash, &sample.target_hash] {
            self.hashes.update(part);
        }
        serde_json::to_writer(&mut self.file, sample).map_err(|e| unwritable(&self.path, e.into()))?;
        self.file.write_all(b"\n").map_err(|e| unwritable(&self.path, e))
    }

    /// Ends the file and gives it its name; what had that name stands until now. Returns the hash over the hashes of all
    /// samples that reports have as `task_hashes`.
    ///
    /// # Errors
    /// [`ErrorKind::Io`].
    pub fn finish(self) -> Result<String> {
        let Self { path, file, hashes } = self;
        let file = file.into_inner().map_err(|e| unwritable(&path, e.into_error()))?;
        file.persist(&path).map_err(|e| unwritable(&path, e.error))?;
        Ok(python::hex(hashes))
    }
}

fn unwritable(path: &Path, e: std::io::Error) -> Error {
    Error::because(ErrorKind::Io, format!("{}: cannot be written", path.display()), e)
}

/// Reads samples one by one. Empty lines are passed over; nothing follows an error.
#[derive(Debug)]
pub struct SampleReader {
    path: PathBuf,
    lines: std::io::Lines<BufReader<File>>,
    line: usize,
    failed: bool,
}

impl SampleReader {
    /// Opens a file of this crate or of lm-evaluation-harness.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] and [`ErrorKind::Io`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let file = File::open(path).map_err(|e| {
            let kind = match e.kind() {
                std::io::ErrorKind::NotFound => ErrorKind::NotFound,
                _ => ErrorKind::Io,
            };
            Error::because(kind, format!("{}: cannot be read", path.display()), e)
        })?;
        Ok(Self { path: path.to_owned(), lines: BufReader::new(file).lines(), line: 0, failed: false })
    }

    fn parse(&self, text: &str) -> Result<Sample> {
        let place = || format!("{} line {}", self.path.display(), self.line);
        // Python writes NaN and Infinity, which JSON has not.
        let again = |_| serde_json::from_str(&crate::report::without_nan(text));
        serde_json::from_str(text).or_else(again).map_err(|e| {
            let what = match e.classify() {
                serde_json::error::Category::Eof => "a line that ends in the middle",
                _ => "no sample of an evaluation",
            };
            Error::because(ErrorKind::Config, what, e).at(place())
        })
    }
}

impl Iterator for SampleReader {
    type Item = Result<Sample>;

    fn next(&mut self) -> Option<Self::Item> {
        while !self.failed {
            let text = self.lines.next()?;
            self.line += 1;
            let sample = match text {
                Ok(text) if text.trim().is_empty() => continue,
                Ok(text) => self.parse(&text),
                Err(e) => {
                    let place = format!("{} line {}: cannot be read", self.path.display(), self.line);
                    Err(Error::because(ErrorKind::Io, place, e))
                }
            };
            self.failed = sample.is_err();
            return Some(sample);
        }
        None
    }
}
