//! Reading input: JSON lines and plain text, from files and stdin.

use crate::out::Failure;
use serde_json::{Map, Value};
use std::{
    fs,
    io::{self, Read},
    path::Path,
};

/// A line of a JSONL file.
pub(crate) struct Line {
    /// `FILE: line N`.
    pub(crate) place: String,
    pub(crate) value: Value,
}

/// What some programs begin UTF-8 files with.
pub(crate) const BOM: &[u8] = b"\xef\xbb\xbf";

/// All of a file; `-` is stdin.
fn read(path: &Path) -> Result<(String, Vec<u8>), Failure> {
    if path == Path::new("-") {
        return Ok(("stdin".to_owned(), stdin()?));
    }
    let name = path.display().to_string();
    let bytes = fs::read(path).map_err(|e| Failure::failed(format!("{name}: cannot be read: {e}")))?;
    Ok((name, bytes))
}

pub(crate) fn stdin() -> Result<Vec<u8>, Failure> {
    let mut bytes = Vec::new();
    io::stdin()
        .lock()
        .read_to_end(&mut bytes)
        .map_err(|e| Failure::failed(format!("stdin: cannot be read: {e}")))?;
    Ok(bytes)
}

/// The lines of a JSONL file that are not empty; at least one.
pub(crate) fn json_lines(path: &Path) -> Result<Vec<Line>, Failure> {
    let (name, bytes) = read(path)?;
    let bytes = bytes.strip_prefix(BOM).unwrap_or(&bytes);
    let mut lines = Vec::new();
    for (index, line) in bytes.split(|byte| *byte == b'\n').enumerate() {
        lines.extend(Line::of_json(format!("{name}: line {}", index + 1), line)?);
    }
    if lines.is_empty() {
        return Err(Failure::failed(format!("{name}: expected at least one line of JSON, found none")));
    }
    Ok(lines)
}

/// A file of text, or all of stdin for `-`.
pub(crate) fn text_file(path: &Path) -> Result<String, Failure> {
    let (name, bytes) = read(path)?;
    let text = String::from_utf8(bytes)
        .map_err(|e| Failure::failed(format!("{name}: expected UTF-8 text: {}", e.utf8_error())))?;
    Ok(text.strip_prefix('\u{feff}').map(str::to_owned).unwrap_or(text))
}

/// The text on stdin, without the line break that `echo` puts at its end.
pub(crate) fn stdin_text() -> Result<String, Failure> {
    let mut text = String::from_utf8(stdin()?).map_err(|e| {
        let valid = e.utf8_error().valid_up_to();
        let line = e.as_bytes()[..valid].iter().filter(|byte| **byte == b'\n').count() + 1;
        Failure::failed(format!("stdin: line {line}: expected UTF-8 text: {}", e.utf8_error()))
    })?;
    if text.ends_with('\n') {
        text.pop();
        if text.ends_with('\r') {
            text.pop();
        }
    }
    Ok(text)
}

/// The text of a line.
pub(crate) fn utf8<'a>(place: &str, line: &'a [u8]) -> Result<&'a str, Failure> {
    std::str::from_utf8(line).map_err(|e| Failure::failed(format!("{place}: expected UTF-8 text: {e}")))
}

impl Line {
    /// A line of JSON; `None` for a blank one.
    pub(crate) fn of_json(place: String, line: &[u8]) -> Result<Option<Self>, Failure> {
        let text = utf8(&place, line)?;
        if text.trim().is_empty() {
            return Ok(None);
        }
        let value = serde_json::from_str(text)
            // serde_json counts lines within what it is given, which is one.
            .map_err(|e| {
                let message = e.to_string().replace(" at line 1 column", " at column");
                Failure::failed(format!("{place}: expected JSON: {message}"))
            })?;
        Ok(Some(Self { place, value }))
    }

    pub(crate) fn fail(&self, message: impl std::fmt::Display) -> Failure {
        Failure::failed(format!("{}: {message}", self.place))
    }

    /// A field with text, if it is there.
    pub(crate) fn text(&self, map: &Map<String, Value>, name: &str) -> Result<Option<String>, Failure> {
        match map.get(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text.clone())),
            Some(other) => Err(self.fail(format_args!("{name}: expected a string, found {}", short(other)))),
        }
    }

    /// A field with token ids, if it is there.
    pub(crate) fn ids(&self, map: &Map<String, Value>) -> Result<Option<Vec<u32>>, Failure> {
        let Some(value) = map.get("ids") else { return Ok(None) };
        let wrong = |found: &Value| {
            self.fail(format_args!("ids: expected a list of token ids, found {}", short(found)))
        };
        let Value::Array(ids) = value else { return Err(wrong(value)) };
        let id = |id: &Value| id.as_u64().and_then(|id| u32::try_from(id).ok()).ok_or_else(|| wrong(id));
        ids.iter().map(id).collect::<Result<_, _>>().map(Some)
    }
}

/// A JSON value, cut to what fits into a message.
pub(crate) fn short(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(40) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}
