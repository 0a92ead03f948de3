use super::{EarlyStopping, GenerationConfig, checks::wrong};
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
#[non_exhaustive]
pub struct Extras {
    /// How many of the most probable tokens to report with each token.
    pub top_alternatives: usize,
    /// Whether to keep the processed scores.
    pub keep_scores: bool,
    /// Whether to keep the raw logits.
    pub keep_logits: bool,
    /// Whether there is a draft model.
    pub has_assistant: bool,
    /// Whether the last token is run as well, so that it must have a position.
    pub runs_last: bool,
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
    /// Longest list of prompt and generated ids (rows of embeddings not counted). With `embeds_len` at most one above
    /// the context: the last token is never run.
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

impl Settings {
    /// How many sequences grow side by side at most, each with a cache of its own.
    pub fn branches(&self) -> usize {
        match self.method {
            Method::Single => self.num_return_sequences,
            Method::Beam { beams } | Method::GroupBeam { beams, .. } => beams,
            Method::Contrastive { k, .. } => k,
            Method::Assisted { .. } | Method::PromptLookup { .. } => 1,
        }
    }
}

impl GenerationConfig {
    /// New tokens where neither `max_new_tokens` nor `max_length` is given.
    pub const DEFAULT_NEW_TOKENS: usize = 20;
    /// `top_k` where it is not given.
    pub const DEFAULT_TOP_K: usize = 50;

    /// Settings of one request, and warnings, one line each. `prompt` holds its ids, which stand behind `embeds_len`
    /// rows of embeddings.
    ///
    /// `max_length` and `min_length` count the rows of embeddings as well. A sequence that reaches the model's context
    /// ends there with [`super::FinishReason::Length`]. A temperature of 0 means the most probable token, as in
    /// transformers when it lays a config over the model's; filters without `do_sample` are named in a warning and do
    /// nothing. Options that would each choose another way of generating are an error, also where transformers passes
    /// over one of them.
    ///
    /// # Errors
    /// [`ErrorKind::Option`] for a value out of range or options that contradict each other, [`ErrorKind::Prompt`] for
    /// a prompt that cannot be run, [`ErrorKind::Unsupported`] for classifier-free guidance.
    pub fn resolve(
        &self,
        model: &OptConfig,
        prompt: &[u32],
        embeds_len: usize,
        extras: &Extras,
    ) -> Result<(Settings, Vec<String>)> {
        self.check(model.vocab_size)?;
        check_prompt(model, prompt, embeds_len)?;
        let mut warnings: Vec<String> =
            self.ignored.iter().map(|name| format!("{name} is not supported and ignored")).collect();

        let cold = self.temperature == Some(0.0);
        let do_sample = self.do_sample.unwrap_or(false) && !cold;
        if self.do_sample == Some(true) && cold {
            warnings.push(
                "temperature is 0: the most probable token is taken, do_sample does nothing".to_owned(),
            );
        }
        let method = self.method(model.vocab_size, do_sample, extras)?;
        let num_return_sequences = self.num_return_sequences.unwrap_or(1);
        check_returns(num_return_sequences, &method, do_sample)?;
        let max_length = self.length(model, [prompt.len(), embeds_len], &method, extras, &mut warnings)?;
        self.warn_unused(&method, do_sample, &mut warnings);

        let eos = self.eos_token_id.as_ref().map(super::TokenIds::to_vec).unwrap_or_default();
        if self.exponential_decay_length_penalty.is_some() && eos.is_empty() {
            return Err(wrong("exponential_decay_length_penalty", "an eos_token_id to raise", "none"));
        }
        let settings = Settings {
            prompt_len: prompt.len(),
            embeds_len,
            vocab_size: model.vocab_size,
            max_length,
            eos,
            pad: self.pad_token_id,
            method,
            do_sample,
            num_return_sequences,
            length_penalty: self.length_penalty.unwrap_or(1.0),
            early_stopping: self.early_stopping.unwrap_or(EarlyStopping::No),
            // Longer than a duration can be is as good as no limit.
            max_time: self.max_time.and_then(|s| Duration::try_from_secs_f64(s).ok()),
            stop_strings: self.stop_strings.clone().unwrap_or_default(),
            seed: self.seed.map_or_else(entropy, Ok)?,
            top_alternatives: extras.top_alternatives.min(model.vocab_size),
            keep_scores: extras.keep_scores,
            keep_logits: extras.keep_logits,
        };
        Ok((settings, warnings))
    }

