use crate::{
    measure::Reply,
    task::{Document, TaskSpec},
};
use opt_core::{Error, ErrorKind, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    io::Write,
    path::{Path, PathBuf},
};

/// A line of a journal.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Entry {
    pub(super) doc: usize,
    #[serde(flatten)]
    pub(super) reply: Reply,
    /// Arguments that were too long for the model.
    pub(super) cut: usize,
}

/// Answers as they came, in a file of JSON lines: first what was run, then for each task a digest of its prompts, and
/// each answer.
pub(super) struct Journal {
    path: PathBuf,
    file: Option<File>,
    /// Of each task, the digest of its prompts and what was answered before.
    before: BTreeMap<String, (u32, Vec<Entry>)>,
}

#[derive(Deserialize)]
struct Line {
    #[serde(default)]
    run: Option<Value>,
    #[serde(default)]
    task: Option<String>,
    #[serde(default)]
    prompts: Option<u32>,
    #[serde(flatten)]
    rest: serde_json::Map<String, Value>,
}

impl Journal {
    /// One that keeps nothing.
    pub(super) fn none() -> Self {
        Self { path: PathBuf::new(), file: None, before: BTreeMap::new() }
    }

    /// Begins a journal, or goes on with one of the same run.
    pub(super) fn open(path: &Path, run: &Value, resume: bool) -> Result<Self> {
        let failed = |e: std::io::Error| {
            Error::because(ErrorKind::Io, format_args!("{}: cannot write the journal", path.display()), e)
        };
        let mut journal = Self { path: path.to_owned(), file: None, before: BTreeMap::new() };
        let before = match fs::read(path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            Err(e) => {
                let message = format_args!("{}: cannot read the journal", path.display());
                return Err(Error::because(ErrorKind::Io, message, e));
            }
        };
        // A last line may have been cut short.
        let end = before.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        let before = String::from_utf8_lossy(before.get(..end).unwrap_or_default());
        if !resume && !before.is_empty() {
            let message = format_args!(
                "{}: an evaluation that was not finished; --resume goes on with it, and without this file it begins anew",
                path.display()
            );
            return Err(Error::new(ErrorKind::Option, message));
        }
        journal.read(&before, run)?;
        if let Some(dir) = path.parent().filter(|dir| !dir.as_os_str().is_empty()) {
            fs::create_dir_all(dir).map_err(failed)?;
        }
        let file = OpenOptions::new().create(true).write(true).truncate(false).open(path).map_err(failed)?;
        file.set_len(end as u64).map_err(failed)?;
        let mut file = file;
        std::io::Seek::seek(&mut file, std::io::SeekFrom::End(0)).map_err(failed)?;
        journal.file = Some(file);
        if end == 0 {
            journal.line(&json!({ "run": run }))?;
        }
        Ok(journal)
    }

    /// Takes over what an earlier run wrote.
    fn read(&mut self, text: &str, run: &Value) -> Result<()> {
        let place = |line: usize| format!("{}, line {line}", self.path.display());
        for (index, line) in text.lines().enumerate() {
            let no_journal = |e: serde_json::Error| {
                Error::because(
                    ErrorKind::Option,
                    format_args!("{}: expected a line of a journal", place(index + 1)),
                    e,
                )
            };
            let line: Line = serde_json::from_str(line).map_err(no_journal)?;
            match (line.run, line.task, line.prompts) {
                (Some(found), ..) if &found != run => {
                    let message = format_args!(
                        "{}: expected a journal of this evaluation ({}), found one of {found}",
                        place(index + 1),
                        differences(run, &found)
                    );
                    return Err(Error::new(ErrorKind::Option, message));
                }
                (Some(_), ..) => {}
                (None, Some(task), Some(prompts)) => {
                    self.before.entry(task).or_insert((prompts, Vec::new()));
                }
                (None, Some(task), None) => {
                    let entry: Entry =
                        serde_json::from_value(Value::Object(line.rest)).map_err(no_journal)?;
                    if let Some((_, entries)) = self.before.get_mut(&task) {
                        entries.push(entry);
                    }
                }
                (None, None, _) => {
                    let message =
                        format_args!("{}: expected a line of a journal, found another", place(index + 1));
                    return Err(Error::new(ErrorKind::Option, message));
                }
            }
        }
        Ok(())
    }

    /// Begins a task; gives what was answered before.
    pub(super) fn begin(&mut self, spec: &TaskSpec, documents: &[Document]) -> Result<Vec<Entry>> {
        let task = &spec.name;
        let prompts = digest(spec, documents);
        match self.before.remove(task) {
            Some((found, entries)) if found == prompts => Ok(entries),
            Some(_) => {
                let message = format_args!(
                    "{}: task {task:?} was begun with other prompts, data, examples, limit or settings of generation; without this file it begins anew",
                    self.path.display()
                );
                Err(Error::new(ErrorKind::Option, message))
            }
            None => {
                self.line(&json!({ "task": task, "prompts": prompts }))?;
                Ok(Vec::new())
            }
        }
    }

    pub(super) fn write(&mut self, task: &str, entries: &[Entry]) -> Result<()> {
        #[derive(Serialize)]
        struct Named<'a> {
            task: &'a str,
            #[serde(flatten)]
            entry: &'a Entry,
        }
        let mut lines = Vec::new();
        for entry in entries {
            serde_json::to_writer(&mut lines, &Named { task, entry }).map_err(|e| self.failed(e.into()))?;
            lines.push(b'\n');
        }
        self.bytes(&lines)
    }

    fn line(&mut self, value: &Value) -> Result<()> {
        self.bytes(format!("{value}\n").as_bytes())
    }

    fn bytes(&mut self, bytes: &[u8]) -> Result<()> {
        let written =
            self.file.as_mut().map_or(Ok(()), |file| file.write_all(bytes).and_then(|()| file.flush()));
        written.map_err(|e| self.failed(e))
    }

    fn failed(&self, error: std::io::Error) -> Error {
        Error::because(
            ErrorKind::Io,
            format_args!("{}: cannot write the journal", self.path.display()),
            error,
        )
    }
}

/// The parts of a run that are not the same.
fn differences(expected: &Value, found: &Value) -> String {
    let keys = expected.as_object().into_iter().flat_map(|all| all.keys());
    let different: Vec<String> =
        keys.filter(|key| expected.get(key) != found.get(key)).map(|key| format!("{key} differs")).collect();
    different.join(", ")
}

/// A checksum over all that is asked, and how.
fn digest(spec: &TaskSpec, documents: &[Document]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(json!([spec.kind, spec.generation]).to_string().as_bytes());
    for document in documents {
        for (context, continuation) in &document.arguments {
            for part in [context, continuation] {
                hasher.update(&(part.len() as u64).to_le_bytes());
                hasher.update(part.as_bytes());
            }
        }
    }
    hasher.finalize()
}
