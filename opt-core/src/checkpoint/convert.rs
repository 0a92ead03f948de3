use super::{
    Checkpoint, FileDType, Format, LM_HEAD, Warning, names,
    source::io,
    write::{self, Job, Planned},
    zip::cannot_write,
};
use crate::{CancelToken, Error, ErrorKind, Progress, ProgressFn, Result, config::OptConfig};
use opt_backend::{DType, MaybeSend};
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    fmt,
    fs::{self, File},
    io::{BufWriter, Write},
    ops::ControlFlow,
    path::{Path, PathBuf},
};

/// What belongs to a model besides config.json and its weights.
const SIDE_FILES: [&str; 7] = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
];

/// How [`convert`] writes.
#[derive(Default)]
#[non_exhaustive]
pub struct ConvertOptions<'a> {
    /// The number format to write; that of each tensor if none.
    pub dtype: Option<DType>,
    /// Splits the weights into files of at most this many bytes of tensors (a larger tensor has a file to itself).
    pub shard_size: Option<u64>,
    /// The file format; by the output's extension if none, and safetensors for a directory.
    pub format: Option<Format>,
    /// Hears of the bytes written.
    pub progress: Option<Box<ProgressFn<'a>>>,
    /// Ends the work from elsewhere.
    pub cancel: CancelToken,
}

impl<'a> ConvertOptions<'a> {
    /// Sets [`ConvertOptions::dtype`].
    #[must_use]
    pub fn dtype(self, dtype: DType) -> Self {
        Self { dtype: Some(dtype), ..self }
    }

    /// Sets [`ConvertOptions::shard_size`].
    #[must_use]
    pub fn shard_size(self, bytes: u64) -> Self {
        Self { shard_size: Some(bytes), ..self }
    }

    /// Sets [`ConvertOptions::format`].
    #[must_use]
    pub fn format(self, format: Format) -> Self {
        Self { format: Some(format), ..self }
    }

    /// Sets [`ConvertOptions::progress`].
    #[must_use]
    pub fn progress(self, progress: impl FnMut(Progress<'_>) -> ControlFlow<()> + MaybeSend + 'a) -> Self {
        Self { progress: Some(Box::new(progress)), ..self }
    }

    /// Sets [`ConvertOptions::cancel`].
    #[must_use]
    pub fn cancel(self, cancel: CancelToken) -> Self {
        Self { cancel, ..self }
    }
}

impl fmt::Debug for ConvertOptions<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { dtype, shard_size, format, progress, cancel } = self;
        f.debug_struct("ConvertOptions")
            .field("dtype", dtype)
            .field("shard_size", shard_size)
            .field("format", format)
            .field("progress", &progress.is_some())
            .field("cancel", cancel)
            .finish()
    }
}

/// What [`convert`] wrote.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Converted {
    /// The files, weights first.
    pub files: Vec<PathBuf>,
    /// Bytes of tensors.
    pub bytes: u64,
    /// Number of tensors.
    pub tensors: usize,
    /// What is worth knowing about the input or the result.
    pub warnings: Vec<Warning>,
}

/// Writes the checkpoint at `input` anew: another file format, number format or number of files.
///
/// An `output` with the extension of a weight file (`.safetensors`, `.bin`) is written as that one file, and config
/// and tokenizer are put beside it where they are not yet. Any other `output` becomes a directory in Hugging Face
/// layout. Names are those of transformers' `OPTForCausalLM`; a tied LM head is left out of safetensors and shares its
/// storage in a pickle. Tensors stream through: memory holds one at a time.
///
/// ```no_run
/// use opt_core::{checkpoint::{ConvertOptions, convert}};
///
/// convert("opt-125m/pytorch_model.bin", "opt-125m-safetensors", ConvertOptions::default())?;
/// # Ok::<(), opt_core::Error>(())
/// ```
///
/// # Errors
/// As [`Checkpoint::open`] and [`Checkpoint::validate`]; [`ErrorKind::Unsupported`] for quantized weights;
/// [`ErrorKind::Option`] if the output exists or options contradict each other; [`ErrorKind::Io`] if writing fails.
/// Nothing is left behind then.
pub fn convert(
    input: impl AsRef<Path>,
    output: impl AsRef<Path>,
    options: ConvertOptions<'_>,
) -> Result<Converted> {
    let (input, output) = (input.as_ref(), output.as_ref());
    let target = Target::new(output, &options)?;
    let checkpoint = Checkpoint::open(input)?;
    if let Some(found) = checkpoint.quantization() {
        let message = format_args!(
            "{}: its weights are quantized ({found}) and cannot be converted; convert the model they were made from",
            input.display()
        );
        return Err(Error::new(ErrorKind::Unsupported, message));
    }
    let mut warnings = checkpoint.validate().map_err(|e| e.at(input.display()))?;
    let planned = plan(&checkpoint, options.dtype, target.format);
    let tensors = planned.len();
    let shards = split(planned, options.shard_size);
    let bytes = shards.iter().flatten().map(Planned::bytes).sum();
    let (progress, cancel) = (options.progress, options.cancel);
    let mut job =
        Job { checkpoint: &checkpoint, progress, cancel, done: 0, total: bytes, overflowed: Vec::new() };
    job.cancel.check("converting")?;
    let files = match target.place {
        Place::File => target.write_file(shards, &mut job, options.dtype, &mut warnings),
        Place::Directory => target.write_directory(&shards, &mut job, options.dtype),
    };
    let files = files.map_err(|e| e.at(output.display()))?;
    let infinite =
        |(name, count)| Warning::Other(format!("{name}: {count} numbers became infinite in the new format"));
    warnings.extend(job.overflowed.into_iter().map(infinite));
    Ok(Converted { files, bytes, tensors, warnings })
}

