//! Which examples each step sees.

use super::{Dataset, permutation::Permutation};
use crate::{Error, ErrorKind, Result, tuning::Example};

/// The batches of a run, by step: what a run sees at a step depends on nothing but the data, the sizes and the seed,
/// so a run that is resumed goes on without going through what it has seen.
///
/// Each epoch has its own order. As with transformers' `Trainer`, the last batch of an epoch may be smaller and its
/// last step may have fewer micro-batches: a step never spans two epochs.
///
/// ```
/// use opt_core::{config::OptConfig, tuning::{Example, data::{Batches, DataOptions, Dataset}}};
///
/// let options = DataOptions::new(&OptConfig::default(), None);
/// let data = Dataset::new((0..10).map(|i| Example::new(vec![2, i])), &options)?;
/// let batches = Batches::new(data, 2, 2)?.shuffled(7);
/// assert_eq!(batches.per_epoch(), 3); // of 4, 4 and 2 examples
/// assert_eq!(batches.step(3)?.epoch, 1);
/// assert_eq!(batches.step(5)?.micro_batches.len(), 1);
/// # Ok::<(), opt_core::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Batches {
    data: Dataset,
    batch: u64,
    micros: u64,
    seed: Option<u64>,
}

/// What one step learns from.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Step {
    /// The epoch, from 0.
    pub epoch: u64,
    /// The examples of each micro-batch.
    pub micro_batches: Vec<Vec<Example>>,
}

impl Step {
    /// The number of tokens to be predicted, over all micro-batches; that of examples where the goal is another.
    pub fn targets(&self) -> usize {
        self.micro_batches.iter().flatten().map(Example::units).sum()
    }
}

/// Keeps the orders of epochs apart from other uses of the same seed.
const STREAM: u64 = 0x6570_6f63 << 32;

impl Batches {
    /// Batches of `batch` examples, of which each step takes `micros`; in the data's own order.
    ///
    /// # Errors
    /// [`ErrorKind::Option`] for sizes of 0.
    pub fn new(data: Dataset, batch: usize, micros: usize) -> Result<Self> {
        if batch == 0 || micros == 0 {
            let message = format_args!(
                "expected batches of at least 1 example and steps of at least 1 batch, found {batch} and {micros}"
            );
            return Err(Error::new(ErrorKind::Option, message));
        }
        Ok(Self { data, batch: batch as u64, micros: micros as u64, seed: None })
    }

    /// In random order, another one in each epoch.
    #[must_use]
    pub fn shuffled(self, seed: u64) -> Self {
        Self { seed: Some(seed), ..self }
    }

    /// The number of steps of an epoch.
    pub fn per_epoch(&self) -> u64 {
        self.data.len().div_ceil(self.batch).div_ceil(self.micros)
    }

    /// The examples.
    pub fn data(&self) -> &Dataset {
        &self.data
    }

    /// What step `step` of the run learns from; the first is 0.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] if the temporary file of token ids cannot be read.
    pub fn step(&self, step: u64) -> Result<Step> {
        // No dataset is empty.
        let (epoch, within) = (step / self.per_epoch().max(1), step % self.per_epoch().max(1));
        let len = self.data.len();
        let order = self.seed.map(|seed| Permutation::new(len, seed, STREAM | (epoch & 0xffff_ffff)));
        let end = |start: u64, size: u64| start.saturating_add(size).min(len);
        let start = within * self.batch.saturating_mul(self.micros);
        let mut at = start;
        let mut micro_batches = Vec::new();
        while at < end(start, self.batch.saturating_mul(self.micros)) {
            let next = end(at, self.batch);
            let place = |place| order.as_ref().map_or(place, |order| order.at(place));
            micro_batches.push((at..next).map(|i| self.data.get(place(i))).collect::<Result<_>>()?);
            at = next;
        }
        Ok(Step { epoch, micro_batches })
    }
}
