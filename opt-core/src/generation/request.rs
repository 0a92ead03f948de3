use super::{
    FinishReason, Method, Plan, ProcessorChain, Reply, SequenceOutput, Settings, Stopping, Strategy,
    TokenEvent, assisted::Speculative, beam::Beam, contrastive::Contrastive, group_beam::GroupBeam,
    sequence::Sequence, single::Single,
};
use crate::{Error, ErrorKind, Result};

/// Everything a [`Strategy`] has to know of one request.
#[derive(Debug, Clone)]
pub struct Request {
    /// Ids of the prompt; may be empty behind embeddings.
    pub prompt: Vec<u32>,
    /// Rows of embeddings that the driver puts in front of the prompt's ids: positions of the cache before them.
    pub embeds_len: usize,
    /// The resolved settings.
    pub settings: Settings,
    /// What changes scores before a token is chosen.
    pub chain: ProcessorChain,
    /// What ends a sequence.
    pub stopping: Stopping,
}

impl Request {
    /// Most tokens that can be generated.
    pub(super) fn max_new(&self) -> usize {
        self.settings.max_length.saturating_sub(self.prompt.len())
    }

    /// Whether whole rows must be seen: something changes them or wants to keep them.
    pub(super) fn wants_rows(&self) -> bool {
        !self.chain.is_empty() || self.settings.keep_scores || self.settings.keep_logits
    }
}

/// The state machine that the request's method asks for.
///
/// A driver, in the small; here the "model" finds token 3 the most probable wherever it is:
///
/// ```
/// use opt_core::config::OptConfig;
/// use opt_core::generation::*;
///
/// # fn main() -> opt_core::Result<()> {
/// # let model: OptConfig = OptConfig::from_json(r#"{"model_type": "opt", "vocab_size": 4, "hidden_size": 8,
/// #     "num_hidden_layers": 1, "num_attention_heads": 1, "ffn_dim": 8, "max_position_embeddings": 16,
/// #     "word_embed_proj_dim": 8}"#)?;
/// let prompt = vec![0, 1];
/// let config = GenerationConfig::default().max_new_tokens(3);
/// let (settings, _) = config.resolve(&model, &prompt, 0, &Extras::default())?;
/// let chain = ProcessorChain::new(&config, &settings, &Hooks::default())?;
/// let stopping = Stopping::new(&settings, None, &Hooks::default());
/// let mut strategy = strategy(Request { prompt, embeds_len: 0, settings, chain, stopping })?;
/// loop {
///     let plan = strategy.plan();
///     if plan.runs.is_empty() {
///         break;
///     }
///     let row = RowScores::Full(vec![0.0, 0.1, 0.2, 0.9].into());
///     let replies = plan.runs.iter().map(|_| Reply { scores: vec![row.clone()], hidden: None }).collect();
///     strategy.advance(replies)?;
/// }
/// assert_eq!(strategy.finish()[0].ids, [3, 3, 3]);
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// [`ErrorKind::Option`] for settings that the method cannot have.
pub fn strategy(request: Request) -> Result<Box<dyn Strategy>> {
    let settings = &request.settings;
    let returned = settings.num_return_sequences;
    let at_most = |limit: usize, what: &str| {
        if returned <= limit {
            return Ok(());
        }
        let message = format!("num_return_sequences: expected at most {limit} {what}, found {returned}");
        Err(Error::new(ErrorKind::Option, message))
    };
    let at_least_one = |value: usize, name: &str| {
        if value > 0 {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Option, format!("{name}: expected at least 1, found 0")))
    };
    at_least_one(returned, "num_return_sequences")?;
    if settings.vocab_size == 0 {
        return Err(Error::new(ErrorKind::Option, "vocab_size: expected at least 1, found 0"));
    }
    let method = settings.method.clone();
    match method {
        Method::Single if !settings.do_sample => at_most(1, "without sampling or beams")?,
        Method::Single => {}
        Method::Beam { beams } => {
            at_least_one(beams, "num_beams")?;
            at_most(beams, "(num_beams)")?;
        }
        Method::GroupBeam { beams, groups, .. } => {
            at_least_one(beams, "num_beams")?;
            at_most(beams, "(num_beams)")?;
            if groups == 0 || !beams.is_multiple_of(groups) {
                let message =
                    format!("num_beam_groups: expected a divisor of num_beams ({beams}), found {groups}");
                return Err(Error::new(ErrorKind::Option, message));
            }
        }
        Method::Contrastive { k, .. } => {
            at_least_one(k, "top_k")?;
            at_most(1, "with contrastive search")?;
        }
        Method::Assisted { .. } => {
            at_most(1, "with a draft model")?;
            if request.embeds_len > 0 {
                let message = "assisted decoding: expected a prompt of ids, found embeddings, which the draft model \
                               cannot read";
                return Err(Error::new(ErrorKind::Option, message));
            }
        }
        Method::PromptLookup { max_ngram, .. } => {
            at_least_one(max_ngram, "max_matching_ngram_size")?;
            at_most(1, "with prompt lookup")?;
        }
    }
    if request.max_new() == 0 {
        return Ok(Box::new(Nothing(request)));
    }
    Ok(match method {
        Method::Single => Box::new(Single::new(request)),
        Method::Beam { beams } => Box::new(Beam::new(request, beams)),
        Method::GroupBeam { beams, groups, diversity } => {
            Box::new(GroupBeam::new(request, beams / groups, groups, diversity))
        }
        Method::Contrastive { alpha, k } => Box::new(Contrastive::new(request, alpha, k)),
        Method::Assisted { tokens, schedule, confidence } => {
            Box::new(Speculative::assisted(request, tokens, schedule, confidence))
        }
        Method::PromptLookup { tokens, max_ngram } => {
            Box::new(Speculative::prompt_lookup(request, tokens, max_ngram))
        }
    })
}

/// A request for no new token.
struct Nothing(Request);

impl Strategy for Nothing {
    fn plan(&mut self) -> Plan {
        Plan::default()
    }

    fn advance(&mut self, _replies: Vec<Reply>) -> Result<()> {
        Ok(())
    }

    fn take_events(&mut self) -> Vec<TokenEvent> {
        Vec::new()
    }

    fn interrupt(&mut self, _reason: FinishReason) {}

    fn finish(&mut self) -> Vec<SequenceOutput> {
        let beams = matches!(self.0.settings.method, Method::Beam { .. } | Method::GroupBeam { .. });
        let output = Sequence::new(&self.0.prompt).into_output(beams.then_some(0.0));
        vec![output; self.0.settings.num_return_sequences]
    }
}
