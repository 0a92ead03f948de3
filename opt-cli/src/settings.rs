//! The flags of `opt generate` that become a `GenerationConfig`.

use crate::out::Failure;
use clap::{Args, ValueEnum};
use opt_core::{
    Opt,
    constraint::Constraint,
    generation::{EarlyStopping, GenerationConfig},
    tokenizer::Bos,
};
use std::{collections::BTreeMap, path::PathBuf};

/// Flags named as in transformers' GenerationConfig.
#[derive(Debug, Args)]
pub(crate) struct Settings {
    /// Make at most N new tokens. [default: 20]
    #[arg(long, value_name = "N", help_heading = "Length")]
    max_new_tokens: Option<usize>,
    /// End when prompt and new tokens together are N; --max-new-tokens goes before it.
    #[arg(long, value_name = "N", help_heading = "Length")]
    max_length: Option<usize>,
    /// Forbid the end before prompt and new tokens together are N.
    #[arg(long, value_name = "N", help_heading = "Length")]
    min_length: Option<usize>,
    /// Forbid the end before there are N new tokens.
    #[arg(long, value_name = "N", help_heading = "Length")]
    min_new_tokens: Option<usize>,
    /// End after this many seconds.
    #[arg(long, value_name = "SECONDS", help_heading = "Length")]
    max_time: Option<f64>,
    /// End behind this text, which stays in the output; may be given several times.
    #[arg(long, value_name = "STRING", allow_hyphen_values = true, help_heading = "Length")]
    stop: Vec<String>,
    /// End behind any of these tokens, in place of the model's own.
    #[arg(long, value_name = "ID,...", value_delimiter = ',', help_heading = "Length")]
    eos_token_id: Option<Vec<u32>>,

    /// Draw tokens at random instead of taking the most probable.
    #[arg(long, help_heading = "Sampling")]
    do_sample: bool,
    /// Divide the logits by this: below 1 keeps closer to the most probable, above 1 is more varied.
    #[arg(long, value_name = "T", value_parser = temperature, allow_hyphen_values = true, help_heading = "Sampling")]
    temperature: Option<f32>,
    /// Draw among the K most probable tokens; 0 is no limit. [default: 50]
    #[arg(long, value_name = "K", help_heading = "Sampling")]
    top_k: Option<usize>,
    /// Draw among the most probable tokens that together reach this probability.
    #[arg(long, value_name = "P", allow_hyphen_values = true, help_heading = "Sampling")]
    top_p: Option<f32>,
    /// Draw among tokens with at least this share of the largest probability.
    #[arg(long, value_name = "P", allow_hyphen_values = true, help_heading = "Sampling")]
    min_p: Option<f32>,
    /// Draw among the tokens of typical information that together reach this probability.
    #[arg(long, value_name = "P", allow_hyphen_values = true, help_heading = "Sampling")]
    typical_p: Option<f32>,
    /// Never draw tokens less probable than this.
    #[arg(long, value_name = "P", allow_hyphen_values = true, help_heading = "Sampling")]
    epsilon_cutoff: Option<f32>,
    /// Never draw tokens less probable than this, the bound being lower where the model is less certain.
    #[arg(long, value_name = "P", allow_hyphen_values = true, help_heading = "Sampling")]
    eta_cutoff: Option<f32>,
    /// Return N continuations of each prompt.
    #[arg(long, value_name = "N", help_heading = "Sampling")]
    num_return_sequences: Option<usize>,

    /// Search with N beams; 1 is no search.
    #[arg(long, value_name = "N", help_heading = "Beams")]
    num_beams: Option<usize>,
    /// Divide the beams into N groups that keep away from each other.
    #[arg(long, value_name = "N", help_heading = "Beams")]
    num_beam_groups: Option<usize>,
    /// Subtract this from a token's score for each earlier group that chose it in the same step.
    #[arg(long, value_name = "X", allow_hyphen_values = true, help_heading = "Beams")]
    diversity_penalty: Option<f32>,
    /// Divide a beam's score by its length to this power: above 0 favours long ones.
    #[arg(long, value_name = "X", allow_hyphen_values = true, help_heading = "Beams")]
    length_penalty: Option<f32>,
    /// Stop when there are enough finished beams (true), when no running one is likely to be better (false), or when
    /// none can be (never).
    #[arg(long, value_name = "WHEN", help_heading = "Beams")]
    early_stopping: Option<When>,

