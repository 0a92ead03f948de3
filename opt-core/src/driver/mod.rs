//! Runs strategies on engines: the loop behind every way of generating.

mod job;
mod slots;

pub(crate) use job::{Job, run_pieces};
pub(crate) use slots::{Slot, Slots};

use crate::{
    CancelToken, Error, ErrorKind, ProgressFn, Result,
    batching::PromptToken,
    embedding::{Capture, Embedding},
    engine::{Engine, KvCache},
    generation::{
        Ended, FinishReason, ModelRole, Need, Plan, Reply, Run, SequenceOutput, Strategy, TokenEvent,
    },
};
use job::run_jobs;
use ndarray::Array2;
use opt_backend::CacheDType;
use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
    time::Duration,
};
use web_time::Instant;

/// Rows of one forward pass. Longer prompts are run in pieces, which bounds memory and lets a cancellation through.
pub(crate) const MAX_ROWS: usize = 512;

/// One request under way.
pub(crate) struct Active {
    pub(crate) strategy: Box<dyn Strategy>,
    pub(crate) assistant: Option<Assistant>,
    /// What the model wears.
    pub(crate) adapter: Option<Arc<str>>,
    pub(crate) embeds: Option<Array2<f32>>,
    /// A cache from elsewhere: holds the first tokens of the prompt.
    pub(crate) start: Option<KvCache>,
    pub(crate) cache_dtype: CacheDType,
    /// Whether to keep keys and values between steps.
    pub(crate) use_cache: bool,
    pub(crate) max_time: Option<Duration>,
    pub(crate) cancel: CancelToken,
    pub(crate) slots: Slots,
    /// What is to be kept of hidden states.
    pub(crate) embed: Option<Capture>,
    /// The vectors of sequences that have ended, by their ids, those of the prompt included.
    pub(crate) embedded: HashMap<Vec<u32>, Embedding>,
    /// Set where the prompt's tokens are to be scored.
    pub(crate) score: Option<Scoring>,
    /// How they were scored.
    pub(crate) scores: Vec<PromptToken>,
}

/// How tokens of a prompt are to be scored.
#[derive(Clone)]
pub(crate) struct Scoring {
    /// For each token of the prompt, the one that follows.
    pub(crate) next: Arc<[u32]>,
    /// How many of the most probable ones to name beside it.
    pub(crate) top: usize,
}

/// The model that drafts.
#[derive(Clone)]
pub(crate) struct Assistant {
    pub(crate) engine: Arc<dyn Engine>,
    /// What it wears.
    pub(crate) adapter: Option<Arc<str>>,
}

/// The runs of a request's plan.
#[derive(Default)]
pub(crate) struct Turn {
    /// Those of the target that are under way.
    pub(crate) jobs: Vec<Job>,
    /// The answers to all runs; those of the jobs are still empty.
    replies: Vec<Reply>,
}

impl Turn {
    /// Whether all rows have been run.
    pub(crate) fn is_run(&self) -> bool {
        self.jobs.iter().all(|job| job.left() == 0)
    }

    /// Whether whole rows of logits come of it, so that it takes time to choose from them.
    pub(crate) fn has_rows(&self) -> bool {
        self.jobs.iter().any(Job::has_rows)
    }
}

impl Active {
    /// A request with nothing asked for besides, wearing an adapter.
    pub(crate) fn new(strategy: Box<dyn Strategy>, adapter: Option<Arc<str>>) -> Self {
        Self {
            strategy,
            assistant: None,
            adapter,
            embeds: None,
            start: None,
            cache_dtype: CacheDType::default(),
            use_cache: true,
            max_time: None,
            cancel: CancelToken::new(),
            slots: Slots::new(0),
            embed: None,
            embedded: HashMap::new(),
            score: None,
            scores: Vec::new(),
        }
    }

    /// Asks the strategy what to run; `None` at its end. What is to be drafted is run at once.
    pub(crate) async fn begin(
        &mut self,
        engine: &dyn Engine,
        watch: Option<&mut ProgressFn<'_>>,
    ) -> Result<Option<Turn>> {
        self.cancel.check("generation")?;
        let plan = self.strategy.plan();
        if plan.runs.is_empty() {
            return Ok(None);
        }
        for op in &plan.cache {
            self.slots.apply(op)?;
        }
        let Plan { runs, .. } = plan;
        let mut turn = Turn { jobs: Vec::new(), replies: vec![Reply::default(); runs.len()] };
        let mut drafts = Vec::new();
        for (at, run) in runs.iter().enumerate() {
            match (run.model, self.assistant.clone()) {
                (ModelRole::Target, _) => turn.jobs.push(Job::new(engine, self, run, at)?),
                (ModelRole::Assistant, Some(Assistant { engine, .. })) => {
                    drafts.push(Job::new(&*engine, self, run, at)?);
                }
                (ModelRole::Assistant, None) => {
                    return Err(Error::new(
                        ErrorKind::Option,
                        "assisted decoding: expected an assistant model",
                    ));
                }
            }
        }
        if let Some(Assistant { engine, .. }) = self.assistant.clone().filter(|_| !drafts.is_empty()) {
            let cancels = [self.cancel.clone()];
            run_jobs(&*engine, drafts.iter_mut().collect(), &cancels, watch).await?;
            self.put_back(drafts, &mut turn.replies)?;
        }
        Ok(Some(turn))
    }

