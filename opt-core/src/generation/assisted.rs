use super::{
    AssistantSchedule, CacheOp, FinishReason, ModelRole, Need, Plan, Random, Reply, Request, Run, ScoreNeed,
    SequenceOutput, Strategy, TokenEvent,
    math::{argmax, softmax},
    prompt_lookup::candidates,
    sequence::{Row, Sequence, Stream, Token, broken, expect_replies, last_row, prompt_run, score_need},
};
use crate::Result;

/// Decoding with drafts: something cheap proposes a few tokens, one run of the target over all of them tells how many
/// it would have chosen itself.
///
/// Greedily the output is the target's own. With sampling, a token x drafted with probability q(x) is accepted with
/// min(1, p(x) / q(x)), and the first that is not is replaced by a draw from (p - q)+, which makes the output
/// distributed as the target's own (Leviathan et al. 2022, arXiv 2211.17192). Where the draft is not drawn (prompt
/// lookup) the target draws at each place and goes on as long as it draws what was drafted.
pub(super) struct Speculative {
    request: Request,
    drafter: Drafter,
    sequence: Sequence,
    random: Random,
    /// The proposed tokens.
    draft: Vec<u32>,
    /// With sampling, what each of them was drawn from: probabilities `[vocab]`.
    draft_probabilities: Vec<Vec<f32>>,
    phase: Phase,
    /// Positions in the target's and the draft model's cache.
    target_len: usize,
    assistant_len: usize,
    /// What the next plan has to begin with.
    truncations: Vec<CacheOp>,
    stream: Stream,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// The target runs the prompt.
    Prompt,
    /// The draft model proposes one more token.
    Draft,
    /// The target runs the draft.
    Verify,
}

enum Drafter {
    Model { tokens: usize, schedule: AssistantSchedule, confidence: f32, random: Random },
    Lookup { tokens: usize, max_ngram: usize },
}

impl Speculative {
    /// A draft model proposes.
    pub(super) fn assisted(
        request: Request,
        tokens: usize,
        schedule: AssistantSchedule,
        confidence: f32,
    ) -> Self {
        // Its draws must not be those that decide what is accepted.
        let random = Random::new(request.settings.seed, 1);
        Self::new(request, Drafter::Model { tokens: tokens.max(1), schedule, confidence, random })
    }

    /// What the sequence holds already proposes.
    pub(super) fn prompt_lookup(request: Request, tokens: usize, max_ngram: usize) -> Self {
        Self::new(request, Drafter::Lookup { tokens, max_ngram })
    }

    fn new(request: Request, drafter: Drafter) -> Self {
        Self {
            drafter,
            sequence: Sequence::new(&request.prompt),
            random: Random::new(request.settings.seed, 0),
            draft: Vec::new(),
            draft_probabilities: Vec::new(),
            phase: Phase::Prompt,
            target_len: 0,
            assistant_len: 0,
            truncations: Vec::new(),
            stream: Stream::default(),
            request,
        }
    }

    /// Most tokens worth drafting: the target adds one of its own.
    fn room(&self) -> usize {
        self.request.settings.max_length.saturating_sub(self.sequence.ids.len() + 1)
    }

    /// Begins a draft; without a draft model also completes it.
    fn begin_draft(&mut self) {
        let room = self.room();
        self.draft.clear();
        self.draft_probabilities.clear();
        self.phase = match &self.drafter {
            Drafter::Model { .. } if room > 0 => Phase::Draft,
            Drafter::Model { .. } => Phase::Verify,
            Drafter::Lookup { tokens, max_ngram } => {
                let eos = &self.request.settings.eos;
                let found = candidates(&self.sequence.ids, *max_ngram, (*tokens).min(room), eos);
                self.draft.extend(found);
                Phase::Verify
            }
        };
    }

    /// The next drafted token, from the draft model's logits.
    fn extend_draft(&mut self, row: &Row) -> Result<()> {
        let room = self.room();
        let request = &self.request;
        let Drafter::Model { tokens, confidence, random, .. } = &mut self.drafter else { return Ok(()) };
        let mut ids = self.sequence.ids.clone();
        ids.extend(&self.draft);
        let (id, probability, probabilities) = if request.wants_rows() || request.settings.do_sample {
            let scores = row.processed(request, &ids)?;
            let id = match request.settings.do_sample {
                true => random.sample(&scores),
                false => argmax(&scores).unwrap_or(0),
            };
            let probabilities = softmax(&scores);
            (id as u32, probabilities.get(id).copied().unwrap_or(0.0), probabilities)
        } else {
            let (id, log_prob) = row.top(1).next().ok_or_else(|| broken("a row of logits", "none"))?;
            (id, log_prob.exp(), Vec::new())
        };
        if probability.is_nan() || probability <= 0.0 {
            // The draft model sees no possible token; the target decides.
            self.phase = Phase::Verify;
            return Ok(());
        }
        if request.settings.do_sample {
            self.draft_probabilities.push(probabilities);
        }
        self.draft.push(id);
        ids.push(id);
        let complete = self.draft.len() >= (*tokens).min(room)
            || probability < *confidence
            || request.stopping.check(&ids).is_some();
        if complete {
            self.phase = Phase::Verify;
        }
        Ok(())
    }