    /// Make tokens less probable that were there before: above 1 is a penalty.
    #[arg(long, value_name = "X", allow_hyphen_values = true, help_heading = "Constraints")]
    repetition_penalty: Option<f32>,
    /// Let no sequence of N tokens occur twice.
    #[arg(long, value_name = "N", help_heading = "Constraints")]
    no_repeat_ngram_size: Option<usize>,
    /// Keep this text from appearing, tokenized as it stands (" cat" and "cat" are two words); may be given several
    /// times. Ids go through --generation-config.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true, help_heading = "Constraints")]
    bad_words: Vec<String>,
    /// Add BIAS to the logit of the token that would complete TEXT, tokenized as it stands; may be given several times.
    #[arg(long, value_name = "TEXT=BIAS", value_parser = bias, allow_hyphen_values = true, help_heading = "Constraints")]
    sequence_bias: Vec<(String, f32)>,
    /// Keep these tokens from appearing.
    #[arg(long, value_name = "ID,...", value_delimiter = ',', help_heading = "Constraints")]
    suppress_tokens: Option<Vec<u32>>,
    /// Keep these tokens from coming first.
    #[arg(long, value_name = "ID,...", value_delimiter = ',', help_heading = "Constraints")]
    begin_suppress_tokens: Option<Vec<u32>>,
    /// Make this the second token of the sequence, behind a prompt of one token.
    #[arg(long, value_name = "ID", help_heading = "Constraints")]
    forced_bos_token_id: Option<u32>,
    /// Make one of these the last token when the maximal length is reached.
    #[arg(long, value_name = "ID,...", value_delimiter = ',', help_heading = "Constraints")]
    forced_eos_token_id: Option<Vec<u32>>,

    /// Make JSON that is valid under the schema in this file. Texts that were not cut at the maximal length are whole.
    #[arg(long, value_name = "FILE.json", conflicts_with = "regex", help_heading = "Constraints")]
    json_schema: Option<PathBuf>,
    /// Make text that matches this pattern as a whole; it begins right behind the prompt, mostly with a space.
    #[arg(long, value_name = "PATTERN", allow_hyphen_values = true, help_heading = "Constraints")]
    regex: Option<String>,

    /// Contrastive search: weigh likeness to earlier tokens with X, 0 to 1; --top-k is the number of candidates.
    #[arg(long, value_name = "X", allow_hyphen_values = true, help_heading = "Other ways of generating")]
    penalty_alpha: Option<f32>,
    /// Faster, same result: guess up to N tokens ahead from the prompt.
    #[arg(long, value_name = "N", help_heading = "Other ways of generating")]
    prompt_lookup_num_tokens: Option<usize>,

    /// Take settings from this file in the form of generation_config.json: flags go before it, and it before the
    /// model's own.
    #[arg(long, value_name = "FILE.json", help_heading = "Model")]
    generation_config: Option<PathBuf>,
}

/// `--early-stopping`.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum When {
    True,
    False,
    Never,
}

impl From<When> for EarlyStopping {
    fn from(when: When) -> Self {
        match when {
            When::True => EarlyStopping::Yes,
            When::False => EarlyStopping::No,
            When::Never => EarlyStopping::Never,
        }
    }
}

/// In a file 0 means greedy search, since older tools wrote it so; who types it is better told.
fn temperature(text: &str) -> Result<f32, String> {
    match text.parse::<f32>() {
        Ok(value) if value > 0.0 && value.is_finite() => Ok(value),
        _ => Err("expected a number above 0; leave out --do-sample for the most probable tokens".to_owned()),
    }
}

/// `TEXT=BIAS`; the text may hold further `=`.
fn bias(text: &str) -> Result<(String, f32), String> {
    let parts = text.rsplit_once('=').filter(|(text, _)| !text.is_empty());
    let (text, bias) = parts.ok_or("expected TEXT=BIAS, such as \" sea=2.5\"")?;
    let bias = bias.parse().map_err(|_| format!("expected a number behind the last =, found {bias:?}"))?;
    Ok((text.to_owned(), bias))
}