    /// Hands the answers of a turn that has been run to the strategy. Sequences that ended with it, if they are to be
    /// embedded, as those of request number `index`.
    pub(crate) fn end(&mut self, turn: Turn, index: usize) -> Result<Vec<Rest>> {
        let Turn { jobs, mut replies } = turn;
        self.put_back(jobs, &mut replies)?;
        self.strategy.advance(replies)?;
        let ended = self.strategy.ended();
        let mut rests = Vec::new();
        if self.embed.is_some() {
            for Ended { ids, slot } in ended {
                let slot = self.slots.slot(ModelRole::Target, slot)?.fork()?;
                rests.push(Rest { request: index, ids, slot });
            }
        }
        Ok(rests)
    }

    /// Ends the request if its time is over. Before new tokens are handed out, so that the last can say that it is.
    pub(crate) fn keep_time(&mut self, elapsed: Duration) {
        if self.max_time.is_some_and(|most| elapsed >= most) {
            self.strategy.interrupt(FinishReason::Length);
        }
    }

    /// The sequences with their vectors, if such were asked for; what is still to be run for these. Of request number
    /// `index`.
    fn outputs(&mut self, index: usize) -> Result<(Vec<SequenceOutput>, Vec<Rest>)> {
        let outputs = self.strategy.finish();
        let mut rests = Vec::new();
        for output in &outputs {
            let Some(ids) = self.ids_of(output) else { continue };
            if !self.embedded.contains_key(&ids)
                && let Some(slot) = self.slots.longest(&ids, outputs.len() == 1)?
            {
                rests.push(Rest { request: index, ids, slot });
            }
        }
        Ok((outputs, rests))
    }

    /// All ids of a sequence, if a vector of it is wanted.
    fn ids_of(&self, output: &SequenceOutput) -> Option<Vec<u32>> {
        self.embed.as_ref().map(|embed| [&embed.prompt[..], &output.ids].concat())
    }

    /// The vector of a sequence, if one was wanted.
    fn with_vector(&self, output: SequenceOutput) -> Ending {
        let embedding = self.ids_of(&output).and_then(|ids| self.embedded.get(&ids).cloned());
        (output, embedding)
    }

    /// Puts caches back into their slots and answers into their places.
    fn put_back(&mut self, jobs: Vec<Job>, replies: &mut [Reply]) -> Result<()> {
        for mut job in jobs {
            self.scores.append(&mut job.scores);
            let slot = self.slots.slot(job.model, job.slot)?;
            let at = job.at;
            let reply = job.put_back(slot);
            if let Some(place) = replies.get_mut(at) {
                *place = reply;
            }
        }
        Ok(())
    }

    /// Puts a slot back where it was taken from: there the rest of a conversation may go on.
    fn keep(&mut self, slot: Slot) {
        if self.slots.target.is_empty() {
            self.slots.target.push(slot);
        }
    }
}

/// Ends a request that has nothing left to run.
pub(crate) async fn finish_one(engine: &dyn Engine, request: &mut Active) -> Result<Vec<Ending>> {
    let (outputs, rests) = request.outputs(0)?;
    for Rest { slot, .. } in run_rests(engine, std::slice::from_mut(request), rests).await? {
        request.keep(slot);
    }
    Ok(outputs.into_iter().map(|output| request.with_vector(output)).collect())
}

/// Any number of requests to one engine, advanced together: each step is one batch.
pub(crate) struct Driver {
    engine: Arc<dyn Engine>,
    requests: Vec<Active>,
    finished: Vec<bool>,
    started: Instant,
}

impl Driver {
    pub(crate) fn new(engine: Arc<dyn Engine>, requests: Vec<Active>) -> Self {
        let finished = vec![false; requests.len()];
        Self { engine, requests, finished, started: Instant::now() }
    }

    pub(crate) fn runs_on(&self, engine: &Arc<dyn Engine>) -> bool {
        Arc::ptr_eq(&self.engine, engine)
    }

    pub(crate) fn is_finished(&self) -> bool {
        self.finished.iter().all(|finished| *finished)
    }

