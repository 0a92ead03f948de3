//! The work directory of a long quantization: each finished layer is a file in it, which a rerun picks up.

use super::QuantizedWeights;
use crate::{Error, ErrorKind, Result};
use ndarray::Array2;
use opt_backend::quant::{Groups, Levels, Quantized, Zeros};
use safetensors::{
    Dtype, SafeTensors,
    tensor::{TensorView, serialize},
};
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, HashMap},
    fs,
    io::Write,
    path::{Path, PathBuf},
};

/// Names what the layers in a work directory were made with.
const SETTINGS: &str = "settings.json";
/// A key of that file, by which a work directory is known from anybody else's.
const MARK: &str = "work directory of opt-rs' quantization";

/// A work directory.
pub(super) struct Work {
    dir: PathBuf,
}

/// What a layer's file says of one weight beside its arrays.
#[derive(Serialize, Deserialize)]
struct Described {
    bits: u32,
    zero: Option<u16>,
    run: Option<usize>,
}

/// A layer's file beside its arrays.
#[derive(Serialize, Deserialize)]
struct Layer {
    /// A checksum of what it was made from.
    source: u32,
    weights: BTreeMap<String, Described>,
}

impl Work {
    /// Makes the directory, or goes on in it. What was made with other settings is removed.
    pub(super) fn open(dir: &Path, settings: &serde_json::Value) -> Result<Self> {
        let io = |e| Error::because(ErrorKind::Io, dir.display(), e);
        let work = Self { dir: dir.to_owned() };
        let text = serde_json::json!({ MARK: 1, "settings": settings }).to_string();
        let found = fs::read_to_string(dir.join(SETTINGS)).ok();
        if found.as_deref() == Some(&text[..]) {
            return Ok(work);
        }
        let found = found.and_then(|found| serde_json::from_str::<serde_json::Value>(&found).ok());
        let ours = found.is_some_and(|found| found.get(MARK).is_some());
        if dir.symlink_metadata().is_ok() && !ours {
            let empty = dir.is_dir() && fs::read_dir(dir).map_err(io)?.next().is_none();
            if !empty {
                let message = format_args!("{}: exists already and is no work directory", dir.display());
                return Err(Error::new(ErrorKind::Option, message));
            }
        }
        work.remove()?;
        fs::create_dir(dir).map_err(io)?;
        work.put(SETTINGS, text.as_bytes())?;
        Ok(work)
    }

    fn put(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let io = |e| Error::because(ErrorKind::Io, format_args!("{}: {name}", self.dir.display()), e);
        let mut file = tempfile::NamedTempFile::new_in(&self.dir).map_err(io)?;
        file.write_all(bytes).map_err(io)?;
        file.persist(self.dir.join(name)).map_err(|e| io(e.error))?;
        Ok(())
    }

    fn name(layer: usize) -> String {
        format!("layer-{layer:05}.safetensors")
    }

    /// A finished layer that was made from `source`; none if there is none, or one that cannot be used.
    pub(super) fn read(&self, layer: usize, source: u32) -> Option<QuantizedWeights> {
        let bytes = fs::read(self.dir.join(Self::name(layer))).ok()?;
        let (_, header) = SafeTensors::read_metadata(&bytes).ok()?;
        let described: Layer = serde_json::from_str(header.metadata().as_ref()?.get("layer")?).ok()?;
        if described.source != source {
            return None;
        }
        let file = SafeTensors::deserialize(&bytes).ok()?;
        let weight = |(name, described): (String, Described)| {
            let weight = weight(&file, &name, &described)?;
            Some((name, weight))
        };
        described.weights.into_iter().map(weight).collect()
    }