    fn method(&self, vocab_size: usize, do_sample: bool, extras: &Extras) -> Result<Method> {
        let beams = self.num_beams.unwrap_or(1);
        let groups = self.num_beam_groups.unwrap_or(1);
        let k = self.top_k.unwrap_or(Self::DEFAULT_TOP_K);
        // As in transformers, one candidate or no penalty is greedy search.
        let alpha = self.penalty_alpha.filter(|alpha| *alpha > 0.0 && k > 1);
        let asked = [
            ("a draft model", extras.has_assistant),
            ("prompt_lookup_num_tokens", self.prompt_lookup_num_tokens.is_some()),
            ("penalty_alpha", alpha.is_some()),
            ("num_beams above 1", beams > 1 || groups > 1),
        ];
        let mut asked = asked.iter().filter(|(_, is)| *is).map(|(name, _)| *name);
        if let (Some(one), Some(other)) = (asked.next(), asked.next()) {
            return Err(contradiction(one, other));
        }
        if let Some(alpha) = alpha {
            return match do_sample {
                true => Err(contradiction("penalty_alpha", "do_sample")),
                false => Ok(Method::Contrastive { alpha, k: k.min(vocab_size) }),
            };
        }
        if groups > 1 {
            if !beams.is_multiple_of(groups) {
                let expected = format!("a multiple of num_beam_groups {groups}");
                return Err(wrong("num_beams", expected, beams));
            }
            if do_sample {
                return Err(contradiction("num_beam_groups", "do_sample"));
            }
            let diversity = self.diversity_penalty.unwrap_or(0.0);
            if diversity == 0.0 {
                return Err(wrong("diversity_penalty", "a number above 0, or all groups are the same", 0));
            }
            return Ok(Method::GroupBeam { beams, groups, diversity });
        }
        if beams > 1 {
            return Ok(Method::Beam { beams });
        }
        if extras.has_assistant {
            let schedule = match self.num_assistant_tokens_schedule.as_deref() {
                Some("heuristic" | "heuristic_transient") => AssistantSchedule::Heuristic,
                _ => AssistantSchedule::Constant,
            };
            return Ok(Method::Assisted {
                tokens: self.num_assistant_tokens.unwrap_or(20),
                schedule,
                confidence: self.assistant_confidence_threshold.unwrap_or(0.4),
            });
        }
        Ok(match self.prompt_lookup_num_tokens {
            Some(tokens) => {
                Method::PromptLookup { tokens, max_ngram: self.max_matching_ngram_size.unwrap_or(2) }
            }
            None => Method::Single,
        })
    }

    /// The longest list of ids, rows of embeddings not counted.
    fn length(
        &self,
        model: &OptConfig,
        [prompt_len, embeds_len]: [usize; 2],
        method: &Method,
        extras: &Extras,
        warnings: &mut Vec<String>,
    ) -> Result<usize> {
        let context = model.max_position_embeddings;
        // The last token need not be run, so that it may stand one past the last position; contrastive search runs
        // its candidates before it chooses.
        let runs_last = extras.runs_last || matches!(method, Method::Contrastive { .. });
        let longest = if runs_last { context } else { context + 1 };
        let start = prompt_len + embeds_len;
        if start >= longest {
            let message =
                format!("prompt: expected less than {longest} tokens, found {start}: none can follow");
            return Err(Error::new(ErrorKind::Prompt, message));
        }
        let wanted = match (self.max_new_tokens, self.max_length) {
            (Some(new), max) => {
                if let Some(max) = max.filter(|max| *max != start.saturating_add(new)) {
                    warnings.push(format!("max_new_tokens {new} takes precedence over max_length {max}"));
                }
                start.saturating_add(new)
            }
            (None, Some(max)) if max <= start => {
                return Err(wrong("max_length", format_args!("more than the prompt's {start} tokens"), max));
            }
            (None, Some(max)) => max,
            (None, None) => longest.min(start + Self::DEFAULT_NEW_TOKENS),
        };
        if wanted > longest {
            warnings.push(format!("{wanted} tokens are more than the context of {context}: it ends there"));
        }
        let max_length = wanted.min(longest);
        let min_length = match self.min_new_tokens {
            Some(new) => ("prompt and min_new_tokens", start.saturating_add(new)),
            None => ("min_length", self.min_length.unwrap_or(0)),
        };
        if min_length.1 > max_length {
            let (name, min) = min_length;
            warnings.push(format!("{name}: {min} tokens cannot be reached, the longest are {max_length}"));
        }
        if let (Some(new), Some(min)) = (self.min_new_tokens, self.min_length.filter(|min| *min > 0)) {
            warnings.push(format!("min_new_tokens {new} takes precedence over min_length {min}"));
        }
        Ok(max_length - embeds_len)
    }

