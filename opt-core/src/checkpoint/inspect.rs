use super::{Checkpoint, FileDType, Format};
use crate::{
    Result,
    config::{OptConfig, held_bytes},
};
use opt_backend::DType;
use serde::{Serialize, Serializer};
use std::path::{Path, PathBuf};

/// What [`inspect`] found.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct Inspection {
    /// What was inspected.
    pub path: PathBuf,
    /// The format of its files.
    pub format: Format,
    /// The model's shape.
    pub config: OptConfig,
    /// How weights are quantized, for people; none if they are not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub quantization: Option<String>,
    /// Number of parameters, a tied LM head counted once.
    pub parameters: u64,
    /// The files with tensors.
    pub files: Vec<FileSummary>,
    /// The tensors, in the order of their names.
    pub tensors: Vec<TensorSummary>,
    /// What running it would take, per number format.
    pub memory: Vec<MemoryNeed>,
    /// What is worth knowing.
    pub warnings: Vec<String>,
    /// What keeps it from running; empty if nothing does.
    pub faults: Vec<String>,
}

/// A file and its size.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct FileSummary {
    /// The file's name.
    pub name: String,
    /// Its size.
    pub bytes: u64,
}

/// A tensor and where it lies.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct TensorSummary {
    /// The canonical name, without prefix.
    pub name: String,
    /// The name in the file.
    pub stored_name: String,
    /// How the file holds the numbers.
    pub dtype: FileDType,
    /// The shape as torch has it.
    pub shape: Vec<usize>,
    /// Bytes in the file.
    pub bytes: u64,
    /// The file's name.
    pub file: String,
}

/// What a number format would take, in bytes, before scratch memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct MemoryNeed {
    /// The number format.
    #[serde(serialize_with = "as_text")]
    pub dtype: DType,
    /// The weights: quantized ones as they are, other matrices in this format, biases and LayerNorms in f32.
    pub weights: u64,
    /// Keys and values of one position, held in this format.
    pub cache_per_token: u64,
    /// Keys and values of one sequence as long as the context.
    pub cache_at_full_context: u64,
}

fn as_text<S: Serializer>(dtype: &DType, serializer: S) -> std::result::Result<S::Ok, S::Error> {
    serializer.collect_str(dtype)
}

impl MemoryNeed {
    /// What a model of this shape takes with weights and KV cache in `dtype`.
    pub fn of(config: &OptConfig, dtype: DType) -> Self {
        let weights = config.tensor_shapes().iter().map(|(_, shape)| held_bytes(shape, dtype)).sum();
        let row = (config.hidden_size * dtype.size()) as u64;
        let cache_per_token = 2 * config.num_hidden_layers as u64 * row;
        let cache_at_full_context = cache_per_token * config.max_position_embeddings as u64;
        Self { dtype, weights, cache_per_token, cache_at_full_context }
    }
}

/// Reads a checkpoint's headers and says what is in it and what it would take to run it; no weight is loaded.
///
/// ```no_run
/// let found = opt_core::checkpoint::inspect("models/opt-novels")?;
/// println!("{} parameters in {} tensors", found.parameters, found.tensors.len());
/// # Ok::<(), opt_core::Error>(())
/// ```
///
/// # Errors
/// As [`Checkpoint::open`]. Tensors that do not fit the config are no error here but in [`Inspection::faults`].
pub fn inspect(path: impl AsRef<Path>) -> Result<Inspection> {
    let path = path.as_ref();
    let checkpoint = Checkpoint::open(path)?;
    let config = checkpoint.config().clone();
    let tensors = checkpoint.tensors().map(|info| TensorSummary {
        name: info.name.clone(),
        stored_name: info.stored_name.clone(),
        dtype: info.dtype,
        shape: info.shape.clone(),
        bytes: info.bytes() as u64,
        file: info.file.clone(),
    });
    let files =
        checkpoint.files().map(|(name, bytes)| FileSummary { name: name.to_owned(), bytes: bytes as u64 });
    let need =
        |dtype| MemoryNeed { weights: checkpoint.weight_bytes(dtype), ..MemoryNeed::of(&config, dtype) };
    Ok(Inspection {
        path: path.to_owned(),
        format: checkpoint.format(),
        quantization: checkpoint.quantization(),
        parameters: config.parameters(),
        files: files.collect(),
        tensors: tensors.collect(),
        memory: [DType::F32, DType::BF16, DType::F16].map(need).to_vec(),
        warnings: checkpoint.warnings.iter().map(ToString::to_string).collect(),
        faults: checkpoint.faults(),
        config,
    })
}
