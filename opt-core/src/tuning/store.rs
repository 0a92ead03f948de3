//! What a training leaves on disk.
//!
//! ```text
//! OUTPUT/training.json        what is being trained, and how
//!        log.jsonl            one line a step and evaluation
//!        checkpoint-40/       a model (or adapter) that can be used, and what resuming needs:
//!            optimizer.safetensors, trainer_state.json
//!        model.safetensors    the result: the best model if there was something to evaluate on, else the last
//! ```
//!
//! A checkpoint is written under another name and renamed when it is complete, so that whatever happens on the way, those
//! that are there can be used.

use super::{
    learner::Learn,
    optimizer::{Optimizer, remembered},
};
use crate::{
    Error, ErrorKind, Result,
    checkpoint::{Checkpoint, io, pretty, read_tensors, write_arrays, write_replaced},
};
use ndarray::{Array2, ArrayD, ArrayView2};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
};

const SETTINGS: &str = "training.json";
const STATE: &str = "trainer_state.json";
const OPTIMIZER: &str = "optimizer.safetensors";
const LOG: &str = "log.jsonl";
/// What names begin with until files and directories are complete.
const UNFINISHED: &str = ".opt-tune-";

/// Where a training stands.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub(super) struct State {
    /// Steps that were made.
    pub(super) step: u64,
    /// Mean loss of the best evaluation, and its step.
    pub(super) best: Option<(f64, u64)>,
    /// Evaluations since that were no better.
    pub(super) stale: u64,
    /// Target tokens learned from; examples where the goal is another.
    pub(super) tokens: u64,
}

/// Writes what was trained into a directory, so that it can be used.
pub(super) type Artifact<'a> = &'a dyn Fn(&Path, &dyn Learn) -> Result<()>;

pub(super) struct Store {
    output: PathBuf,
}

impl Store {
    /// Takes an output directory, which must be empty, new, or hold a training with the same settings that is to be
    /// resumed.
    pub(super) fn open(output: &Path, settings: &Value, resume: bool) -> Result<Self> {
        let fail =
            |message: String| Err(Error::new(ErrorKind::Option, format!("{}: {message}", output.display())));
        let store = Self { output: output.to_owned() };
        let path = output.join(SETTINGS);
        if path.is_file() {
            if !resume {
                return fail("holds a training already; resume it, or name another directory".to_owned());
            }
            let text = fs::read_to_string(&path).map_err(|e| io("cannot read", &path, e))?;
            let found: Value = serde_json::from_str(&text).map_err(|e| {
                Error::because(ErrorKind::Config, format_args!("{}: not usable", path.display()), e)
            })?;
            if let Some((key, expected, found)) = difference("", &found, settings) {
                return fail(format!(
                    "cannot be resumed with other settings: {key}: expected {expected}, found {found}"
                ));
            }
            store.remove_unfinished();
            return Ok(store);
        }
        if output.exists() {
            let mut entries = fs::read_dir(output).map_err(|e| io("cannot read", output, e))?;
            if entries.any(|entry| !entry.is_ok_and(|entry| is_unfinished(&entry))) {
                return fail("holds something else; expected an empty or a new directory".to_owned());
            }
        }
        fs::create_dir_all(output).map_err(|e| io("cannot create", output, e))?;
        store.replace(SETTINGS, &pretty(settings)?)?;
        Ok(store)
    }

    /// Removes what a training that was killed had not finished writing. That it is still there does no harm.
    fn remove_unfinished(&self) {
        let entries = fs::read_dir(&self.output).into_iter().flatten().flatten();
        for entry in entries.filter(is_unfinished) {
            let path = entry.path();
            let _ = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
        }
    }

    pub(super) fn output(&self) -> &Path {
        &self.output
    }

    /// Puts a file in the place of another, whole or not at all.
    pub(super) fn replace(&self, name: &str, contents: &[u8]) -> Result<()> {
        let path = self.output.join(name);
        let write = || {
            let mut file = tempfile::Builder::new().prefix(UNFINISHED).tempfile_in(&self.output)?;
            file.write_all(contents)?;
            readable(file.path())?;
            file.persist(&path).map_err(|e| e.error)?;
            Ok(())
        };
        write().map_err(|e| io("cannot write", &path, e))
    }

    pub(super) fn checkpoint(&self, step: u64) -> PathBuf {
        self.output.join(format!("checkpoint-{step}"))
    }

    /// The steps of the checkpoints that are there, lowest first.
    pub(super) fn steps(&self) -> Result<Vec<u64>> {
        let entries = fs::read_dir(&self.output).map_err(|e| io("cannot read", &self.output, e))?;
        let step = |name: &str| name.strip_prefix("checkpoint-")?.parse().ok();
        let mut steps: Vec<u64> =
            entries.filter_map(|entry| step(entry.ok()?.file_name().to_str()?)).collect();
        steps.retain(|step| self.checkpoint(*step).join(STATE).is_file());
        steps.sort_unstable();
        Ok(steps)
    }

