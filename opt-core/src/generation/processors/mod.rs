//! Changes to the scores before a token is chosen.

mod edits;
mod filters;
mod numeric;
mod repetition;

use super::{GenerationConfig, Method, Settings, StoppingCriterion, TokenIds, field::decimal};
use crate::{Error, ErrorKind, Result, callbacks::PrefixFn};
use edits::{Edit, ExponentialDecay, PrefixConstraint, SequenceBias, When};
use filters::{Epsilon, Eta, MinP, TopK, TopP, Typical};
use numeric::{RemoveInvalid, Renormalize, Temperature};
use opt_backend::{MaybeSend, MaybeSync};
use repetition::{NoRepeatNgram, RepetitionPenalty};
use std::{borrow::Cow, fmt, sync::Arc};

/// A change to one row of scores.
///
/// Stateless: whatever it needs follows from its construction and from `ids`, so one value serves all rows, beams and
/// threads.
pub trait LogitsProcessor: MaybeSend + MaybeSync {
    /// What it is called in [`ProcessorChain::names`].
    fn name(&self) -> &str;

    /// Changes `scores` (`[vocab]`) of the token that follows `ids` (prompt and generated).
    ///
    /// # Errors
    /// Whatever the implementation cannot do; it ends the request.
    fn process(&self, ids: &[u32], scores: &mut [f32]) -> Result<()>;
}

/// Callbacks of the caller's.
///
/// ```
/// use opt_core::generation::{Hooks, LogitsProcessor};
///
/// /// Makes token 7 certain once token 3 was there.
/// struct AfterThree;
/// impl LogitsProcessor for AfterThree {
///     fn name(&self) -> &str {
///         "after_three"
///     }
///     fn process(&self, ids: &[u32], scores: &mut [f32]) -> opt_core::Result<()> {
///         if ids.last() == Some(&3) {
///             scores.iter_mut().enumerate().filter(|(id, _)| *id != 7).for_each(|(_, s)| *s = f32::NEG_INFINITY);
///         }
///         Ok(())
///     }
/// }
/// let hooks = Hooks::default().processor(AfterThree).prefix_allowed_tokens(|ids| vec![ids.len() as u32, 7]);
/// # assert_eq!(hooks.processors.len(), 1);
/// ```
#[derive(Clone, Default)]
#[non_exhaustive]
pub struct Hooks {
    /// Processors, run after the built-in ones and before temperature and filters.
    pub processors: Vec<Arc<dyn LogitsProcessor>>,
    /// Restricts each next token.
    pub prefix_allowed_tokens: Option<PrefixFn>,
    /// The form that the text is held to; stands where `prefix_allowed_tokens` does.
    #[cfg(all(feature = "constraint", not(target_arch = "wasm32")))]
    pub constraint: Option<crate::constraint::Constraint>,
    /// Further reasons to stop.
    pub criteria: Vec<Arc<dyn StoppingCriterion>>,
}

impl Hooks {
    /// Adds a processor behind those already there.
    #[must_use]
    pub fn processor(mut self, processor: impl LogitsProcessor + 'static) -> Self {
        self.processors.push(Arc::new(processor));
        self
    }

    /// Lets only the tokens follow that `allowed` names for the ids so far (prompt and generated).
    #[must_use]
    pub fn prefix_allowed_tokens(
        mut self,
        allowed: impl Fn(&[u32]) -> Vec<u32> + MaybeSend + MaybeSync + 'static,
    ) -> Self {
        self.prefix_allowed_tokens = Some(Arc::new(allowed));
        self
    }

    /// Adds a reason to stop.
    #[must_use]
    pub fn criterion(mut self, criterion: impl StoppingCriterion + 'static) -> Self {
        self.criteria.push(Arc::new(criterion));
        self
    }
}

