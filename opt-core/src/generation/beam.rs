use super::{
    EarlyStopping, Ended, FinishReason, Need, Plan, Random, Reply, Request, ScoreNeed, SequenceOutput,
    Strategy, TokenEvent,
    math::top_k,
    sequence::{
        Row, Sequence, Stream, expect_replies, last_row, no_token, prompt_run, reorder, score_need, step_run,
    },
};
use crate::Result;
use std::{cmp::Ordering, sync::Arc};

/// Beam search and beam sampling.
///
/// Each step looks at the best continuations of all beams together, enough of them that beams remain even if all the
/// best ones end. Those that end *and* rank among the best `beams` go to the pool of finished ones, scored by
/// Σ log p / length^penalty; the best that do not end run on.
pub(super) struct Beam {
    request: Request,
    beams: usize,
    /// Best first.
    running: Vec<Running>,
    /// Best first, at most `beams`.
    pool: Vec<(f32, Sequence)>,
    random: Random,
    slot_count: usize,
    done: bool,
    stream: Stream,
    ended: Vec<Ended>,
}

struct Running {
    sequence: Sequence,
    /// Sum of processed log-probabilities, in f32 as torch keeps it.
    score: f32,
    /// The slot that holds all but the last token.
    parent: usize,
}

/// A continuation of a beam by one token.
#[derive(Debug, Clone, Copy)]
pub(super) struct Candidate {
    pub(super) score: f32,
    pub(super) beam: usize,
    pub(super) id: u32,
}

impl Candidate {
    /// Best first; among equals the earlier beam, then the lower id.
    pub(super) fn order(&self, other: &Self) -> Ordering {
        other.score.total_cmp(&self.score).then(self.beam.cmp(&other.beam)).then(self.id.cmp(&other.id))
    }
}

/// A row of processed scores, if it is to be kept.
pub(super) type Kept = Option<Arc<[f32]>>;

/// How many continuations to look at for `beams` beams, so that as many remain if others end.
pub(super) fn candidates_to_keep(beams: usize, eos: usize) -> usize {
    beams.saturating_mul((1 + eos).max(2))
}

/// `score` divided by `len`^`penalty`.
fn penalized(score: f32, len: usize, penalty: f32) -> f32 {
    score / (len as f64).powf(f64::from(penalty)) as f32
}

impl Beam {
    pub(super) fn new(request: Request, beams: usize) -> Self {
        let first = Running { sequence: Sequence::new(&request.prompt), score: 0.0, parent: 0 };
        Self {
            beams,
            running: vec![first],
            pool: Vec::new(),
            random: Random::new(request.settings.seed, 0),
            slot_count: 1,
            done: false,
            stream: Stream::default(),
            ended: Vec::new(),
            request,
        }
    }

    fn keep(&self) -> usize {
        candidates_to_keep(self.beams, self.request.settings.eos.len())
    }

    /// Continuations to look at, ranked: the best of all, or drawn without replacement. Impossible ones are none.
    /// Also, for each beam, the processed row if it is to be kept.
    fn candidates(&mut self, rows: &[Row]) -> Result<(Vec<Candidate>, Vec<Kept>)> {
        let (keep, sample) = (self.keep(), self.request.settings.do_sample);
        let mut candidates = Vec::new();
        let mut kept = Vec::new();
        for (beam, (running, row)) in self.running.iter().zip(rows).enumerate() {
            let candidate =
                |(id, log_prob): (u32, f32)| Candidate { score: log_prob + running.score, beam, id };
            if !sample && !self.request.wants_rows() {
                candidates.extend(row.top(keep).map(candidate));
                kept.push(None);
                continue;
            }
            let mut scores = row.log_probs()?;
            self.request.chain.apply(&running.sequence.ids, &mut scores)?;
            let indexed = |(i, score): (usize, f32)| candidate((i as u32, score));
            match sample {
                true => candidates.extend(scores.iter().copied().enumerate().map(indexed)),
                false => candidates.extend(top_k(&scores, keep).into_iter().map(indexed)),
            }
            kept.push(self.request.settings.keep_scores.then(|| scores.into()));
        }
        candidates.retain(|c| c.score > f32::NEG_INFINITY);
        if sample {
            let scores: Vec<f32> = candidates.iter().map(|c| c.score).collect();
            let drawn = self.random.sample_without_replacement(&scores, keep);
            candidates = drawn.into_iter().filter_map(|i| candidates.get(i).copied()).collect();
        } else {
            candidates.sort_by(Candidate::order);
            candidates.truncate(keep);
        }
        Ok((candidates, kept))
    }

