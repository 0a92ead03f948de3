//! What lm-evaluation-harness asks of a model, asked of an [`Opt`]: log-likelihoods of continuations and of whole
//! texts, and texts up to a stop string; tokenized, cut and windowed as it does (its class `HFLM`).

mod encode;
mod generate;
mod share;

pub use encode::Encoded;
pub use generate::Written;
pub use share::Shared;

use opt_core::{CacheDType, CancelToken, Opt, Progress, ProgressFn, Result, tokenizer::Bos};
use serde::{Deserialize, Serialize};
use std::ops::ControlFlow;

/// How probable a continuation is.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct LogLikelihood {
    /// The sum over its tokens of log p(token | all before it), in nats.
    pub log_prob: f64,
    /// Whether each of its tokens is the most probable one at its place.
    pub greedy: bool,
}

/// Asks a model what the harness asks.
///
/// ```
/// use opt_core::Opt;
/// use opt_eval::Asker;
///
/// let opt = Opt::open("../models/opt-novels")?;
/// let asker = Asker::new(&opt);
/// let pairs = [("The old house stood", " on the hill"), ("The old house stood", " of the and")];
/// let encoded: Vec<_> = pairs.iter().map(|(a, b)| asker.encode(a, b)).collect::<Result<_, _>>()?;
/// let found = asker.log_likelihoods(&encoded, &mut |_| std::ops::ControlFlow::Continue(()))?;
/// assert!(found[0].log_prob > found[1].log_prob);
/// # Ok::<(), opt_core::Error>(())
/// ```
#[derive(Clone)]
pub struct Asker<'a> {
    opt: &'a Opt,
    bos: Bos,
    share: bool,
    cache: CacheDType,
    seed: u64,
    cancel: CancelToken,
}

impl<'a> Asker<'a> {
    /// Asks `opt`; texts begin as its tokenizer says, which the harness does since 0.4.10.
    pub fn new(opt: &'a Opt) -> Self {
        Self {
            opt,
            bos: Bos::Model,
            share: true,
            cache: CacheDType::default(),
            seed: 0,
            cancel: CancelToken::new(),
        }
    }

    /// Sets whether texts begin with BOS; never, with older harnesses.
    #[must_use]
    pub fn bos(mut self, bos: Bos) -> Self {
        self.bos = bos;
        self
    }

    /// Sets whether what several requests begin with is run once for all of them.
    #[must_use]
    pub fn share(mut self, share: bool) -> Self {
        self.share = share;
        self
    }

    /// Sets how keys and values are held: of what several requests begin with, and of texts while they are made.
    #[must_use]
    pub fn cache_dtype(mut self, cache: CacheDType) -> Self {
        self.cache = cache;
        self
    }

    /// Sets the seed of texts that are drawn. Each prompt draws by itself, so that a text depends on nothing but its prompt
    /// and this.
    #[must_use]
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// Lets `cancel` end the work.
    #[must_use]
    pub fn cancel(mut self, cancel: CancelToken) -> Self {
        self.cancel = cancel;
        self
    }

    /// The model.
    pub fn opt(&self) -> &'a Opt {
        self.opt
    }

    /// Whether texts begin with BOS.
    pub fn bos_rule(&self) -> Bos {
        self.bos
    }

    /// The log-likelihood of each, in order.
    ///
    /// # Errors
    /// [`opt_core::ErrorKind::Cancelled`], [`opt_core::ErrorKind::Backend`], and
    /// [`opt_core::ErrorKind::Prompt`] for ids outside the vocabulary.
    pub fn log_likelihoods(
        &self,
        encoded: &[Encoded],
        progress: &mut ProgressFn<'_>,
    ) -> Result<Vec<LogLikelihood>> {
        Shared::plan(encoded, self.share).run(self, encoded, progress)
    }

    /// The log-likelihood of each text as a whole, in nats: the sum over windows that do not overlap in what they
    /// predict and have one token of context.
    ///
    /// # Errors
    /// As [`Asker::log_likelihoods`]; [`opt_core::ErrorKind::Tokenizer`] for a model without tokenizer.
    pub fn rolling(&self, texts: &[String], progress: &mut ProgressFn<'_>) -> Result<Vec<f64>> {
        let mut windows = Vec::new();
        let mut owners = Vec::new();
        for (index, text) in texts.iter().enumerate() {
            let of_text = self.windows(text)?;
            owners.extend(of_text.iter().map(|_| index));
            windows.extend(of_text);
        }
        let total = windows.len() as u64;
        let mut in_windows =
            |at: Progress<'_>| -> ControlFlow<()> { progress(Progress::new("windows", at.done, total)) };
        let found = self.log_likelihoods(&windows, &mut in_windows)?;
        let mut sums = vec![0.0; texts.len()];
        for (owner, found) in owners.into_iter().zip(found) {
            if let Some(sum) = sums.get_mut(owner) {
                *sum += found.log_prob;
            }
        }
        Ok(sums)
    }
}
