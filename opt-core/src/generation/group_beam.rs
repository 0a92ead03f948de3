use super::{
    EarlyStopping, Ended, FinishReason, Need, Plan, Reply, Request, ScoreNeed, SequenceOutput, Strategy,
    TokenEvent,
    beam::{Candidate, Kept, candidates_to_keep},
    math::top_k,
    sequence::{Row, Sequence, Stream, expect_replies, last_row, no_token, prompt_run, reorder, step_run},
};
use crate::Result;

/// Diverse beam search (Vijayakumar et al. 2016, arXiv 1610.02424).
///
/// The beams form groups. In each step the groups choose one after the other, each by classical beam search within
/// itself; a token loses `diversity` for each time an earlier group chose it in the same step.
pub(super) struct GroupBeam {
    request: Request,
    group_size: usize,
    diversity: f32,
    groups: Vec<Group>,
    slot_count: usize,
    returned: Vec<(f64, Sequence)>,
    done: bool,
    stream: Stream,
    ended: Vec<Ended>,
}

struct Group {
    running: Vec<Running>,
    pool: Pool,
    done: bool,
}

struct Running {
    sequence: Sequence,
    score: f32,
    /// The slot that holds all but the last token.
    parent: usize,
}

/// Finished hypotheses of one group: the best few, in no order.
struct Pool {
    size: usize,
    length_penalty: f64,
    hypotheses: Vec<(f64, Sequence)>,
}

impl Pool {
    /// `sum` divided by `len`^penalty; in f64, as Python's floats are.
    fn score(&self, sum: f32, len: usize) -> f64 {
        f64::from(sum) / (len as f64).powf(self.length_penalty)
    }

    fn worst(&self) -> f64 {
        self.hypotheses.iter().map(|(score, _)| *score).fold(1e9, f64::min)
    }

    fn add(&mut self, sequence: Sequence, sum: f32) {
        let score = self.score(sum, sequence.new_len().max(1));
        if self.hypotheses.len() >= self.size && score <= self.worst() {
            return;
        }
        self.hypotheses.push((score, sequence));
        if self.hypotheses.len() > self.size {
            let worst = self.worst();
            if let Some(i) = self.hypotheses.iter().position(|(score, _)| *score <= worst) {
                self.hypotheses.remove(i);
            }
        }
    }

    /// Whether nothing that runs can be better than what is here. `best` is the best sum of this step's candidates,
    /// `len` their length, `max` the greatest length.
    fn settled(&self, best: f32, len: usize, max: usize, early_stopping: EarlyStopping) -> bool {
        if self.hypotheses.len() < self.size {
            return false;
        }
        let len = match early_stopping {
            EarlyStopping::Yes => return true,
            EarlyStopping::Never if self.length_penalty > 0.0 => max,
            EarlyStopping::Never | EarlyStopping::No => len,
        };
        self.worst() >= self.score(best, len)
    }
}

impl GroupBeam {
    pub(super) fn new(request: Request, group_size: usize, groups: usize, diversity: f32) -> Self {
        let length_penalty = f64::from(request.settings.length_penalty);
        let group = |_| Group {
            running: vec![Running { sequence: Sequence::new(&request.prompt), score: 0.0, parent: 0 }],
            pool: Pool { size: group_size, length_penalty, hypotheses: Vec::new() },
            done: false,
        };
        Self {
            group_size,
            diversity,
            groups: (0..groups).map(group).collect(),
            slot_count: 1,
            returned: Vec::new(),
            done: false,
            stream: Stream::default(),
            ended: Vec::new(),
            request,
        }
    }

    fn running(&self) -> impl Iterator<Item = &Running> {
        self.groups.iter().flat_map(|g| &g.running)
    }

    fn started(&self) -> bool {
        self.running().any(|r| r.sequence.new_len() > 0)
    }

    /// The tokens that a finished group goes on to choose, as far as later groups are concerned: padding. So it is in
    /// transformers, and it is felt where padding is a token that the model may choose.
    fn padding(&self) -> impl Iterator<Item = u32> {
        let settings = &self.request.settings;
        let pad = settings.pad.or(settings.eos.first().copied());
        pad.into_iter().flat_map(|pad| std::iter::repeat_n(pad, self.group_size))
    }

