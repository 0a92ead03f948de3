//! Running a checkpoint layer by layer, one in memory at a time, to see what its linears read.

use super::{Gram, Holding, QuantizedWeights};
use crate::{
    Decoder, Error, ErrorKind, Result,
    checkpoint::Checkpoint,
    config::OptConfig,
    decoder::{At, Inside, Layer, Reads, SeeInput, Style},
};
use ndarray::Array2;
use opt_backend::{Backend, Span};
use std::{collections::BTreeMap, sync::Arc};

/// What is done on the way.
pub(crate) trait Visitor {
    /// The weights of a layer that was done before; its linears' inputs are then not looked at.
    fn finished(&mut self, layer: usize) -> Result<Option<QuantizedWeights>>;

    /// Sees the inputs of some linears of a layer, and may give weights with which to go on.
    fn visit(&mut self, layer: usize, inputs: &BTreeMap<Reads, Gram>) -> Result<QuantizedWeights>;

    /// A layer is done, with these weights in place of its own.
    fn done(&mut self, layer: usize, weights: &QuantizedWeights) -> Result<()>;

    /// Called for each sequence that is run; an error ends the work.
    fn tick(&mut self) -> Result<()>;
}

/// The linears of a layer.
pub(crate) const LINEARS: [Reads; 4] = [Reads::Qkv, Reads::Out, Reads::Fc1, Reads::Fc2];

/// A walk over the layers of a checkpoint.
pub(crate) struct WalkJob<'a> {
    pub(crate) checkpoint: &'a Checkpoint,
    /// Tokens from position 0 on.
    pub(crate) sequences: &'a [Vec<u32>],
    /// Linears that are visited together. Each part sees inputs computed with the weights given for the parts before.
    pub(crate) parts: &'a [&'a [Reads]],
    /// Weights outside of the layers in place of the checkpoint's.
    pub(crate) outside: Arc<QuantizedWeights>,
    pub(crate) visitor: &'a mut dyn Visitor,
}

impl WalkJob<'_> {
    /// Runs on this backend.
    pub(crate) fn run<B: Backend>(&mut self, backend: &B) -> Result<()> {
        let config = self.checkpoint.config();
        check_sequences(self.checkpoint.config(), self.sequences)?;
        let style = Style::new(config)?;
        let mut states = self.embed(backend)?;
        for index in 0..config.num_hidden_layers {
            let weights = match self.visitor.finished(index)? {
                Some(weights) => weights,
                None => {
                    let weights = self.visit(backend, style, index, &states)?;
                    self.visitor.done(index, &weights)?;
                    weights
                }
            };
            if index + 1 == config.num_hidden_layers {
                break;
            }
            let layer = self.layer(backend, index, weights)?;
            for state in &mut states {
                self.visitor.tick()?;
                *state = step(backend, &layer, style, index, state, None)?;
            }
        }
        Ok(())
    }

    /// The states before the first layer, `[tokens, hidden_size]` each.
    fn embed<B: Backend>(&mut self, backend: &B) -> Result<Vec<Array2<f32>>> {
        let holding = Holding { given: Some(Arc::clone(&self.outside)), ..Holding::default() };
        let decoder = Decoder::load(backend, self.checkpoint, &holding, 0..0, &mut |_| Ok(()))?;
        let start = |ids: &Vec<u32>| {
            let positions: Vec<u32> = (0..ids.len() as u32).collect();
            let state = decoder.start(backend, decoder.embed(backend, ids)?, &positions)?;
            Ok(backend.block_on(backend.read_owned(state))?)
        };
        self.sequences.iter().map(start).collect()
    }

    fn layer<B: Backend>(&self, backend: &B, index: usize, weights: QuantizedWeights) -> Result<Layer<B>> {
        let holding = Holding { given: Some(Arc::new(weights)), ..Holding::default() };
        Layer::load(backend, self.checkpoint, &holding, index)
    }

    fn visit<B: Backend>(
        &mut self,
        backend: &B,
        style: Style,
        index: usize,
        states: &[Array2<f32>],
    ) -> Result<QuantizedWeights> {
        let mut weights = QuantizedWeights::new();
        for part in self.parts {
            let layer = self.layer(backend, index, weights.clone())?;
            let mut inputs = BTreeMap::<Reads, Gram>::new();
            for state in states {
                self.visitor.tick()?;
                let mut see = |reads: Reads, x: &B::Tensor| {
                    if part.contains(&reads) {
                        let x = backend.block_on(backend.read(x))?;
                        inputs.entry(reads).or_insert_with(|| Gram::new(x.ncols())).add(x.view())?;
                    }
                    Ok(())
                };
                step(backend, &layer, style, index, state, Some(&mut see))?;
            }
            weights.extend(self.visitor.visit(index, &inputs)?);
        }
        Ok(weights)
    }
}

/// One layer over one sequence.
fn step<B: Backend>(
    backend: &B,
    layer: &Layer<B>,
    style: Style,
    index: usize,
    state: &Array2<f32>,
    inputs: Option<SeeInput<'_, B>>,
) -> Result<Array2<f32>> {
    let spans = [Span { start: 0, len: state.nrows() }];
    let at = At { style, index, spans: &spans, wanted: None };
    let inside = Inside { attentions: None, inputs };
    let next = layer.forward(backend, backend.upload(state.view())?, at, None, inside)?;
    Ok(backend.block_on(backend.read_owned(next))?)
}

/// The names of the linears that read so.
pub(crate) fn names(layer: usize, reads: Reads) -> Vec<String> {
    let parts: &[&str] = match reads {
        Reads::Qkv => &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        Reads::Out => &["self_attn.out_proj"],
        Reads::Fc1 => &["fc1"],
        Reads::Fc2 => &["fc2"],
    };
    parts.iter().map(|part| format!("layers.{layer}.{part}.weight")).collect()
}

/// Whether a model takes these sequences.
pub(super) fn check_sequences(config: &OptConfig, sequences: &[Vec<u32>]) -> Result<()> {
    let most = config.max_position_embeddings;
    for (index, ids) in sequences.iter().enumerate() {
        let place = format_args!("sequence {}", index + 1).to_string();
        if ids.is_empty() || ids.len() > most {
            let message = format!("expected 1 to {most} tokens (the context), found {}", ids.len());
            return Err(Error::new(ErrorKind::Prompt, message).at(place));
        }
        crate::engine::check_vocabulary(ids, config.vocab_size).map_err(|e| e.at(place))?;
    }
    Ok(())
}
