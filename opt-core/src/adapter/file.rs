//! An adapter and its files.

use super::{
    config::AdapterConfig,
    target::{HEADS, PREFIX, Part, Slot},
};
use crate::{
    Error, ErrorKind, Result,
    checkpoint::{read_tensors, tensors_from_bytes},
    config::OptConfig,
};
use bytemuck::cast_slice;
use ndarray::ArrayD;
use safetensors::{Dtype, tensor::TensorView};
use std::{
    collections::{BTreeMap, HashMap},
    fs,
    io::Write,
    path::{Path, PathBuf},
};

/// What PEFT calls the files of an adapter.
const CONFIG: &str = "adapter_config.json";
const WEIGHTS: [&str; 2] = ["adapter_model.safetensors", "adapter_model.bin"];

/// An adapter in host memory, as PEFT saves it: its configuration, and its tensors by their keys in the file.
///
/// ```no_run
/// use opt_core::{Load, Opt, adapter::Adapter, generation::GenerationConfig};
///
/// let adapter = Adapter::open("my-lora")?.named("mine");
/// let opt = Opt::load("opt-125m", Load::default().adapter(adapter))?.adapted("mine")?;
/// println!("{}", opt.generate("The river", &GenerationConfig::default())?.text());
/// # Ok::<(), opt_core::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Adapter {
    name: String,
    config: AdapterConfig,
    tensors: BTreeMap<String, ArrayD<f32>>,
}

impl Adapter {
    /// An adapter of these tensors, keyed as in PEFT's files; see [`AdapterConfig::slots`] for which there must be.
    pub fn new(
        name: impl Into<String>,
        config: AdapterConfig,
        tensors: impl IntoIterator<Item = (String, ArrayD<f32>)>,
    ) -> Self {
        Self { name: name.into(), config, tensors: tensors.into_iter().collect() }
    }

    /// Reads a directory with `adapter_config.json` and `adapter_model.safetensors` (or `adapter_model.bin`). The
    /// adapter is named like the directory.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] where there is none, [`ErrorKind::Config`] and [`ErrorKind::Unsupported`] as
    /// [`AdapterConfig::from_json`], [`ErrorKind::Checkpoint`] for damaged weights.
    pub fn open(directory: impl AsRef<Path>) -> Result<Self> {
        let directory = directory.as_ref();
        let place = |e: Error| e.at(format_args!("adapter {}", directory.display()));
        let absent = |what: &str| {
            let message = format_args!("expected a directory that PEFT saved, found no {what}");
            place(Error::new(ErrorKind::NotFound, message))
        };
        let file = directory.join(CONFIG);
        if !file.is_file() {
            return Err(absent(CONFIG));
        }
        let text = fs::read_to_string(&file).map_err(|e| place(Error::because(ErrorKind::Io, CONFIG, e)))?;
        let config = AdapterConfig::from_json(&text).map_err(place)?;
        let weights = WEIGHTS.iter().map(|name| directory.join(name)).find(|path| path.is_file());
        let weights = weights.ok_or_else(|| absent(&WEIGHTS.join(" or ")))?;
        let tensors = read_tensors(&weights).map_err(place)?;
        let canonical = directory.canonicalize();
        let named = canonical.as_deref().unwrap_or(directory).file_name();
        let name = named.map_or_else(|| "adapter".into(), |name| name.to_string_lossy());
        Ok(Self::new(name, config, tensors))
    }

    /// Reads the text of an adapter_config.json and the weights file beside it from memory.
    ///
    /// # Errors
    /// As [`Adapter::open`].
    pub fn from_bytes(name: impl Into<String>, config_json: &str, weights: Vec<u8>) -> Result<Self> {
        Ok(Self::new(name, AdapterConfig::from_json(config_json)?, tensors_from_bytes(weights)?))
    }

    /// Gives it another name, by which requests ask for it.
    #[must_use]
    pub fn named(self, name: impl Into<String>) -> Self {
        Self { name: name.into(), ..self }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What it is.
    pub fn config(&self) -> &AdapterConfig {
        &self.config
    }

    /// Its tensors by their keys in the file.
    pub fn tensors(&self) -> &BTreeMap<String, ArrayD<f32>> {
        &self.tensors
    }

    /// The number of its numbers; copies of the model's are not counted.
    pub fn parameters(&self) -> u64 {
        let own = self.tensors.iter().filter(|(key, _)| !key.ends_with(".base_layer.weight"));
        own.map(|(_, tensor)| tensor.len() as u64).sum()
    }

    /// The weights as a safetensors file.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] if there is no room for it.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let fail = |e| Error::because(ErrorKind::Io, "the adapter cannot be written", e);
        let data: Vec<(&String, &ArrayD<f32>, Vec<f32>)> = self
            .tensors
            .iter()
            .map(|(key, tensor)| (key, tensor, tensor.iter().copied().collect()))
            .collect();
        let views = data.iter().map(|(key, tensor, values)| {
            Ok((*key, TensorView::new(Dtype::F32, tensor.shape().to_vec(), cast_slice(values))?))
        });
        let views = views.collect::<std::result::Result<Vec<_>, safetensors::SafeTensorError>>();
        // PEFT refuses a file that does not say which library's tensors it holds.
        let format = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        views.and_then(|views| safetensors::serialize(views, Some(format))).map_err(|e| fail(Box::new(e)))
    }