    /// One step of every request that is not finished. `watch` is told how many tokens of prompts have been run.
    ///
    /// The token of any request ends the whole batch: requests that run together are one call of the user's.
    pub(crate) async fn step(&mut self, mut watch: Option<&mut ProgressFn<'_>>) -> Result<()> {
        let cancels: Vec<CancelToken> = self.requests.iter().map(|r| r.cancel.clone()).collect();
        let mut turns = Vec::with_capacity(self.requests.len());
        for (index, (request, finished)) in self.requests.iter_mut().zip(&mut self.finished).enumerate() {
            request.cancel.check("generation")?;
            if *finished {
                continue;
            }
            match request.begin(&*self.engine, watch.as_deref_mut()).await? {
                Some(turn) => turns.push((index, turn)),
                None => *finished = true,
            }
        }
        let jobs = turns.iter_mut().flat_map(|(_, turn)| &mut turn.jobs).collect();
        run_jobs(&*self.engine, jobs, &cancels, watch).await?;

        let elapsed = self.started.elapsed();
        let several = self.requests.len() > 1;
        let mut rests = Vec::new();
        for (index, turn) in turns {
            let Some(request) = self.requests.get_mut(index) else { continue };
            let ended = request.end(turn, index);
            rests.extend(
                ended.map_err(|e| if several { e.at(format_args!("request {}", index + 1)) } else { e })?,
            );
            request.keep_time(elapsed);
        }
        run_rests(&*self.engine, &mut self.requests, rests).await?;
        Ok(())
    }

    /// Tokens that became certain, with the index of their request.
    pub(crate) fn take_events(&mut self, events: &mut VecDeque<(usize, TokenEvent)>) {
        for (index, request) in self.requests.iter_mut().enumerate() {
            events.extend(request.strategy.take_events().into_iter().map(|event| (index, event)));
        }
    }

    /// Ends every request where it is.
    pub(crate) fn interrupt(&mut self, reason: FinishReason) {
        self.requests.iter_mut().for_each(|request| request.strategy.interrupt(reason));
    }

    /// The sequences of each request with their vectors, if such were asked for, and its slots.
    pub(crate) async fn finish(mut self) -> Result<Vec<(Vec<Ending>, Slots)>> {
        let mut outputs = Vec::with_capacity(self.requests.len());
        let mut rests = Vec::new();
        for (index, request) in self.requests.iter_mut().enumerate() {
            let (sequences, mut left) = request.outputs(index)?;
            outputs.push(sequences);
            rests.append(&mut left);
        }
        for Rest { request, slot, .. } in run_rests(&*self.engine, &mut self.requests, rests).await? {
            if let Some(request) = self.requests.get_mut(request) {
                request.keep(slot);
            }
        }
        let each = self.requests.into_iter().zip(outputs);
        Ok(each
            .map(|(request, outputs)| {
                let endings = outputs.into_iter().map(|output| request.with_vector(output)).collect();
                (endings, request.slots)
            })
            .collect())
    }
}

/// A finished sequence and its vector, if one was asked for.
pub(crate) type Ending = (SequenceOutput, Option<Embedding>);

/// A sequence that has ended, and a slot that holds its beginning.
pub(crate) struct Rest {
    /// The index of its request.
    request: usize,
    /// Those of the prompt first.
    ids: Vec<u32>,
    slot: Slot,
}

/// Runs what slots still lack of sequences that have ended, all as one batch, and keeps their vectors.
pub(crate) async fn run_rests(
    engine: &dyn Engine,
    requests: &mut [Active],
    mut rests: Vec<Rest>,
) -> Result<Vec<Rest>> {
    let mut jobs = Vec::new();
    for (at, Rest { request, ids, slot }) in rests.iter_mut().enumerate() {
        let Some(request) = requests.get(*request) else { continue };
        let common = slot.ids.iter().zip(&*ids).take_while(|(a, b)| a == b).count();
        if slot.ids.len() > common {
            slot.apply_truncate(request.slots.embeds, request.slots.embeds + common)?;
        }
        if let Some(tokens) = ids.get(common..).filter(|tokens| !tokens.is_empty()) {
            let run = Run {
                model: ModelRole::Target,
                slot: 0,
                tokens: tokens.to_vec(),
                prompt: false,
                need: Need::default(),
            };
            jobs.push(Job::in_slot(engine, request, slot, None, &run, at)?);
        }
    }
    if !jobs.is_empty() {
        let cancels: Vec<CancelToken> = requests.iter().map(|r| r.cancel.clone()).collect();
        run_jobs(engine, jobs.iter_mut().collect(), &cancels, None).await?;
    }
    for job in jobs {
        if let Some(Rest { slot, .. }) = rests.get_mut(job.at) {
            job.put_back(slot);
        }
    }
    for Rest { request, ids, slot } in &rests {
        let Some(request) = requests.get_mut(*request) else { continue };
        let embedding = request.embed.as_ref().map(|embed| embed.embedding(&slot.states)).transpose()?;
        if let Some(embedding) = embedding.flatten() {
            request.embedded.insert(ids.clone(), embedding);
        }
    }
    Ok(rests)
}
