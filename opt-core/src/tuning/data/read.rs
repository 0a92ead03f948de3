//! From files to examples.

use super::{
    DataOptions, Documents, Reads, goals,
    jsonl::{self, Line},
    store::{Store, Totals, Writer},
    text::{Text, can_cut},
};
use crate::{
    Error, ErrorKind, Progress, ProgressFn, Result,
    tokenizer::{Bos, Tokenizer},
    tuning::{Example, Goal, head},
};
use std::{fs::File, io::Read, path::Path};

/// How often progress is reported, in bytes read.
const REPORT: u64 = 1 << 20;

/// Collects examples, checking each.
pub(super) struct Collector<'a> {
    options: &'a DataOptions,
    writer: Writer,
    /// What is packed and does not fill a block yet.
    rest: Vec<u32>,
    /// Tokens seen, also those of a block that is not full.
    seen: u64,
}

/// The tokenizer, where there is text to be read.
pub(super) fn tokenizer(options: &DataOptions) -> Result<&Tokenizer> {
    options.tokenizer.as_ref().ok_or_else(|| {
        let message = r#"this model has no tokenizer: expected a .jsonl of {"ids": [...]}, found text"#;
        Error::new(ErrorKind::Tokenizer, message)
    })
}

pub(super) fn refuse<T>(message: impl std::fmt::Display) -> Result<T> {
    Err(Error::new(ErrorKind::Prompt, message))
}

impl<'a> Collector<'a> {
    pub(super) fn new(options: &'a DataOptions) -> Result<Self> {
        options.check()?;
        let folder = options.scratch.clone().unwrap_or_else(std::env::temp_dir);
        let writer = Writer::new(&folder, options.in_memory);
        Ok(Self { options, writer, rest: Vec::new(), seen: 0 })
    }

    fn check_ids(&self, ids: &[u32]) -> Result<()> {
        let vocab = self.options.vocab_size;
        match ids.iter().find(|id| **id as usize >= vocab) {
            None => Ok(()),
            Some(id) => refuse(format_args!("expected token ids below {vocab} (the vocabulary), found {id}")),
        }
    }

    /// Adds an example of its own.
    pub(super) fn example(&mut self, mut example: Example) -> Result<()> {
        self.seen += example.tokens() as u64;
        let reads = &self.options.reads;
        if let (Goal::Tokens(from), Reads::Language) = (&mut example.goal, reads) {
            *from = (*from).max(1);
            if example.ids.len() < 2 {
                return refuse(format_args!("expected at least 2 tokens, found {}", example.ids.len()));
            }
        }
        self.fit(&mut example.ids)?;
        match (reads, &mut example.goal) {
            (Reads::Language, Goal::Tokens(from)) if *from >= example.ids.len() => {
                return refuse(format_args!(
                    "expected a token to learn after the {from} of the prompt, found none within the first {}",
                    example.ids.len()
                ));
            }
            (Reads::Language, Goal::Tokens(_)) => {}
            // What is cut off cannot be pointed at; as in transformers' `run_qa.py`, the rest goes on.
            (Reads::Head(_), Goal::Answer([_, last]))
                if self.options.truncate && *last >= example.ids.len() =>
            {
                return Ok(());
            }
            (Reads::Head(task), goal) => head::check(&example.ids, goal, task)?,
            (Reads::Pairs, Goal::Passage(ids)) => self.fit(ids)?,
            (Reads::Pairs | Reads::Language, _) => {
                return refuse("expected examples of what the data is read for, found one with another goal");
            }
        }
        self.writer.push(&example)
    }

    /// Checks the ids of a sequence, which is cut to the sequence length where that is allowed.
    fn fit(&self, ids: &mut Vec<u32>) -> Result<()> {
        self.check_ids(ids)?;
        let most = self.options.seq_len;
        if ids.is_empty() {
            return refuse("expected at least one token, found none");
        }
        if ids.len() > most && !self.options.truncate {
            return refuse(format_args!(
                "expected at most {most} tokens (the sequence length), found {}",
                ids.len()
            ));
        }
        ids.truncate(most);
        Ok(())
    }

    /// Appends to what is cut into blocks.
    fn pack(&mut self, ids: &[u32]) -> Result<()> {
        self.check_ids(ids)?;
        self.seen += ids.len() as u64;
        let mut ids = ids;
        while !ids.is_empty() {
            let missing = self.options.seq_len - self.rest.len();
            let (now, later) = ids.split_at(missing.min(ids.len()));
            self.rest.extend_from_slice(now);
            ids = later;
            if self.rest.len() == self.options.seq_len {
                self.writer.push(&Example::new(self.rest.clone()))?;
                self.rest.clear();
            }
        }
        Ok(())
    }

