use crate::{
    CancelToken, Opt,
    embedding::{EmbedOptions, EmbedPart, Embedding},
    generation::{Alternative, FinishReason, GenerationConfig, Hooks, LogitsProcessor, StoppingCriterion},
    prompt::Overflow,
    tokenizer::Bos,
};
use ndarray::Array2;
use opt_backend::{CacheDType, MaybeSend, MaybeSync};
use std::sync::Arc;

/// What to continue.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Prompt {
    /// Text; the model's tokenizer puts BOS in front where the model was trained so.
    Text(String),
    /// Token ids, used exactly as given.
    Ids(Vec<u32>),
    /// Embeddings `[tokens, word_embed_proj_dim]` in place of the token table's.
    Embeds(Array2<f32>),
}

impl From<&str> for Prompt {
    fn from(text: &str) -> Self {
        Prompt::Text(text.to_owned())
    }
}

impl From<String> for Prompt {
    fn from(text: String) -> Self {
        Prompt::Text(text)
    }
}

impl From<&String> for Prompt {
    fn from(text: &String) -> Self {
        Prompt::Text(text.clone())
    }
}

impl From<Vec<u32>> for Prompt {
    fn from(ids: Vec<u32>) -> Self {
        Prompt::Ids(ids)
    }
}

impl From<&[u32]> for Prompt {
    fn from(ids: &[u32]) -> Self {
        Prompt::Ids(ids.to_vec())
    }
}

impl From<Array2<f32>> for Prompt {
    fn from(rows: Array2<f32>) -> Self {
        Prompt::Embeds(rows)
    }
}

/// One prompt with everything that shapes its continuation. Each request of a batch has its own.
///
/// ```
/// use opt_core::{Request, generation::GenerationConfig};
///
/// let request = Request::new("The river")
///     .config(GenerationConfig::default().max_new_tokens(8).do_sample(true).seed(7))
///     .top_alternatives(3);
/// ```
#[derive(Clone)]
#[non_exhaustive]
pub struct Request {
    /// What to continue.
    pub prompt: Prompt,
    /// How; what it leaves open comes from the model's generation_config.json.
    pub config: GenerationConfig,
    /// Processors, constraints and stopping criteria of the caller's own.
    pub hooks: Hooks,
    /// Draft model of assisted decoding; must share the tokenizer.
    pub assistant: Option<Opt>,
    /// The adapter that the model wears for it; `None` is what the [`Opt`] wears, which is nothing unless it came from
    /// [`Opt::adapted`].
    pub adapter: Option<String>,
    /// Whether BOS is put in front of a text.
    pub bos: Bos,
    /// What happens to a prompt longer than the context.
    pub overflow: Overflow,
    /// How many of the most probable tokens to report with each token.
    pub top_alternatives: usize,
    /// Whether to keep the processed scores of each step.
    pub keep_scores: bool,
    /// Whether to keep the raw logits of each step.
    pub keep_logits: bool,
    /// What vector to make of the text while it is generated; see [`Request::embed`].
    pub embed: Option<(EmbedOptions, EmbedPart)>,
    /// How keys and values are held.
    pub cache_dtype: CacheDType,
    /// Ends the work from elsewhere.
    pub cancel: CancelToken,
}

impl Request {
    /// A request with the model's own settings.
    pub fn new(prompt: impl Into<Prompt>) -> Self {
        Self {
            prompt: prompt.into(),
            config: GenerationConfig::default(),
            hooks: Hooks::default(),
            assistant: None,
            adapter: None,
            bos: Bos::default(),
            overflow: Overflow::default(),
            top_alternatives: 0,
            keep_scores: false,
            keep_logits: false,
            embed: None,
            cache_dtype: CacheDType::default(),
            cancel: CancelToken::new(),
        }
    }

    /// Sets how to continue.
    #[must_use]
    pub fn config(mut self, config: GenerationConfig) -> Self {
        self.config = config;
        self
    }

    /// Adds a processor behind the built-in ones; one that has a built-in's name replaces it.
    #[must_use]
    pub fn processor(mut self, processor: impl LogitsProcessor + 'static) -> Self {
        self.hooks.processors.push(Arc::new(processor));
        self
    }

    /// Adds a reason to stop.
    #[must_use]
    pub fn stop_when(mut self, criterion: impl StoppingCriterion + 'static) -> Self {
        self.hooks.criteria.push(Arc::new(criterion));
        self
    }

    /// Allows only the tokens that `allowed` names for the ids so far.
    #[must_use]
    pub fn allow_only(
        mut self,
        allowed: impl Fn(&[u32]) -> Vec<u32> + MaybeSend + MaybeSync + 'static,
    ) -> Self {
        self.hooks.prefix_allowed_tokens = Some(Arc::new(allowed));
        self
    }

    /// Holds the text to a form: a JSON schema, a regular expression, a grammar.
    #[cfg(all(feature = "constraint", not(target_arch = "wasm32")))]
    #[must_use]
    pub fn constrain(mut self, constraint: &crate::constraint::Constraint) -> Self {
        self.hooks.constraint = Some(constraint.clone());
        self
    }