/// The tensors to write, in the order of the forward pass, what the model has no place for last.
fn plan(checkpoint: &Checkpoint, dtype: Option<DType>, format: Format) -> Vec<Planned<'_>> {
    let config = &checkpoint.config;
    let order: Vec<String> = config.tensor_shapes().into_iter().map(|(name, _)| name).collect();
    let to = |from: FileDType| match (dtype, from.float()) {
        (Some(dtype), Some(_)) => dtype.into(),
        _ => from,
    };
    let rank = |name: &str| order.iter().position(|n| n == name).unwrap_or(order.len());
    let tied = |name: &str| config.tie_word_embeddings && name == LM_HEAD;
    let mut planned: Vec<(usize, Planned<'_>)> = checkpoint
        .tensors()
        .filter(|info| !tied(&info.name))
        .map(|info| {
            let rank = rank(&info.name);
            let known = rank < order.len();
            let name = if known { names::full(&info.name) } else { info.stored_name.clone() };
            (rank, Planned { name, info, dtype: to(info.dtype), tied_to: None })
        })
        .collect();
    planned.sort_by_key(|(rank, _)| *rank);
    let mut planned: Vec<Planned<'_>> = planned.into_iter().map(|(_, planned)| planned).collect();
    // Right after the table, so that both fall into one shard: torch shares storages within a file only.
    if format == Format::Pickle && config.tie_word_embeddings {
        let table = names::full("embed_tokens.weight");
        if let Some(at) = planned.iter().position(|planned| planned.name == table) {
            let head = planned.get(at).map(|t| (t.info, t.dtype));
            if let Some((info, dtype)) = head {
                let head = Planned { name: LM_HEAD.to_owned(), info, dtype, tied_to: Some(table) };
                planned.insert(at + 1, head);
            }
        }
    }
    planned
}

fn split(planned: Vec<Planned<'_>>, most: Option<u64>) -> Vec<Vec<Planned<'_>>> {
    let most = most.unwrap_or(u64::MAX);
    let (mut shards, mut size) = (vec![Vec::new()], 0);
    for planned in planned {
        let bytes = planned.bytes();
        match shards.last_mut() {
            Some(shard) if shard.is_empty() || bytes <= most.saturating_sub(size) => {
                size += bytes;
                shard.push(planned);
            }
            _ => {
                size = bytes;
                shards.push(vec![planned]);
            }
        }
    }
    shards
}

enum Place {
    File,
    Directory,
}

/// Where to write, checked before any work.
pub(super) struct Target<'a> {
    output: &'a Path,
    parent: &'a Path,
    place: Place,
    format: Format,
}