/// A request's processors in transformers' order.
///
/// The built-in ones bear the names of their options: `sequence_bias`, `repetition_penalty`, `no_repeat_ngram_size`,
/// `bad_words_ids`, `min_length`, `min_new_tokens`, `prefix_allowed_tokens_fn` (the callback, and behind it a constraint),
/// `forced_bos_token_id`,
/// `forced_eos_token_id`, `remove_invalid_values`, `exponential_decay_length_penalty`, `suppress_tokens`,
/// `begin_suppress_tokens`; then the caller's, of which one with the name of an earlier one stands in its place; then
/// when sampling `temperature`, `top_k`, `top_p`, `min_p`, `typical_p`, `epsilon_cutoff`, `eta_cutoff`; at last
/// `renormalize_logits`.
///
/// What comes in are logits where one token follows the other, and log-probabilities with beams.
///
/// ```
/// use opt_core::{config::OptConfig, generation::{Extras, GenerationConfig, Hooks, ProcessorChain}};
///
/// let config = GenerationConfig::default().repetition_penalty(2.0).do_sample(true).top_k(2);
/// let model = OptConfig::from_json(r#"{"vocab_size": 4}"#)?;
/// let (settings, _) = config.resolve(&model, &[3], 0, &Extras::default())?;
/// let chain = ProcessorChain::new(&config, &settings, &Hooks::default())?;
/// assert_eq!(chain.names(), ["repetition_penalty", "top_k"]);
///
/// let mut scores = [1.0, 4.0, 0.5, 6.0];
/// chain.apply(&[3], &mut scores)?;
/// assert_eq!(scores, [f32::NEG_INFINITY, 4.0, f32::NEG_INFINITY, 3.0]);
/// # Ok::<(), opt_core::Error>(())
/// ```
#[derive(Clone, Default)]
pub struct ProcessorChain {
    processors: Arc<[Arc<dyn LogitsProcessor>]>,
    /// Whether a row without any possible token is an error, since there is nothing to draw.
    must_draw: bool,
}

impl ProcessorChain {
    /// The processors that `config` and `hooks` ask for; filters only if `settings` sample.
    ///
    /// # Errors
    /// [`ErrorKind::Option`] for options out of range.
    pub fn new(config: &GenerationConfig, settings: &Settings, hooks: &Hooks) -> Result<Self> {
        config.check(settings.vocab_size)?;
        let mut list = processors(config, settings, hooks);
        for custom in &hooks.processors {
            match list.iter_mut().find(|p| p.name() == custom.name()) {
                Some(place) => *place = custom.clone(),
                None => list.push(custom.clone()),
            }
        }
        if settings.do_sample {
            warpers(config, settings, &mut list);
        }
        if config.renormalize_logits == Some(true) {
            list.push(Arc::new(Renormalize));
        }
        let must_draw = settings.do_sample && !matches!(settings.method, Method::Beam { .. });
        Ok(Self { processors: list.into(), must_draw })
    }

    /// Whether it leaves every row as it is.
    pub fn is_empty(&self) -> bool {
        self.processors.is_empty()
    }

    /// Runs all processors in order over `scores` (`[vocab]`) of the token that follows `ids`.
    ///
    /// # Errors
    /// Those of the processors, and [`ErrorKind::Option`] if a token is to be drawn and none is left.
    pub fn apply(&self, ids: &[u32], scores: &mut [f32]) -> Result<()> {
        self.processors.iter().try_for_each(|p| p.process(ids, scores))?;
        self.check(ids, scores)
    }

    /// What [`ProcessorChain::apply`] makes of scores, which are copied only if there is something to do.
    pub(crate) fn applied<'a>(&self, ids: &[u32], scores: &'a [f32]) -> Result<Cow<'a, [f32]>> {
        let mut scores = Cow::Borrowed(scores);
        if self.processors.is_empty() {
            self.check(ids, &scores)?;
        } else {
            self.apply(ids, scores.to_mut())?;
        }
        Ok(scores)
    }

    fn check(&self, ids: &[u32], scores: &[f32]) -> Result<()> {
        if self.must_draw && !scores.iter().any(|s| s.is_finite()) {
            let message = format!("no token is left to draw after {} ids", ids.len());
            return Err(Error::new(ErrorKind::Option, format!("{message}, by {}", self.names().join(", "))));
        }
        Ok(())
    }

    /// Names in the order of application.
    pub fn names(&self) -> Vec<&str> {
        self.processors.iter().map(|p| p.name()).collect()
    }
}