    fn tokenizer(&self) -> Result<&'a Tokenizer> {
        tokenizer(self.options)
    }

    pub(super) fn files(&mut self, paths: &[&Path], mut progress: Option<&mut ProgressFn<'_>>) -> Result<()> {
        let io = |e: std::io::Error, path: &Path| {
            let not_found = e.kind() == std::io::ErrorKind::NotFound;
            let kind = if not_found { ErrorKind::NotFound } else { ErrorKind::Io };
            Error::because(kind, format_args!("cannot open {}", path.display()), e)
        };
        let mut total = 0;
        for path in paths {
            let found = path.metadata().map_err(|e| io(e, path))?;
            if !found.is_file() {
                let message = format_args!("{}: expected a file, found something else", path.display());
                return Err(Error::new(ErrorKind::Io, message));
            }
            total += found.len();
        }
        let mut before = 0;
        for path in paths {
            let name = path.display().to_string();
            let mut reported = None;
            let mut watch = |bytes: u64| -> Result<()> {
                if reported.is_some_and(|reported| bytes < reported + REPORT) {
                    return Ok(());
                }
                reported = Some(bytes);
                self.options.cancel.check("reading the data")?;
                let report = Progress::new(&name, before + bytes, total);
                match progress.as_mut().map(|progress| progress(report)) {
                    Some(std::ops::ControlFlow::Break(())) => {
                        Err(Error::new(ErrorKind::Cancelled, "reading the data was cancelled"))
                    }
                    _ => Ok(()),
                }
            };
            let text = Text::new(File::open(path).map_err(|e| io(e, path))?);
            let extension = path.extension().unwrap_or_default().to_string_lossy().to_ascii_lowercase();
            let read = match extension.as_str() {
                "txt" if self.options.reads != Reads::Language => {
                    refuse("expected a .jsonl whose lines say what is to be learned, found a text file")
                }
                "txt" => self.text(text, &mut watch),
                "jsonl" | "ndjson" => self.jsonl(text, &mut watch),
                _ => {
                    let message = "expected a file named .txt or .jsonl";
                    return Err(Error::new(ErrorKind::Option, message).at(path.display()));
                }
            };
            before += read.map_err(|e| e.at(path.display()))?;
        }
        Ok(())
    }

    /// Reads a text file, and gives its size.
    fn text(&mut self, mut text: Text<impl Read>, watch: &mut dyn FnMut(u64) -> Result<()>) -> Result<u64> {
        let tokenizer = self.tokenizer()?;
        let bos = self.options.bos;
        // A tokenizer whose texts cannot be cut gets them whole.
        let size = if can_cut(tokenizer) { self.options.piece } else { usize::MAX };
        let mut first = true;
        loop {
            watch(text.bytes)?;
            let (next, bos) = match self.options.documents {
                Documents::File if first => (text.piece(size)?, bos),
                Documents::File => (text.piece(size)?, Bos::Never),
                Documents::Paragraphs => (text.paragraph()?, bos),
                Documents::Lines => (text.line()?, bos),
            };
            first = false;
            let Some((line, piece)) = next else { break };
            let at = |e: Error| e.at(format_args!("line {line}"));
            self.pack(&tokenizer.encode(&piece, bos).map_err(at)?).map_err(at)?;
        }
        Ok(text.bytes)
    }

    fn jsonl(&mut self, mut text: Text<impl Read>, watch: &mut dyn FnMut(u64) -> Result<()>) -> Result<u64> {
        loop {
            watch(text.bytes)?;
            let Some((number, line)) = text.line()? else { break };
            if !line.trim().is_empty() {
                self.line(&line).map_err(|e| e.at(format_args!("line {number}")))?;
            }
        }
        Ok(text.bytes)
    }

    fn line(&mut self, line: &str) -> Result<()> {
        if self.options.reads != Reads::Language {
            return self.example(goals::read(line, self.options)?);
        }
        let bos = self.options.bos;
        let (ids, from) = match jsonl::parse(line)? {
            Line::Ids(ids) => (ids, 1),
            Line::Text(text) => (self.tokenizer()?.encode(&text, bos)?, 1),
            Line::Pair { prompt, completion } => {
                if self.options.pack {
                    return refuse(r#"expected lines of "text" or "ids" to be packed, found a "completion""#);
                }
                // Apart, since the prompt will stand alone when the model is asked to complete it.
                let tokenizer = self.tokenizer()?;
                let mut ids = tokenizer.encode(&prompt, bos)?;
                let from = ids.len();
                ids.extend(tokenizer.encode(&completion, Bos::Never)?);
                ids.push(self.options.eos.ok_or_else(|| {
                    let message = "neither the tokenizer nor the config names a token that ends a completion";
                    Error::new(ErrorKind::Tokenizer, message)
                })?);
                (ids, from)
            }
        };
        if self.options.pack { self.pack(&ids) } else { self.example(Example::completion(ids, from)) }
    }

    /// The examples; an incomplete block at the end is dropped, unless it is all there is.
    pub(super) fn finish(mut self) -> Result<Store> {
        let Totals { examples, .. } = self.writer.totals();
        if examples == 0 {
            match self.seen {
                0 => return refuse("expected something to learn from, found nothing"),
                1 => return refuse("expected at least 2 tokens in all, found 1"),
                _ => self.writer.push(&Example::new(self.rest.clone()))?,
            }
        }
        self.writer.finish()
    }
}
