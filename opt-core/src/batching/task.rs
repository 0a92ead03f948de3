use crate::{
    Error, ErrorKind, Opt, Prompt, Request, Result,
    driver::Active,
    embedding::{EmbedOptions, Embedder},
    generation::Alternative,
    stream::Head,
};

/// The name of a task in its batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TaskId(pub(super) u64);

/// One request that is ready to run: checked, tokenized, its settings resolved.
///
/// Making one costs time on the thread that makes it and none in the batch, and refuses what cannot be run before it
/// waits in a queue.
pub struct Task {
    pub(super) work: Work,
    pub(super) prompt_ids: Vec<u32>,
}

pub(super) enum Work {
    Generate(Box<Active>, Head),
    Embed(Box<Embedder>),
    Score { opt: Opt, top: usize },
}

impl Task {
    /// A task to continue a prompt.
    ///
    /// # Errors
    /// As [`Opt::generate`].
    pub fn generate(opt: &Opt, request: Request) -> Result<Self> {
        let (active, head) = opt.prepare(request, None)?;
        let prompt_ids = head.prompt_ids.clone();
        Ok(Self { work: Work::Generate(Box::new(active), head), prompt_ids })
    }

    /// A task to make a vector of a text, or of token ids.
    ///
    /// # Errors
    /// As [`Embedder::embed`]; [`ErrorKind::Prompt`] for embeddings.
    pub fn embed(opt: &Opt, input: impl Into<Prompt>, options: EmbedOptions) -> Result<Self> {
        let embedder = Embedder::new(opt, options)?;
        let input = input.into();
        embedder.check(&input)?;
        let prompt_ids = ids(opt, input, embedder.options().bos)?;
        Ok(Self { work: Work::Embed(Box::new(embedder)), prompt_ids })
    }

    /// A task to say how probable each token of a prompt is, and the `top` most probable ones in its place.
    ///
    /// # Errors
    /// As [`Opt::score`]; [`ErrorKind::Prompt`] for embeddings.
    pub fn score(opt: &Opt, prompt: impl Into<Prompt>, top: usize) -> Result<Self> {
        let prompt_ids = ids(opt, prompt.into(), crate::tokenizer::Bos::default())?;
        Ok(Self { work: Work::Score { opt: opt.clone(), top }, prompt_ids })
    }

    /// The prompt as it will be run.
    pub fn prompt_ids(&self) -> &[u32] {
        &self.prompt_ids
    }
}

fn ids(opt: &Opt, prompt: Prompt, bos: crate::tokenizer::Bos) -> Result<Vec<u32>> {
    match prompt {
        Prompt::Text(text) => opt.require_tokenizer()?.encode(&text, bos),
        Prompt::Ids(ids) => Ok(ids),
        Prompt::Embeds(_) => {
            Err(Error::new(ErrorKind::Prompt, "expected text or token ids, found embeddings"))
        }
    }
}

/// How probable the tokens of a prompt are.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct PromptScores {
    /// The prompt as it was run.
    pub ids: Vec<u32>,
    /// For each token but the first, which follows nothing.
    pub tokens: Vec<PromptToken>,
}

/// How probable a token of a prompt is.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct PromptToken {
    /// log p(token | all before it), in nats.
    pub log_prob: f32,
    /// The most probable tokens in its place, best first.
    pub alternatives: Vec<Alternative>,
}
