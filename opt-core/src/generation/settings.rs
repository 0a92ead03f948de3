use super::{EarlyStopping, GenerationConfig, TokenIds};
use crate::{Error, ErrorKind, Result, config::OptConfig};
use std::time::Duration;

/// How the length of a draft develops.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum AssistantSchedule {
    /// Always the same.
    #[default]
    Constant,
    /// Two more after a draft that was accepted whole, one less after another, never below one.
    Heuristic,
}

/// Which way of generating the settings ask for.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Method {
    /// One token after the other: the most probable, or drawn.
    Single,
    /// Beam search.
    Beam {
        /// Number of beams.
        beams: usize,
    },
    /// Diverse beam search (Vijayakumar et al. 2016).
    GroupBeam {
        /// Number of beams in all groups together.
        beams: usize,
        /// Number of groups; divides `beams`.
        groups: usize,
        /// What a beam loses for each pick of the same token by an earlier group.
        diversity: f32,
    },
    /// Contrastive search (Su et al. 2022).
    Contrastive {
        /// Weight of the degeneration penalty.
        alpha: f32,
        /// Candidates for each token.
        k: usize,
    },
    /// A draft model proposes, the target model checks.
    Assisted {
        /// Tokens of the first draft.
        tokens: usize,
        /// How that number develops.
        schedule: AssistantSchedule,
        /// The draft ends behind a token less probable than this (0: never).
        confidence: f32,
    },
    /// The prompt itself proposes, the model checks.
    PromptLookup {
        /// Most tokens of a draft.
        tokens: usize,
        /// Longest n-gram to look for.
        max_ngram: usize,
    },
}

/// What a call asks for that is not in [`GenerationConfig`].
#[derive(Debug, Clone, Default)]
pub struct Extras {
    /// How many of the most probable tokens to report with each token.
    pub top_alternatives: usize,
    /// Whether to keep the processed scores.
    pub keep_scores: bool,
    /// Whether to keep the raw logits.
    pub keep_logits: bool,
    /// Whether there is a draft model.
    pub has_assistant: bool,
}

/// One request's settings, resolved and validated.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Settings {
    /// Ids of the prompt.
    pub prompt_len: usize,
    /// Rows of embeddings in front of the prompt's ids.
    pub embeds_len: usize,
    /// Width of a row of scores.
    pub vocab_size: usize,
    /// Longest list of prompt and generated ids (rows of embeddings not counted). With `embeds_len` never above the
    /// context, so that the whole sequence can be run again.
    pub max_length: usize,
    /// Tokens that end a sequence.
    pub eos: Vec<u32>,
    /// Padding token.
    pub pad: Option<u32>,
    /// Which way of generating.
    pub method: Method,
    /// Draw, in methods that can do both.
    pub do_sample: bool,
    /// Sequences to hand out.
    pub num_return_sequences: usize,
    /// Exponent of the length that beam scores are divided by.
    pub length_penalty: f32,
    /// When beam search stops.
    pub early_stopping: EarlyStopping,
    /// After which time to stop.
    pub max_time: Option<Duration>,
    /// Texts that end a sequence.
    pub stop_strings: Vec<String>,
    /// Seed of the draws; if none was given, one from the system, so that the run can be repeated.
    pub seed: u64,
    /// How many of the most probable tokens to report with each token.
    pub top_alternatives: usize,
    /// Whether to keep the processed scores.
    pub keep_scores: bool,
    /// Whether to keep the raw logits.
    pub keep_logits: bool,
}

impl GenerationConfig {
    /// Settings of one request: `prompt` are its ids, behind `embeds_len` rows of embeddings. Also warnings, one line each.
    ///
    /// # Errors
    /// [`ErrorKind::Option`] for a value out of range or options that contradict each other, [`ErrorKind::Prompt`] for
    /// a prompt that cannot be run.
    pub fn resolve(
        &self,
        model: &OptConfig,
        prompt: &[u32],
        embeds_len: usize,
        extras: &Extras,
    ) -> Result<(Settings, Vec<String>)> {
        if prompt.len() + embeds_len == 0 {
            return Err(Error::new(ErrorKind::Prompt, "prompt: expected at least one token, found none"));
        }
        let context = model.max_position_embeddings.saturating_sub(embeds_len);
        let max_length = match (self.max_new_tokens, self.max_length) {
            (Some(new), _) => prompt.len().saturating_add(new),
            (None, Some(max)) => max,
            (None, None) => prompt.len() + 20,
        };
        let beams = self.num_beams.unwrap_or(1);
        let groups = self.num_beam_groups.unwrap_or(1);
        let do_sample = self.do_sample.unwrap_or(false);
        let method = match self.penalty_alpha {
            _ if extras.has_assistant => Method::Assisted {
                tokens: self.num_assistant_tokens.unwrap_or(20),
                schedule: AssistantSchedule::Constant,
                confidence: self.assistant_confidence_threshold.unwrap_or(0.4),
            },
            _ if self.prompt_lookup_num_tokens.is_some() => Method::PromptLookup {
                tokens: self.prompt_lookup_num_tokens.unwrap_or(10),
                max_ngram: self.max_matching_ngram_size.unwrap_or(2),
            },
            _ if groups > 1 => {
                Method::GroupBeam { beams, groups, diversity: self.diversity_penalty.unwrap_or(0.0) }
            }
            _ if beams > 1 => Method::Beam { beams },
            Some(alpha) if alpha > 0.0 && !do_sample && self.top_k.unwrap_or(50) > 1 => {
                Method::Contrastive { alpha, k: self.top_k.unwrap_or(50) }
            }
            _ => Method::Single,
        };
        let settings = Settings {
            prompt_len: prompt.len(),
            embeds_len,
            vocab_size: model.vocab_size,
            max_length: max_length.min(context),
            eos: self.eos_token_id.as_ref().map(TokenIds::to_vec).unwrap_or_default(),
            pad: self.pad_token_id,
            method,
            do_sample,
            num_return_sequences: self.num_return_sequences.unwrap_or(1),
            length_penalty: self.length_penalty.unwrap_or(1.0),
            early_stopping: self.early_stopping.unwrap_or(EarlyStopping::No),
            max_time: self.max_time.and_then(|s| Duration::try_from_secs_f64(s).ok()),
            stop_strings: self.stop_strings.clone().unwrap_or_default(),
            seed: self.seed.unwrap_or(0),
            top_alternatives: extras.top_alternatives,
            keep_scores: extras.keep_scores,
            keep_logits: extras.keep_logits,
        };
        Ok((settings, Vec::new()))
    }
}
