//! Checkpoints: the files that hold a model's weights, opened without reading the weights.
//!
//! [`Checkpoint`] reads safetensors (one file or shards with an index), what `torch.save` writes (`.bin`, the zip
//! format, one file or shards) and Flax's `flax_model.msgpack`, and names their tensors alike. [`convert`] writes one
//! format from another, [`inspect`] says what is in a checkpoint and what it would take to run it.
//!
//! Nothing in a file is trusted: see each reader for what it refuses.

mod convert;
mod entry;
mod files;
#[cfg(not(target_arch = "wasm32"))]
mod fingerprint;
mod flax;
#[doc(hidden)]
pub mod fuzzing;
mod index;
mod inspect;
mod json;
mod loose;
mod names;
mod pickle;
mod quantized;
mod rewrite;
mod safetensors;
mod source;
mod tensor;
#[cfg(not(target_arch = "wasm32"))]
mod values;
mod write;
mod zip;

pub use convert::{ConvertOptions, Converted, convert};
pub use entry::FileDType;
pub use files::Format;
pub use inspect::{FileSummary, Inspection, MemoryNeed, TensorSummary, inspect};
pub(crate) use loose::{read_tensors, tensors_from_bytes};
pub use quantized::{QuantLayout, Weight, ggml, write_quantized};
pub(crate) use rewrite::{Rewrite, rewrite};
pub use tensor::{Tensor, TensorInfo};
#[cfg(not(target_arch = "wasm32"))]
pub(crate) use {
    convert::pretty,
    source::io,
    values::{array_bytes, model_files, write_arrays, write_replaced},
};

use crate::{Error, ErrorKind, Result, config::OptConfig};
use entry::{fail, shown};
use files::Opened;
use quantized::Quantization;
use source::Source;
use std::{
    collections::BTreeMap,
    fmt,
    path::{Path, PathBuf},
};

/// An opened checkpoint: its config, and where each tensor lies.
///
/// ```no_run
/// use opt_core::checkpoint::Checkpoint;
///
/// let checkpoint = Checkpoint::open("models/opt-novels")?;
/// for warning in checkpoint.validate()? {
///     eprintln!("{warning}");
/// }
/// let config = checkpoint.config();
/// let table = checkpoint.tensor("embed_tokens.weight", &[config.vocab_size, config.word_embed_proj_dim])?;
/// println!("{} tokens", table.matrix()?.shape()[0]);
/// # Ok::<(), opt_core::Error>(())
/// ```
#[derive(Debug)]
pub struct Checkpoint {
    config: OptConfig,
    directory: Option<PathBuf>,
    format: Format,
    sources: Vec<Source>,
    /// By canonical name.
    tensors: BTreeMap<String, TensorInfo>,
    warnings: Vec<Warning>,
    /// How weights are packed, if some are.
    quantization: Option<Quantization>,
}

/// Something about a checkpoint that does not keep it from running.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Warning {
    /// A tensor that the model has no place for.
    ExtraTensor {
        /// Its name in the file.
        name: String,
        /// The file's name.
        file: String,
    },
    /// A tensor in a shard that the index does not name, or names in another shard: it is not used.
    NotInIndex {
        /// Its name in the file.
        name: String,
        /// The file's name.
        file: String,
    },
    /// Anything else worth a line.
    Other(String),
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Warning::ExtraTensor { name, file } => {
                write!(f, "{file}: tensor {} has no place in the model and is ignored", shown(name))
            }
            Warning::NotInIndex { name, file } => {
                write!(f, "{file}: tensor {} is not this shard's by the index and is ignored", shown(name))
            }
            Warning::Other(message) => f.write_str(message),
        }
    }
}

/// How many of many faults a message names.
const NAMED_FAULTS: usize = 5;

