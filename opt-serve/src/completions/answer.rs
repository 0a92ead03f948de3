//! Answers of `/v1/completions`.

use super::logprobs::Logprobs;
use opt_core::generation::FinishReason;
use serde::Serialize;
use utoipa::ToSchema;

/// An answer, or a piece of one that is streamed.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub(crate) struct Completion {
    pub(crate) id: String,
    /// `text_completion`.
    pub(crate) object: &'static str,
    /// Seconds since 1970.
    pub(crate) created: u64,
    /// The model, or the adapter, that made it.
    pub(crate) model: String,
    /// What runs it: results with a seed stay the same while this does.
    pub(crate) system_fingerprint: String,
    /// `n` for each prompt, in order.
    pub(crate) choices: Vec<Choice>,
    /// In streams null but in the last piece, and only if asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Usage>)]
    pub(crate) usage: Option<Option<Usage>>,
}

/// One continuation of one prompt.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub(crate) struct Choice {
    pub(crate) text: String,
    /// Its prompt's place times `n`, and its own among those.
    pub(crate) index: usize,
    pub(crate) logprobs: Option<Logprobs>,
    /// `stop` at an end token or a stop string, `length` at `max_tokens` or the context; null while it goes on.
    pub(crate) finish_reason: Option<&'static str>,
    /// The new tokens, with `return_token_ids`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) token_ids: Option<Vec<u32>>,
    /// The prompt's tokens, with `return_token_ids`; in streams in the first piece.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) prompt_token_ids: Option<Vec<u32>>,
}

/// How many tokens it took.
#[derive(Debug, Clone, Copy, Default, Serialize, ToSchema)]
pub(crate) struct Usage {
    pub(crate) prompt_tokens: usize,
    pub(crate) completion_tokens: usize,
    pub(crate) total_tokens: usize,
    pub(crate) prompt_tokens_details: PromptDetails,
}

/// Of the tokens of prompts.
#[derive(Debug, Clone, Copy, Default, Serialize, ToSchema)]
pub(crate) struct PromptDetails {
    /// Those that did not have to be run, since an earlier prompt began alike.
    pub(crate) cached_tokens: usize,
}

impl Usage {
    pub(crate) fn of(prompt_tokens: usize, completion_tokens: usize, cached_tokens: usize) -> Self {
        Self {
            prompt_tokens,
            completion_tokens,
            total_tokens: prompt_tokens + completion_tokens,
            prompt_tokens_details: PromptDetails { cached_tokens },
        }
    }
}

pub(crate) fn finish(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Length => "length",
        _ => "stop",
    }
}
