//! Quantizing the weights of a whole checkpoint.

#[cfg(feature = "quantize")]
use super::{
    GptqOptions, Gram, WalkJob, gptq,
    walk::{LINEARS, Visitor, names},
    work::Work,
};
use super::{QuantSpec, QuantizedWeights, rows::finite_row};
use crate::{
    CancelToken, Error, ErrorKind, Progress, ProgressFn, Result,
    backends::{self, BackendOptions, Chosen},
    checkpoint::Checkpoint,
};
#[cfg(feature = "quantize")]
use crate::{config::is_linear, decoder::Reads};
use opt_backend::MaybeSend;
#[cfg(feature = "quantize")]
use std::{collections::BTreeMap, sync::Arc};
use std::{ops::ControlFlow, path::PathBuf};

/// How codes are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
#[non_exhaustive]
pub enum Method {
    /// Each weight becomes the nearest code.
    #[default]
    Rtn,
    /// GPTQ (arXiv 2210.17323): rounding errors are made up for, as far as the inputs of a calibration text tell.
    #[cfg(feature = "quantize")]
    Gptq(GptqOptions),
}

/// What [`quantize_weights`] is to do, and who watches.
#[derive(Default)]
#[non_exhaustive]
pub struct QuantizeOptions<'a> {
    /// How codes are chosen.
    pub method: Method,
    /// Token sequences for GPTQ, each from position 0 on; see [`super::calibration_sequences`].
    pub calibration: Vec<Vec<u32>>,
    /// Runs the layers over the calibration text; the default backend if none.
    pub backend: Option<Chosen>,
    /// Where GPTQ keeps finished layers, so that a rerun with the same settings goes on behind them. With other
    /// settings it starts anew. Its parent must exist; the directory is left for [`QuantizeOptions::work`]'s owner to
    /// remove once the result is safe.
    pub work: Option<PathBuf>,
    /// Hears how far the work has come.
    pub progress: Option<Box<ProgressFn<'a>>>,
    /// Ends the work from elsewhere.
    pub cancel: CancelToken,
}

impl<'a> QuantizeOptions<'a> {
    /// Sets [`QuantizeOptions::method`].
    #[must_use]
    pub fn method(self, method: Method) -> Self {
        Self { method, ..self }
    }

    /// Sets [`QuantizeOptions::calibration`].
    #[must_use]
    pub fn calibration(self, sequences: Vec<Vec<u32>>) -> Self {
        Self { calibration: sequences, ..self }
    }

    /// Sets [`QuantizeOptions::backend`].
    #[must_use]
    pub fn backend(self, backend: Chosen) -> Self {
        Self { backend: Some(backend), ..self }
    }

    /// Sets [`QuantizeOptions::work`].
    #[must_use]
    pub fn work(self, directory: impl Into<PathBuf>) -> Self {
        Self { work: Some(directory.into()), ..self }
    }

    /// Sets [`QuantizeOptions::progress`].
    #[must_use]
    pub fn progress(self, progress: impl FnMut(Progress<'_>) -> ControlFlow<()> + MaybeSend + 'a) -> Self {
        Self { progress: Some(Box::new(progress)), ..self }
    }

    /// Sets [`QuantizeOptions::cancel`].
    #[must_use]
    pub fn cancel(self, cancel: CancelToken) -> Self {
        Self { cancel, ..self }
    }
}

/// Counts what is done, and ends the work where it is asked to.
pub(super) struct Watch<'a> {
    pub(super) progress: Option<Box<ProgressFn<'a>>>,
    pub(super) cancel: CancelToken,
    pub(super) work: &'static str,
    pub(super) done: u64,
    pub(super) total: u64,
}

impl Watch<'_> {
    pub(super) fn tick(&mut self, item: &str) -> Result<()> {
        self.cancel.check(self.work)?;
        let report = Progress::new(item, self.done, self.total);
        self.done += 1;
        match self.progress.as_mut().map(|progress| progress(report)) {
            Some(ControlFlow::Break(())) => {
                Err(Error::new(ErrorKind::Cancelled, format_args!("{} was cancelled", self.work)))
            }
            _ => Ok(()),
        }
    }
}

