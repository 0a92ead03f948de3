use super::{
    FinishReason, Need, Plan, Reply, Request, SequenceOutput, Strategy, TokenEvent,
    math::{softmax, top_k},
    sequence::{
        Row, Sequence, Stream, broken, expect_replies, last_row, no_token, prompt_run, reorder, score_need,
    },
};
use crate::{
    Result,
    generation::{ModelRole, Run},
};
use ndarray::ArrayView1;
use std::sync::Arc;

/// Contrastive search (Su et al. 2022, arXiv 2202.06417).
///
/// The k most probable next tokens are all run, each in its own fork of the cache; the one with the largest
/// (1 - α) p - α max cos(h, h') is taken, where h is its last hidden state and h' those of all tokens before it. Its
/// run has already answered what comes next.
pub(super) struct Contrastive {
    request: Request,
    alpha: f32,
    k: usize,
    sequence: Sequence,
    /// Last hidden states of what is in the cache, scaled to length 1.
    context: Vec<Vec<f32>>,
    /// What runs now; none before the prompt has run.
    candidates: Vec<Candidate>,
    /// The slot of which all candidates are forks.
    parent: usize,
    slot_count: usize,
    stream: Stream,
}

struct Candidate {
    id: u32,
    probability: f32,
    row: Row,
    scores: Option<Arc<[f32]>>,
}

/// `row` scaled to length 1; a row of zeros stays one.
fn unit(row: ArrayView1<'_, f32>) -> Vec<f32> {
    let norm = row.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt();
    let scale = if norm > 0.0 { norm.recip() } else { 0.0 };
    row.iter().map(|&x| (f64::from(x) * scale) as f32).collect()
}

/// The largest cosine between `hidden` and a row of `context`, all scaled to length 1 and of one width.
fn similarity(hidden: &[f32], context: &[Vec<f32>]) -> f32 {
    let cosine = |row: &Vec<f32>| ArrayView1::from(row).dot(&ArrayView1::from(hidden));
    context.iter().map(cosine).fold(f32::NEG_INFINITY, f32::max)
}

impl Contrastive {
    pub(super) fn new(request: Request, alpha: f32, k: usize) -> Self {
        Self {
            alpha,
            k,
            sequence: Sequence::new(&request.prompt),
            context: Vec::new(),
            candidates: Vec::new(),
            parent: 0,
            slot_count: 1,
            stream: Stream::default(),
            request,
        }
    }

    /// The candidates behind the sequence, whose next token has the raw logits `row`.
    fn propose(&mut self, row: &Row) -> Result<()> {
        let request = &self.request;
        let candidate = |scores: Option<Arc<[f32]>>| {
            move |(id, probability)| Candidate { id, probability, row: row.clone(), scores: scores.clone() }
        };
        self.candidates = if request.wants_rows() {
            let scores = row.processed(request, &self.sequence.ids)?;
            let best = top_k(&softmax(&scores), self.k).into_iter().map(|(i, p)| (i as u32, p));
            // A token that the processors forbid is none, even if there are not k others.
            let possible =
                best.filter(|(id, _)| scores.get(*id as usize).is_some_and(|s| *s > f32::NEG_INFINITY));
            let possible: Vec<_> = possible.collect();
            possible
                .into_iter()
                .map(candidate(request.settings.keep_scores.then(|| scores.as_ref().into())))
                .collect()
        } else {
            let known = row.top(self.k).filter(|(_, log_prob)| !log_prob.is_nan());
            known.map(|(id, log_prob)| (id, log_prob.exp())).map(candidate(None)).collect()
        };
        match self.candidates.is_empty() {
            true => Err(no_token(self.sequence.new_len())),
            false => Ok(()),
        }
    }
}

impl Strategy for Contrastive {
    fn plan(&mut self) -> Plan {
        if self.sequence.finish.is_some() {
            return Plan::default();
        }
        let need = Need { scores: score_need(&self.request, self.k), rows: 1, hidden: true };
        if self.candidates.is_empty() {
            return Plan { cache: Vec::new(), runs: vec![prompt_run(&self.request, need)] };
        }
        let cache = reorder(self.slot_count, vec![self.parent; self.candidates.len()]);
        self.slot_count = self.candidates.len();
        let run = |(slot, c): (usize, &Candidate)| Run {
            model: ModelRole::Target,
            slot,
            tokens: vec![c.id],
            prompt: false,
            need,
        };
        Plan { cache, runs: self.candidates.iter().enumerate().map(run).collect() }
    }

    fn advance(&mut self, replies: Vec<Reply>) -> Result<()> {
        if self.sequence.finish.is_some() {
            return Ok(());
        }
        expect_replies(&replies, self.candidates.len().max(1))?;
        let mut hidden = Vec::new();
        let mut rows = Vec::new();
        for mut reply in replies {
            let states = reply.hidden.take().ok_or_else(|| broken("last hidden states", "none"))?;
            if self.context.first().is_some_and(|row| row.len() != states.ncols()) {
                return Err(broken("last hidden states of one width", &states.ncols().to_string()));
            }
            hidden.push(states.rows().into_iter().map(unit).collect::<Vec<_>>());
            rows.push(last_row(reply, &self.request.settings)?);
        }
        if self.candidates.is_empty() {
            self.context = hidden.into_iter().flatten().collect();
            return rows.first().map_or(Ok(()), |row| self.propose(row));
        }
        let mut best: Option<(usize, f32)> = None;
        for (i, (candidate, states)) in self.candidates.iter().zip(&hidden).enumerate() {
            let state = states.last().ok_or_else(|| broken("one last hidden state", "none"))?;
            let score =
                (1.0 - self.alpha) * candidate.probability - self.alpha * similarity(state, &self.context);
            if best.is_none_or(|(_, s)| score > s) {
                best = Some((i, score));
            }
        }
        let chosen = best.map_or(0, |(i, _)| i);
        if let Some(candidate) = self.candidates.get(chosen) {
            let token = candidate.row.token(candidate.id, candidate.scores.clone(), 0);
            self.stream.push(0, &mut self.sequence, token, &self.request.stopping);
        }
        if self.sequence.finish.is_some() {
            return Ok(());
        }
        self.parent = chosen;
        self.context.extend(hidden.into_iter().nth(chosen).into_iter().flatten());
        match rows.get(chosen) {
            Some(row) => self.propose(row),
            None => Ok(()),
        }
    }

    fn take_events(&mut self) -> Vec<TokenEvent> {
        self.stream.take()
    }

    fn interrupt(&mut self, reason: FinishReason) {
        if self.sequence.finish.is_none() {
            self.sequence.finish = Some(reason);
            self.stream.close(0, reason);
        }
    }

    fn finish(&mut self) -> Vec<SequenceOutput> {
        vec![std::mem::replace(&mut self.sequence, Sequence::new(&[])).into_output(None)]
    }
}
