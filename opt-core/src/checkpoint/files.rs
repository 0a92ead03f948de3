//! Finding a checkpoint's files and reading their headers.

use super::{
    Warning,
    entry::{Entry, fail, shown},
    flax,
    index::Index,
    pickle, safetensors,
    source::{self, Source},
    zip,
};
use crate::{Error, ErrorKind, Result};
use serde::Serialize;
use std::{
    collections::{HashMap, HashSet},
    fmt,
    path::{Path, PathBuf},
};

/// The file formats a checkpoint may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Format {
    /// `.safetensors`.
    Safetensors,
    /// What `torch.save` writes.
    Pickle,
    /// Flax's MessagePack.
    Flax,
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Format::Safetensors => "safetensors",
            Format::Pickle => "pickle",
            Format::Flax => "flax",
        })
    }
}

impl Format {
    /// What transformers calls the file of a model that has one.
    pub(super) fn file_name(self) -> &'static str {
        match self {
            Format::Safetensors => "model.safetensors",
            Format::Pickle => "pytorch_model.bin",
            Format::Flax => "flax_model.msgpack",
        }
    }

    /// By a file's extension.
    pub(super) fn of(path: &Path) -> Option<Self> {
        Some(match path.extension()?.to_str()?.to_ascii_lowercase().as_str() {
            "safetensors" => Format::Safetensors,
            "bin" | "pt" | "pth" => Format::Pickle,
            "msgpack" => Format::Flax,
            _ => return None,
        })
    }

    /// By a file's first bytes.
    pub(super) fn sniff(file: &[u8]) -> Self {
        // A safetensors header starts at byte 8 with a brace; in MessagePack that byte is inside a name or a length.
        match (zip::is_zip(file), file.get(8), file.first()) {
            (true, ..) => Format::Pickle,
            (_, Some(b'{'), _) => Format::Safetensors,
            (_, _, Some(0x81..=0x8f | 0xde | 0xdf)) => Format::Flax,
            _ => Format::Safetensors,
        }
    }

    pub(super) fn read(self, source: &Source) -> Result<Vec<Entry>> {
        let read = match self {
            Format::Safetensors => safetensors::read,
            Format::Pickle => pickle::read,
            Format::Flax => flax::read,
        };
        read(source.bytes()).map_err(|e| e.at(&source.name))
    }
}

const FORMATS: [Format; 3] = [Format::Safetensors, Format::Pickle, Format::Flax];

/// A config or an index of more than this is none.
const MOST_JSON: u64 = 64 << 20;

/// A tensor, and its file's place among the sources.
type Placed = (usize, Entry);

/// Files with the tensors they hold.
pub(super) struct Opened {
    pub(super) format: Format,
    pub(super) sources: Vec<Source>,
    pub(super) entries: Vec<Placed>,
    pub(super) warnings: Vec<Warning>,
}

/// The text of a directory's config.json.
pub(super) fn config(directory: &Path) -> Result<String> {
    source::read_text(&directory.join("config.json"), MOST_JSON)
}

/// A small text file.
pub(super) fn small(path: &Path) -> Result<String> {
    source::read_text(path, MOST_JSON)
}

/// Opens the files of a directory or the one file named, and says which directory the config is in.
pub(super) fn open(path: &Path) -> Result<(PathBuf, Opened)> {
    let metadata = path.metadata().map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => Error::new(ErrorKind::NotFound, "no such file or directory"),
        _ => Error::because(ErrorKind::Io, "cannot open", e),
    })?;
    if metadata.is_dir() {
        return Ok((path.to_owned(), directory(path)?));
    }
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let opened = if name == "tf_model.h5" || name.ends_with(".h5") {
        return Err(tensorflow());
    } else if let Some(stem) = name.strip_suffix(".index.json") {
        let Some(format) = Format::of(Path::new(stem)) else {
            return fail("expected an index named like model.safetensors.index.json");
        };
        sharded(parent, path, format)?
    } else {
        let Some(format) = Format::of(path) else {
            let message =
                "expected a directory or a file ending in .safetensors, .bin, .pt, .pth or .msgpack";
            return Err(Error::new(ErrorKind::Unsupported, message));
        };
        single(Source::map(path)?, format)?
    };
    Ok((parent.to_owned(), opened))
}