impl<'a> Target<'a> {
    pub(super) fn new(output: &'a Path, options: &ConvertOptions<'_>) -> Result<Self> {
        let fail = |message: &str| {
            Err(Error::new(ErrorKind::Option, format_args!("{}: {message}", output.display())))
        };
        let by_name = Format::of(output);
        let format = options.format.or(by_name).unwrap_or(Format::Safetensors);
        if format == Format::Flax {
            return Err(Error::new(ErrorKind::Unsupported, "writing Flax's format is not supported"));
        }
        if by_name.is_some_and(|by_name| by_name != format) {
            return fail(&format!("the extension is not that of the format {format}"));
        }
        if options.shard_size == Some(0) {
            return fail("expected a shard size above 0");
        }
        if by_name.is_some() && options.shard_size.is_some() {
            return fail("one file cannot have a shard size; name a directory");
        }
        let place = if by_name.is_some() { Place::File } else { Place::Directory };
        let taken = match (output.symlink_metadata(), &place) {
            (Err(_), _) => false,
            (Ok(found), Place::Directory) if found.is_dir() => {
                let mut entries = fs::read_dir(output).map_err(|e| io("cannot read", output, e))?;
                entries.next().is_some()
            }
            (Ok(_), _) => true,
        };
        if taken {
            return fail("exists already and is not overwritten");
        }
        let parent = output.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        if !parent.is_dir() {
            let message = format_args!("{}: no such directory to write into", parent.display());
            return Err(Error::new(ErrorKind::NotFound, message));
        }
        Ok(Self { output, parent, place, format })
    }

    fn write_directory(
        &self,
        shards: &[Vec<Planned<'_>>],
        job: &mut Job<'_>,
        dtype: Option<DType>,
    ) -> Result<Vec<PathBuf>> {
        self.directory(|inside| {
            let names = file_names(self.format, shards.len());
            for (name, shard) in names.iter().zip(shards) {
                let path = inside.join(name);
                let file = File::create_new(&path).map_err(|e| io("cannot create", &path, e))?;
                self.write_weights(shard, file, job)?;
            }
            let mut files = names.clone();
            if shards.len() > 1 {
                let name = format!("{}.index.json", self.format.file_name());
                fs::write(inside.join(&name), index(&names, shards)?).map_err(cannot_write)?;
                files.push(name);
            }
            for (name, contents) in side_files(job.checkpoint, dtype)? {
                fs::write(inside.join(name), contents).map_err(cannot_write)?;
                files.push(name.to_owned());
            }
            Ok(files)
        })
    }

    /// Whether the output becomes a directory.
    pub(super) fn is_directory(&self) -> bool {
        matches!(self.place, Place::Directory)
    }

    /// Lets `fill` write files into a directory and gives it the output's name when it is complete.
    pub(super) fn directory(&self, fill: impl FnOnce(&Path) -> Result<Vec<String>>) -> Result<Vec<PathBuf>> {
        let temporary = temporary(0o777).tempdir_in(self.parent).map_err(cannot_write)?;
        let files = fill(temporary.path())?;
        if self.output.is_dir() {
            // Empty, as checked before: not every system renames onto it.
            fs::remove_dir(self.output).map_err(cannot_write)?;
        }
        fs::rename(temporary.path(), self.output).map_err(cannot_write)?;
        // What the guard would delete is gone from its name.
        let _ = temporary.keep();
        Ok(files.into_iter().map(|name| self.output.join(name)).collect())
    }

    /// A weights file is read by the config.json beside it, so one of another model may not stand there.
    fn check_neighbour(&self, checkpoint: &Checkpoint) -> Result<()> {
        let path = self.parent.join("config.json");
        let Ok(text) = fs::read_to_string(&path) else { return Ok(()) };
        let same = OptConfig::from_json(&text).is_ok_and(|mut found| {
            found.dtype = checkpoint.config().dtype.clone();
            found == *checkpoint.config()
        });
        if same {
            return Ok(());
        }
        let message = "is another model's: expected none or the input's; convert into a directory of its own";
        Err(Error::new(ErrorKind::Option, format!("{}: {message}", path.display())))
    }

    fn write_file(
        &self,
        shards: Vec<Vec<Planned<'_>>>,
        job: &mut Job<'_>,
        dtype: Option<DType>,
        warnings: &mut Vec<Warning>,
    ) -> Result<Vec<PathBuf>> {
        let all: Vec<Planned<'_>> = shards.into_iter().flatten().collect();
        self.check_neighbour(job.checkpoint)?;
        let mut temporary = temporary(0o666).tempfile_in(self.parent).map_err(cannot_write)?;
        self.write_weights(&all, temporary.as_file_mut(), job)?;
        let mut staged = Vec::new();
        for (name, contents) in side_files(job.checkpoint, dtype)? {
            let path = self.parent.join(name);
            if path.exists() {
                if fs::read(&path).is_ok_and(|found| found != contents) {
                    let message = format!("{}: kept as it is, although the input's differs", path.display());
                    warnings.push(Warning::Other(message));
                }
                continue;
            }
            let mut side = self::temporary(0o666).tempfile_in(self.parent).map_err(cannot_write)?;
            side.write_all(&contents).map_err(cannot_write)?;
            staged.push((side, path));
        }
        let exists = |e: tempfile::PersistError| cannot_write(e.error);
        temporary.persist_noclobber(self.output).map_err(exists)?;
        let mut files = vec![self.output.to_owned()];
        for (side, path) in staged {
            side.persist_noclobber(&path).map_err(exists)?;
            files.push(path);
        }
        Ok(files)
    }

    fn write_weights(
        &self,
        tensors: &[Planned<'_>],
        file: impl Write + std::io::Seek,
        job: &mut Job<'_>,
    ) -> Result<()> {
        let mut out = BufWriter::with_capacity(1 << 20, file);
        match self.format {
            Format::Pickle => write::pickle_file(tensors, &mut out, job)?,
            _ => write::safetensors_file(tensors, &mut out, job)?,
        }
        out.flush().map_err(cannot_write)
    }
}

/// A hidden name beside the output; `mode` is what the finished file is to have, less the umask.
fn temporary(mode: u32) -> tempfile::Builder<'static, 'static> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(".opt-convert-");
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(mode));
    #[cfg(not(unix))]
    let _ = mode;
    builder
}

