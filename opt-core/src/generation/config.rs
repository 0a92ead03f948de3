use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// `early_stopping` of beam search.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum EarlyStopping {
    /// `true`: stop as soon as there are enough finished hypotheses.
    Yes,
    /// `false`: stop when the best running beam, scored at its current length, cannot beat the worst finished one.
    No,
    /// `"never"`: like `No`, with the length that is best for the running beam.
    Never,
}

/// One token id or several.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum TokenIds {
    /// One id.
    One(u32),
    /// Several ids.
    Many(Vec<u32>),
}

/// What transformers calls `GenerationConfig`: the same names, and `None` where nothing was said.
///
/// Three of them are laid over each other: the model's generation_config.json, a file of the user's, the call's own
/// settings; a field that is `None` leaves the one below standing.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
#[serde(default)]
pub struct GenerationConfig {
    /// Longest sequence, prompt included.
    pub max_length: Option<usize>,
    /// Most new tokens; wins over `max_length`. With neither, 20.
    pub max_new_tokens: Option<usize>,
    /// Shortest sequence, prompt included: eos is impossible before.
    pub min_length: Option<usize>,
    /// Fewest new tokens.
    pub min_new_tokens: Option<usize>,
    /// When beam search stops.
    pub early_stopping: Option<EarlyStopping>,
    /// Seconds after which to stop.
    pub max_time: Option<f64>,
    /// Texts that end a sequence; they stay in the output.
    pub stop_strings: Option<Vec<String>>,
    /// Draw instead of taking the most probable.
    pub do_sample: Option<bool>,
    /// Beams of beam search; 1 is none.
    pub num_beams: Option<usize>,
    /// Groups of diverse beam search.
    pub num_beam_groups: Option<usize>,
    /// What a group's beam loses for each token an earlier group picked in the same step.
    pub diversity_penalty: Option<f32>,
    /// Exponent of the length that beam scores are divided by.
    pub length_penalty: Option<f32>,
    /// Sequences handed out for each prompt.
    pub num_return_sequences: Option<usize>,
    /// Contrastive search: weight of the degeneration penalty.
    pub penalty_alpha: Option<f32>,
    /// Divides the logits.
    pub temperature: Option<f32>,
    /// Keep the k most probable (50 unless said otherwise; 0 is off).
    pub top_k: Option<usize>,
    /// Keep the most probable that together reach this mass.
    pub top_p: Option<f32>,
    /// Keep what has at least this share of the largest probability.
    pub min_p: Option<f32>,
    /// Locally typical sampling: mass to keep.
    pub typical_p: Option<f32>,
    /// Drop what is less probable than this.
    pub epsilon_cutoff: Option<f32>,
    /// Drop what is less probable than min(ε, √ε e^-entropy).
    pub eta_cutoff: Option<f32>,
    /// Divides (or multiplies, below 0) the logits of tokens seen before.
    pub repetition_penalty: Option<f32>,
    /// No n-gram of this size occurs twice; 0 is off.
    pub no_repeat_ngram_size: Option<usize>,
    /// Token sequences that must not appear.
    pub bad_words_ids: Option<Vec<Vec<u32>>>,
    /// Added to the logit that would complete a token sequence.
    #[serde(with = "sequence_bias")]
    pub sequence_bias: Option<BTreeMap<Vec<u32>, f32>>,
    /// Tokens that must not appear.
    pub suppress_tokens: Option<Vec<u32>>,
    /// Tokens that must not come first.
    pub begin_suppress_tokens: Option<Vec<u32>>,
    /// The first token after a prompt of one.
    pub forced_bos_token_id: Option<u32>,
    /// The last token when `max_length` is reached.
    pub forced_eos_token_id: Option<TokenIds>,
    /// Replace NaN and infinite logits.
    pub remove_invalid_values: Option<bool>,
    /// (start, factor): raises eos exponentially from `start` new tokens on.
    pub exponential_decay_length_penalty: Option<(usize, f32)>,
    /// Log-softmax after all processors.
    pub renormalize_logits: Option<bool>,
    /// Classifier-free guidance; only 1 is possible.
    pub guidance_scale: Option<f32>,
    /// Prompt lookup: tokens to propose from the prompt at each step.
    pub prompt_lookup_num_tokens: Option<usize>,
    /// Prompt lookup: longest n-gram to look for.
    pub max_matching_ngram_size: Option<usize>,
    /// Assisted decoding: tokens the draft model proposes.
    pub num_assistant_tokens: Option<usize>,
    /// Assisted decoding: `constant` or `heuristic`.
    pub num_assistant_tokens_schedule: Option<String>,
    /// Assisted decoding: the draft stops below this probability.
    pub assistant_confidence_threshold: Option<f32>,
    /// Padding token.
    pub pad_token_id: Option<u32>,
    /// Token put before a text.
    pub bos_token_id: Option<u32>,
    /// Tokens that end a sequence.
    pub eos_token_id: Option<TokenIds>,
    /// Keep keys and values between steps.
    pub use_cache: Option<bool>,
    /// Seed of the draws; not in transformers' file.
    pub seed: Option<u64>,
}

/// transformers writes `[[[ids], bias], ...]`, since JSON keys are strings.
mod sequence_bias {
    use super::*;
    use serde::{Deserializer, Serializer};
    type Map = Option<BTreeMap<Vec<u32>, f32>>;

    pub(super) fn serialize<S: Serializer>(map: &Map, serializer: S) -> Result<S::Ok, S::Error> {
        map.as_ref().map(|m| m.iter().collect::<Vec<_>>()).serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Map, D::Error> {
        Ok(Option::<Vec<(Vec<u32>, f32)>>::deserialize(deserializer)?
            .map(|pairs| pairs.into_iter().collect()))
    }
}