/// Quantizes the weights of a checkpoint that `spec` names; the others are not in the result.
///
/// Memory holds one tensor at a time beside the result; for GPTQ one layer, the state of the calibration sequences
/// `[tokens, hidden_size]` and the sums over one layer's inputs.
///
/// ```no_run
/// use opt_core::{Load, Opt, checkpoint::Checkpoint};
/// use opt_core::quantize::{QuantSpec, QuantizeOptions, quantize_weights};
/// use std::sync::Arc;
///
/// let checkpoint = Checkpoint::open("opt-125m")?;
/// let weights = quantize_weights(&checkpoint, &QuantSpec::int4(), QuantizeOptions::default())?;
/// let opt = Opt::load("opt-125m", Load::default().replace(Arc::new(weights)))?;
/// # Ok::<(), opt_core::Error>(())
/// ```
///
/// # Errors
/// [`ErrorKind::Option`] for choices that do not fit each other or the model (the message names the tensor), and for a
/// checkpoint that is quantized already; [`ErrorKind::Prompt`] for calibration sequences that cannot be run;
/// [`ErrorKind::Checkpoint`] for weights that are not finite; [`ErrorKind::Cancelled`]; [`ErrorKind::Io`] and
/// [`ErrorKind::Backend`].
pub fn quantize_weights(
    checkpoint: &Checkpoint,
    spec: &QuantSpec,
    options: QuantizeOptions<'_>,
) -> Result<QuantizedWeights> {
    let holding = super::Holding { spec: Some(*spec), ..super::Holding::default() };
    holding.check(checkpoint)?;
    checkpoint.validate()?;
    check_finite(checkpoint)?;
    let QuantizeOptions { method, calibration, backend, work, progress, cancel } = options;
    let mut watch = Watch { progress, cancel, work: "quantizing", done: 0, total: 0 };
    let planned: Vec<(String, [usize; 2], QuantSpec)> = checkpoint
        .config()
        .tensor_shapes()
        .into_iter()
        .filter_map(|(name, shape)| {
            let &[out, inputs] = &shape[..] else { return None };
            spec.of_tensor(&name).map(|spec| (name, [out, inputs], spec))
        })
        .collect();
    let round = |watch: &mut Watch<'_>, planned: &[&(String, [usize; 2], QuantSpec)]| {
        let mut weights = QuantizedWeights::new();
        for (name, shape, spec) in planned {
            watch.tick(name)?;
            let weight = checkpoint.tensor(name, shape)?;
            weights.insert(name.clone(), spec.quantize(name, weight.matrix()?)?);
        }
        Ok::<_, Error>(weights)
    };
    match method {
        Method::Rtn => {
            let _ = (calibration, backend, work);
            watch.total = planned.len() as u64;
            round(&mut watch, &planned.iter().collect::<Vec<_>>())
        }
        #[cfg(feature = "quantize")]
        Method::Gptq(options) => {
            options.check(spec)?;
            if calibration.is_empty() {
                let message = "GPTQ: expected at least one calibration sequence, found none";
                return Err(Error::new(ErrorKind::Option, message));
            }
            let tables: Vec<_> = planned.iter().filter(|(name, ..)| !is_linear(name)).collect();
            let parts: &[&[Reads]] = if options.true_sequential {
                &LINEARS.each_ref().map(std::slice::from_ref)
            } else {
                &[&LINEARS]
            };
            let layers = checkpoint.config().num_hidden_layers as u64;
            let per_layer = (parts.len() + 1) * calibration.len() + 6;
            watch.total = tables.len() as u64 + layers * per_layer as u64;
            super::walk::check_sequences(checkpoint.config(), &calibration)?;
            let backend = started(backend)?.0;
            let work = match work {
                None => None,
                Some(dir) => {
                    let info = backend.info();
                    Some(Work::open(&dir, &settings(checkpoint, spec, &options, &calibration, &info)?)?)
                }
            };
            let outside = Arc::new(round(&mut watch, &tables)?);
            let first = watch.done;
            let mut visitor = Quantizer {
                checkpoint,
                spec,
                options,
                watch,
                work,
                result: QuantizedWeights::clone(&outside),
                item: String::new(),
                first,
                per_layer: per_layer as u64,
            };
            let mut job =
                WalkJob { checkpoint, sequences: &calibration, parts, outside, visitor: &mut visitor };
            let walked = backend.walk(&mut job).and_then(|()| visitor.watch.tick(""));
            if let (Err(_), Some(work)) = (&walked, &visitor.work) {
                work.remove_if_idle()?;
            }
            walked.map(|()| visitor.result)
        }
    }
}

pub(super) fn started(backend: Option<Chosen>) -> Result<Chosen> {
    match backend {
        Some(backend) => Ok(backend),
        None => backends::choose(backends::NAMES[0], &BackendOptions::default()),
    }
}

/// Whatever is quantized, numbers that are not finite make the whole model worthless.
fn check_finite(checkpoint: &Checkpoint) -> Result<()> {
    for (name, shape) in checkpoint.config().tensor_shapes() {
        let at = |e: Error| e.at(format_args!("tensor {name}"));
        let tensor = checkpoint.tensor(&name, &shape)?;
        if shape.len() == 2 {
            let weight = tensor.matrix()?;
            let [rows, columns] = weight.shape();
            let mut numbers = vec![0.0; columns];
            (0..rows).try_for_each(|row| finite_row(&weight, row, &mut numbers)).map_err(at)?;
        } else if let Some((place, found)) =
            tensor.vector()?.to_f32().iter().enumerate().find(|(_, x)| !x.is_finite())
        {
            let message = format_args!("expected finite numbers, found {found} at {place}");
            return Err(at(Error::new(ErrorKind::Checkpoint, message)));
        }
    }
    Ok(())
}

