//! How probable a model finds given tokens.

use crate::Progress;
use crate::{
    CancelToken, Error, ErrorKind, Opt, ProgressFn, Result,
    driver::MAX_ROWS,
    engine::{Forward, Sequence, Want},
    tokenizer::Bos,
};
use std::ops::ControlFlow;

/// Tokens to score: those from `from` on, each given all before it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScoreInput {
    /// All tokens, context first.
    pub ids: Vec<u32>,
    /// Index of the first scored token; at least 1, since the first token follows nothing.
    pub from: usize,
}

/// The score of one input.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Scored {
    /// All tokens, context first.
    pub ids: Vec<u32>,
    /// For each scored token log p(token | all before it), in nats.
    pub log_probs: Vec<f32>,
    /// Their sum.
    pub log_prob: f64,
    /// Whether greedy decoding from the context gives just these tokens.
    pub greedy: bool,
}

impl ScoreInput {
    /// All of `ids` but the first.
    pub fn all(ids: Vec<u32>) -> Self {
        Self { ids, from: 1 }
    }

    /// A continuation after a context, tokenized as lm-evaluation-harness does: white space at the end of the context
    /// belongs to the continuation, and the continuation's tokens are those that the whole text has beyond the
    /// context's. A context without any token is the BOS token.
    ///
    /// # Errors
    /// [`ErrorKind::Tokenizer`] for a model without tokenizer, or one without BOS if the context is empty;
    /// [`ErrorKind::Prompt`] for a continuation without a token of its own.
    pub fn pair(opt: &Opt, context: &str, continuation: &str, bos: Bos) -> Result<Self> {
        let tokenizer = opt.require_tokenizer()?;
        // What Python's rstrip takes for white space.
        let blank = |c: char| c.is_whitespace() || ('\x1c'..='\x1f').contains(&c);
        let trimmed = context.trim_end_matches(blank);
        let before = if context.is_empty() { Vec::new() } else { tokenizer.encode(trimmed, bos)? };
        let whole = format!("{context}{continuation}");
        let input = if before.is_empty() {
            let start = tokenizer.bos_id().or(tokenizer.eos_id()).ok_or_else(|| {
                Error::new(
                    ErrorKind::Tokenizer,
                    "an empty context needs a tokenizer with a BOS token; it has none",
                )
            })?;
            let mut ids = vec![start];
            ids.extend(tokenizer.encode(&whole, Bos::Never)?);
            Self { ids, from: 1 }
        } else {
            let from = before.len();
            // Where tokens of the two merge, the context keeps its own.
            let after = tokenizer.encode(&whole, bos)?.into_iter().skip(from);
            Self { ids: before.into_iter().chain(after).collect(), from }
        };
        if input.from >= input.ids.len() {
            let message = format!(
                "continuation: expected at least one token beyond the context's {}, found none",
                input.from
            );
            return Err(Error::new(ErrorKind::Prompt, message));
        }
        Ok(input)
    }
}

impl Opt {
    /// [`Opt::score`], awaited.
    ///
    /// # Errors
    /// Those of [`Opt::score`].
    pub async fn score_async(&self, inputs: &[ScoreInput]) -> Result<Vec<Scored>> {
        self.score_with_async(inputs, &CancelToken::new(), &mut |_| ControlFlow::Continue(())).await
    }

    /// [`Opt::score_with`], awaited.
    ///
    /// # Errors
    /// Those of [`Opt::score_with`].
    pub async fn score_with_async(
        &self,
        inputs: &[ScoreInput],
        cancel: &CancelToken,
        progress: &mut ProgressFn<'_>,
    ) -> Result<Vec<Scored>> {
        for (index, input) in inputs.iter().enumerate() {
            self.check_score_input(input).map_err(|e| e.at(format_args!("input {}", index + 1)))?;
        }
        let mut scored = Vec::with_capacity(inputs.len());
        let mut rest = inputs;
        while !rest.is_empty() {
            // As many as fit, but at least one.
            let mut rows = 0;
            let fits = |input: &&ScoreInput| {
                rows += input.ids.len();
                rows <= MAX_ROWS
            };
            let count = rest.iter().take_while(fits).count().max(1);
            let (batch, later) = rest.split_at(count);
            rest = later;
            scored.extend(self.score_batch(batch, cancel).await?);
            if progress(Progress::new("inputs", scored.len() as u64, inputs.len() as u64)).is_break() {
                return Err(Error::new(ErrorKind::Cancelled, "scoring was cancelled"));
            }
        }
        Ok(scored)
    }

    async fn score_batch(&self, inputs: &[ScoreInput], cancel: &CancelToken) -> Result<Vec<Scored>> {
        let sequences = inputs.iter().map(|input| {
            // The last token is only ever a target.
            let run = input.ids.len().saturating_sub(1);
            Sequence::new(&input.ids[..run])
                .want(Want::LogProbs { targets: &input.ids[input.from..] })
                .adapter(self.adapter())
        });
        let batch = Forward { sequences: sequences.collect(), cancel: Some(cancel), watch: None };
        let outputs = self.engine().forward(batch).await?;
        let each = inputs.iter().zip(outputs);
        Ok(each
            .map(|(input, output)| {
                let log_probs: Vec<f32> = output.log_probs.iter().map(|score| score.log_prob).collect();
                Scored {
                    ids: input.ids.clone(),
                    log_prob: log_probs.iter().map(|&p| f64::from(p)).sum(),
                    greedy: output.log_probs.iter().all(|score| score.greedy),
                    log_probs,
                }
            })
            .collect())
    }

    fn check_score_input(&self, input: &ScoreInput) -> Result<()> {
        let len = input.ids.len();
        let context = self.context();
        let fail = |message: String| Err(Error::new(ErrorKind::Prompt, message));
        if len == 0 {
            return fail("expected at least one token, found none".to_owned());
        }
        if input.from == 0 || input.from > len {
            return fail(format!("expected to score from token 1 to {len}, found {}", input.from));
        }
        if len - 1 > context {
            return fail(format!(
                "expected at most {} tokens (the context and a target), found {len}",
                context + 1
            ));
        }
        crate::engine::check_vocabulary(&input.ids, self.config().vocab_size)
    }
}