    /// One step of group `index`, whose beams have `rows` and begin at slot `slot`. `chosen` are the tokens of earlier
    /// groups, sorted; those that this group chooses are returned.
    fn step(&mut self, index: usize, rows: &[Row], slot: usize, chosen: &[u32]) -> Result<Vec<u32>> {
        let (request, size) = (&self.request, self.group_size);
        let settings = &request.settings;
        let first_beam = index * size;
        let keep = candidates_to_keep(size, settings.eos.len());
        let Some(group) = self.groups.get_mut(index) else { return Ok(Vec::new()) };

        let mut candidates = Vec::new();
        let mut kept: Vec<Kept> = Vec::new();
        for (beam, (running, row)) in group.running.iter().zip(rows).enumerate() {
            let mut scores = row.log_probs()?;
            for same in chosen.chunk_by(|a, b| a == b) {
                if let Some(score) = same.first().and_then(|&id| scores.get_mut(id as usize)) {
                    *score -= self.diversity * same.len() as f32;
                }
            }
            request.chain.apply(&running.sequence.ids, &mut scores)?;
            let best = top_k(&scores, keep).into_iter();
            candidates.extend(best.map(|(i, s)| Candidate { score: s + running.score, beam, id: i as u32 }));
            kept.push(settings.keep_scores.then(|| scores.into()));
        }
        candidates.retain(|c| c.score > f32::NEG_INFINITY);
        candidates.sort_by(Candidate::order);
        candidates.truncate(keep);

        let mut beams = std::mem::take(&mut group.running);
        let generated = beams.first().map_or(0, |b| b.sequence.new_len());
        let Some(best) = candidates.first().map(|c| c.score) else {
            if group.pool.hypotheses.is_empty() {
                return Err(no_token(generated));
            }
            group.done = true;
            return Ok(Vec::new());
        };
        for (rank, candidate) in candidates.into_iter().enumerate() {
            let Candidate { score, beam, id } = candidate;
            let (Some(parent), Some(row)) = (beams.get_mut(beam), rows.get(beam)) else { continue };
            let finish = parent.sequence.end_with(id, &request.stopping);
            let ends = matches!(finish, Some(FinishReason::Eos | FinishReason::Stop));
            if ends && rank >= size {
                continue;
            }
            let token = row.token(id, kept.get(beam).cloned().flatten(), first_beam + beam);
            let sequence = parent.sequence.with(token, finish);
            if ends {
                self.ended.push(Ended { ids: sequence.ids.clone(), slot: slot + beam });
                group.pool.add(sequence, score);
                continue;
            }
            group.running.push(Running { sequence, score, parent: slot + beam });
            if group.running.len() == size {
                break;
            }
        }
        let chosen = group.running.iter().filter_map(|r| r.sequence.ids.last().copied()).collect();
        let settled = group.pool.settled(best, generated + 1, request.max_new(), settings.early_stopping);
        group.done = settled || group.running.is_empty();
        if group.done {
            // Its beams at the greatest length are not finished hypotheses either, once it is settled.
            group.running.clear();
        }
        Ok(chosen)
    }

    /// Ends all groups; beams that still run become hypotheses.
    fn end(&mut self) {
        self.done = true;
        for group in &mut self.groups {
            for Running { sequence, score, .. } in std::mem::take(&mut group.running) {
                group.pool.add(sequence, score);
            }
        }
        self.returned = self.groups.iter_mut().flat_map(|g| std::mem::take(&mut g.pool.hypotheses)).collect();
        self.returned.sort_by(|a, b| a.0.total_cmp(&b.0));
        self.returned.reverse();
        self.returned.truncate(self.request.settings.num_return_sequences);
        for (i, (_, sequence)) in self.returned.iter().enumerate() {
            self.stream.extend(sequence.events(i));
        }
    }
}

impl Strategy for GroupBeam {
    fn plan(&mut self) -> Plan {
        if self.done {
            return Plan::default();
        }
        let need = Need { scores: ScoreNeed::Full, rows: 1, hidden: false };
        if !self.started() {
            return Plan { cache: Vec::new(), runs: vec![prompt_run(&self.request, need)] };
        }
        let cache = reorder(self.slot_count, self.running().map(|r| r.parent).collect());
        let runs: Vec<_> =
            self.running().enumerate().map(|(slot, r)| step_run(slot, &r.sequence, need)).collect();
        self.slot_count = runs.len();
        Plan { cache, runs }
    }

    fn advance(&mut self, replies: Vec<Reply>) -> Result<()> {
        if self.done {
            return Ok(());
        }
        let started = self.started();
        let counts: Vec<usize> = self.groups.iter().map(|g| g.running.len()).collect();
        expect_replies(&replies, if started { counts.iter().sum() } else { 1 })?;
        let settings = &self.request.settings;
        let rows = replies.into_iter().map(|r| last_row(r, settings)).collect::<Result<Vec<Row>>>()?;
        let mut chosen: Vec<u32> = Vec::new();
        let mut slot = 0;
        for (index, count) in counts.into_iter().enumerate() {
            if self.groups.get(index).is_some_and(|g| g.done) {
                chosen.extend(self.padding());
                chosen.sort_unstable();
                continue;
            }
            // All groups start from the one run of the prompt.
            let rows = if started { rows.get(slot..slot + count) } else { rows.get(..1) };
            chosen.extend(self.step(index, rows.unwrap_or_default(), slot, &chosen)?);
            chosen.sort_unstable();
            slot += if started { count } else { 0 };
        }
        if self.running().all(|r| r.sequence.finish.is_some()) {
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
        self.groups.iter_mut().flat_map(|g| &mut g.running).for_each(|r| r.sequence.finish = Some(reason));
        self.end();
    }

    fn finish(&mut self) -> Vec<SequenceOutput> {
        let returned = std::mem::take(&mut self.returned);
        returned.into_iter().map(|(score, s)| s.into_output(Some(score as f32))).collect()
    }
}