    /// Appends a token that is certain, and says whether the sequence goes on.
    fn push(&mut self, token: Token) -> bool {
        self.stream.push(0, &mut self.sequence, token, &self.request.stopping)
    }

    /// Takes over what of the draft the target agrees with, and one token more. `rows` are its logits behind each
    /// prefix of the draft. The number of drafted tokens that were accepted.
    fn verify(&mut self, rows: &[Row]) -> Result<usize> {
        let draft = std::mem::take(&mut self.draft);
        let drawn = std::mem::take(&mut self.draft_probabilities);
        let keep = self.request.settings.keep_scores;
        for (i, row) in rows.iter().enumerate() {
            let drafted = draft.get(i).copied();
            if let Some((id, q)) = drafted.zip(drawn.get(i)) {
                let scores = row.processed(&self.request, &self.sequence.ids)?;
                let p = softmax(&scores);
                let at =
                    |probabilities: &[f32]| probabilities.get(id as usize).copied().map_or(0.0, f64::from);
                let accepted = self.random.uniform() * at(q) < at(&p);
                let id = if accepted { id } else { self.replacement(&scores, &p, q) };
                let goes_on = self.push(row.token(id, keep.then(|| scores.as_ref().into()), 0));
                if !accepted || !goes_on {
                    return Ok(i + usize::from(accepted));
                }
            } else {
                let random = self.request.settings.do_sample.then_some(&mut self.random);
                let token = row.choose(&self.request, &self.sequence.ids, random)?;
                let accepted = drafted == Some(token.id);
                let goes_on = self.push(token);
                if !accepted || !goes_on {
                    return Ok(i + usize::from(accepted));
                }
            }
        }
        Ok(draft.len())
    }

    /// A draw from (p - q)+, which replaces a rejected token.
    fn replacement(&mut self, scores: &[f32], p: &[f32], q: &[f32]) -> u32 {
        let rest: Vec<f32> = p.iter().zip(q).map(|(p, q)| (p - q).max(0.0).ln()).collect();
        // Rounding can leave nothing of it where p and q differ by no more.
        let any = rest.iter().any(|r| *r > f32::NEG_INFINITY);
        self.random.sample(if any { &rest } else { scores }) as u32
    }

    /// Adapts the length of drafts to how many of the `drafted` tokens were `accepted`.
    fn adapt(&mut self, drafted: usize, accepted: usize) {
        if let Drafter::Model { tokens, schedule: AssistantSchedule::Heuristic, .. } = &mut self.drafter {
            *tokens = if accepted == drafted { *tokens + 2 } else { tokens.saturating_sub(1).max(1) };
        }
    }

    /// Has the caches forget a rejected draft. The last id is not in them: it has not run.
    fn truncate(&mut self) {
        let len = self.request.embeds_len + self.sequence.ids.len().saturating_sub(1);
        let caches =
            [(ModelRole::Target, &mut self.target_len), (ModelRole::Assistant, &mut self.assistant_len)];
        for (model, held) in caches {
            if *held > len {
                *held = len;
                self.truncations.push(CacheOp::Truncate { model, slot: 0, len });
            }
        }
    }
}

impl Strategy for Speculative {
    fn plan(&mut self) -> Plan {
        if self.sequence.finish.is_some() {
            return Plan::default();
        }
        let sampled = self.request.settings.do_sample;
        let scores = if sampled { ScoreNeed::Full } else { score_need(&self.request, 1) };
        let need = Need { scores, rows: 1, hidden: false };
        if self.phase == Phase::Prompt {
            self.target_len = self.request.embeds_len + self.request.prompt.len();
            return Plan { cache: Vec::new(), runs: vec![prompt_run(&self.request, need)] };
        }
        let cache = std::mem::take(&mut self.truncations);
        let (model, held, rows) = match self.phase {
            Phase::Draft => (ModelRole::Assistant, &mut self.assistant_len, 1),
            _ => (ModelRole::Target, &mut self.target_len, self.draft.len() + 1),
        };
        let skip = held.saturating_sub(self.request.embeds_len);
        let tokens: Vec<u32> = self.sequence.ids.iter().chain(&self.draft).copied().skip(skip).collect();
        let prompt = *held == 0;
        *held += tokens.len();
        Plan { cache, runs: vec![Run { model, slot: 0, tokens, prompt, need: Need { rows, ..need } }] }
    }

    fn advance(&mut self, mut replies: Vec<Reply>) -> Result<()> {
        if self.sequence.finish.is_some() {
            return Ok(());
        }
        expect_replies(&replies, 1)?;
        let Some(reply) = replies.pop() else { return Ok(()) };
        if self.phase == Phase::Draft {
            let row = last_row(reply, &self.request.settings)?;
            return self.extend_draft(&row);
        }
        let drafted = self.draft.len();
        if reply.scores.len() != drafted + 1 {
            return Err(broken(&format!("{} rows", drafted + 1), &reply.scores.len().to_string()));
        }
        let settings = &self.request.settings;
        let rows =
            reply.scores.into_iter().map(|row| Row::new(row, settings)).collect::<Result<Vec<Row>>>()?;
        let accepted = self.verify(&rows)?;
        if self.phase == Phase::Verify {
            self.adapt(drafted, accepted);
        }
        self.truncate();
        self.begin_draft();
        Ok(())
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