    /// Writes a checkpoint. `kept` says which values are kept beside the optimizer's memory, since they cannot be read
    /// from the artifact again.
    pub(super) fn save(
        &self,
        state: &State,
        learner: &dyn Learn,
        optimizer: Optimizer,
        artifact: Artifact<'_>,
        kept: &dyn Fn(&str) -> bool,
    ) -> Result<PathBuf> {
        let path = self.checkpoint(state.step);
        let save = || {
            let inside = tempfile::Builder::new()
                .prefix(UNFINISHED)
                .tempdir_in(&self.output)
                .map_err(|e| io("cannot create a directory in", &self.output, e))?;
            artifact(inside.path(), learner)?;
            write_memory(&inside.path().join(OPTIMIZER), learner, optimizer, kept)?;
            let text = pretty(&serde_json::to_value(state).unwrap_or_default())?;
            let file = inside.path().join(STATE);
            fs::write(&file, text).map_err(|e| io("cannot write", &file, e))?;
            readable(inside.path()).map_err(|e| io("cannot write", inside.path(), e))?;
            if path.exists() {
                fs::remove_dir_all(&path).map_err(|e| io("cannot replace", &path, e))?;
            }
            fs::rename(inside.path(), &path).map_err(|e| io("cannot write", &path, e))?;
            // What the guard would delete is gone from its name.
            let _ = inside.keep();
            Ok(())
        };
        save().map_err(|e: Error| e.at(format_args!("{}: not saved", path.display())))?;
        Ok(path)
    }

    /// Removes all checkpoints but the last `limit` and `best`.
    pub(super) fn prune(&self, limit: usize, best: Option<u64>) -> Result<()> {
        let steps = self.steps()?;
        let old = steps.len().saturating_sub(limit.max(1));
        for step in steps.into_iter().take(old).filter(|step| Some(*step) != best) {
            let path = self.checkpoint(step);
            fs::remove_dir_all(&path).map_err(|e| io("cannot remove", &path, e))?;
        }
        Ok(())
    }

    /// Sets the learner as a checkpoint has it.
    pub(super) fn restore(&self, step: u64, learner: &mut dyn Learn, optimizer: Optimizer) -> Result<State> {
        let dir = self.checkpoint(step);
        let mut restore = || {
            let file = dir.join(STATE);
            let text = fs::read_to_string(&file).map_err(|e| io("cannot read", &file, e))?;
            let state: State = serde_json::from_str(&text).map_err(|e| {
                Error::because(ErrorKind::Checkpoint, format_args!("{}: not usable", file.display()), e)
            })?;
            let arrays = read_arrays(&dir.join(OPTIMIZER))?;
            let model =
                if dir.join("model.safetensors").is_file() { Some(Checkpoint::open(&dir)?) } else { None };
            for (name, shape) in learner.shapes() {
                let of = |part: &str| arrays.get(&format!("{name}.{part}"));
                let value = match (of("value"), &model) {
                    (Some(value), _) => value.clone(),
                    (None, Some(model)) => read_model(model, &name, shape)?,
                    (None, None) => {
                        let message = format_args!("{OPTIMIZER}: tensor {name}.value is missing");
                        return Err(Error::new(ErrorKind::Checkpoint, message));
                    }
                };
                let parts = remembered(optimizer, &name, shape);
                let memory: Vec<ArrayView2<'_, f32>> =
                    parts.iter().filter_map(|(part, _)| of(part)).map(|m| m.view()).collect();
                learner.restore(&name, value.view(), optimizer, &memory)?;
            }
            Ok(state)
        };
        restore().map_err(|e: Error| e.at(dir.display()))
    }

    /// Puts the files of an artifact into the output directory itself.
    pub(super) fn publish(&self, from: &Path) -> Result<()> {
        let entries = fs::read_dir(from).map_err(|e| io("cannot read", from, e))?;
        for entry in entries {
            let entry = entry.map_err(|e| io("cannot read", from, e))?;
            let name = entry.file_name();
            if [STATE, OPTIMIZER].iter().any(|own| name == *own) {
                continue;
            }
            let target = self.output.join(&name);
            let copy = || {
                let file = tempfile::Builder::new().prefix(UNFINISHED).tempfile_in(&self.output)?;
                fs::copy(entry.path(), file.path())?;
                readable(file.path())?;
                file.persist(&target).map_err(|e| e.error)?;
                Ok(())
            };
            copy().map_err(|e| io("cannot write", &target, e))?;
        }
        Ok(())
    }

    /// The log, from its start, less what came after `step`; nothing of it without one.
    pub(super) fn log(&self, step: Option<u64>) -> Result<Log> {
        let path = self.output.join(LOG);
        let kept: Vec<Value> = match fs::read_to_string(&path) {
            Ok(text) => text
                .lines()
                .filter_map(|line| serde_json::from_str(line).ok())
                .filter(|line: &Value| {
                    line["step"].as_u64().is_some_and(|at| step.is_some_and(|step| at <= step))
                })
                .collect(),
            Err(_) => Vec::new(),
        };
        let text: String = kept.iter().map(|line| format!("{line}\n")).collect();
        self.replace(LOG, text.as_bytes())?;
        let file =
            fs::OpenOptions::new().append(true).open(&path).map_err(|e| io("cannot open", &path, e))?;
        Ok(Log { file, path, lines: kept })
    }
}