    /// Lets a smaller model propose tokens. The result stays that of the target model.
    #[must_use]
    pub fn assistant(mut self, assistant: Opt) -> Self {
        self.assistant = Some(assistant);
        self
    }

    /// Lets the model wear an adapter that was loaded beside it, by its name.
    #[must_use]
    pub fn adapter(mut self, name: impl Into<String>) -> Self {
        self.adapter = Some(name.into());
        self
    }

    /// Sets whether BOS is put in front of a text.
    #[must_use]
    pub fn bos(mut self, bos: Bos) -> Self {
        self.bos = bos;
        self
    }

    /// Sets what happens to a prompt longer than the context.
    #[must_use]
    pub fn overflow(mut self, overflow: Overflow) -> Self {
        self.overflow = overflow;
        self
    }

    /// Asks for the `count` most probable tokens with each token.
    #[must_use]
    pub fn top_alternatives(mut self, count: usize) -> Self {
        self.top_alternatives = count;
        self
    }

    /// Asks for the processed scores of each step, `[vocab_size]`.
    #[must_use]
    pub fn keep_scores(mut self) -> Self {
        self.keep_scores = true;
        self
    }

    /// Asks for the raw logits of each step, `[vocab_size]`.
    #[must_use]
    pub fn keep_logits(mut self) -> Self {
        self.keep_logits = true;
        self
    }

    /// Makes a vector of each sequence while it is generated, of the hidden states that its tokens have anyway:
    /// [`GeneratedSequence::embedding`]. Of the options, those of inputs (BOS, overflow, limits) have no effect.
    ///
    /// Every token of [`GeneratedSequence::ids`] counts, an eos too. The last one is never run by generation itself, so
    /// it is run from the cache at the end, it alone; so that it can be, a sequence ends at the context and not one
    /// token behind it. It goes with every way of generating.
    ///
    /// ```
    /// use opt_core::{Opt, Request, embedding::{EmbedOptions, EmbedPart}, generation::GenerationConfig};
    ///
    /// let opt = Opt::open("../models/opt-novels")?;
    /// let settings = GenerationConfig::default().max_new_tokens(8);
    /// let request = Request::new("The river").config(settings).embed(EmbedOptions::default(), EmbedPart::Produced);
    /// let made = opt.generate_batch([request])?.remove(0);
    /// let embedding = made.sequences[0].embedding.as_ref().unwrap();
    /// assert_eq!((embedding.tokens, embedding.vector().len()), (8, opt.config().word_embed_proj_dim));
    /// # Ok::<(), opt_core::Error>(())
    /// ```
    #[must_use]
    pub fn embed(mut self, options: EmbedOptions, part: EmbedPart) -> Self {
        self.embed = Some((options, part));
        self
    }

    /// Sets how keys and values are held.
    #[must_use]
    pub fn cache_dtype(mut self, dtype: CacheDType) -> Self {
        self.cache_dtype = dtype;
        self
    }

    /// Lets `cancel` end the work.
    #[must_use]
    pub fn cancel(mut self, cancel: CancelToken) -> Self {
        self.cancel = cancel;
        self
    }
}

impl<P: Into<Prompt>> From<P> for Request {
    fn from(prompt: P) -> Self {
        Request::new(prompt)
    }
}

/// What came of one request.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Generated {
    /// The prompt as it was run; empty for embeddings.
    pub prompt_ids: Vec<u32>,
    /// `num_return_sequences` continuations, best first where they have scores.
    pub sequences: Vec<GeneratedSequence>,
    /// What was set but has no effect, one line each.
    pub warnings: Vec<String>,
    /// The seed of the draws; with it the run can be repeated.
    pub seed: u64,
}

impl Generated {
    /// The text of the first sequence; empty for a model without tokenizer.
    pub fn text(&self) -> &str {
        self.sequences.first().and_then(|sequence| sequence.text.as_deref()).unwrap_or_default()
    }

    /// The new ids of the first sequence.
    pub fn ids(&self) -> &[u32] {
        self.sequences.first().map_or(&[], |sequence| &sequence.ids)
    }
}

/// One continuation.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct GeneratedSequence {
    /// The new ids, with the eos that was produced and no padding.
    pub ids: Vec<u32>,
    /// Their text without special tokens; `None` for a model without tokenizer.
    pub text: Option<String>,
    /// For each id, log softmax of the raw logits.
    pub log_probs: Vec<f32>,
    /// The beam's score; `None` without beams.
    pub score: Option<f32>,
    /// Why it ended.
    pub finish: FinishReason,
    /// For each id the most probable tokens, if asked for.
    pub alternatives: Vec<Vec<Alternative>>,
    /// For each id the processed scores `[vocab_size]`, if asked for.
    pub scores: Vec<Vec<f32>>,
    /// For each id the raw logits `[vocab_size]`, if asked for.
    pub logits: Vec<Vec<f32>>,
    /// With beams, for each id the index of the beam it was taken from.
    pub beam_indices: Vec<usize>,
    /// The vector that [`Request::embed`] asked for; `None` also where there is no token to make it of.
    pub embedding: Option<Embedding>,
}