impl Settings {
    /// The settings of flags and file; what both leave open is the model's. Reads the file, not the model.
    pub(crate) fn config(&self, seed: Option<u64>) -> Result<GenerationConfig, Failure> {
        let mut config = GenerationConfig::default();
        config.max_new_tokens = self.max_new_tokens;
        config.max_length = self.max_length;
        config.min_length = self.min_length;
        config.min_new_tokens = self.min_new_tokens;
        config.max_time = self.max_time;
        config.do_sample = self.do_sample.then_some(true);
        config.temperature = self.temperature;
        config.top_k = self.top_k;
        config.top_p = self.top_p;
        config.min_p = self.min_p;
        config.typical_p = self.typical_p;
        config.epsilon_cutoff = self.epsilon_cutoff;
        config.eta_cutoff = self.eta_cutoff;
        config.num_return_sequences = self.num_return_sequences;
        config.num_beams = self.num_beams;
        config.num_beam_groups = self.num_beam_groups;
        config.diversity_penalty = self.diversity_penalty;
        config.length_penalty = self.length_penalty;
        config.early_stopping = self.early_stopping.map(EarlyStopping::from);
        config.repetition_penalty = self.repetition_penalty;
        config.no_repeat_ngram_size = self.no_repeat_ngram_size;
        config.suppress_tokens = self.suppress_tokens.clone();
        config.begin_suppress_tokens = self.begin_suppress_tokens.clone();
        config.forced_bos_token_id = self.forced_bos_token_id;
        config.penalty_alpha = self.penalty_alpha;
        config.prompt_lookup_num_tokens = self.prompt_lookup_num_tokens;
        config.seed = seed;
        if let Some(ids) = &self.eos_token_id {
            config = config.eos_token_id(ids.iter().copied());
        }
        if let Some(ids) = &self.forced_eos_token_id {
            config = config.forced_eos_token_id(ids.iter().copied());
        }
        if !self.stop.is_empty() {
            config = config.stop_strings(self.stop.iter().cloned());
        }
        let Some(path) = &self.generation_config else { return Ok(config) };
        let file = GenerationConfig::from_file(path)?;
        let mut merged = config.clone().over(&file);
        // Of two ways to say a length, the one that was typed goes before the one in the file.
        if config.max_new_tokens.is_some() || config.max_length.is_some() {
            (merged.max_new_tokens, merged.max_length) = (config.max_new_tokens, config.max_length);
        }
        if config.min_new_tokens.is_some() || config.min_length.is_some() {
            (merged.min_new_tokens, merged.min_length) = (config.min_new_tokens, config.min_length);
        }
        Ok(merged)
    }

    /// Adds what needs the model's tokenizer.
    pub(crate) fn texts(&self, opt: &Opt, config: GenerationConfig) -> Result<GenerationConfig, Failure> {
        let ids = |text: &str| {
            let tokenizer = opt.require_tokenizer()?;
            tokenizer.encode(text, Bos::Never)
        };
        let mut config = config;
        if !self.bad_words.is_empty() {
            let words = self.bad_words.iter().map(|text| ids(text).map_err(|e| e.at("--bad-words")));
            config = config.bad_words_ids(words.collect::<Result<Vec<_>, _>>()?);
        }
        if !self.sequence_bias.is_empty() {
            let biases = self
                .sequence_bias
                .iter()
                .map(|(text, bias)| ids(text).map(|ids| (ids, *bias)).map_err(|e| e.at("--sequence-bias")));
            config = config.sequence_bias(biases.collect::<Result<BTreeMap<_, _>, _>>()?);
        }
        Ok(config)
    }
}

impl Settings {
    /// The form that `--json-schema` or `--regex` asks for.
    pub(crate) fn constraint(&self, opt: &Opt) -> Result<Option<Constraint>, Failure> {
        if let Some(path) = &self.json_schema {
            let place = format!("--json-schema {}", path.display());
            let text = std::fs::read_to_string(path)
                .map_err(|e| Failure::failed(format!("{place}: cannot be read: {e}")))?;
            let schema = serde_json::from_str(&text)
                .map_err(|e| Failure::failed(format!("{place}: expected JSON: {e}")))?;
            return Ok(Some(Constraint::json_schema(opt, &schema).map_err(|e| e.at(&place))?));
        }
        let regex =
            self.regex.as_ref().map(|pattern| Constraint::regex(opt, pattern).map_err(|e| e.at("--regex")));
        Ok(regex.transpose()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bias_is_behind_the_last_equals_sign() {
        assert_eq!(bias(" sea=2.5"), Ok((" sea".to_owned(), 2.5)));
        assert_eq!(bias("a=b=-1"), Ok(("a=b".to_owned(), -1.0)));
        assert!(bias("=1").is_err() && bias("sea").is_err() && bias("sea=").is_err());
    }

    #[test]
    fn temperatures_are_above_zero() {
        assert_eq!(temperature("0.7"), Ok(0.7));
        for wrong in ["0", "-1", "nan", "inf", "warm", ""] {
            assert!(temperature(wrong).is_err(), "{wrong}");
        }
    }
}