    fn add_to_pool(&mut self, sequence: Sequence, score: f32) {
        self.pool
            .push((penalized(score, sequence.new_len(), self.request.settings.length_penalty), sequence));
    }

    fn trim_pool(&mut self) {
        self.pool.sort_by(|a, b| b.0.total_cmp(&a.0));
        self.pool.truncate(self.beams);
    }

    /// Whether no running beam is worth going on with.
    fn settled(&self) -> bool {
        let settings = &self.request.settings;
        let Some(best) = self.running.first() else { return true };
        let Some((worst, _)) = self.pool.last().filter(|_| self.pool.len() >= self.beams) else {
            return false;
        };
        let len = match settings.early_stopping {
            EarlyStopping::Yes => return true,
            EarlyStopping::Never if settings.length_penalty > 0.0 => self.request.max_new(),
            EarlyStopping::Never | EarlyStopping::No => best.sequence.new_len(),
        };
        penalized(best.score, len, settings.length_penalty) <= *worst
    }

    fn end(&mut self) {
        self.done = true;
        self.running.clear();
        self.trim_pool();
        self.pool.truncate(self.request.settings.num_return_sequences);
        for (i, (_, sequence)) in self.pool.iter().enumerate() {
            self.stream.extend(sequence.events(i));
        }
    }
}

impl Strategy for Beam {
    fn plan(&mut self) -> Plan {
        if self.done {
            return Plan::default();
        }
        let scores = match self.request.settings.do_sample {
            true => ScoreNeed::Full,
            false => score_need(&self.request, self.keep()),
        };
        let need = Need { scores, rows: 1, hidden: false };
        if self.running.iter().all(|r| r.sequence.new_len() == 0) {
            return Plan { cache: Vec::new(), runs: vec![prompt_run(&self.request, need)] };
        }
        let cache = reorder(self.slot_count, self.running.iter().map(|r| r.parent).collect());
        self.slot_count = self.running.len();
        let beams = self.running.iter().enumerate();
        Plan { cache, runs: beams.map(|(slot, r)| step_run(slot, &r.sequence, need)).collect() }
    }

    fn advance(&mut self, replies: Vec<Reply>) -> Result<()> {
        if self.done {
            return Ok(());
        }
        expect_replies(&replies, self.running.len())?;
        let settings = &self.request.settings;
        let rows = replies.into_iter().map(|r| last_row(r, settings)).collect::<Result<Vec<Row>>>()?;
        let generated = self.running.first().map_or(0, |r| r.sequence.new_len());
        let (candidates, kept) = self.candidates(&rows)?;
        if candidates.is_empty() && self.pool.is_empty() {
            return Err(no_token(generated));
        }
        let mut beams = std::mem::take(&mut self.running);
        let mut running = Vec::new();
        for (rank, candidate) in candidates.into_iter().enumerate() {
            let Candidate { score, beam, id } = candidate;
            let (Some(parent), Some(row)) = (beams.get_mut(beam), rows.get(beam)) else { continue };
            let finish = parent.sequence.end_with(id, &self.request.stopping);
            // What ends behind the best `beams` was only looked at to fill gaps.
            if finish.is_some() && rank >= self.beams {
                continue;
            }
            let token = row.token(id, kept.get(beam).cloned().flatten(), beam);
            let sequence = parent.sequence.with(token, finish);
            match finish {
                Some(_) => {
                    self.ended.push(Ended { ids: sequence.ids.clone(), slot: beam });
                    self.add_to_pool(sequence, score);
                }
                None => running.push(Running { sequence, score, parent: beam }),
            }
        }
        // Drawn candidates come in the order of drawing.
        running.sort_by(|a, b| b.score.total_cmp(&a.score));
        running.truncate(self.beams);
        self.running = running;
        self.trim_pool();
        if self.settled() {
            self.end();
        }
        Ok(())
    }

    fn ended(&mut self) -> Vec<Ended> {
        std::mem::take(&mut self.ended)
    }

    fn take_events(&mut self) -> Vec<TokenEvent> {
        self.stream.take()
    }

    fn interrupt(&mut self, reason: FinishReason) {
        if self.done {
            return;
        }
        for Running { mut sequence, score, .. } in std::mem::take(&mut self.running) {
            sequence.finish = Some(reason);
            match sequence.new_len() {
                0 => self.pool.push((0.0, sequence)),
                _ => self.add_to_pool(sequence, score),
            }
        }
        self.end();
    }

    fn finish(&mut self) -> Vec<SequenceOutput> {
        std::mem::take(&mut self.pool).into_iter().map(|(score, s)| s.into_output(Some(score))).collect()
    }
}
