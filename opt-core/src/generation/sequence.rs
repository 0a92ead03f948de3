//! What all strategies keep: growing sequences, rows of logits, and tokens on their way out.

use super::{
    Alternative, CacheOp, FinishReason, ModelRole, Need, Random, Reply, Request, RowScores, Run, ScoreNeed,
    SequenceOutput, Settings, Stopping, TokenEvent,
    math::{Exponentials, argmax, log_softmax_in_place, top_k},
};
use crate::{Error, ErrorKind, Result};
use std::{borrow::Cow, sync::Arc};

/// A chosen token and what was asked to be known of the choice.
#[derive(Debug, Clone)]
pub(super) struct Token {
    pub(super) id: u32,
    pub(super) log_prob: f32,
    pub(super) beam: usize,
    alternatives: Arc<[Alternative]>,
    scores: Option<Arc<[f32]>>,
    logits: Option<Arc<[f32]>>,
}

/// A prompt and the tokens generated behind it. Beams copy it, hence the shared tokens.
#[derive(Debug, Clone)]
pub(super) struct Sequence {
    /// Prompt and generated.
    pub(super) ids: Vec<u32>,
    tokens: Vec<Arc<Token>>,
    pub(super) finish: Option<FinishReason>,
}

impl Sequence {
    pub(super) fn new(prompt: &[u32]) -> Self {
        Self { ids: prompt.to_vec(), tokens: Vec::new(), finish: None }
    }

    /// Number of generated tokens.
    pub(super) fn new_len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether and why it would end with one more token `id`.
    pub(super) fn end_with(&mut self, id: u32, stopping: &Stopping) -> Option<FinishReason> {
        self.ids.push(id);
        let finish = stopping.check(&self.ids);
        self.ids.pop();
        finish
    }

    pub(super) fn push(&mut self, token: Token, finish: Option<FinishReason>) {
        self.ids.push(token.id);
        self.tokens.push(Arc::new(token));
        self.finish = finish;
    }

    /// A copy with one more token.
    pub(super) fn with(&self, token: Token, finish: Option<FinishReason>) -> Self {
        let mut longer = self.clone();
        longer.push(token, finish);
        longer
    }

    /// The last token, which is what runs next.
    pub(super) fn last(&self) -> Vec<u32> {
        self.ids.last().copied().into_iter().collect()
    }

    /// The events of all its tokens, as sequence number `sequence`.
    pub(super) fn events(&self, sequence: usize) -> impl Iterator<Item = TokenEvent> + '_ {
        let last = self.tokens.len().wrapping_sub(1);
        self.tokens
            .iter()
            .enumerate()
            .map(move |(i, token)| token.event(sequence, self.finish.filter(|_| i == last)))
    }

    pub(super) fn into_output(self, score: Option<f32>) -> SequenceOutput {
        let rows = |row: fn(&Token) -> &Option<Arc<[f32]>>| -> Vec<Vec<f32>> {
            self.tokens.iter().filter_map(|t| row(t).as_ref().map(|r| r.to_vec())).collect()
        };
        let asked = self.tokens.iter().any(|t| !t.alternatives.is_empty());
        SequenceOutput {
            ids: self.tokens.iter().map(|t| t.id).collect(),
            log_probs: self.tokens.iter().map(|t| t.log_prob).collect(),
            score,
            finish: self.finish.unwrap_or(FinishReason::Length),
            alternatives: match asked {
                true => self.tokens.iter().map(|t| t.alternatives.to_vec()).collect(),
                false => Vec::new(),
            },
            scores: rows(|t| &t.scores),
            logits: rows(|t| &t.logits),
            beam_indices: match score {
                Some(_) => self.tokens.iter().map(|t| t.beam).collect(),
                None => Vec::new(),
            },
        }
    }
}

impl Token {
    fn event(&self, sequence: usize, finish: Option<FinishReason>) -> TokenEvent {
        TokenEvent {
            sequence,
            id: self.id,
            log_prob: self.log_prob,
            alternatives: self.alternatives.to_vec(),
            finish,
        }
    }
}

