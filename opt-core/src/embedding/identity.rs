use super::{Embedder, Pooling};
use crate::{
    Error, ErrorKind, Result,
    engine::{Forward, Hidden, Sequence},
    tokenizer::Bos,
};
use serde::{Deserialize, Serialize};

/// What must be equal for two vectors to be comparable: the model, the layer, the pooling.
///
/// A model is told from others of its shape by what it makes of a few tokens, so that it does not matter where its files
/// lie, and so that adapters and quantized weights count. What rounding changes does not: the same weights in f16, bf16
/// or int8 are the same model; in four bits they are another.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Identity {
    /// The shape of the model, for people.
    pub model: String,
    /// The adapter it wore, for people.
    pub adapter: Option<String>,
    /// The width of a vector.
    pub width: usize,
    /// The index of the state.
    pub layer: usize,
    /// How states became one vector.
    pub pooling: Pooling,
    /// Whether vectors were scaled to length 1.
    pub normalized: bool,
    /// Whether a BOS was put before texts, where the model has one.
    pub bos: bool,
    /// The mean state of a few tokens at that layer, `[width]`.
    pub probe: Vec<f32>,
}

/// How far two probes of one model may be apart, of their length.
const TOLERANCE: f64 = 0.05;

impl Embedder {
    /// What this embedder's vectors can be compared with, awaited. It runs a few tokens.
    ///
    /// # Errors
    /// [`ErrorKind::Backend`].
    pub async fn identity_async(&self) -> Result<Identity> {
        let config = self.opt().config();
        let count = self.opt().context().min(8) as u32;
        let ids: Vec<u32> = (0..count).map(|id| id % config.vocab_size.max(1) as u32).collect();
        let sequence = Sequence {
            hidden: Hidden::Layer(self.layer()),
            pooling: Pooling::Mean,
            ..Sequence::new(&ids[..]).adapter(self.opt().adapter())
        };
        let batch = Forward { sequences: vec![sequence], ..Forward::default() };
        let mut outputs = self.opt().engine().forward(batch).await?;
        let state = outputs.pop().and_then(|mut output| output.hidden.pop()).unwrap_or_default();
        let options = self.options();
        Ok(Identity {
            model: format!(
                "{} layers of {} with {} heads, vocabulary {}",
                config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.vocab_size
            ),
            adapter: self.opt().adapter().map(str::to_owned),
            width: self.width(),
            layer: self.layer(),
            pooling: options.pooling,
            normalized: options.normalize,
            bos: options.bos != Bos::Never,
            probe: state.into_raw_vec_and_offset().0,
        })
    }

    /// What this embedder's vectors can be compared with. It runs a few tokens.
    ///
    /// # Errors
    /// [`ErrorKind::Backend`].
    #[cfg(not(target_arch = "wasm32"))]
    pub fn identity(&self) -> Result<Identity> {
        opt_backend::block_on(self.identity_async())
    }
}

impl Identity {
    /// Whether vectors of `other` can be compared with those of `self`, which is what is expected.
    ///
    /// # Errors
    /// [`ErrorKind::Checkpoint`] naming the first thing that differs.
    pub fn check(&self, other: &Identity) -> Result<()> {
        let yes = |is: bool| if is { "yes" } else { "no" }.to_owned();
        let bos = |is: bool| if is { "before texts" } else { "none" }.to_owned();
        let parts = [
            ("model", self.model.clone(), other.model.clone()),
            ("layer", self.layer.to_string(), other.layer.to_string()),
            ("width", self.width.to_string(), other.width.to_string()),
            ("pooling", self.pooling.to_string(), other.pooling.to_string()),
            ("normalized", yes(self.normalized), yes(other.normalized)),
            ("BOS", bos(self.bos), bos(other.bos)),
        ];
        if let Some((name, expected, found)) = parts.into_iter().find(|(_, a, b)| a != b) {
            let message = format_args!("{name}: expected {expected}, found {found}");
            return Err(Error::new(ErrorKind::Checkpoint, message));
        }
        let length =
            |values: &mut dyn Iterator<Item = f32>| values.map(|x| f64::from(x).powi(2)).sum::<f64>().sqrt();
        let off = length(&mut self.probe.iter().zip(&other.probe).map(|(a, b)| a - b));
        let near = off <= TOLERANCE * length(&mut self.probe.iter().copied());
        if self.probe.len() == other.probe.len() && near {
            return Ok(());
        }
        let worn = |adapter: &Option<String>| match adapter {
            Some(name) => format!("adapter {name:?}"),
            None => "no adapter".to_owned(),
        };
        let message = match self.adapter == other.adapter {
            true => {
                "model: expected the same weights, found those of another model of the same shape".to_owned()
            }
            false => format!(
                "model: expected it with {}, found it with {}",
                worn(&self.adapter),
                worn(&other.adapter)
            ),
        };
        Err(Error::new(ErrorKind::Checkpoint, message))
    }
}