/// One JSON object a line.
pub(super) struct Log {
    file: File,
    path: PathBuf,
    pub(super) lines: Vec<Value>,
}

impl Log {
    pub(super) fn write(&mut self, line: Value) -> Result<()> {
        self.file.write_all(format!("{line}\n").as_bytes()).map_err(|e| io("cannot write", &self.path, e))?;
        self.lines.push(line);
        Ok(())
    }
}

/// The weights of `base` with what was trained, a head's tensors of these names and shapes, and the files beside them.
pub(super) fn write_model(
    inside: &Path,
    base: &Checkpoint,
    files: &[(String, Vec<u8>)],
    head: &[(String, Vec<usize>)],
    learner: &dyn Learn,
) -> Result<()> {
    let trained: BTreeSet<String> = learner.shapes().into_iter().map(|(name, _)| name).collect();
    let path = inside.join("model.safetensors");
    write_replaced(&path, base, &trained, head, &mut |name| learner.value(name))?;
    for (name, contents) in files {
        let path = inside.join(name);
        fs::write(&path, contents).map_err(|e| io("cannot write", &path, e))?;
    }
    Ok(())
}

fn write_memory(
    path: &Path,
    learner: &dyn Learn,
    optimizer: Optimizer,
    kept: &dyn Fn(&str) -> bool,
) -> Result<()> {
    let mut entries = Vec::new();
    // Of which parameter an entry is, and which part of what is remembered, if it is not its value.
    let mut sources = BTreeMap::new();
    for (name, shape) in learner.shapes() {
        let mut enter = |part: &str, shape: [usize; 2], index: Option<usize>| {
            let entry = format!("{name}.{part}");
            entries.push((entry.clone(), shape.to_vec()));
            sources.insert(entry, (name.clone(), index));
        };
        if kept(&name) {
            enter("value", shape, None);
        }
        // Before the first step, and of what has no gradient, nothing is remembered.
        if !learner.memory_is_empty(&name) {
            for (index, (part, shape)) in remembered(optimizer, &name, shape).into_iter().enumerate() {
                enter(part, shape, Some(index));
            }
        }
    }
    // The parts of a parameter are asked for one after the other: they are read once.
    let mut last: Option<(&str, Vec<Array2<f32>>)> = None;
    write_arrays(path, &entries, &mut |entry| {
        let missing = || Error::new(ErrorKind::NotFound, format_args!("{entry}: nothing is remembered"));
        let (name, index) = sources.get(entry).ok_or_else(missing)?;
        let Some(index) = *index else { return learner.value(name) };
        if last.as_ref().is_none_or(|(known, _)| known != name) {
            last = Some((name, learner.memory(name)?));
        }
        let part = last.as_ref().and_then(|(_, parts)| parts.get(index));
        part.cloned().ok_or_else(missing)
    })
}

fn read_model(model: &Checkpoint, name: &str, shape: [usize; 2]) -> Result<Array2<f32>> {
    // A vector is `[1, width]` here; the file says which of the two it is.
    let vector = model.tensors().any(|info| info.name == name && info.shape.len() == 1);
    if vector {
        let tensor = model.tensor(name, &shape[1..])?;
        return Ok(tensor.vector()?.to_f32().insert_axis(ndarray::Axis(0)));
    }
    Ok(model.tensor(name, &shape)?.matrix()?.to_f32())
}

/// All matrices of a safetensors file.
fn read_arrays(path: &Path) -> Result<BTreeMap<String, Array2<f32>>> {
    let matrix = |(name, tensor): (String, ArrayD<f32>)| {
        let tensor = tensor.into_dimensionality();
        let damaged =
            |e| Error::because(ErrorKind::Checkpoint, format_args!("{OPTIMIZER}: tensor {name}"), e);
        Ok((name.clone(), tensor.map_err(damaged)?))
    };
    read_tensors(path)?.into_iter().map(matrix).collect()
}

/// Whether it has the name of something that is being written.
fn is_unfinished(entry: &fs::DirEntry) -> bool {
    entry.file_name().to_string_lossy().starts_with(UNFINISHED)
}

/// Where two settings differ first: the key, what was, and what is.
fn difference(place: &str, old: &Value, new: &Value) -> Option<(String, Value, Value)> {
    match (old, new) {
        (Value::Object(old), Value::Object(new)) => {
            let keys: BTreeSet<&String> = old.keys().chain(new.keys()).collect();
            keys.into_iter().find_map(|key| {
                let place = if place.is_empty() { key.clone() } else { format!("{place}.{key}") };
                difference(&place, old.get(key).unwrap_or(&Value::Null), new.get(key).unwrap_or(&Value::Null))
            })
        }
        (old, new) if old == new => None,
        (old, new) => Some((place.to_owned(), old.clone(), new.clone())),
    }
}

/// Temporary files and directories are their maker's alone; these are to be files like others.
pub(super) fn readable(path: &Path) -> std::io::Result<()> {
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        let mode = if path.is_dir() { 0o755 } else { 0o644 };
        fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
    }
    let _ = path;
    Ok(())
}
