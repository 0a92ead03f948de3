//! How far the outputs of quantized linears are off.

use super::{
    Gram, QuantizedWeights, WalkJob,
    model::{Watch, read, started},
    walk::{LINEARS, Visitor, names},
};
use crate::{CancelToken, Result, backends::Chosen, checkpoint::Checkpoint, decoder::Reads};
use serde::Serialize;
use std::{collections::BTreeMap, sync::Arc};

/// How far the outputs of one linear are off.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct LayerError {
    /// The weight's canonical name.
    pub tensor: String,
    /// ‖W x - Ŵ x‖² / ‖W x‖², both summed over the inputs.
    pub relative_error: f64,
}

/// The relative error of each quantized linear of the decoder layers, on the inputs that it reads in the model as the
/// checkpoint has it; in the order of the model.
///
/// # Errors
/// As [`super::quantize_weights`].
pub fn layer_errors(
    checkpoint: &Checkpoint,
    weights: &QuantizedWeights,
    sequences: &[Vec<u32>],
    backend: Option<Chosen>,
    cancel: &CancelToken,
) -> Result<Vec<LayerError>> {
    let watch = Watch { progress: None, cancel: cancel.clone(), work: "measuring errors", done: 0, total: 0 };
    let mut visitor = Measurer { checkpoint, weights, watch, errors: Vec::new() };
    let parts: &[&[Reads]] = &[&LINEARS];
    let mut job = WalkJob { checkpoint, sequences, parts, outside: Arc::default(), visitor: &mut visitor };
    started(backend)?.0.walk(&mut job)?;
    Ok(visitor.errors)
}

struct Measurer<'a> {
    checkpoint: &'a Checkpoint,
    weights: &'a QuantizedWeights,
    watch: Watch<'static>,
    errors: Vec<LayerError>,
}

impl Visitor for Measurer<'_> {
    fn finished(&mut self, _: usize) -> Result<Option<QuantizedWeights>> {
        Ok(None)
    }

    fn visit(&mut self, layer: usize, inputs: &BTreeMap<Reads, Gram>) -> Result<QuantizedWeights> {
        for (reads, gram) in inputs {
            for name in names(layer, *reads) {
                let Some(quantized) = self.weights.get(&name) else { continue };
                self.watch.tick(&name)?;
                let weight = read(self.checkpoint, &name)?;
                let weight = weight.matrix()?.to_f32();
                let relative_error = gram
                    .relative_error(weight.view(), quantized.dequantize().view())
                    .map_err(|e| e.at(format_args!("tensor {name}")))?;
                self.errors.push(LayerError { tensor: name, relative_error });
            }
        }
        Ok(QuantizedWeights::new())
    }

    fn done(&mut self, _: usize, _: &QuantizedWeights) -> Result<()> {
        Ok(())
    }

    fn tick(&mut self) -> Result<()> {
        self.watch.tick("")
    }
}