    /// Keeps a finished layer.
    pub(super) fn write(&self, layer: usize, source: u32, weights: &QuantizedWeights) -> Result<()> {
        let mut described = BTreeMap::new();
        let mut arrays: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = Vec::new();
        for (name, weight) in weights {
            let Levels::Integers { bits } = weight.levels() else { continue };
            let shape = |array: &[usize]| array.to_vec();
            let codes: Vec<u8> = weight.codes().iter().copied().collect();
            arrays.push((format!("{name}.codes"), Dtype::U8, shape(weight.codes().shape()), codes));
            let scales: Vec<u8> = weight.scales().iter().flat_map(|s| s.to_le_bytes()).collect();
            arrays.push((format!("{name}.scales"), Dtype::F32, shape(weight.scales().shape()), scales));
            let zero = match weight.zeros() {
                Zeros::Each(zeros) => {
                    let bytes: Vec<u8> = zeros.iter().flat_map(|z| z.to_le_bytes()).collect();
                    arrays.push((format!("{name}.zeros"), Dtype::U16, shape(zeros.shape()), bytes));
                    None
                }
                Zeros::Same(zero) => Some(*zero),
                _ => None,
            };
            let run = match weight.groups() {
                Groups::Index(index) => {
                    let bytes: Vec<u8> = index.iter().flat_map(|g| g.to_le_bytes()).collect();
                    arrays.push((format!("{name}.groups"), Dtype::U32, vec![index.len()], bytes));
                    None
                }
                Groups::Runs(size) => Some(*size),
                _ => None,
            };
            described.insert(name.clone(), Described { bits, zero, run });
        }
        let json = serde_json::to_string(&Layer { source, weights: described })
            .map_err(|e| Error::because(ErrorKind::Io, "cannot write JSON", e))?;
        let views = arrays.iter().map(|(name, dtype, shape, bytes)| {
            TensorView::new(*dtype, shape.clone(), bytes).map(|view| (name.as_str(), view))
        });
        let fail = |e| Error::because(ErrorKind::Io, "cannot write a layer", e);
        let views = views.collect::<std::result::Result<Vec<_>, _>>().map_err(fail)?;
        let metadata = HashMap::from([("layer".to_owned(), json)]);
        self.put(&Self::name(layer), &serialize(views, Some(metadata)).map_err(fail)?)
    }

    /// Removes a layer's file, if there is one.
    pub(super) fn forget(&self, layer: usize) -> Result<()> {
        match fs::remove_file(self.dir.join(Self::name(layer))) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::because(ErrorKind::Io, self.dir.display(), e))
            }
            _ => Ok(()),
        }
    }

    /// Removes the directory if there is no finished layer in it.
    pub(super) fn remove_if_idle(&self) -> Result<()> {
        let mut entries =
            fs::read_dir(&self.dir).map_err(|e| Error::because(ErrorKind::Io, self.dir.display(), e))?;
        let layers =
            entries.any(|entry| entry.is_ok_and(|e| e.file_name().to_string_lossy().starts_with("layer-")));
        if layers { Ok(()) } else { self.remove() }
    }

    /// Removes the directory with what was put into it; with anything else in it, it stays and that is an error.
    fn remove(&self) -> Result<()> {
        let io = |e| Error::because(ErrorKind::Io, self.dir.display(), e);
        let entries = match fs::read_dir(&self.dir) {
            Ok(entries) => entries,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(io(e)),
        };
        for entry in entries {
            let entry = entry.map_err(io)?;
            let name = entry.file_name();
            let name = name.to_string_lossy();
            // Temporary files are left by a process that was killed.
            if name == SETTINGS || name.starts_with("layer-") || name.starts_with(".tmp") {
                fs::remove_file(entry.path()).map_err(io)?;
            }
        }
        fs::remove_dir(&self.dir).map_err(io)
    }
}

/// Removes the work directory of a quantization ([`super::QuantizeOptions::work`]) once its result is written. Files in
/// it that are not the quantization's stay.
///
/// # Errors
/// [`ErrorKind::Io`] if it cannot be removed, or if there is something else in it.
pub fn remove_work(dir: impl AsRef<Path>) -> Result<()> {
    Work { dir: dir.as_ref().to_owned() }.remove()
}

fn weight(file: &SafeTensors<'_>, name: &str, described: &Described) -> Option<Quantized> {
    let array = |part: &str| file.tensor(&format!("{name}.{part}")).ok();
    let shape = |view: &TensorView<'_>| match *view.shape() {
        [rows, columns] => Some((rows, columns)),
        _ => None,
    };
    let codes = array("codes").filter(|view| view.dtype() == Dtype::U8)?;
    let codes = Array2::from_shape_vec(shape(&codes)?, codes.data().to_vec()).ok()?;
    let scales = array("scales").filter(|view| view.dtype() == Dtype::F32)?;
    let numbers = scales.data().as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
    let scales = Array2::from_shape_vec(shape(&scales)?, numbers).ok()?;
    let zeros = match described.zero {
        Some(zero) => Zeros::Same(zero),
        None => {
            let zeros = array("zeros").filter(|view| view.dtype() == Dtype::U16)?;
            let numbers = zeros.data().as_chunks().0.iter().map(|b| u16::from_le_bytes(*b)).collect();
            Zeros::Each(Array2::from_shape_vec(shape(&zeros)?, numbers).ok()?)
        }
    };
    let groups = match described.run {
        Some(size) => Groups::Runs(size),
        None => {
            let index = array("groups").filter(|view| view.dtype() == Dtype::U32)?;
            Groups::Index(index.data().as_chunks().0.iter().map(|b| u32::from_le_bytes(*b)).collect())
        }
    };
    Quantized::new(codes, scales, zeros, Levels::Integers { bits: described.bits }, groups).ok()
}
