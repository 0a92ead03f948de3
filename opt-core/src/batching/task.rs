use super::reading::Reading;
use crate::{
    Error, ErrorKind, Opt, Prompt, Request, Result,
    driver::{Active, Scoring},
    embedding::{Capture, EmbedOptions, EmbedPart, Embedder},
    engine::{Engine, check_vocabulary},
    generation::Strategy,
    stream::Head,
    tokenizer::{Bos, Tokenizer},
};
use opt_backend::CacheDType;
use std::sync::Arc;

/// The name of a task in its batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TaskId(pub(super) u64);

/// One request that is ready to run: checked, tokenized, its settings resolved.
///
/// Making one costs time on the thread that makes it and none in the batch, and refuses what cannot be run before it
/// waits in a queue.
pub struct Task {
    pub(super) engine: Arc<dyn Engine>,
    pub(super) active: Active,
    pub(super) goal: Goal,
    pub(super) prompt: Arc<[u32]>,
    /// Sequences that grow side by side at most.
    pub(super) branches: usize,
    /// Bytes of keys and values that they take at most.
    pub(super) cache_bytes: u64,
    most_tokens: usize,
    pub(super) sees_prompt: bool,
}

/// What a task is for.
pub(super) enum Goal {
    Generate { head: Head, tokenizer: Option<Tokenizer> },
    Embed { cut: usize },
    Score,
}

impl Task {
    /// A task to continue a prompt.
    ///
    /// # Errors
    /// As [`Opt::generate`].
    pub fn generate(opt: &Opt, request: Request) -> Result<Self> {
        let (active, head) = opt.prepare(request, None)?;
        let (longest, branches) = (head.longest, head.branches);
        let most_tokens = longest.saturating_sub(head.prompt_ids.len()).saturating_mul(head.returned);
        let prompt = Arc::from(&head.prompt_ids[..]);
        let positions = longest + active.embeds.as_ref().map_or(0, |rows| rows.nrows()) + head.virtual_tokens;
        let sees_prompt = head.sees_prompt;
        let goal = Goal::Generate { head, tokenizer: opt.tokenizer().cloned() };
        Ok(Self { most_tokens, sees_prompt, ..Self::new(opt, active, goal, prompt, positions, branches) })
    }

    /// A task to make a vector of a text, or of token ids.
    ///
    /// # Errors
    /// As [`Embedder::embed`]; [`ErrorKind::Prompt`] for embeddings in place of a text.
    pub fn embed(opt: &Opt, input: impl Into<Prompt>, options: EmbedOptions) -> Result<Self> {
        let embedder = Embedder::new(opt, options)?;
        let (ids, cut) = embedder.ids(&input.into())?;
        let capture =
            Capture::new(embedder.options().clone(), EmbedPart::Whole, &ids, opt.config().num_hidden_layers)?;
        let mut active = reading(opt, &ids);
        active.embed = Some(capture);
        Ok(Self::reading(opt, active, Goal::Embed { cut }, ids))
    }

    /// A task to say how probable each token of a prompt is, and which `top` ones are the most probable in its place.
    ///
    /// # Errors
    /// As [`Opt::score`]; [`ErrorKind::Prompt`] for embeddings.
    pub fn score(opt: &Opt, prompt: impl Into<Prompt>, top: usize) -> Result<Self> {
        let ids = match prompt.into() {
            Prompt::Text(text) => opt.require_tokenizer()?.encode(&text, Bos::default())?,
            Prompt::Ids(ids) => ids,
            Prompt::Embeds(_) => {
                let message = "prompt: expected text or token ids, found embeddings";
                return Err(Error::new(ErrorKind::Prompt, message));
            }
        };
        check_vocabulary(&ids, opt.config().vocab_size)?;
        // The last token need not be run.
        let Some((_, run)) = ids.split_last() else {
            return Err(Error::new(ErrorKind::Prompt, "prompt: expected at least one token, found none"));
        };
        if run.len() > opt.context() {
            let (most, found) = (opt.context() + 1, ids.len());
            let message = format!("prompt: expected at most {most} tokens, found {found}");
            return Err(Error::new(ErrorKind::Prompt, message));
        }
        let mut active = reading(opt, run);
        let next = ids.iter().skip(1).copied().collect();
        active.score = Some(Scoring { next, top: top.min(opt.config().vocab_size) });
        Ok(Self::reading(opt, active, Goal::Score, ids))
    }

    fn reading(opt: &Opt, active: Active, goal: Goal, ids: Vec<u32>) -> Self {
        let positions = ids.len() + opt.config().max_position_embeddings - opt.context();
        Self { sees_prompt: true, ..Self::new(opt, active, goal, ids.into(), positions, 1) }
    }

    fn new(
        opt: &Opt,
        active: Active,
        goal: Goal,
        prompt: Arc<[u32]>,
        positions: usize,
        branches: usize,
    ) -> Self {
        let bytes = position_bytes(opt, active.cache_dtype);
        let cache_bytes =
            (positions.next_multiple_of(BLOCK) as u64).saturating_mul(branches as u64).saturating_mul(bytes);
        let engine = Arc::clone(opt.engine());
        Self { engine, active, goal, prompt, branches, cache_bytes, most_tokens: 0, sees_prompt: false }
    }

    /// The prompt as it will be run.
    pub fn prompt_ids(&self) -> &[u32] {
        &self.prompt
    }

    /// Tokens that will be generated at most, those of all returned sequences together.
    pub fn most_tokens(&self) -> usize {
        self.most_tokens
    }

    /// Sequences that grow side by side at most: beams, or returned sequences.
    pub fn sequences(&self) -> usize {
        self.branches
    }

    /// Bytes of keys and values that it takes at most.
    pub fn cache_bytes(&self) -> u64 {
        self.cache_bytes
    }

    /// What was set but has no effect, one line each.
    pub fn warnings(&self) -> &[String] {
        match &self.goal {
            Goal::Generate { head, .. } => &head.warnings,
            Goal::Embed { .. } | Goal::Score => &[],
        }
    }
}

/// Runs a prompt, and nothing behind it.
fn reading(opt: &Opt, ids: &[u32]) -> Active {
    Active::new(Box::new(Reading::new(ids)) as Box<dyn Strategy>, opt.worn())
}

/// Caches grow by as many positions at once (those of the CPU backend; others by about as many).
pub(super) const BLOCK: usize = 32;

/// Bytes of keys and values of one position of one sequence.
pub(super) fn position_bytes(opt: &Opt, dtype: CacheDType) -> u64 {
    let config = opt.config();
    let (hidden, heads) = (config.hidden_size as u64, config.num_attention_heads as u64);
    let row = match dtype {
        CacheDType::F16 => hidden * 2,
        CacheDType::Int8 => hidden + heads * 4,
        _ => hidden * 4,
    };
    config.num_hidden_layers as u64 * 2 * row
}
