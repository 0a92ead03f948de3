//! Making one model of a model and an adapter.

use super::file::{Adapter, Parts};
use crate::{
    CancelToken, Error, ErrorKind, Progress, ProgressFn, Result,
    checkpoint::{Checkpoint, Converted, Rewrite, Tensor, rewrite},
    config::OptConfig,
};
use ndarray::{Array1, Array2, ArrayD};
use opt_backend::MaybeSend;
use std::{ops::ControlFlow, path::Path};

/// Who watches [`merge`].
#[derive(Default)]
#[non_exhaustive]
pub struct MergeOptions<'a> {
    /// Hears of each tensor.
    pub progress: Option<Box<ProgressFn<'a>>>,
    /// Ends the work from elsewhere.
    pub cancel: CancelToken,
}

impl<'a> MergeOptions<'a> {
    /// Sets [`MergeOptions::progress`].
    #[must_use]
    pub fn progress(self, progress: impl FnMut(Progress<'_>) -> ControlFlow<()> + MaybeSend + 'a) -> Self {
        Self { progress: Some(Box::new(progress)), ..self }
    }

    /// Sets [`MergeOptions::cancel`].
    #[must_use]
    pub fn cancel(self, cancel: CancelToken) -> Self {
        Self { cancel, ..self }
    }
}

/// What [`Adapter::merge_weight`] did to a weight, for [`Adapter::unmerge_weight`] to undo.
#[derive(Debug, Clone, PartialEq)]
pub struct Merged {
    /// DoRA's factors, `[out]`.
    gain: Option<Array1<f32>>,
}

/// Writes the model that `checkpoint` with `adapter` is, as a directory in Hugging Face layout.
///
/// Sums are made in f32 and rounded to the number format that each tensor has in the checkpoint. Where the LM head is
/// the token table and the adapter changes only one of the two uses, the written model has a head of its own
/// (`tie_word_embeddings: false`), so that it computes what the adapted model does; PEFT's `merge_and_unload` changes
/// both uses there. The directory appears when it is complete.
///
/// ```no_run
/// use opt_core::{adapter::{Adapter, MergeOptions, merge}, checkpoint::Checkpoint};
/// use std::path::Path;
///
/// let (model, adapter) = (Checkpoint::open("opt-125m")?, Adapter::open("my-lora")?);
/// merge(&model, &adapter, Path::new("opt-125m-mine"), MergeOptions::default())?;
/// # Ok::<(), opt_core::Error>(())
/// ```
///
/// # Errors
/// [`ErrorKind::Unsupported`] for a prefix or prompt, which is no weight, for quantized weights, and for biases where
/// the model has none; as [`Adapter::check`]; [`ErrorKind::Option`] if the output exists; [`ErrorKind::Cancelled`];
/// [`ErrorKind::Io`]. Nothing is left behind then.
pub fn merge(
    checkpoint: &Checkpoint,
    adapter: &Adapter,
    output: &Path,
    options: MergeOptions<'_>,
) -> Result<Converted> {
    let model = checkpoint.config();
    let place = |e: Error| e.at(format_args!("adapter {:?}", adapter.name()));
    check_kind(adapter).map_err(place)?;
    if let Some(found) = checkpoint.quantization() {
        let message = format_args!(
            "the weights are quantized ({found}) and cannot be merged into; merge into the model they were made from, or \
             load the adapter beside them"
        );
        return Err(Error::new(ErrorKind::Unsupported, message));
    }
    let parts = adapter.parts(model)?;
    check_biases(&parts).map_err(place)?;
    let MergeOptions { mut progress, cancel } = options;
    let mut change = |name: &str, tensor: &Tensor<'_>| changed(&parts, model, name, tensor);
    let job = Rewrite {
        base: checkpoint,
        untie: model.tie_word_embeddings && unties(&parts),
        change: &mut change,
        progress: progress.as_deref_mut(),
        cancel,
        work: "merging",
    };
    rewrite(output, job)
}

fn check_kind(adapter: &Adapter) -> Result<()> {
    if adapter.config().lora().is_some() {
        return Ok(());
    }
    let message = "a prefix or prompt stands before the tokens and cannot be merged into weights; load it beside the model";
    Err(Error::new(ErrorKind::Unsupported, message))
}

fn check_biases(parts: &Parts<'_>) -> Result<()> {
    for target in parts.targets.iter().filter(|target| !target.has_bias) {
        if parts.term(&target.module)?.is_some_and(|term| term.own_bias.is_some()) {
            let message = format_args!("lora_bias: {} has no bias to merge it into", target.module);
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
    }
    Ok(())
}

/// Whether token table and LM head are no longer the same.
fn unties(parts: &Parts<'_>) -> bool {
    let tables = ["embed_tokens", "lm_head"];
    parts.targets.iter().any(|target| tables.contains(&&target.module[..]))
        || tables.iter().any(|module| parts.instead(&format!("{module}.weight")).is_some())
}

/// A tensor of the merged model; `None` where it is as it was.
fn changed(
    parts: &Parts<'_>,
    model: &OptConfig,
    name: &str,
    tensor: &Tensor<'_>,
) -> Result<Option<ArrayD<f32>>> {
    let tied = model.tie_word_embeddings && name == "lm_head.weight";
    let known = tied || model.tensor_shapes().iter().any(|(known, _)| known == name);
    if !known {
        return Ok(None);
    }
    if let Some(bias) = name.strip_suffix(".bias") {
        let own = parts.term(bias)?.and_then(|term| term.own_bias.map(|own| own.mapv(|v| v * term.scale())));
        let base = parts.instead_vector(name)?;
        return Ok(match (base, own) {
            (None, None) => None,
            (Some(base), None) => Some(base.to_owned().into_dyn()),
            (base, Some(own)) => {
                let base =
                    base.map_or_else(|| tensor.vector().map(|v| v.to_f32()), |base| Ok(base.to_owned()));
                Some((base? + &own).into_dyn())
            }
        });
    }
    if let Some(own) = parts.instead(name) {
        return Ok(Some(own.clone()));
    }
    let Some(module) = name.strip_suffix(".weight") else { return Ok(None) };
    if parts.term(module)?.is_none() {
        return Ok(None);
    }
    let mut weight = tensor.matrix()?.to_f32();
    merge_into(parts, module, &mut weight)?;
    Ok(Some(weight.into_dyn()))
}

/// Puts the term of `module` into its weight, which has the shape of the model's tensor.
fn merge_into(parts: &Parts<'_>, module: &str, weight: &mut Array2<f32>) -> Result<Merged> {
    let Some(term) = parts.term(module)? else { return Ok(Merged { gain: None }) };
    let [out, input] = term.target.shape;
    let expected = if term.is_transposed() { [input, out] } else { [out, input] };
    check_shape(module, weight, expected)?;
    let view = if term.is_transposed() { weight.view_mut().reversed_axes() } else { weight.view_mut() };
    Ok(Merged { gain: term.merge(view) })
}

fn check_shape(module: &str, weight: &Array2<f32>, expected: [usize; 2]) -> Result<()> {
    let found: [usize; 2] = weight.dim().into();
    if expected == found {
        return Ok(());
    }
    let message = format_args!("{module}.weight: expected shape {expected:?}, found {found:?}");
    Err(Error::new(ErrorKind::Checkpoint, message))
}

impl Adapter {
    /// Puts the low-rank term of a module (canonical name: `layers.0.fc1`, `embed_tokens`) into its weight, which has
    /// the shape of the model's tensor: W + s B A, and with DoRA m / ‖W + s B A‖ (W + s B A). A module without a term
    /// stays as it is. Biases and modules that are saved whole are not weights' terms: see [`merge`].
    ///
    /// # Errors
    /// As [`Adapter::check`]; [`ErrorKind::Unsupported`] for a prefix or prompt; [`ErrorKind::Checkpoint`] for a
    /// weight of another shape.
    pub fn merge_weight(&self, model: &OptConfig, module: &str, weight: &mut Array2<f32>) -> Result<Merged> {
        check_kind(self)?;
        merge_into(&self.parts(model)?, module, weight)
    }

    /// Takes out of a weight what [`Adapter::merge_weight`] put into it; the result differs from what it was by
    /// rounding.
    ///
    /// # Errors
    /// As [`Adapter::merge_weight`].
    pub fn unmerge_weight(
        &self,
        model: &OptConfig,
        module: &str,
        weight: &mut Array2<f32>,
        merged: &Merged,
    ) -> Result<()> {
        check_kind(self)?;
        let parts = self.parts(model)?;
        let Some(term) = parts.term(module)? else { return Ok(()) };
        let [out, input] = term.target.shape;
        let expected = if term.is_transposed() { [input, out] } else { [out, input] };
        check_shape(module, weight, expected)?;
        let view = if term.is_transposed() { weight.view_mut().reversed_axes() } else { weight.view_mut() };
        term.unmerge(view, merged.gain.as_ref());
        Ok(())
    }
}