/// transformers' names of a model's weight files.
fn file_names(format: Format, count: usize) -> Vec<String> {
    let name = format.file_name();
    match name.rsplit_once('.') {
        Some((stem, extension)) if count > 1 => {
            (1..=count).map(|number| format!("{stem}-{number:05}-of-{count:05}.{extension}")).collect()
        }
        _ => vec![name.to_owned()],
    }
}

fn index(names: &[String], shards: &[Vec<Planned<'_>>]) -> Result<Vec<u8>> {
    let all = || shards.iter().flatten().filter(|planned| planned.tied_to.is_none());
    let map: BTreeMap<&str, &str> = names
        .iter()
        .zip(shards)
        .flat_map(|(file, shard)| shard.iter().map(|planned| (planned.name.as_str(), file.as_str())))
        .collect();
    let metadata = json!({
        "total_parameters": all().map(|planned| planned.info.len() as u64).sum::<u64>(),
        "total_size": all().map(Planned::bytes).sum::<u64>(),
    });
    pretty(&json!({ "metadata": metadata, "weight_map": map }))
}

pub(crate) fn pretty(value: &Value) -> Result<Vec<u8>> {
    let mut text = serde_json::to_vec_pretty(value)
        .map_err(|e| Error::because(ErrorKind::Io, "cannot write JSON", e))?;
    text.push(b'\n');
    Ok(text)
}

/// config.json, saying the new number format, and the other files that are there.
pub(super) fn side_files(
    checkpoint: &Checkpoint,
    dtype: Option<DType>,
) -> Result<Vec<(&'static str, Vec<u8>)>> {
    let directory = checkpoint.directory();
    let mut config = match directory {
        Some(directory) => super::files::config(directory)?.into_bytes(),
        // Of a checkpoint in memory.
        None => {
            let config = serde_json::to_value(checkpoint.config());
            pretty(&config.map_err(|e| Error::because(ErrorKind::Io, "cannot write JSON", e))?)?
        }
    };
    if let Some(dtype) = dtype {
        config = with_dtype(&config, dtype)?;
    }
    let mut files = vec![("config.json", config)];
    for name in SIDE_FILES {
        let Some(path) = directory.map(|directory| directory.join(name)) else { break };
        if path.is_file() {
            files.push((name, fs::read(&path).map_err(|e| io("cannot read", &path, e))?));
        }
    }
    Ok(files)
}

fn with_dtype(config: &[u8], dtype: DType) -> Result<Vec<u8>> {
    let mut config: Value = serde_json::from_slice(config)
        .map_err(|e| Error::because(ErrorKind::Config, "config.json is not usable", e))?;
    let name = match dtype {
        DType::F16 => "float16",
        DType::BF16 => "bfloat16",
        _ => "float32",
    };
    if let Some(map) = config.as_object_mut() {
        // transformers renamed the key in 4.56 and reads both.
        let both = ["dtype", "torch_dtype"];
        let present = both.into_iter().filter(|key| map.contains_key(*key)).collect::<Vec<_>>();
        let keys = if present.is_empty() { vec!["torch_dtype"] } else { present };
        keys.into_iter().for_each(|key| drop(map.insert(key.to_owned(), json!(name))));
    }
    pretty(&config)
}
