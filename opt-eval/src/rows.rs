//! Rows of data sets: JSON lines, JSON, CSV, text, and Parquet (feature `parquet`).

use opt_core::{Error, ErrorKind, Result};
use serde_json::{Map, Value};
use std::{
    fs,
    path::{Path, PathBuf},
};

/// One row: its columns by name.
pub type Row = Map<String, Value>;

/// The rows of a file, and where in it each stands.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct Rows {
    pub(crate) rows: Vec<Row>,
    /// For each row what to call its place in messages: `data/piqa.jsonl, line 3`.
    places: Vec<Place>,
}

#[derive(Debug, Clone, PartialEq)]
struct Place {
    file: std::sync::Arc<Path>,
    unit: &'static str,
    at: usize,
}

/// How files are read.
#[derive(Debug, Default)]
pub(crate) struct Reading<'a> {
    /// Columns of CSV files without a line of names.
    pub(crate) columns: &'a [String],
    /// In text files, lines that begin a new row match this.
    pub(crate) pages: Option<&'a str>,
}

/// Endings of files that can be read, the most exact first.
pub(crate) const ENDINGS: [&str; 7] = ["jsonl", "json", "csv", "parquet", "txt", "raw", "tokens"];

impl Rows {
    /// Where a row stands: file and line.
    pub(crate) fn place(&self, row: usize) -> String {
        match self.places.get(row) {
            Some(Place { file, unit, at }) => format!("{}, {unit} {at}", file.display()),
            None => format!("row {}", row + 1),
        }
    }

    /// Rows that stand in no file.
    pub(crate) fn given(rows: Vec<Row>) -> Self {
        Self { rows, places: Vec::new() }
    }

    fn push(&mut self, file: &std::sync::Arc<Path>, unit: &'static str, at: usize, row: Row) {
        self.rows.push(row);
        self.places.push(Place { file: file.clone(), unit, at });
    }

    /// Reads files as one list of rows, in order.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`], [`ErrorKind::Io`], and [`ErrorKind::Config`] for what cannot be read, naming file and
    /// line.
    pub(crate) fn read(files: &[PathBuf], reading: &Reading<'_>) -> Result<Self> {
        let mut rows = Self::default();
        for file in files {
            rows.append(file, reading)?;
        }
        Ok(rows)
    }

    fn append(&mut self, file: &Path, reading: &Reading<'_>) -> Result<()> {
        let name: std::sync::Arc<Path> = file.into();
        let ending = file.extension().and_then(|e| e.to_str()).unwrap_or_default().to_ascii_lowercase();
        if ending == "parquet" {
            return self.parquet(&name);
        }
        let bytes = fs::read(file).map_err(|e| {
            let kind =
                if e.kind() == std::io::ErrorKind::NotFound { ErrorKind::NotFound } else { ErrorKind::Io };
            Error::because(kind, format_args!("{}: cannot be read", file.display()), e)
        })?;
        let text = String::from_utf8(bytes).map_err(|e| {
            bad(
                format_args!("{}: byte {}", file.display(), e.utf8_error().valid_up_to()),
                "expected UTF-8, found something else",
            )
        })?;
        let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
        match &ending[..] {
            "jsonl" => self.json_lines(&name, text),
            "json" if text.trim_start().starts_with('[') => self.json(&name, text),
            "json" => self.json_lines(&name, text),
            "csv" => self.csv(&name, text, reading.columns),
            "txt" | "raw" | "tokens" => self.text(&name, text, reading.pages),
            _ => Err(bad(
                file.display(),
                &format!("expected a file ending in one of {}, found {ending:?}", ENDINGS.join(", ")),
            )),
        }
    }

    fn json_lines(&mut self, file: &std::sync::Arc<Path>, text: &str) -> Result<()> {
        for (index, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            let place = format_args!("{}, line {}", file.display(), index + 1).to_string();
            let row = match serde_json::from_str(line) {
                Ok(Value::Object(row)) => row,
                Ok(other) => {
                    return Err(bad(place, &format!("expected a JSON object, found {}", kind_of(&other))));
                }
                Err(e) => return Err(bad(place, &format!("expected a JSON object: {e}"))),
            };
            self.push(file, "line", index + 1, row);
        }
        Ok(())
    }