/// Those of every way of generating, in order.
fn processors(
    config: &GenerationConfig,
    settings: &Settings,
    hooks: &Hooks,
) -> Vec<Arc<dyn LogitsProcessor>> {
    let mut list: Vec<Arc<dyn LogitsProcessor>> = Vec::new();
    let eos = &settings.eos;
    let edit = |name, when, ids: &[u32]| Arc::new(Edit { name, when, ids: ids.to_vec(), force: false });
    let force = |name, at, ids| Arc::new(Edit { name, when: When::At(at), ids, force: true });

    if let Some(biases) = &config.sequence_bias {
        let biases = biases.iter().map(|(ids, bias)| (ids.as_slice(), *bias));
        list.push(Arc::new(SequenceBias::new("sequence_bias", biases)));
    }
    if let Some(penalty) = config.repetition_penalty.filter(|p| *p != 1.0) {
        list.push(Arc::new(RepetitionPenalty(penalty)));
    }
    if let Some(n) = config.no_repeat_ngram_size.filter(|n| *n > 0) {
        list.push(Arc::new(NoRepeatNgram(n)));
    }
    if let Some(words) = &config.bad_words_ids {
        // An end token alone is no bad word: without it nothing would end.
        let words = words.iter().filter(|w| !matches!(w.as_slice(), [id] if eos.contains(id)));
        let bias = SequenceBias::new("bad_words_ids", words.map(|w| (w.as_slice(), f32::NEG_INFINITY)));
        if !bias.is_empty() {
            list.push(Arc::new(bias));
        }
    }
    // Where `min_new_tokens` is given it replaces `min_length`.
    let min_new = config.min_new_tokens;
    let min_length = match min_new {
        Some(new) => settings.prompt_len.saturating_add(new),
        None => config.min_length.unwrap_or(0).saturating_sub(settings.embeds_len),
    };
    if min_length > 0 && !eos.is_empty() {
        list.push(edit("min_length", When::Before(min_length), eos));
    }
    if let Some(new) = min_new.filter(|n| *n > 0 && !eos.is_empty()) {
        let length = settings.prompt_len.saturating_add(new);
        list.push(edit("min_new_tokens", When::Before(length), eos));
    }
    if let Some(allowed) = &hooks.prefix_allowed_tokens {
        list.push(Arc::new(PrefixConstraint(allowed.clone())));
    }
    #[cfg(all(feature = "constraint", not(target_arch = "wasm32")))]
    if let Some(constraint) = &hooks.constraint {
        list.push(Arc::new(crate::constraint::Constrained::new(constraint, settings)));
    }
    if let Some(id) = config.forced_bos_token_id {
        list.push(force("forced_bos_token_id", 1, vec![id]));
    }
    if let Some(ids) = config.forced_eos_token_id.as_ref().map(TokenIds::to_vec) {
        list.push(force("forced_eos_token_id", settings.max_length.saturating_sub(1), ids));
    }
    if config.remove_invalid_values == Some(true) {
        list.push(Arc::new(RemoveInvalid));
    }
    if let Some((start, factor)) = config.exponential_decay_length_penalty {
        let start = start.saturating_add(settings.prompt_len);
        list.push(Arc::new(ExponentialDecay { start, factor: decimal(factor), eos: eos.clone() }));
    }
    if let Some(ids) = &config.suppress_tokens {
        list.push(edit("suppress_tokens", When::Always, ids));
    }
    if let Some(ids) = &config.begin_suppress_tokens {
        // A forced first token pushes the beginning back by one.
        let forced = settings.prompt_len <= 1 && config.forced_bos_token_id.is_some();
        let begin = settings.prompt_len + usize::from(forced);
        list.push(edit("begin_suppress_tokens", When::At(begin), ids));
    }
    list
}

/// Those of sampling, in order.
fn warpers(config: &GenerationConfig, settings: &Settings, list: &mut Vec<Arc<dyn LogitsProcessor>>) {
    // With beams one token that is no end must stay, so that there is something to go on with.
    let min_keep = match settings.method {
        Method::Beam { .. } | Method::GroupBeam { .. } => settings.eos.len().max(1) + 1,
        _ => 1,
    };
    if let Some(temperature) = config.temperature.filter(|t| *t != 1.0) {
        list.push(Arc::new(Temperature(temperature)));
    }
    let k = config.top_k.unwrap_or(GenerationConfig::DEFAULT_TOP_K);
    if k > 0 {
        list.push(Arc::new(TopK { k: k.max(min_keep) }));
    }
    if let Some(p) = config.top_p.filter(|p| *p < 1.0) {
        list.push(Arc::new(TopP { rest: (1.0 - decimal(p)) as f32, min_keep }));
    }
    if let Some(share) = config.min_p {
        list.push(Arc::new(MinP { share, min_keep }));
    }
    if let Some(mass) = config.typical_p.filter(|p| *p < 1.0) {
        list.push(Arc::new(Typical { mass, min_keep }));
    }
    if let Some(epsilon) = config.epsilon_cutoff.filter(|e| *e > 0.0) {
        list.push(Arc::new(Epsilon { epsilon, min_keep }));
    }
    if let Some(epsilon) = config.eta_cutoff.filter(|e| *e > 0.0) {
        list.push(Arc::new(Eta { epsilon, min_keep }));
    }
}

impl fmt::Debug for ProcessorChain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ProcessorChain").field(&self.names()).finish()
    }
}

impl fmt::Debug for Hooks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hooks")
            .field("processors", &self.processors.iter().map(|p| p.name()).collect::<Vec<_>>())
            .finish_non_exhaustive()
    }
}
