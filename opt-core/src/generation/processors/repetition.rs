//! Processors against repetition.

use super::LogitsProcessor;
use crate::Result;

/// Makes every token seen before less probable, once however often it was seen (Keskar et al. 2019, CTRL).
pub(super) struct RepetitionPenalty(pub(super) f32);

impl LogitsProcessor for RepetitionPenalty {
    fn name(&self) -> &str {
        "repetition_penalty"
    }

    fn process(&self, ids: &[u32], scores: &mut [f32]) -> Result<()> {
        let mut seen = vec![0u64; scores.len().div_ceil(64)];
        for &id in ids {
            let id = id as usize;
            let (Some(score), Some(word)) = (scores.get_mut(id), seen.get_mut(id / 64)) else { continue };
            let bit = 1 << (id % 64);
            if *word & bit == 0 {
                *word |= bit;
                *score = if *score < 0.0 { *score * self.0 } else { *score / self.0 };
            }
        }
        Ok(())
    }
}

/// Forbids every token that would complete an n-gram already there.
pub(super) struct NoRepeatNgram(pub(super) usize);

impl LogitsProcessor for NoRepeatNgram {
    fn name(&self) -> &str {
        "no_repeat_ngram_size"
    }

    fn process(&self, ids: &[u32], scores: &mut [f32]) -> Result<()> {
        let Some(start) = (ids.len() + 1).checked_sub(self.0) else { return Ok(()) };
        let prefix = ids.get(start..).unwrap_or_default();
        for ngram in ids.windows(self.0) {
            if let [head @ .., last] = ngram
                && head == prefix
                && let Some(score) = scores.get_mut(*last as usize)
            {
                *score = f32::NEG_INFINITY;
            }
        }
        Ok(())
    }
}
