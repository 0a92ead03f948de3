//! What is to be embedded, read line by line as often as it is needed: inputs may be larger than memory.

use crate::{
    out::Failure,
    prompts::{self, BOM, Line, short, utf8},
};
use opt_core::{Prompt, embedding::export::RecordId};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::{
    fs::File,
    io::{self, BufRead, BufReader},
    path::{Path, PathBuf},
};

/// A file of lines, or what came on stdin.
pub(super) struct Source {
    name: String,
    place: Place,
    /// Whether lines are plain texts.
    plain: bool,
}

enum Place {
    File(PathBuf),
    Memory(Vec<u8>),
}

/// A line.
pub(super) struct Item {
    /// `FILE: line N`.
    pub(super) place: String,
    pub(super) input: Prompt,
    pub(super) id: Option<RecordId>,
    pub(super) metadata: Option<Map<String, Value>>,
}

impl Item {
    /// Its text, if it is one.
    pub(super) fn text(&self) -> Option<&str> {
        if let Prompt::Text(text) = &self.input { Some(text) } else { None }
    }
}

/// By what an input is known again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Content {
    /// How many items there are.
    pub(super) items: u64,
    bytes: u64,
    crc32: u32,
}

impl Source {
    /// The file at `path`, whose name says whether its lines are texts or JSON; `-` is JSON from stdin.
    pub(super) fn open(path: &Path) -> Result<Self, Failure> {
        if path == Path::new("-") {
            return Ok(Self {
                name: "stdin".to_owned(),
                place: Place::Memory(prompts::stdin()?),
                plain: false,
            });
        }
        let plain = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("txt"));
        Ok(Self { name: path.display().to_string(), place: Place::File(path.to_owned()), plain })
    }

    /// Reads all of it once.
    ///
    /// # Errors
    /// Naming the first line that is not as it must be, and for no line at all.
    pub(super) fn look_through(&self) -> Result<Content, Failure> {
        let mut items = self.items()?;
        let mut count = 0;
        for item in items.by_ref() {
            item?;
            count += 1;
        }
        if count == 0 {
            let what = if self.plain { "of text" } else { "of JSON" };
            let message = format!("{}: expected at least one line {what}, found none", self.name);
            return Err(Failure::failed(message));
        }
        Ok(Content { items: count, bytes: items.bytes, crc32: items.crc.finalize() })
    }

    /// Its items, from the first.
    pub(super) fn items(&self) -> Result<Items<'_>, Failure> {
        let reader: Box<dyn BufRead + '_> = match &self.place {
            Place::Memory(bytes) => Box::new(&bytes[..]),
            Place::File(path) => {
                let file = File::open(path).map_err(|e| self.unreadable(e))?;
                Box::new(BufReader::with_capacity(1 << 16, file))
            }
        };
        Ok(Items { source: self, reader, line: 0, bytes: 0, crc: crc32fast::Hasher::new() })
    }

    fn unreadable(&self, error: io::Error) -> Failure {
        Failure::failed(format!("{}: cannot be read: {error}", self.name))
    }

    /// What a line holds; `None` for a blank one of JSON.
    fn item(&self, place: String, line: &[u8]) -> Result<Option<Item>, Failure> {
        if self.plain {
            let line = line.strip_suffix(b"\n").unwrap_or(line);
            let line = line.strip_suffix(b"\r").unwrap_or(line);
            let text = utf8(&place, line)?.to_owned();
            return Ok(Some(Item { place, input: Prompt::Text(text), id: None, metadata: None }));
        }
        let Some(line) = Line::of_json(place, line)? else { return Ok(None) };
        let input = input(&line)?;
        let map = line.value.as_object();
        let id = match map.and_then(|map| map.get("id")) {
            None | Some(Value::Null) => None,
            Some(value) => Some(RecordId::deserialize(value).map_err(|_| {
                line.fail(format_args!("id: expected a string or a whole number, found {}", short(value)))
            })?),
        };
        let metadata = match map.and_then(|map| map.get("metadata")) {
            None | Some(Value::Null) => None,
            Some(Value::Object(metadata)) => Some(metadata.clone()),
            Some(other) => {
                return Err(line.fail(format_args!("metadata: expected an object, found {}", short(other))));
            }
        };
        Ok(Some(Item { place: line.place, input, id, metadata }))
    }
}

/// What a line of JSON asks about, in the forms that `opt score` takes.
fn input(line: &Line) -> Result<Prompt, Failure> {
    let expected = r#"expected {"ids": [...]}, {"text": "..."} or {"context": "...", "continuation": "..."}"#;
    let Value::Object(map) = &line.value else {
        return Err(line.fail(format_args!("{expected}, found {}", short(&line.value))));
    };
    let (ids, text) = (line.ids(map)?, line.text(map, "text")?);
    match (ids, text, line.text(map, "context")?, line.text(map, "continuation")?) {
        (Some(ids), None, None, None) => Ok(Prompt::Ids(ids)),
        (None, Some(text), None, None) => Ok(Prompt::Text(text)),
        (None, None, Some(context), Some(continuation)) => Ok(Prompt::Text(context + &continuation)),
        _ => Err(line.fail(format_args!("{expected}, found {}", short(&line.value)))),
    }
}

/// The items of a source, one after the other.
pub(super) struct Items<'a> {
    source: &'a Source,
    reader: Box<dyn BufRead + 'a>,
    line: u64,
    bytes: u64,
    crc: crc32fast::Hasher,
}

impl Iterator for Items<'_> {
    type Item = Result<Item, Failure>;

    fn next(&mut self) -> Option<Self::Item> {
        let mut bytes = Vec::new();
        loop {
            bytes.clear();
            match self.reader.read_until(b'\n', &mut bytes) {
                Ok(0) => return None,
                Ok(read) => self.bytes += read as u64,
                Err(error) => return Some(Err(self.source.unreadable(error))),
            }
            self.crc.update(&bytes);
            self.line += 1;
            let line = if self.line == 1 { bytes.strip_prefix(BOM).unwrap_or(&bytes) } else { &bytes };
            let place = format!("{}: line {}", self.source.name, self.line);
            if let Some(item) = self.source.item(place, line).transpose() {
                return Some(item);
            }
        }
    }
}
