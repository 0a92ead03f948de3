//! Which values of single options are possible.

use super::{GenerationConfig, TokenIds};
use crate::{Error, ErrorKind, Result};

/// More beams than anyone means; each holds a cache.
const MOST_BEAMS: usize = 4096;
/// More sequences of one prompt than anyone means.
const MOST_SEQUENCES: usize = 65536;

/// The names of `num_assistant_tokens_schedule`.
pub(super) const SCHEDULES: [&str; 3] = ["constant", "heuristic", "heuristic_transient"];

/// `name: expected ..., found ...`.
pub(super) fn wrong(name: &str, expected: impl std::fmt::Display, found: impl std::fmt::Display) -> Error {
    Error::new(ErrorKind::Option, format!("{name}: expected {expected}, found {found}"))
}

impl GenerationConfig {
    /// Checks every option by itself, for a model of `vocab_size` tokens.
    pub(super) fn check(&self, vocab_size: usize) -> Result<()> {
        self.check_numbers()?;
        self.check_counts()?;
        self.check_ids(vocab_size)?;
        if let Some(name) = self.num_assistant_tokens_schedule.as_deref().filter(|n| !SCHEDULES.contains(n)) {
            return Err(wrong(
                "num_assistant_tokens_schedule",
                SCHEDULES.join(", "),
                format_args!("{name:?}"),
            ));
        }
        if self.stop_strings.iter().flatten().any(String::is_empty) {
            return Err(wrong("stop_strings", "texts", "an empty one"));
        }
        if let Some(scale) = self.guidance_scale.filter(|s| *s != 1.0) {
            let message = format!("guidance_scale: guidance is not supported; expected 1, found {scale}");
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        Ok(())
    }

    fn check_numbers(&self) -> Result<()> {
        let inside = |name: &str, value: Option<f32>, expected: &str, test: fn(f32) -> bool| match value {
            // No comparison holds for NaN, so it fails every test.
            Some(value) if !test(value) => Err(wrong(name, expected, value)),
            _ => Ok(()),
        };
        let from_zero = |v: f32| (0.0..f32::INFINITY).contains(&v);
        let above_zero = |v: f32| v > 0.0 && v < f32::INFINITY;
        let share = |v: f32| (0.0..=1.0).contains(&v);
        let mass = |v: f32| v > 0.0 && v <= 1.0;
        let cutoff = |v: f32| (0.0..1.0).contains(&v);
        inside("temperature", self.temperature, "a number above 0", from_zero)?;
        inside("top_p", self.top_p, "a number above 0 and at most 1", mass)?;
        inside("min_p", self.min_p, "a number from 0 to 1", share)?;
        inside("typical_p", self.typical_p, "a number above 0 and at most 1", mass)?;
        inside("epsilon_cutoff", self.epsilon_cutoff, "a number from 0 to below 1", cutoff)?;
        inside("eta_cutoff", self.eta_cutoff, "a number from 0 to below 1", cutoff)?;
        inside("repetition_penalty", self.repetition_penalty, "a number above 0", above_zero)?;
        inside("length_penalty", self.length_penalty, "a finite number", f32::is_finite)?;
        inside("diversity_penalty", self.diversity_penalty, "a number of at least 0", from_zero)?;
        inside("penalty_alpha", self.penalty_alpha, "a number from 0 to 1", share)?;
        let confidence = self.assistant_confidence_threshold;
        inside("assistant_confidence_threshold", confidence, "a number from 0 to 1", share)?;
        let factor = self.exponential_decay_length_penalty.map(|(_, factor)| factor);
        inside("exponential_decay_length_penalty", factor, "a factor above 0", above_zero)?;
        if let Some(seconds) = self.max_time.filter(|s| !(0.0..f64::INFINITY).contains(s)) {
            return Err(wrong("max_time", "seconds, at least 0", seconds));
        }
        match self.sequence_bias.iter().flatten().find(|(_, bias)| bias.is_nan() || **bias == f32::INFINITY) {
            Some((ids, bias)) => {
                Err(wrong("sequence_bias", "a finite bias", format_args!("{bias} for {ids:?}")))
            }
            None => Ok(()),
        }
    }

    fn check_counts(&self) -> Result<()> {
        let counts = [
            ("max_new_tokens", self.max_new_tokens, usize::MAX),
            ("num_beams", self.num_beams, MOST_BEAMS),
            ("num_beam_groups", self.num_beam_groups, MOST_BEAMS),
            ("num_return_sequences", self.num_return_sequences, MOST_SEQUENCES),
            ("prompt_lookup_num_tokens", self.prompt_lookup_num_tokens, usize::MAX),
            ("max_matching_ngram_size", self.max_matching_ngram_size, usize::MAX),
            ("num_assistant_tokens", self.num_assistant_tokens, usize::MAX),
        ];
        for (name, value, most) in counts {
            match value {
                Some(0) => return Err(wrong(name, "at least 1", 0)),
                Some(found) if found > most => {
                    return Err(wrong(name, format_args!("at most {most}"), found));
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn check_ids(&self, vocab_size: usize) -> Result<()> {
        let inside = |name: &str, ids: &[u32]| match ids.iter().find(|id| **id as usize >= vocab_size) {
            Some(id) => Err(wrong(name, format_args!("token ids below the vocabulary of {vocab_size}"), id)),
            None => Ok(()),
        };
        let lists = [
            ("eos_token_id", self.eos_token_id.as_ref().map(TokenIds::to_vec)),
            ("forced_bos_token_id", self.forced_bos_token_id.map(|id| vec![id])),
            ("forced_eos_token_id", self.forced_eos_token_id.as_ref().map(TokenIds::to_vec)),
            ("suppress_tokens", self.suppress_tokens.clone()),
            ("begin_suppress_tokens", self.begin_suppress_tokens.clone()),
        ];
        for (name, ids) in lists {
            inside(name, &ids.unwrap_or_default())?;
        }
        if self.forced_eos_token_id == Some(TokenIds::Many(Vec::new())) {
            return Err(wrong("forced_eos_token_id", "at least one token id", "none"));
        }
        let words = self.bad_words_ids.iter().flatten().map(|ids| ("bad_words_ids", ids));
        let biases = self.sequence_bias.iter().flatten().map(|(ids, _)| ("sequence_bias", ids));
        for (name, ids) in words.chain(biases) {
            if ids.is_empty() {
                return Err(wrong(name, "sequences of token ids", "an empty one"));
            }
            inside(name, ids)?;
        }
        Ok(())
    }
}
