use super::{
    Ended, FinishReason, Need, Plan, Random, Reply, Request, ScoreNeed, SequenceOutput, Strategy, TokenEvent,
    sequence::{Row, Sequence, Stream, expect_replies, last_row, prompt_run, reorder, score_need, step_run},
};
use crate::Result;

/// Greedy decoding and multinomial sampling: one token after the other.
///
/// Several sequences of one prompt are forks of one run of it, each with its own stream of random numbers.
pub(super) struct Single {
    request: Request,
    sequences: Vec<Sequence>,
    randoms: Vec<Random>,
    /// For each cache slot, which sequence it holds; before the prompt has run there is none.
    slots: Vec<usize>,
    /// How the slots of the next plan follow from those there are now.
    parents: Vec<usize>,
    slot_count: usize,
    stream: Stream,
    ended: Vec<Ended>,
}

impl Single {
    pub(super) fn new(request: Request) -> Self {
        let n = request.settings.num_return_sequences;
        let seed = request.settings.seed;
        Self {
            sequences: vec![Sequence::new(&request.prompt); n],
            randoms: (0..n as u64).map(|stream| Random::new(seed, stream)).collect(),
            slots: Vec::new(),
            parents: Vec::new(),
            slot_count: 1,
            stream: Stream::default(),
            ended: Vec::new(),
            request,
        }
    }

    fn need(&self) -> Need {
        let scores = match self.request.settings.do_sample {
            true => ScoreNeed::Full,
            false => score_need(&self.request, 1),
        };
        Need { scores, rows: 1, hidden: false }
    }

    fn extend(&mut self, index: usize, row: &Row) -> Result<()> {
        let random = self.randoms.get_mut(index).filter(|_| self.request.settings.do_sample);
        let Some(sequence) = self.sequences.get_mut(index) else { return Ok(()) };
        let token = row.choose(&self.request, &sequence.ids, random)?;
        self.stream.push(index, sequence, token, &self.request.stopping);
        Ok(())
    }

    fn finished(&self) -> bool {
        self.sequences.iter().all(|s| s.finish.is_some())
    }
}

impl Strategy for Single {
    fn plan(&mut self) -> Plan {
        if self.finished() {
            return Plan::default();
        }
        let need = self.need();
        if self.slots.is_empty() {
            return Plan { cache: Vec::new(), runs: vec![prompt_run(&self.request, need)] };
        }
        let cache = reorder(self.slot_count, std::mem::take(&mut self.parents));
        self.slot_count = self.slots.len();
        let sequences = self.slots.iter().filter_map(|&i| self.sequences.get(i));
        Plan { cache, runs: sequences.enumerate().map(|(slot, s)| step_run(slot, s, need)).collect() }
    }

    fn advance(&mut self, replies: Vec<Reply>) -> Result<()> {
        if self.finished() {
            return Ok(());
        }
        expect_replies(&replies, self.slots.len().max(1))?;
        let settings = &self.request.settings;
        let rows = replies.into_iter().map(|r| last_row(r, settings)).collect::<Result<Vec<Row>>>()?;
        // Each sequence with the slot it was run in.
        let ran: Vec<(usize, usize)> = match self.slots.is_empty() {
            true => (0..self.sequences.len()).map(|i| (i, 0)).collect(),
            false => self.slots.iter().copied().enumerate().map(|(slot, i)| (i, slot)).collect(),
        };
        for &(index, slot) in &ran {
            if let Some(row) = rows.get(slot) {
                self.extend(index, row)?;
            }
        }
        // A sequence alone keeps its slot.
        let alone = self.sequences.len() == 1;
        let over = |(i, _): &&(usize, usize)| self.sequences.get(*i).is_some_and(|s| s.finish.is_some());
        self.ended = ran
            .iter()
            .filter(|_| !alone)
            .filter(over)
            .filter_map(|&(i, slot)| Some(Ended { ids: self.sequences.get(i)?.ids.clone(), slot }))
            .collect();
        let open = |i: &usize| self.sequences.get(*i).is_some_and(|s| s.finish.is_none());
        (self.slots, self.parents) = ran.into_iter().filter(|(i, _)| open(i)).unzip();
        Ok(())
    }

    fn ended(&mut self) -> Vec<Ended> {
        std::mem::take(&mut self.ended)
    }

    fn take_events(&mut self) -> Vec<TokenEvent> {
        self.stream.take()
    }

    fn interrupt(&mut self, reason: FinishReason) {
        for (i, sequence) in self.sequences.iter_mut().enumerate().filter(|(_, s)| s.finish.is_none()) {
            sequence.finish = Some(reason);
            self.stream.close(i, reason);
        }
    }

    fn finish(&mut self) -> Vec<SequenceOutput> {
        std::mem::take(&mut self.sequences).into_iter().map(|s| s.into_output(None)).collect()
    }
}
