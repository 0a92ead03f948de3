//! Processors that treat every token alike.

use super::LogitsProcessor;
use crate::{Result, generation::math};

/// Replaces NaN by 0 and infinities by the largest finite values.
pub(super) struct RemoveInvalid;

impl LogitsProcessor for RemoveInvalid {
    fn name(&self) -> &str {
        "remove_invalid_values"
    }

    fn process(&self, _ids: &[u32], scores: &mut [f32]) -> Result<()> {
        for score in scores {
            *score = if score.is_nan() { 0.0 } else { score.clamp(f32::MIN, f32::MAX) };
        }
        Ok(())
    }
}

/// Divides by a temperature.
pub(super) struct Temperature(pub(super) f32);

impl LogitsProcessor for Temperature {
    fn name(&self) -> &str {
        "temperature"
    }

    fn process(&self, _ids: &[u32], scores: &mut [f32]) -> Result<()> {
        scores.iter_mut().for_each(|s| *s /= self.0);
        Ok(())
    }
}

/// Log-softmax.
pub(super) struct Renormalize;

impl LogitsProcessor for Renormalize {
    fn name(&self) -> &str {
        "renormalize_logits"
    }

    fn process(&self, _ids: &[u32], scores: &mut [f32]) -> Result<()> {
        math::log_softmax_in_place(scores);
        Ok(())
    }
}
