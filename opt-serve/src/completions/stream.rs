//! An answer that is sent token by token.

use super::{
    answer::{Choice, Completion, Usage, finish},
    logprobs::{Logprobs, Writer},
    prepare::Ready,
    request::Wanted,
    stop::StopFilter,
    whole,
};
use crate::{
    engine::{Engine, Update},
    error::ApiError,
    timing::{Deadline, Timer},
};
use axum::response::sse::Event;
use opt_core::{Generated, Opt, StreamToken, batching::PromptScores};
use std::{collections::VecDeque, convert::Infallible, sync::Arc};
use tokio::sync::mpsc::UnboundedReceiver;

/// A stream that has begun.
pub(super) struct Streaming {
    pub(super) head: Completion,
    pub(super) wanted: Arc<Wanted>,
    pub(super) receiver: UnboundedReceiver<(usize, Update)>,
    pub(super) deadline: Deadline,
    /// Measures until the stream is dropped.
    _timer: Timer,
    /// Lives as long as what it makes is read, whatever becomes of the server.
    _engine: Engine,
    prompts: Vec<Ready>,
    choices: Vec<Growing>,
    /// Prompts that are not done.
    open: usize,
    completion_tokens: usize,
    cached_tokens: usize,
    chunks: VecDeque<String>,
    ended: bool,
}

/// A choice that grows.
struct Growing {
    filter: StopFilter,
    writer: Option<Writer>,
    /// What has no text to go with yet.
    held: Logprobs,
    held_ids: Vec<u32>,
    /// Characters of the answer that have been sent or left out.
    length: usize,
    done: bool,
}

impl Streaming {
    #[allow(clippy::too_many_arguments)] // Each is another thing that a stream needs; they are named at the one call.
    pub(super) fn new(
        opt: &Opt,
        head: Completion,
        wanted: Arc<Wanted>,
        prompts: Vec<Ready>,
        scores: &[PromptScores],
        receiver: UnboundedReceiver<(usize, Update)>,
        running: usize,
        (deadline, timer, engine): (Deadline, Timer, Engine),
    ) -> Result<Self, ApiError> {
        let mut stream = Self {
            head,
            receiver,
            deadline,
            _timer: timer,
            _engine: engine,
            choices: Vec::new(),
            open: running,
            completion_tokens: 0,
            cached_tokens: 0,
            chunks: VecDeque::new(),
            ended: false,
            prompts,
            wanted,
        };
        stream.begin(opt, scores)?;
        if stream.open == 0 {
            stream.end();
        }
        Ok(stream)
    }

    /// The pieces before the first token.
    fn begin(&mut self, opt: &Opt, scores: &[PromptScores]) -> Result<(), ApiError> {
        let wanted = Arc::clone(&self.wanted);
        for place in 0..self.prompts.len() {
            let Some(prompt) = self.prompts.get(place) else { continue };
            let (logprobs, start) = whole::echo(opt, &wanted, prompt, scores.get(place))?;
            let ids = wanted.return_token_ids.then(|| prompt.ids.clone());
            let text = if wanted.echo { prompt.text.clone() } else { String::new() };
            for i in 0..wanted.n {
                let writer = wanted.logprobs.map(|top| Writer::starting(opt.tokenizer(), top, start));
                let filter = StopFilter::new(&wanted.stop);
                self.choices.push(Growing {
                    filter,
                    writer,
                    held: Logprobs::default(),
                    held_ids: Vec::new(),
                    length: start,
                    done: self.open == 0,
                });
                let finish_reason = (self.open == 0).then_some("length");
                if wanted.echo || ids.is_some() || finish_reason.is_some() {
                    self.send(Choice {
                        text: text.clone(),
                        index: place * wanted.n + i,
                        logprobs: wanted.logprobs.filter(|_| wanted.echo).map(|_| logprobs.clone()),
                        finish_reason,
                        token_ids: wanted.return_token_ids.then(Vec::new),
                        prompt_token_ids: ids.clone(),
                    });
                }
            }
        }
        Ok(())
    }

    fn send(&mut self, choice: Choice) {
        let usage = self.wanted.include_usage.then_some(None);
        self.chunk(vec![choice], usage);
    }

    fn chunk(&mut self, choices: Vec<Choice>, usage: Option<Option<Usage>>) {
        let chunk = Completion { choices, usage, ..self.head.clone() };
        self.chunks.push_back(serde_json::to_string(&chunk).unwrap_or_default());
    }

