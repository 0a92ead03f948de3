use super::{Optimizer, schedule::Schedule};
use crate::{Error, ErrorKind, Result};
use serde::{Deserialize, Serialize};

/// How a training runs. The defaults are those of transformers' `Trainer`.
///
/// ```
/// use opt_core::tuning::{Schedule, TrainOptions};
///
/// let options = TrainOptions::default().lr(1e-4).max_steps(200).warmup_steps(20).schedule(Schedule::Cosine);
/// assert_eq!(options.batch_size, 8);
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct TrainOptions {
    /// Passes over the data, where `max_steps` is not given.
    pub epochs: u64,
    /// Steps in all.
    pub max_steps: Option<u64>,
    /// Examples of a micro-batch, which are run at once.
    pub batch_size: usize,
    /// Micro-batches of a step; each target of a step counts alike, whichever it is in.
    pub grad_accum: usize,
    /// Highest learning rate.
    pub lr: f64,
    /// How the learning rate moves after the warm-up.
    pub schedule: Schedule,
    /// Steps over which the learning rate rises from 0.
    pub warmup_steps: u64,
    /// Decay of matrices; biases and LayerNorms have none.
    pub weight_decay: f32,
    /// Gradients whose norm is larger are scaled down to it.
    pub clip: Option<f32>,
    /// How parameters follow their gradients.
    pub optimizer: Optimizer,
    /// ε of the loss (1 - ε) · nll + ε · mean(-log p).
    pub label_smoothing: f32,
    /// Seeds the order of examples, dropout and new parameters.
    pub seed: u64,
    /// Keeps only the states between layers, and computes the rest again: less memory, a third more time.
    pub gradient_checkpointing: bool,
    /// Steps between evaluations, where there is something to evaluate on; at the end of each epoch if none.
    pub eval_steps: Option<u64>,
    /// Steps between saved checkpoints; at the end of each epoch if none.
    pub save_steps: Option<u64>,
    /// Checkpoints that are kept beside the best.
    pub save_limit: usize,
    /// Ends after so many evaluations that were no better than the best.
    pub patience: Option<u64>,
}

impl Default for TrainOptions {
    fn default() -> Self {
        Self {
            epochs: 3,
            max_steps: None,
            batch_size: 8,
            grad_accum: 1,
            lr: 5e-5,
            schedule: Schedule::Linear,
            warmup_steps: 0,
            weight_decay: 0.0,
            clip: Some(1.0),
            optimizer: Optimizer::default(),
            label_smoothing: 0.0,
            seed: 42,
            gradient_checkpointing: false,
            eval_steps: None,
            save_steps: None,
            save_limit: 2,
            patience: None,
        }
    }
}

macro_rules! setters {
    ($($name:ident: $type:ty),* $(,)?) => {$(
        #[doc = concat!("Sets [`TrainOptions::", stringify!($name), "`].")]
        #[must_use]
        pub fn $name(self, $name: $type) -> Self {
            Self { $name, ..self }
        }
    )*};
}

macro_rules! optional {
    ($($name:ident: $type:ty),* $(,)?) => {$(
        #[doc = concat!("Sets [`TrainOptions::", stringify!($name), "`].")]
        #[must_use]
        pub fn $name(self, $name: impl Into<Option<$type>>) -> Self {
            Self { $name: $name.into(), ..self }
        }
    )*};
}

impl TrainOptions {
    setters! {
        epochs: u64, batch_size: usize, grad_accum: usize, lr: f64, schedule: Schedule, warmup_steps: u64,
        weight_decay: f32, optimizer: Optimizer, label_smoothing: f32, seed: u64, gradient_checkpointing: bool,
        save_limit: usize,
    }

    optional! { max_steps: u64, clip: f32, eval_steps: u64, save_steps: u64, patience: u64 }

    /// # Errors
    /// [`ErrorKind::Option`] for the first option out of its range.
    pub fn validate(&self) -> Result<()> {
        let fail = |name: &str, expected: &str, found: &dyn std::fmt::Display| {
            Err(Error::new(ErrorKind::Option, format_args!("{name}: expected {expected}, found {found}")))
        };
        let positive = [
            ("epochs", self.epochs),
            ("max_steps", self.max_steps.unwrap_or(1)),
            ("batch_size", self.batch_size as u64),
            ("grad_accum", self.grad_accum as u64),
            ("eval_steps", self.eval_steps.unwrap_or(1)),
            ("save_steps", self.save_steps.unwrap_or(1)),
            ("save_limit", self.save_limit as u64),
            ("patience", self.patience.unwrap_or(1)),
        ];
        if let Some((name, found)) = positive.iter().find(|(_, value)| *value == 0) {
            return fail(name, "at least 1", found);
        }
        if !(self.lr.is_finite() && self.lr > 0.0) {
            return fail("lr", "a number above 0", &self.lr);
        }
        if !(self.weight_decay.is_finite() && self.weight_decay >= 0.0) {
            return fail("weight_decay", "a number of at least 0", &self.weight_decay);
        }
        if !(0.0..1.0).contains(&self.label_smoothing) {
            return fail("label_smoothing", "0 to below 1", &self.label_smoothing);
        }
        match self.clip {
            Some(clip) if !(clip > 0.0 && clip.is_finite()) => fail("clip", "a number above 0", &clip),
            _ => Ok(()),
        }
    }
}
