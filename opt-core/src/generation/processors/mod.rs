//! Changes to the scores before a token is chosen.

use super::{GenerationConfig, Settings, StoppingCriterion};
use crate::Result;
use std::{fmt, sync::Arc};

/// A change to one row of scores.
///
/// Stateless: whatever it needs follows from its construction and from `ids`, so one value serves all rows, beams and
/// threads.
pub trait LogitsProcessor: Send + Sync {
    /// What it is called in [`ProcessorChain::names`].
    fn name(&self) -> &str;

    /// Changes `scores` (`[vocab]`) of the token that follows `ids` (prompt and generated).
    ///
    /// # Errors
    /// Whatever the implementation cannot do; it ends the request.
    fn process(&self, ids: &[u32], scores: &mut [f32]) -> Result<()>;
}

/// The tokens that may follow `ids` (prompt and generated).
pub type PrefixFn = Arc<dyn Fn(&[u32]) -> Vec<u32> + Send + Sync>;

/// Callbacks of the caller's.
#[derive(Clone, Default)]
pub struct Hooks {
    /// Processors, run after the built-in ones and before temperature and filters.
    pub processors: Vec<Arc<dyn LogitsProcessor>>,
    /// Restricts each next token.
    pub prefix_allowed_tokens: Option<PrefixFn>,
    /// Further reasons to stop.
    pub criteria: Vec<Arc<dyn StoppingCriterion>>,
}

/// A request's processors in transformers' order.
#[derive(Clone, Default)]
pub struct ProcessorChain {
    processors: Arc<[Arc<dyn LogitsProcessor>]>,
}

impl ProcessorChain {
    /// The processors that `config` and `hooks` ask for, warpers included when sampling.
    ///
    /// # Errors
    /// For options out of range.
    pub fn new(_config: &GenerationConfig, _settings: &Settings, hooks: &Hooks) -> Result<Self> {
        Ok(Self { processors: hooks.processors.clone().into() })
    }

    /// Whether it leaves every row as it is.
    pub fn is_empty(&self) -> bool {
        self.processors.is_empty()
    }

    /// Runs all processors in order over `scores` (`[vocab]`) of the token that follows `ids`.
    ///
    /// # Errors
    /// Those of the processors.
    pub fn apply(&self, ids: &[u32], scores: &mut [f32]) -> Result<()> {
        self.processors.iter().try_for_each(|p| p.process(ids, scores))
    }

    /// Names in the order of application.
    pub fn names(&self) -> Vec<&str> {
        self.processors.iter().map(|p| p.name()).collect()
    }
}

impl fmt::Debug for ProcessorChain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ProcessorChain").field(&self.names()).finish()
    }
}

impl fmt::Debug for Hooks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hooks")
            .field("processors", &self.processors.iter().map(|p| p.name()).collect::<Vec<_>>())
            .finish_non_exhaustive()
    }
}
