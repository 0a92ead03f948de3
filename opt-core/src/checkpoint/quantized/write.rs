//! Writing quantized checkpoints.

use super::layouts;
use crate::{
    Error, ErrorKind, Result,
    checkpoint::{
        Checkpoint, FileDType, TensorInfo,
        convert::{ConvertOptions, Converted, Target, pretty, side_files},
        source::io,
        write::safetensors_header,
        zip::cannot_write,
    },
    config::{OptConfig, is_linear},
};
use opt_backend::quant::Quantized;
use serde_json::{Map, Value};
use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{BufWriter, Write},
    path::Path,
};

/// The `quant_method` of this project's own layout.
pub(super) const NATIVE: &str = "opt-rs";

/// How [`write_quantized`] stores packed weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum QuantLayout {
    /// This project's own: holds every [`Quantized`], of linears and of tables. Only this project reads it.
    Native,
    /// AutoGPTQ's and GPTQModel's: integers of one number of bits and one size of groups, in the layers' linears, with
    /// scales that are f16.
    Gptq,
    /// bitsandbytes': int8 with one scale a row, or NF4 or FP4 in blocks; any linear but the LM head.
    BitsAndBytes,
}

impl QuantLayout {
    /// Checks that the linears of a model of this shape can be written so.
    ///
    /// # Errors
    /// [`ErrorKind::Option`] naming the first that cannot.
    pub fn check(self, config: &OptConfig) -> Result<()> {
        if self != QuantLayout::Gptq {
            return Ok(());
        }
        for (name, shape) in config.tensor_shapes() {
            if let (true, &[out, input]) = (is_linear(&name), &shape[..])
                && let Some(message) = super::gptq::Gptq::misfit([out, input])
            {
                return Err(Error::new(ErrorKind::Option, message).at(format_args!("tensor {name}")));
            }
        }
        Ok(())
    }
}

/// A tensor to write.
pub(super) struct Item<'a> {
    name: String,
    dtype: FileDType,
    shape: Vec<usize>,
    content: Content<'a>,
}

enum Content<'a> {
    Bytes(Vec<u8>),
    /// As the checkpoint has it.
    Copy(&'a TensorInfo),
}

impl Item<'_> {
    pub(super) fn new(name: String, dtype: FileDType, shape: impl Into<Vec<usize>>, bytes: Vec<u8>) -> Self {
        Self { name, dtype, shape: shape.into(), content: Content::Bytes(bytes) }
    }

    fn bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.size()
    }
}