/// The raw logits of the token that follows some sequence.
#[derive(Debug, Clone)]
pub(super) struct Row {
    raw: RowScores,
    /// Known of a whole row.
    exponentials: Option<Exponentials>,
    log_sum_exp: f64,
    alternatives: Arc<[Alternative]>,
    logits: Option<Arc<[f32]>>,
}

impl Row {
    /// # Errors
    /// If the row is not as wide as the vocabulary.
    pub(super) fn new(raw: RowScores, settings: &Settings) -> Result<Self> {
        let mut exponentials = None;
        let (log_sum_exp, logits) = match &raw {
            RowScores::TopK(top) if top.ids.is_empty() || top.ids.len() != top.logits.len() => {
                return Err(broken("at least one logit for each row", "none"));
            }
            RowScores::TopK(top) => (f64::from(top.log_sum_exp), None),
            RowScores::Full(row) if row.len() != settings.vocab_size => {
                return Err(broken(
                    &format!("rows of {} logits", settings.vocab_size),
                    &row.len().to_string(),
                ));
            }
            RowScores::Full(row) => {
                let known = exponentials.insert(Exponentials::of(row));
                (known.log_sum_exp(), settings.keep_logits.then(|| Arc::from(&**row)))
            }
        };
        let mut row = Self { raw, exponentials, log_sum_exp, alternatives: Arc::from([]), logits };
        if settings.top_alternatives > 0 {
            row.alternatives = row
                .top(settings.top_alternatives)
                .map(|(id, log_prob)| Alternative { id, log_prob })
                .collect();
        }
        Ok(row)
    }

    /// The `k` most probable tokens with their log-probabilities, best first.
    pub(super) fn top(&self, k: usize) -> impl Iterator<Item = (u32, f32)> {
        let top: Vec<(u32, f32)> = match &self.raw {
            RowScores::TopK(top) => top.ids.iter().copied().zip(top.logits.iter().copied()).take(k).collect(),
            RowScores::Full(row) => top_k(row, k).into_iter().map(|(i, logit)| (i as u32, logit)).collect(),
        };
        let log_sum_exp = self.log_sum_exp;
        top.into_iter().map(move |(id, logit)| (id, (f64::from(logit) - log_sum_exp) as f32))
    }

    /// The whole row, after the processors.
    ///
    /// # Errors
    /// Those of the processors; and if the row is not whole.
    pub(super) fn processed(&self, request: &Request, ids: &[u32]) -> Result<Cow<'_, [f32]>> {
        request.chain.applied(ids, self.full()?)
    }

    /// Log-probabilities, `[vocab]`, before any processor.
    pub(super) fn log_probs(&self) -> Result<Vec<f32>> {
        let mut scores = self.full()?.to_vec();
        log_softmax_in_place(&mut scores);
        Ok(scores)
    }

    fn full(&self) -> Result<&[f32]> {
        match &self.raw {
            RowScores::Full(row) => Ok(row),
            RowScores::TopK(_) => Err(broken("whole rows of logits", "their largest")),
        }
    }

    /// The token `id`, chosen by `scores`.
    pub(super) fn token(&self, id: u32, scores: Option<Arc<[f32]>>, beam: usize) -> Token {
        let logit = match &self.raw {
            RowScores::Full(row) => row.get(id as usize).copied(),
            RowScores::TopK(top) => {
                top.ids.iter().position(|&t| t == id).and_then(|i| top.logits.get(i).copied())
            }
        };
        let log_prob = logit.map_or(f32::NEG_INFINITY, |l| (f64::from(l) - self.log_sum_exp) as f32);
        let (alternatives, logits) = (self.alternatives.clone(), self.logits.clone());
        Token { id, log_prob, beam, alternatives, scores, logits }
    }

    /// The next token behind `ids`: drawn if there is something to draw with, otherwise the most probable.
    ///
    /// # Errors
    /// Those of the processors, and if they leave no token.
    pub(super) fn choose(
        &self,
        request: &Request,
        ids: &[u32],
        random: Option<&mut Random>,
    ) -> Result<Token> {
        if random.is_none()
            && !request.wants_rows()
            && let Some((id, log_prob)) = self.top(1).next()
        {
            return match log_prob.is_nan() {
                true => Err(no_token(ids.len() - request.prompt.len())),
                false => Ok(self.token(id, None, 0)),
            };
        }
        let scores = self.processed(request, ids)?;
        let id = match (random, &self.exponentials) {
            // The scores are the row's own.
            (Some(random), Some(known)) if matches!(scores, Cow::Borrowed(_)) => {
                Some(random.sample_by(&scores, known))
            }
            (Some(random), _) => Some(random.sample(&scores)),
            (None, _) => argmax(&scores),
        };
        let id = id.filter(|&id| scores.get(id).is_some_and(|&s| s > f32::NEG_INFINITY));
        let id = id.ok_or_else(|| no_token(ids.len() - request.prompt.len()))? as u32;
        Ok(self.token(id, request.settings.keep_scores.then(|| scores.as_ref().into()), 0))
    }
}