impl Checkpoint {
    /// Opens a directory in Hugging Face layout, or a single file with its `config.json` beside it.
    ///
    /// Of several formats in a directory the first of safetensors, pickle and Flax is taken. Files are mapped, not
    /// read: nobody may shorten them while the checkpoint is open (the system would end the process), whereas
    /// replacing them, as all tools do that write a new file and rename it, is safe.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] where there is no checkpoint, [`ErrorKind::Config`] for an unusable config.json,
    /// [`ErrorKind::Unsupported`] for formats that need a conversion in Python first (the message says which), and
    /// [`ErrorKind::Checkpoint`] for files that are damaged or lie about themselves.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let place = |e: Error| e.at(path.display());
        let (directory, opened) = files::open(path).map_err(place)?;
        let text = files::config(&directory)?;
        let config = OptConfig::from_json(&text).map_err(place)?;
        let quantization = Quantization::find(&text, Some(&directory)).map_err(place)?;
        Self::assemble(config, quantization, Some(directory), opened).map_err(place)
    }

    /// A checkpoint whose files are in memory: the text of its config.json, and one or more files of one format.
    ///
    /// # Errors
    /// As [`Checkpoint::open`].
    pub fn from_bytes(config_json: &str, files: Vec<Vec<u8>>) -> Result<Self> {
        let config = OptConfig::from_json(config_json)?;
        let quantization = Quantization::find(config_json, None)?;
        Self::assemble(config, quantization, None, files::from_memory(files)?)
    }

    fn assemble(
        config: OptConfig,
        quantization: Option<Quantization>,
        directory: Option<PathBuf>,
        opened: Opened,
    ) -> Result<Self> {
        let Opened { format, sources, entries, mut warnings } = opened;
        let mut tensors = BTreeMap::<String, TensorInfo>::new();
        for (index, entry) in entries {
            let Some(name) = names::canonical(&entry.name).map(str::to_owned) else { continue };
            let file = sources.get(index).map(|source| source.name.clone()).unwrap_or_default();
            let info = TensorInfo::new(name.clone(), file, index, entry);
            if let Some(first) = tensors.get(&name) {
                return fail(format_args!("{} and {} are the same tensor", first.place(), info.place()));
            }
            tensors.insert(name, info);
        }
        let mut checkpoint =
            Self { config, directory, format, sources, tensors, warnings: vec![], quantization };
        let packed = checkpoint.packed_names();
        if packed.is_empty()
            && let Some(unused) = checkpoint.quantization.take()
        {
            // transformers quantizes while it loads then.
            let message =
                format!("the configuration says {unused}, but every weight is plain and runs as it is");
            warnings.push(Warning::Other(message));
        }
        let config = &checkpoint.config;
        let expected: std::collections::HashSet<String> =
            config.tensor_shapes().into_iter().map(|(name, _)| name).chain(packed).collect();
        let tied = |name: &str| config.tie_word_embeddings && name == LM_HEAD;
        let extra = checkpoint.tensors.values().filter(|i| !expected.contains(&i.name) && !tied(&i.name));
        warnings.extend(
            extra.map(|i| Warning::ExtraTensor { name: i.stored_name.clone(), file: i.file.clone() }),
        );
        checkpoint.warnings = warnings;
        Ok(checkpoint)
    }

    /// The model's shape.
    pub fn config(&self) -> &OptConfig {
        &self.config
    }

    /// The text of its config.json; of one in memory, with the keys that [`OptConfig`] knows.
    ///
    /// # Errors
    /// [`ErrorKind::Io`].
    #[cfg(not(target_arch = "wasm32"))]
    pub(crate) fn config_json(&self) -> Result<String> {
        match &self.directory {
            Some(directory) => files::config(directory),
            None => serde_json::to_string(&self.config)
                .map_err(|e| Error::because(ErrorKind::Io, "cannot write JSON", e)),
        }
    }

    /// The directory it was opened from; none for one in memory.
    pub fn directory(&self) -> Option<&Path> {
        self.directory.as_deref()
    }

    /// The format of its files.
    pub fn format(&self) -> Format {
        self.format
    }

    /// All tensors, in the order of their canonical names.
    pub fn tensors(&self) -> impl Iterator<Item = &TensorInfo> {
        self.tensors.values()
    }

    /// Names and sizes, in bytes, of the files with tensors.
    pub fn files(&self) -> impl Iterator<Item = (&str, usize)> {
        self.sources.iter().map(|source| (source.name.as_str(), source.bytes().len()))
    }

    /// The tensor of this canonical name, which must have this shape.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if it is not there, [`ErrorKind::Checkpoint`] for another shape.
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor<'_>> {
        let found = self.optional(name, shape)?;
        found.ok_or_else(|| Error::new(ErrorKind::NotFound, format_args!("tensor {name} is missing")))
    }

    /// Like [`Checkpoint::tensor`], for one that may be missing.
    ///
    /// # Errors
    /// [`ErrorKind::Checkpoint`] for another shape.
    pub fn optional(&self, name: &str, shape: &[usize]) -> Result<Option<Tensor<'_>>> {
        let Some(info) = self.tensors.get(name) else { return Ok(None) };
        if info.shape != shape {
            let place = info.place();
            return fail(format_args!("{place}: expected shape {shape:?}, found {:?}", info.shape));
        }
        self.read(info).map(Some)
    }

    /// The tensors to write anew and transformers' names for them: all but a head that is the token table.
    fn written(&self) -> Vec<(&TensorInfo, String)> {
        let known: Vec<String> = self.config.tensor_shapes().into_iter().map(|(name, _)| name).collect();
        let tied = |info: &&TensorInfo| self.config.tie_word_embeddings && info.name == LM_HEAD;
        let name = |info: &TensorInfo| match known.contains(&info.name) {
            true => names::full(&info.name),
            false => info.stored_name.clone(),
        };
        self.tensors().filter(|info| !tied(info)).map(|info| (info, name(info))).collect()
    }

    /// A tensor of [`Checkpoint::tensors`], whatever its shape.
    pub(crate) fn read<'a>(&'a self, info: &'a TensorInfo) -> Result<Tensor<'a>> {
        match self.sources.get(info.source) {
            Some(source) => Tensor::new(info, source),
            None => fail(format_args!("{}: its file is not open", info.place())),
        }
    }

    /// Compares what is there to what the config asks for, without reading a weight.
    ///
    /// # Errors
    /// [`ErrorKind::Checkpoint`] if tensors are missing, have another shape or a number format no backend takes; the
    /// message names the first few and says how many there are.
    pub fn validate(&self) -> Result<Vec<Warning>> {
        let faults = self.faults();
        if faults.is_empty() {
            return Ok(self.warnings.clone());
        }
        let named = faults.iter().take(NAMED_FAULTS).map(String::as_str).collect::<Vec<_>>().join("; ");
        let more = faults.len().saturating_sub(NAMED_FAULTS);
        let more = if more > 0 { format!("; and {more} more") } else { String::new() };
        fail(format_args!("the tensors do not fit config.json: {named}{more}"))
    }

    /// One line for each tensor that keeps the model from loading.
    fn faults(&self) -> Vec<String> {
        let fault = |name: String, shape: Vec<usize>| match self.tensors.get(&name) {
            None => Some(format!("{} {shape:?} is missing", names::full(&name))),
            Some(info) if info.shape != shape => {
                Some(format!("{}: expected shape {shape:?}, found {:?}", info.place(), info.shape))
            }
            Some(info) if info.dtype.float().is_none() => {
                Some(format!("{}: expected F32, F16 or BF16, found {}", info.place(), info.dtype))
            }
            Some(_) => None,
        };
        let faults = |(name, shape): (String, Vec<usize>)| match self.packed_faults(&name, &shape) {
            Some(faults) => faults,
            None => fault(name, shape).into_iter().collect(),
        };
        self.config.tensor_shapes().into_iter().flat_map(faults).collect()
    }
}

/// The one tensor that pickles hold although it is tied to the token table.
const LM_HEAD: &str = "lm_head.weight";