/// What the finished layers in a work directory depend on, beside the weights of the layers themselves.
#[cfg(feature = "quantize")]
fn settings(
    checkpoint: &Checkpoint,
    spec: &QuantSpec,
    options: &GptqOptions,
    calibration: &[Vec<u32>],
    info: &opt_backend::Info,
) -> Result<serde_json::Value> {
    let mut text = crc32fast::Hasher::new();
    for ids in calibration {
        text.update(&(ids.len() as u64).to_le_bytes());
        ids.iter().for_each(|id| text.update(&id.to_le_bytes()));
    }
    let mut outside = crc32fast::Hasher::new();
    for info in checkpoint.tensors().filter(|info| !info.name.starts_with("layers.")) {
        outside.update(checkpoint.read(info)?.bytes());
    }
    Ok(serde_json::json!({
        "version": 1, "spec": spec, "gptq": options, "config": checkpoint.config(),
        "sequences": calibration.len(), "text": text.finalize(), "outside": outside.finalize(),
        "backend": [&info.name, &info.device], "simd": info.simd, "details": info.details,
    }))
}

#[cfg(feature = "quantize")]
struct Quantizer<'a, 'b> {
    checkpoint: &'a Checkpoint,
    spec: &'a QuantSpec,
    options: GptqOptions,
    watch: Watch<'b>,
    work: Option<Work>,
    result: QuantizedWeights,
    item: String,
    /// Units before the first layer, and in each.
    first: u64,
    per_layer: u64,
}

#[cfg(feature = "quantize")]
impl Quantizer<'_, '_> {
    /// A checksum of all tensors of a layer.
    fn source(&self, layer: usize) -> Result<u32> {
        let mut crc = crc32fast::Hasher::new();
        let prefix = format!("layers.{layer}.");
        for info in self.checkpoint.tensors().filter(|info| info.name.starts_with(&prefix)) {
            crc.update(self.checkpoint.read(info)?.bytes());
        }
        Ok(crc.finalize())
    }

    /// Whether these are the weights of a layer of this model.
    fn fits(&self, layer: usize, weights: &QuantizedWeights) -> bool {
        let prefix = format!("layers.{layer}.");
        let shapes = self.checkpoint.config().tensor_shapes();
        let expected: Vec<_> =
            shapes.iter().filter(|(name, _)| name.starts_with(&prefix) && is_linear(name)).collect();
        let has = |(name, shape): &&(String, Vec<usize>)| {
            weights.get(name).is_some_and(|weight| weight.shape()[..] == shape[..])
        };
        weights.len() == expected.len() && expected.iter().all(has)
    }
}

#[cfg(feature = "quantize")]
impl Visitor for Quantizer<'_, '_> {
    fn finished(&mut self, layer: usize) -> Result<Option<QuantizedWeights>> {
        self.watch.done = self.first + layer as u64 * self.per_layer;
        self.item = format!("layers.{layer}");
        let Some(work) = &self.work else { return Ok(None) };
        let found = work.read(layer, self.source(layer)?).filter(|weights| self.fits(layer, weights));
        match found {
            Some(weights) => {
                self.result.extend(weights.clone());
                Ok(Some(weights))
            }
            None => {
                // What follows was made behind another layer.
                let layers = self.checkpoint.config().num_hidden_layers;
                (layer..layers).try_for_each(|later| work.forget(later))?;
                Ok(None)
            }
        }
    }

    fn visit(&mut self, layer: usize, inputs: &BTreeMap<Reads, Gram>) -> Result<QuantizedWeights> {
        let mut weights = QuantizedWeights::new();
        for (reads, gram) in inputs {
            for name in names(layer, *reads) {
                self.watch.tick(&name)?;
                let weight = read(self.checkpoint, &name)?;
                let weight = weight.matrix()?;
                weights.insert(name.clone(), gptq(&name, weight, gram, self.spec, &self.options)?);
            }
        }
        Ok(weights)
    }

    fn done(&mut self, layer: usize, weights: &QuantizedWeights) -> Result<()> {
        if let Some(work) = &self.work {
            work.write(layer, self.source(layer)?, weights)?;
        }
        self.result.extend(weights.clone());
        Ok(())
    }

    fn tick(&mut self) -> Result<()> {
        self.watch.tick(&self.item)
    }
}

/// A weight of the checkpoint, of whatever shape the config gives it.
pub(super) fn read<'a>(checkpoint: &'a Checkpoint, name: &str) -> Result<crate::checkpoint::Tensor<'a>> {
    let shapes = checkpoint.config().tensor_shapes();
    let shape = shapes.into_iter().find(|(n, _)| n == name).map(|(_, shape)| shape).unwrap_or_default();
    checkpoint.tensor(name, &shape)
}
