use crate::{
    Error, ErrorKind, Generated, GeneratedSequence, ProgressFn, Result,
    driver::{Driver, Ending, Slots},
    embedding::Embedding,
    engine::Engine,
    generation::{Alternative, FinishReason, SequenceOutput, TokenEvent},
    tokenizer::{Detokenizer, Tokenizer},
};
use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
};

/// One token of a stream.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct StreamToken {
    /// Which request of the batch.
    pub request: usize,
    /// Which of its sequences.
    pub sequence: usize,
    /// The token.
    pub id: u32,
    /// The text that became certain with it: empty while a character is incomplete, and for a model without tokenizer.
    /// The texts of a sequence's tokens, one after the other, are the sequence's text, unless it was stopped within a
    /// character.
    pub text: String,
    /// log softmax of the raw logits at `id`.
    pub log_prob: f32,
    /// The most probable tokens, if asked for.
    pub alternatives: Vec<Alternative>,
    /// Set on a sequence's last token, unless [`TokenStream::stop`] made it the last after it was handed out.
    pub finish: Option<FinishReason>,
}

/// Tokens of one or several requests, as they are made.
///
/// It owns all it needs, so that it can move to another thread; dropping it ends the work. Beam search decides late:
/// its tokens come all at the end.
pub struct TokenStream {
    driver: Driver,
    texts: Texts,
    events: VecDeque<(usize, TokenEvent)>,
    heads: Vec<Head>,
    failed: Option<ErrorKind>,
}

/// What is known of a request before its first token.
pub(crate) struct Head {
    pub(crate) prompt_ids: Vec<u32>,
    /// How many tokens were cut off in front of it.
    pub(crate) cut: usize,
    pub(crate) warnings: Vec<String>,
    pub(crate) seed: u64,
    /// Most ids of a sequence, those of the prompt included.
    pub(crate) longest: usize,
    /// Sequences that grow side by side at most.
    pub(crate) branches: usize,
    /// Sequences that are handed out.
    pub(crate) returned: usize,
    /// Whether something is to be known of every token of the prompt, so that all must be run.
    pub(crate) sees_prompt: bool,
    /// Positions of the adapter in front.
    pub(crate) virtual_tokens: usize,
}

impl TokenStream {
    pub(crate) fn new(driver: Driver, tokenizer: Option<Tokenizer>, heads: Vec<Head>) -> Self {
        let texts = Texts::new(tokenizer);
        Self { driver, texts, events: VecDeque::new(), heads, failed: None }
    }

    /// The prompts as they are run; empty for embeddings.
    pub fn prompt_ids(&self) -> impl Iterator<Item = &[u32]> {
        self.heads.iter().map(|head| &head.prompt_ids[..])
    }

    /// What was set but has no effect, one line each.
    pub fn warnings(&self) -> impl Iterator<Item = &str> {
        self.heads.iter().flat_map(|head| head.warnings.iter().map(String::as_str))
    }

    /// The next token, awaited. `None` at the end. Dropping the future before it is ready ends the stream.
    pub async fn next_token(&mut self) -> Option<Result<StreamToken>> {
        self.advance(None).await
    }

    /// Like [`TokenStream::next_token`], and tells `watch` how far the prompts have been run; it can cancel there.
    pub async fn next_token_watched(&mut self, watch: &mut ProgressFn<'_>) -> Option<Result<StreamToken>> {
        self.advance(Some(watch)).await
    }

    async fn advance(&mut self, mut watch: Option<&mut ProgressFn<'_>>) -> Option<Result<StreamToken>> {
        loop {
            if let Some((request, event)) = self.events.pop_front() {
                let token = self.texts.token(request, event);
                self.failed = token.as_ref().err().map(Error::kind);
                return Some(token);
            }
            if self.failed.is_some() || self.driver.is_finished() {
                return None;
            }
            // If the future is dropped here, the step is lost, and with it the stream.
            self.failed = Some(ErrorKind::Cancelled);
            if let Err(error) = self.driver.step(watch.as_deref_mut()).await {
                self.failed = Some(error.kind());
                return Some(Err(error));
            }
            self.failed = None;
            self.driver.take_events(&mut self.events);
        }
    }

    /// Ends all sequences where they are; they finish with `reason`.
    pub fn stop(&mut self, reason: FinishReason) {
        self.driver.interrupt(reason);
    }

    /// Whether this is one request to `engine` that continues `ids`.
    pub(crate) fn continues(&self, engine: &Arc<dyn Engine>, ids: &[u32]) -> bool {
        let follows = |head: &Head| head.cut > 0 || head.prompt_ids.starts_with(ids);
        let one = matches!(&self.heads[..], [head] if !head.prompt_ids.is_empty() && follows(head));
        one && self.driver.runs_on(engine)
    }

    /// Runs to the end and collects everything, what [`TokenStream::next_token`] has given out included.
    ///
    /// # Errors
    /// What a step failed with.
    pub async fn finish(self) -> Result<Vec<Generated>> {
        Ok(self.finish_with_slots().await?.into_iter().map(|(generated, _)| generated).collect())
    }

    pub(crate) async fn finish_with_slots(mut self) -> Result<Vec<(Generated, Slots)>> {
        if let Some(kind) = self.failed {
            return Err(Error::new(kind, "the stream has failed before: it has no result"));
        }
        while !self.driver.is_finished() {
            self.driver.step(None).await?;
        }
        let tokenizer = self.texts.tokenizer;
        let each = self.driver.finish().await?.into_iter().zip(self.heads);
        each.map(|((endings, slots), head)| Ok((head.generated(endings, tokenizer.as_ref())?, slots)))
            .collect()
    }
}

impl Head {
    /// All that came of the request.
    pub(crate) fn generated(self, endings: Vec<Ending>, tokenizer: Option<&Tokenizer>) -> Result<Generated> {
        let sequence = |(output, embedding)| finished(output, embedding, tokenizer);
        let sequences = endings.into_iter().map(sequence).collect::<Result<_>>()?;
        let Head { prompt_ids, warnings, seed, .. } = self;
        Ok(Generated { prompt_ids, sequences, warnings, seed })
    }
}

fn finished(
    output: SequenceOutput,
    embedding: Option<Embedding>,
    tokenizer: Option<&Tokenizer>,
) -> Result<GeneratedSequence> {
    let text = tokenizer.map(|tokenizer| tokenizer.decode(&output.ids, true)).transpose()?;
    let SequenceOutput { ids, log_probs, score, finish, alternatives, scores, logits, beam_indices } = output;
    Ok(GeneratedSequence {
        ids,
        text,
        log_probs,
        score,
        finish,
        alternatives,
        scores,
        logits,
        beam_indices,
        embedding,
    })
}

/// The text of sequences that are still growing.
pub(crate) struct Texts {
    tokenizer: Option<Tokenizer>,
    open: HashMap<(usize, usize), Detokenizer>,
}

impl Texts {
    pub(crate) fn new(tokenizer: Option<Tokenizer>) -> Self {
        Self { tokenizer, open: HashMap::new() }
    }

    pub(crate) fn token(&mut self, request: usize, event: TokenEvent) -> Result<StreamToken> {
        let TokenEvent { sequence, id, log_prob, alternatives, finish } = event;
        let mut text = String::new();
        if let Some(tokenizer) = &self.tokenizer {
            let open = self.open.entry((request, sequence)).or_insert_with(|| tokenizer.detokenizer(true));
            text = open.push(id)?;
            if finish.is_some() {
                text.push_str(&open.finish()?);
            }
        }
        Ok(StreamToken { request, sequence, id, text, log_prob, alternatives, finish })
    }
}
