//! Writing a checkpoint with some of its weights changed.

use super::{
    Checkpoint, FileDType, LM_HEAD, Tensor, TensorInfo, Warning,
    convert::{ConvertOptions, Converted, Target, pretty, side_files},
    source::io,
    write::{convert, safetensors_header},
    zip::cannot_write,
};
use crate::{CancelToken, Error, ErrorKind, Progress, ProgressFn, Result};
use ndarray::ArrayD;
use serde_json::{Value, json};
use std::{
    fs::{self, File},
    io::{BufWriter, Write},
    ops::ControlFlow,
    path::Path,
};

/// What [`rewrite`] is to do.
pub(crate) struct Rewrite<'a, 'p> {
    pub(crate) base: &'a Checkpoint,
    /// Whether the LM head becomes a tensor of its own, of the token table's numbers.
    pub(crate) untie: bool,
    /// The new numbers of a tensor of this canonical name; `None` leaves it as it is.
    #[allow(clippy::type_complexity)]
    pub(crate) change: &'a mut dyn FnMut(&str, &Tensor<'_>) -> Result<Option<ArrayD<f32>>>,
    pub(crate) progress: Option<&'a mut ProgressFn<'p>>,
    pub(crate) cancel: CancelToken,
    /// What is being done, for the message when it is cancelled.
    pub(crate) work: &'static str,
}

struct Item<'a> {
    /// Canonical.
    name: String,
    stored: String,
    info: &'a TensorInfo,
}

/// Writes a directory in Hugging Face layout; each tensor has the number format that it has in the base.
///
/// # Errors
/// As [`super::convert`]'s.
pub(crate) fn rewrite(output: &Path, job: Rewrite<'_, '_>) -> Result<Converted> {
    let Rewrite { base, untie, change, mut progress, cancel, work } = job;
    let target = Target::new(output, &ConvertOptions::default())?;
    let option = |place: &str, message: &str| Err(Error::new(ErrorKind::Option, message).at(place));
    if !target.is_directory() {
        let message = "expected the name of a directory, found that of a file";
        return option(&output.display().to_string(), message);
    }
    let mut warnings = base.validate()?;
    let items = items(base, untie);
    let total = items.iter().map(|item| item.info.bytes() as u64).sum();
    let mut done = 0;
    let mut infinite = Vec::new();
    let files = target.directory(|inside| {
        let path = inside.join("model.safetensors");
        let file = File::create_new(&path).map_err(|e| io("cannot create", &path, e))?;
        let mut out = BufWriter::with_capacity(1 << 20, file);
        let header = items.iter().map(|item| (item.stored.clone(), item.info.dtype, item.info.shape.clone()));
        out.write_all(&safetensors_header(header)?).map_err(cannot_write)?;
        for item in &items {
            cancel.check(work)?;
            if let Some(ControlFlow::Break(())) =
                progress.as_mut().map(|progress| progress(Progress::new(&item.name, done, total)))
            {
                return Err(Error::new(ErrorKind::Cancelled, format_args!("{work} was cancelled")));
            }
            let tensor = base.read(item.info)?;
            match change(&item.name, &tensor)? {
                None => out.write_all(tensor.bytes()).map_err(cannot_write)?,
                Some(numbers) => {
                    let (bytes, overflowed) = rounded(&numbers, item.info)?;
                    infinite.extend((overflowed > 0).then(|| (item.name.clone(), overflowed)));
                    out.write_all(&bytes).map_err(cannot_write)?;
                }
            }
            done += item.info.bytes() as u64;
        }
        out.flush().map_err(cannot_write)?;
        let mut files = vec!["model.safetensors".to_owned()];
        for (name, contents) in side_files(base, None)? {
            let contents = if name == "config.json" && untie { untied(&contents)? } else { contents };
            fs::write(inside.join(name), contents).map_err(cannot_write)?;
            files.push(name.to_owned());
        }
        Ok(files)
    });
    let files = files.map_err(|e| e.at(output.display()))?;
    let told = |(name, count): (String, u64)| {
        Warning::Other(format!("{name}: {count} numbers became infinite in the model's number format"))
    };
    warnings.extend(infinite.into_iter().map(told));
    Ok(Converted { files, bytes: total, tensors: items.len(), warnings })
}

/// Tensors of wider numbers first, so that all are aligned.
fn items(base: &Checkpoint, untie: bool) -> Vec<Item<'_>> {
    let mut items: Vec<Item<'_>> = Vec::new();
    for (info, stored) in base.written() {
        items.push(Item { name: info.name.clone(), stored, info });
        if untie && info.name == "embed_tokens.weight" {
            items.push(Item { name: LM_HEAD.to_owned(), stored: LM_HEAD.to_owned(), info });
        }
    }
    items.sort_by_key(|item| std::cmp::Reverse(item.info.dtype.size()));
    items
}

fn rounded(numbers: &ArrayD<f32>, info: &TensorInfo) -> Result<(Vec<u8>, u64)> {
    if numbers.shape() != info.shape {
        let message = format_args!("expected shape {:?}, found {:?}", info.shape, numbers.shape());
        return Err(Error::new(ErrorKind::Checkpoint, message).at(&info.name));
    }
    let values: Vec<f32> = numbers.iter().copied().collect();
    let mut bytes = Vec::with_capacity(info.bytes());
    let overflowed = convert(bytemuck::cast_slice(&values), FileDType::F32, info.dtype, &mut bytes)?;
    Ok((bytes, overflowed))
}

fn untied(config: &[u8]) -> Result<Vec<u8>> {
    let text = config.strip_prefix("\u{feff}".as_bytes()).unwrap_or(config);
    let mut config: Value = serde_json::from_slice(text)
        .map_err(|e| Error::because(ErrorKind::Config, "config.json is not usable", e))?;
    if let Some(map) = config.as_object_mut() {
        map.insert("tie_word_embeddings".to_owned(), json!(false));
    }
    pretty(&config)
}