/// The form in which the next token's scores are wanted to choose among the `k` best.
pub(super) fn score_need(request: &Request, k: usize) -> ScoreNeed {
    match request.wants_rows() {
        true => ScoreNeed::Full,
        false => {
            ScoreNeed::TopK(k.max(request.settings.top_alternatives).clamp(1, request.settings.vocab_size))
        }
    }
}

/// The run of the prompt, in slot 0 of the target.
pub(super) fn prompt_run(request: &Request, need: Need) -> Run {
    Run { model: ModelRole::Target, slot: 0, tokens: request.prompt.clone(), prompt: true, need }
}

/// The run of a sequence's last token.
pub(super) fn step_run(slot: usize, sequence: &Sequence, need: Need) -> Run {
    Run { model: ModelRole::Target, slot, tokens: sequence.last(), prompt: false, need }
}

/// What makes of `slots` slots those of `parents`; nothing if they are the same.
pub(super) fn reorder(slots: usize, parents: Vec<usize>) -> Vec<CacheOp> {
    match parents.iter().copied().eq(0..slots) {
        true => Vec::new(),
        false => vec![CacheOp::Reorder { model: ModelRole::Target, parents }],
    }
}

/// # Errors
/// If there are not as many replies as runs.
pub(super) fn expect_replies(replies: &[Reply], runs: usize) -> Result<()> {
    match replies.len() == runs {
        true => Ok(()),
        false => Err(broken(&format!("{runs} replies"), &replies.len().to_string())),
    }
}

/// The last row of a reply.
///
/// # Errors
/// If it has none.
pub(super) fn last_row(reply: Reply, settings: &Settings) -> Result<Row> {
    let row = reply.scores.into_iter().next_back().ok_or_else(|| broken("a row of logits", "none"))?;
    Row::new(row, settings)
}

pub(super) fn broken(expected: &str, found: &str) -> Error {
    Error::new(ErrorKind::Backend, format!("answer to a generation step: expected {expected}, found {found}"))
}

pub(super) fn no_token(generated: usize) -> Error {
    let message =
        format!("generation: after {generated} new tokens no token is possible (every score is -inf or NaN)");
    Error::new(ErrorKind::Option, message)
}

/// Tokens that have not been handed out yet.
#[derive(Debug, Default)]
pub(super) struct Stream(Vec<TokenEvent>);

impl Stream {
    /// Appends `token` to sequence number `index`, and says whether the sequence goes on.
    pub(super) fn push(
        &mut self,
        index: usize,
        sequence: &mut Sequence,
        token: Token,
        stopping: &Stopping,
    ) -> bool {
        let finish = sequence.end_with(token.id, stopping);
        self.0.push(token.event(index, finish));
        sequence.push(token, finish);
        finish.is_none()
    }

    pub(super) fn extend(&mut self, events: impl Iterator<Item = TokenEvent>) {
        self.0.extend(events);
    }

    /// The last token of `sequence`, if still here, becomes its end.
    pub(super) fn close(&mut self, sequence: usize, reason: FinishReason) {
        if let Some(event) = self.0.iter_mut().rfind(|e| e.sequence == sequence) {
            event.finish = Some(reason);
        }
    }

    pub(super) fn take(&mut self) -> Vec<TokenEvent> {
        std::mem::take(&mut self.0)
    }
}