fn directory(path: &Path) -> Result<Opened> {
    for format in FORMATS {
        let file = path.join(format.file_name());
        if file.exists() {
            return single(Source::map(&file)?, format);
        }
        let index = path.join(format!("{}.index.json", format.file_name()));
        if index.exists() {
            return sharded(path, &index, format);
        }
    }
    if let Some(file) = autogptq(path) {
        return single(Source::map(&file)?, Format::of(&file).unwrap_or(Format::Safetensors));
    }
    if path.join("tf_model.h5").exists() {
        return Err(tensorflow());
    }
    let message =
        "no model.safetensors, pytorch_model.bin or flax_model.msgpack, nor an index of their shards";
    Err(Error::new(ErrorKind::NotFound, message))
}

/// The file that AutoGPTQ called `gptq_model-4bit-128g.safetensors` and the like, if there is one and no other.
fn autogptq(directory: &Path) -> Option<PathBuf> {
    let is_it = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with("gptq_model-")
            && matches!(Format::of(path), Some(Format::Safetensors | Format::Pickle))
    };
    let mut found = directory.read_dir().ok()?.filter_map(|entry| Some(entry.ok()?.path())).filter(is_it);
    found.next().filter(|_| found.next().is_none())
}

fn tensorflow() -> Error {
    let message = "TensorFlow's tf_model.h5 is not read; convert it in Python (transformers below 5, with tensorflow \
        and torch): OPTForCausalLM.from_pretrained(directory, from_tf=True).save_pretrained(output)";
    Error::new(ErrorKind::Unsupported, message)
}

fn single(source: Source, format: Format) -> Result<Opened> {
    let entries = format.read(&source)?.into_iter().map(|entry| (0, entry)).collect();
    Ok(Opened { format, sources: vec![source], entries, warnings: Vec::new() })
}

fn sharded(directory: &Path, index: &Path, format: Format) -> Result<Opened> {
    let index_name = index.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let text = source::read_text(index, MOST_JSON)?;
    let index = Index::parse(&text).map_err(|e| e.at(&index_name))?;
    let mut sources = Vec::new();
    for file in index.files() {
        let shard = Source::map(&directory.join(file));
        sources
            .push(shard.map_err(|e| e.at(format_args!("{index_name} names a shard that cannot be used")))?);
    }
    let files = sources.iter().map(|source| format.read(source)).collect::<Result<Vec<_>>>()?;
    let (entries, warnings) = select(&index, &sources, files, format).map_err(|e| e.at(&index_name))?;
    Ok(Opened { format, sources, entries, warnings })
}

/// The tensors of all shards that the index names, each from the shard it names for it.
fn select(
    index: &Index,
    sources: &[Source],
    files: Vec<Vec<Entry>>,
    format: Format,
) -> Result<(Vec<Placed>, Vec<Warning>)> {
    // Flax's index joins names with slashes and keeps its own last parts.
    let name = |name: &str| match format {
        Format::Flax => flax::torch_name(name),
        _ => name.to_owned(),
    };
    let wanted: HashMap<String, &str> =
        index.weight_map.iter().map(|(tensor, file)| (name(tensor), file.as_str())).collect();
    let (mut entries, mut warnings, mut found) = (Vec::new(), Vec::new(), HashSet::new());
    for (number, (file, source)) in files.into_iter().zip(sources).enumerate() {
        for entry in file {
            if wanted.get(&entry.name) == Some(&source.name.as_str()) {
                found.insert(entry.name.clone());
                entries.push((number, entry));
            } else {
                warnings.push(Warning::NotInIndex { name: entry.name, file: source.name.clone() });
            }
        }
    }
    match index.weight_map.iter().find(|(tensor, _)| !found.contains(&name(tensor))) {
        None => Ok((entries, warnings)),
        Some((tensor, file)) => {
            fail(format_args!("tensor {} is not in the shard {} named for it", shown(tensor), shown(file)))
        }
    }
}

/// Files in memory, all of one format.
pub(super) fn from_memory(files: Vec<Vec<u8>>) -> Result<Opened> {
    let format = files.first().map_or(Format::Safetensors, |file| Format::sniff(file));
    let (mut sources, mut entries) = (Vec::new(), Vec::new());
    for (number, bytes) in files.into_iter().enumerate() {
        let source = Source::memory(format!("file {number}"), bytes);
        entries.extend(format.read(&source)?.into_iter().map(|entry| (number, entry)));
        sources.push(source);
    }
    Ok(Opened { format, sources, entries, warnings: Vec::new() })
}