/// Writes a checkpoint whose weights named in `weights` (canonical names: `layers.0.fc1.weight`, `embed_tokens.weight`)
/// are stored packed, everything else as `base` has it.
///
/// `output` becomes a directory in Hugging Face layout: model.safetensors, config.json with the `quantization_config`
/// (the keys of `extra` put into it), tokenizer and generation_config.json of `base`; for GPTQ also
/// quantize_config.json. It is written under another name and renamed when complete.
///
/// ```no_run
/// use opt_core::checkpoint::{Checkpoint, QuantLayout, ggml, write_quantized};
/// use std::{collections::BTreeMap, path::Path};
///
/// let base = Checkpoint::open("opt-125m")?;
/// let name = "layers.0.fc1.weight";
/// let weight = base.tensor(name, &[3072, 768])?;
/// let packed = ggml::quantize(weight.matrix()?.to_f32().view(), ggml::Kind::Q8_0)?;
/// let weights = BTreeMap::from([(name.to_owned(), packed)]);
/// write_quantized(Path::new("opt-125m-q8"), &base, &weights, QuantLayout::Native, &serde_json::Map::new())?;
/// # Ok::<(), opt_core::Error>(())
/// ```
///
/// # Errors
/// [`ErrorKind::Option`] if the output exists, `base` is quantized itself, or a weight (which the message names) is not
/// the model's or cannot be held by the layout; as [`Checkpoint::validate`]; [`ErrorKind::Io`] if writing fails.
/// Nothing is left behind then.
pub fn write_quantized(
    output: &Path,
    base: &Checkpoint,
    weights: &BTreeMap<String, Quantized>,
    layout: QuantLayout,
    extra: &Map<String, Value>,
) -> Result<Converted> {
    let target = Target::new(output, &ConvertOptions::default())?;
    if !target.is_directory() {
        return Err(option(output.display(), "expected the name of a directory, found that of a file"));
    }
    if let Some(found) = base.quantization() {
        return Err(option("the base", format_args!("expected plain weights, found {found}")));
    }
    let mut warnings = base.validate()?;
    check_names(base, weights)?;
    let (mut items, mut description) = layouts::items(layout, base, weights, &mut warnings)?;
    let kept = base.written().into_iter().filter(|(info, _)| !weights.contains_key(&info.name));
    items.extend(kept.map(|(info, name)| {
        let shape = info.shape.clone();
        Item { name, dtype: info.dtype, shape, content: Content::Copy(info) }
    }));
    // Tensors of wider numbers come first, so that all are aligned.
    items.sort_by_key(|item| std::cmp::Reverse(item.dtype.size()));

    if let Some(map) = description.as_object_mut() {
        map.extend(extra.clone());
    }
    let files = target.directory(|inside| {
        let path = inside.join("model.safetensors");
        let file = File::create_new(&path).map_err(|e| io("cannot create", &path, e))?;
        let mut out = BufWriter::with_capacity(1 << 20, file);
        write_items(base, &items, &mut out)?;
        out.flush().map_err(cannot_write)?;
        let mut files = vec!["model.safetensors".to_owned()];
        let mut side = side_files(base, None)?;
        if layout == QuantLayout::Gptq {
            side.push(("quantize_config.json", pretty(&description)?));
        }
        for (name, contents) in side {
            let contents = match name {
                "config.json" => with_quantization(&contents, &description)?,
                _ => contents,
            };
            fs::write(inside.join(name), contents).map_err(cannot_write)?;
            files.push(name.to_owned());
        }
        Ok(files)
    });
    Ok(Converted {
        files: files.map_err(|e| e.at(output.display()))?,
        bytes: items.iter().map(|item| item.bytes() as u64).sum(),
        tensors: items.len(),
        warnings,
    })
}

pub(super) fn option(place: impl std::fmt::Display, message: impl std::fmt::Display) -> Error {
    Error::new(ErrorKind::Option, message).at(place)
}

fn with_quantization(config: &[u8], description: &Value) -> Result<Vec<u8>> {
    let text = config.strip_prefix("\u{feff}".as_bytes()).unwrap_or(config);
    let mut config: Value = serde_json::from_slice(text)
        .map_err(|e| Error::because(ErrorKind::Config, "config.json is not usable", e))?;
    if let Some(map) = config.as_object_mut() {
        map.insert("quantization_config".to_owned(), description.clone());
    }
    pretty(&config)
}

/// Fails for a weight that the model does not have, or has in another shape.
fn check_names(base: &Checkpoint, weights: &BTreeMap<String, Quantized>) -> Result<()> {
    let shapes: BTreeMap<String, Vec<usize>> = base.config.tensor_shapes().into_iter().collect();
    for (name, weight) in weights {
        match shapes.get(name) {
            Some(shape) if shape[..] == weight.shape() => {}
            Some(shape) => {
                let message = format_args!("expected shape {shape:?}, found {:?}", weight.shape());
                return Err(option(name, message));
            }
            None => return Err(option(name, "the model has no such weight")),
        }
        if name == "embed_positions.weight" {
            return Err(option(name, "the position table is not quantized"));
        }
    }
    Ok(())
}

fn write_items(base: &Checkpoint, items: &[Item<'_>], out: &mut dyn Write) -> Result<()> {
    let tensors = items.iter().map(|item| (item.name.clone(), item.dtype, item.shape.clone()));
    out.write_all(&safetensors_header(tensors)?).map_err(cannot_write)?;
    for item in items {
        match &item.content {
            Content::Bytes(bytes) => out.write_all(bytes).map_err(cannot_write)?,
            Content::Copy(info) => out.write_all(base.read(info)?.bytes()).map_err(cannot_write)?,
        }
    }
    Ok(())
}