    fn json(&mut self, file: &std::sync::Arc<Path>, text: &str) -> Result<()> {
        let all: Vec<Value> = serde_json::from_str(text)
            .map_err(|e| bad(file.display(), &format!("expected a list of JSON objects: {e}")))?;
        for (index, value) in all.into_iter().enumerate() {
            match value {
                Value::Object(row) => self.push(file, "row", index + 1, row),
                other => {
                    let place = format_args!("{}, row {}", file.display(), index + 1).to_string();
                    return Err(bad(place, &format!("expected a JSON object, found {}", kind_of(&other))));
                }
            }
        }
        Ok(())
    }

    /// With a line of names, or without one where `columns` has as many names and the first line has none of them.
    fn csv(&mut self, file: &std::sync::Arc<Path>, text: &str, columns: &[String]) -> Result<()> {
        let mut reader =
            csv::ReaderBuilder::new().has_headers(false).flexible(true).from_reader(text.as_bytes());
        let mut names: Vec<String> = Vec::new();
        for (index, record) in reader.records().enumerate() {
            let place = || format_args!("{}, row {}", file.display(), index + 1).to_string();
            let record = record.map_err(|e| bad(place(), &e.to_string()))?;
            if index == 0 {
                let own: Vec<String> = record.iter().map(|name| name.trim().to_owned()).collect();
                let named = columns.is_empty()
                    || own.len() != columns.len()
                    || own.iter().any(|name| columns.contains(name) && name.len() > 1);
                if named {
                    names = own;
                    continue;
                }
                names = columns.to_vec();
            }
            if record.len() != names.len() {
                let message = format!(
                    "expected {} columns ({}), found {}",
                    names.len(),
                    names.join(", "),
                    record.len()
                );
                return Err(bad(place(), &message));
            }
            let row =
                names.iter().zip(&record).map(|(name, value)| (name.clone(), Value::from(value))).collect();
            self.push(file, "row", index + 1, row);
        }
        Ok(())
    }

    fn text(&mut self, file: &std::sync::Arc<Path>, text: &str, pages: Option<&str>) -> Result<()> {
        let page = |text: &str| Row::from_iter([("page".to_owned(), Value::from(text))]);
        let Some(pattern) = pages else {
            self.push(file, "line", 1, page(text));
            return Ok(());
        };
        let pattern = regex::Regex::new(pattern)
            .map_err(|e| bad(format_args!("pattern {pattern:?}"), &e.to_string()))?;
        let mut lines: Vec<&str> = Vec::new();
        let mut first = 1;
        // The end closes the last page.
        let ends = text.split('\n').map(Some).chain([None]);
        for (index, line) in ends.enumerate() {
            if line.is_none_or(|line| pattern.is_match(line)) {
                let whole = lines.join("\n");
                if !whole.trim().is_empty() {
                    self.push(file, "line", first, page(&whole));
                }
                lines.clear();
                first = index + 1;
            }
            lines.extend(line);
        }
        Ok(())
    }

    #[cfg(feature = "parquet")]
    fn parquet(&mut self, file: &std::sync::Arc<Path>) -> Result<()> {
        use parquet::file::reader::{FileReader, SerializedFileReader};
        let damaged = |e: parquet::errors::ParquetError| {
            bad(file.display(), &format!("cannot be read as Parquet: {e}"))
        };
        let opened = fs::File::open(file).map_err(|e| {
            let kind =
                if e.kind() == std::io::ErrorKind::NotFound { ErrorKind::NotFound } else { ErrorKind::Io };
            Error::because(kind, format_args!("{}: cannot be read", file.display()), e)
        })?;
        let reader = SerializedFileReader::new(opened).map_err(damaged)?;
        for (index, row) in reader.get_row_iter(None).map_err(damaged)?.enumerate() {
            if let Value::Object(row) = row.map_err(damaged)?.to_json_value() {
                self.push(file, "row", index + 1, row);
            }
        }
        Ok(())
    }

    #[cfg(not(feature = "parquet"))]
    fn parquet(&mut self, file: &std::sync::Arc<Path>) -> Result<()> {
        let message =
            format_args!("{}: Parquet files need the feature `parquet` of opt-eval", file.display());
        Err(Error::new(ErrorKind::Unsupported, message))
    }
}

fn bad(place: impl std::fmt::Display, message: &str) -> Error {
    Error::new(ErrorKind::Config, message).at(place)
}

/// What a JSON value is, for messages.
pub(crate) fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a truth value",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}