    /// Options that do nothing in the chosen way of generating; the same as transformers names.
    fn warn_unused(&self, method: &Method, do_sample: bool, warnings: &mut Vec<String>) {
        let differs = |value: Option<f32>, neutral: f32| value.is_some_and(|v| v != neutral);
        if !do_sample {
            let contrastive = matches!(method, Method::Contrastive { .. });
            let unused = [
                ("temperature", differs(self.temperature, 1.0) && self.temperature != Some(0.0)),
                ("top_k", self.top_k.is_some_and(|k| k != Self::DEFAULT_TOP_K) && !contrastive),
                ("top_p", differs(self.top_p, 1.0)),
                ("min_p", self.min_p.is_some()),
                ("typical_p", differs(self.typical_p, 1.0)),
                ("epsilon_cutoff", differs(self.epsilon_cutoff, 0.0)),
                ("eta_cutoff", differs(self.eta_cutoff, 0.0)),
            ];
            let unused = unused.iter().filter(|(_, is)| *is);
            warnings.extend(unused.map(|(name, _)| format!("{name} does nothing without do_sample")));
        }
        if !matches!(method, Method::Beam { .. } | Method::GroupBeam { .. }) {
            let unused = [
                ("early_stopping", self.early_stopping.is_some_and(|e| e != EarlyStopping::No)),
                ("length_penalty", differs(self.length_penalty, 1.0)),
            ];
            let unused = unused.iter().filter(|(_, is)| *is);
            warnings.extend(unused.map(|(name, _)| format!("{name} does nothing with a single beam")));
        }
        if differs(self.diversity_penalty, 0.0) && !matches!(method, Method::GroupBeam { .. }) {
            warnings.push("diversity_penalty does nothing without num_beam_groups above 1".to_owned());
        }
    }
}

fn contradiction(one: &str, other: &str) -> Error {
    Error::new(ErrorKind::Option, format!("{one} and {other} contradict each other: expected one of them"))
}

fn check_prompt(model: &OptConfig, prompt: &[u32], embeds_len: usize) -> Result<()> {
    let fail = |message: String| Err(Error::new(ErrorKind::Prompt, format!("prompt: {message}")));
    let (vocab_size, context) = (model.vocab_size, model.max_position_embeddings);
    if let Some((place, id)) = prompt.iter().enumerate().find(|(_, id)| **id as usize >= vocab_size) {
        return fail(format!(
            "expected token ids below the vocabulary of {vocab_size}, found {id} at {place}"
        ));
    }
    match prompt.len().saturating_add(embeds_len) {
        0 => fail("expected at least one token, found none".to_owned()),
        len if len > context => fail(format!("expected at most {context} tokens (the context), found {len}")),
        _ => Ok(()),
    }
}

fn check_returns(count: usize, method: &Method, do_sample: bool) -> Result<()> {
    let most = match *method {
        Method::Beam { beams } | Method::GroupBeam { beams, .. } => {
            (beams, format!("at most num_beams {beams}"))
        }
        Method::Single if do_sample => return Ok(()),
        Method::Single => (1, "1 without do_sample and beams, which would repeat it".to_owned()),
        _ => (1, "1 with contrastive search, a draft model or prompt lookup".to_owned()),
    };
    if count > most.0 { Err(wrong("num_return_sequences", most.1, count)) } else { Ok(()) }
}

/// A seed that differs from run to run.
fn entropy() -> Result<u64> {
    getrandom::u64().map_err(|e| {
        Error::because(ErrorKind::Unsupported, "seed: expected one, since there is no randomness here", e)
    })
}
