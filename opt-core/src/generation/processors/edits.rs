//! Processors that change the scores of a few tokens, whatever the others are.

use super::LogitsProcessor;
use crate::callbacks::PrefixFn;
use crate::{Error, ErrorKind, Result};

/// Rules a token out; ids outside the row are passed over.
fn forbid(scores: &mut [f32], ids: &[u32]) {
    for &id in ids {
        if let Some(score) = scores.get_mut(id as usize) {
            *score = f32::NEG_INFINITY;
        }
    }
}

/// Makes `ids` the only possible tokens, all alike.
fn force(scores: &mut [f32], ids: &[u32]) {
    scores.fill(f32::NEG_INFINITY);
    for &id in ids {
        if let Some(score) = scores.get_mut(id as usize) {
            *score = 0.0;
        }
    }
}

/// When an [`Edit`] applies, by the number of ids so far.
pub(super) enum When {
    Always,
    At(usize),
    Before(usize),
}

/// Forbids or forces tokens.
pub(super) struct Edit {
    pub(super) name: &'static str,
    pub(super) when: When,
    pub(super) ids: Vec<u32>,
    pub(super) force: bool,
}

impl LogitsProcessor for Edit {
    fn name(&self) -> &str {
        self.name
    }

    fn process(&self, ids: &[u32], scores: &mut [f32]) -> Result<()> {
        let applies = match self.when {
            When::Always => true,
            When::At(len) => ids.len() == len,
            When::Before(len) => ids.len() < len,
        };
        if applies {
            let edit = if self.force { force } else { forbid };
            edit(scores, &self.ids);
        }
        Ok(())
    }
}

/// Adds a bias to the token that would complete a sequence. A bias of negative infinity forbids it.
pub(super) struct SequenceBias {
    name: &'static str,
    single: Vec<(u32, f32)>,
    longer: Vec<(Vec<u32>, u32, f32)>,
}

impl SequenceBias {
    /// The sequences are different from each other; empty ones are passed over.
    pub(super) fn new<'a>(name: &'static str, biases: impl Iterator<Item = (&'a [u32], f32)>) -> Self {
        let (mut single, mut longer) = (Vec::new(), Vec::new());
        for (sequence, bias) in biases {
            match sequence {
                [] => {}
                [id] => single.push((*id, bias)),
                [prefix @ .., id] => longer.push((prefix.to_vec(), *id, bias)),
            }
        }
        Self { name, single, longer }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.single.is_empty() && self.longer.is_empty()
    }
}

impl LogitsProcessor for SequenceBias {
    fn name(&self) -> &str {
        self.name
    }

    fn process(&self, ids: &[u32], scores: &mut [f32]) -> Result<()> {
        // transformers looks at a sequence only once there are as many ids as it has, though one fewer would do.
        let completed = self
            .longer
            .iter()
            .filter(|(prefix, ..)| ids.len() > prefix.len() && ids.ends_with(prefix))
            .map(|&(_, id, bias)| (id, bias));
        for (id, bias) in self.single.iter().copied().chain(completed) {
            if let Some(score) = scores.get_mut(id as usize) {
                *score += bias;
            }
        }
        Ok(())
    }
}

/// Allows only what a callback names.
pub(super) struct PrefixConstraint(pub(super) PrefixFn);

impl LogitsProcessor for PrefixConstraint {
    fn name(&self) -> &str {
        "prefix_allowed_tokens_fn"
    }

    fn process(&self, ids: &[u32], scores: &mut [f32]) -> Result<()> {
        let allowed = (self.0)(ids);
        if allowed.is_empty() {
            let message = "prefix_allowed_tokens_fn: expected at least one token id, found none";
            return Err(Error::new(ErrorKind::Option, format!("{message} (after {} ids)", ids.len())));
        }
        let mut kept = Vec::with_capacity(allowed.len());
        for id in allowed {
            let Some(&score) = scores.get(id as usize) else {
                let message = format!("expected ids below the vocabulary of {}, found {id}", scores.len());
                return Err(Error::new(ErrorKind::Option, message).at("prefix_allowed_tokens_fn"));
            };
            kept.push((id as usize, score));
        }
        scores.fill(f32::NEG_INFINITY);
        kept.into_iter().for_each(|(id, score)| scores[id] = score);
        Ok(())
    }
}

/// Raises the end tokens more with each token from `start` ids on: score + |score| (factor^n - 1).
pub(super) struct ExponentialDecay {
    pub(super) start: usize,
    pub(super) factor: f64,
    pub(super) eos: Vec<u32>,
}

impl LogitsProcessor for ExponentialDecay {
    fn name(&self) -> &str {
        "exponential_decay_length_penalty"
    }

    fn process(&self, ids: &[u32], scores: &mut [f32]) -> Result<()> {
        let Some(steps) = ids.len().checked_sub(self.start).filter(|n| *n > 0) else { return Ok(()) };
        let growth = (self.factor.powf(steps as f64) - 1.0) as f32;
        for &id in &self.eos {
            // An end token that is ruled out stays so: infinity minus infinity would be no number.
            if let Some(score) = scores.get_mut(id as usize).filter(|s| s.is_finite()) {
                *score += score.abs() * growth;
            }
        }
        Ok(())
    }
}