    /// Writes `adapter_model.safetensors` and `adapter_config.json` into a directory, which is made where it is
    /// missing. Each file is written under another name and renamed when complete, so that what was there stays whole
    /// until then; the configuration comes last.
    ///
    /// # Errors
    /// [`ErrorKind::Io`].
    pub fn save(&self, directory: impl AsRef<Path>) -> Result<()> {
        let directory = directory.as_ref();
        let place = |e: Error| e.at(format_args!("adapter {}", directory.display()));
        let failed = |e: std::io::Error| place(Error::because(ErrorKind::Io, "cannot be written", e));
        let [weights, other] = WEIGHTS;
        let weights_bytes = self.to_bytes().map_err(place)?;
        fs::create_dir_all(directory).map_err(failed)?;
        for (name, contents) in [(weights, &weights_bytes[..]), (CONFIG, self.config.to_json().as_bytes())] {
            let mut builder = tempfile::Builder::new();
            builder.prefix(".opt-adapter-");
            #[cfg(unix)]
            builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
            let mut file = builder.tempfile_in(directory).map_err(failed)?;
            file.write_all(contents).and_then(|()| file.as_file().sync_all()).map_err(failed)?;
            file.persist(directory.join(name)).map_err(|e| failed(e.error))?;
        }
        // Of an adapter that was here before; PEFT would prefer the new file, others may not.
        let other = directory.join(other);
        if other.exists() {
            fs::remove_file(other).map_err(failed)?;
        }
        Ok(())
    }

    /// Checks that this is an adapter for a model of this shape, and says what is worth a warning.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] where the configuration does not fit the model, [`ErrorKind::Checkpoint`] naming tensors
    /// that are missing, have another shape or have no place.
    pub fn check(&self, model: &OptConfig) -> Result<Vec<String>> {
        self.parts(model).map(|parts| parts.warnings)
    }

    /// The tensors by what they are.
    pub(crate) fn parts(&self, model: &OptConfig) -> Result<Parts<'_>> {
        self.sorted(model).map_err(|e| e.at(format_args!("adapter {:?}", self.name)))
    }

    fn sorted(&self, model: &OptConfig) -> Result<Parts<'_>> {
        let mut parts = Parts::default();
        let mut rest: BTreeMap<&str, &ArrayD<f32>> =
            self.tensors.iter().map(|(key, tensor)| (&key[..], tensor)).collect();
        let fail = |message: String| Err(Error::new(ErrorKind::Checkpoint, message));
        for Slot { key, shape, part } in self.config.slots(model)? {
            let optional = matches!(part, Part::Copy(_));
            let Some(tensor) = rest.remove(&key[..]) else {
                if optional {
                    continue;
                }
                return fail(format!("tensor {key} {shape:?} is missing"));
            };
            if tensor.shape() != shape {
                return fail(format!(
                    "an adapter for another model: tensor {key}: expected shape {shape:?}, found {:?}",
                    tensor.shape()
                ));
            }
            if let Some(found) = tensor.iter().find(|value| !value.is_finite()) {
                return fail(format!("tensor {key}: expected finite numbers, found {found}"));
            }
            parts.tensors.insert(part, tensor);
        }
        for key in rest.into_keys() {
            let name = key.strip_prefix(PREFIX).unwrap_or(key);
            // With bias "all", PEFT writes those of modules that are saved whole a second and a third time.
            if name.ends_with(".modules_to_save.bias") || name.ends_with(".original_module.bias") {
                continue;
            }
            if HEADS.iter().any(|head| name.strip_prefix(head).is_some_and(|rest| rest.starts_with('.'))) {
                parts
                    .warnings
                    .push(format!("adapter {:?}: {key} belongs to a head and is ignored", self.name));
                continue;
            }
            return fail(format!(
                "an adapter for another model, or not this configuration's: tensor {key} has no place in it"
            ));
        }
        if let Some(lora) = self.config.lora() {
            parts.targets = lora.targets(model, &self.config.modules_to_save)?;
        }
        if let Some(sizes) = self.config.sizes() {
            let sizes = [
                ("num_layers", sizes.num_layers, model.num_hidden_layers),
                ("num_attention_heads", sizes.num_attention_heads, model.num_attention_heads),
            ];
            if let Some((key, Some(found), expected)) =
                sizes.into_iter().find(|(_, found, expected)| found.is_some_and(|found| found != *expected))
            {
                return fail(format!(
                    "an adapter for another model: {key}: expected {expected}, found {found}"
                ));
            }
        }
        Ok(parts)
    }
}

/// An adapter's tensors by what they are, all of the right shape.
#[derive(Default)]
pub(crate) struct Parts<'a> {
    pub(crate) tensors: BTreeMap<Part, &'a ArrayD<f32>>,
    pub(crate) targets: Vec<super::target::Target>,
    pub(crate) warnings: Vec<String>,
}

/// Where an adapter comes from, for [`Load::adapter`](crate::Load::adapter).
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum AdapterSource {
    /// One in memory.
    Memory(Box<Adapter>),
    /// A directory.
    Directory(PathBuf),
}

impl AdapterSource {
    pub(crate) fn open(self) -> Result<Adapter> {
        match self {
            AdapterSource::Memory(adapter) => Ok(*adapter),
            AdapterSource::Directory(path) => Adapter::open(path),
        }
    }
}

impl From<Adapter> for AdapterSource {
    fn from(adapter: Adapter) -> Self {
        AdapterSource::Memory(Box::new(adapter))
    }
}

impl From<&str> for AdapterSource {
    fn from(path: &str) -> Self {
        AdapterSource::Directory(path.into())
    }
}

impl From<&Path> for AdapterSource {
    fn from(path: &Path) -> Self {
        AdapterSource::Directory(path.to_owned())
    }
}

impl From<PathBuf> for AdapterSource {
    fn from(path: PathBuf) -> Self {
        AdapterSource::Directory(path)
    }
}