    /// The last pieces.
    fn end(&mut self) {
        if self.wanted.include_usage {
            let prompt_tokens = self.prompts.iter().map(|prompt| prompt.ids.len()).sum();
            let usage = Usage::of(prompt_tokens, self.completion_tokens, self.cached_tokens);
            self.chunk(Vec::new(), Some(Some(usage)));
        }
        self.chunks.push_back("[DONE]".to_owned());
        self.ended = true;
    }

    /// An error as the last piece: the status has been sent long ago.
    fn fail(&mut self, error: &ApiError) {
        self.chunks.push_back(error.json());
        self.ended = true;
        self.receiver.close();
    }

    /// The next event; `None` behind the last one.
    pub(super) async fn next(mut self) -> Option<(Result<Event, Infallible>, Self)> {
        loop {
            if let Some(chunk) = self.chunks.pop_front() {
                return Some((Ok(Event::default().data(chunk)), self));
            }
            if self.ended {
                return None;
            }
            let update = self.deadline.within(self.receiver.recv()).await;
            let told = match update {
                Err(error) => Err(error),
                Ok(None) => Err(ApiError::internal("the engine has dropped the request")),
                Ok(Some((_, Update::Failed(error)))) => Err(error),
                Ok(Some((place, Update::Token(token)))) => self.token(place, &token),
                Ok(Some((place, Update::Generated { generated, cached }))) => {
                    self.generated(place, &generated, cached);
                    Ok(())
                }
                Ok(Some(_)) => Ok(()),
            };
            if let Err(error) = told {
                self.fail(&error);
            }
        }
    }

    /// The choices that a sequence of a prompt is: all of them where each run would give the same.
    fn choices_of(&self, place: usize, sequence: usize, sequences: usize) -> std::ops::Range<usize> {
        let n = self.wanted.n;
        let first = place * n;
        if self.wanted.is_certain() && sequences == 1 {
            first..first + n
        } else {
            first + sequence..first + sequence + 1
        }
    }

    fn token(&mut self, place: usize, token: &StreamToken) -> Result<(), ApiError> {
        let sequences = self.wanted.config.num_return_sequences.unwrap_or(1);
        for index in self.choices_of(place, token.sequence, sequences) {
            let Some(choice) = self.choices.get_mut(index).filter(|choice| !choice.done) else { continue };
            choice.held_ids.push(token.id);
            if let Some(writer) = &mut choice.writer {
                writer.push(&mut choice.held, token.id, Some(token.log_prob), &token.alternatives)?;
            }
            let text = choice.filter.push(&token.text, token.finish.is_some());
            let reason = if choice.filter.stopped() { Some("stop") } else { token.finish.map(finish) };
            self.grow(index, text, reason);
        }
        Ok(())
    }

    fn generated(&mut self, place: usize, generated: &Generated, cached: usize) {
        let sequences = generated.sequences.len();
        for (number, sequence) in generated.sequences.iter().enumerate() {
            let range = self.choices_of(place, number, sequences);
            self.completion_tokens += sequence.ids.len() * range.len();
            for index in range {
                // A sequence whose last token did not know that it was the last.
                let Some(choice) = self.choices.get_mut(index).filter(|choice| !choice.done) else {
                    continue;
                };
                let text = choice.filter.push("", true);
                self.grow(index, text, Some(finish(sequence.finish)));
            }
        }
        self.cached_tokens += cached;
        self.open = self.open.saturating_sub(1);
        if self.open == 0 {
            self.end();
        }
    }

    /// Sends a choice's new text, with the tokens that it came from.
    fn grow(&mut self, index: usize, text: String, reason: Option<&'static str>) {
        if text.is_empty() && reason.is_none() {
            return;
        }
        let Some(choice) = self.choices.get_mut(index) else { return };
        choice.done = reason.is_some();
        choice.length += text.chars().count();
        let mut logprobs = std::mem::take(&mut choice.held);
        if choice.filter.stopped() {
            logprobs.split_off(choice.length);
        } else if reason.is_none() {
            // Tokens whose text is held back, since it may become a stop string, wait with it.
            choice.held = logprobs.split_off(choice.length);
        }
        let ids = std::mem::take(&mut choice.held_ids);
        let piece = Choice {
            text,
            index,
            logprobs: self.wanted.logprobs.map(|_| logprobs),
            finish_reason: reason,
            token_ids: self.wanted.return_token_ids.then_some(ids),
            prompt_token_ids: None,
        };
        self.send(piece);
    }
}
