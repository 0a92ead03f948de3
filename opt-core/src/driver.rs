//! Runs strategies on engines: the loop behind every way of generating.

use crate::{
    CancelToken, Error, ErrorKind, Progress, ProgressFn, Result,
    embedding::{Capture, EmbedPart, Embedding, States},
    engine::{Engine, Forward, Hidden, Input, KvCache, Output, Sequence, Want},
    generation::{
        CacheOp, Ended, FinishReason, ModelRole, Need, Plan, Reply, RowScores, Run, ScoreNeed,
        SequenceOutput, Strategy, TokenEvent,
    },
};
use ndarray::{Array2, Axis, concatenate};
use opt_backend::CacheDType;
use std::{
    collections::{HashMap, VecDeque},
    ops::ControlFlow,
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
    /// A session's cache: holds the first tokens of the prompt.
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
}

/// The model that drafts.
#[derive(Clone)]
pub(crate) struct Assistant {
    pub(crate) engine: Arc<dyn Engine>,
    /// What it wears.
    pub(crate) adapter: Option<Arc<str>>,
}

/// The cache slots of a request's two models.
pub(crate) struct Slots {
    /// Rows of embeddings, which lie before the ids and are never cut.
    embeds: usize,
    target: Vec<Slot>,
    assistant: Vec<Slot>,
}

/// One branch of a request: the tokens run so far and their cache.
#[derive(Default)]
pub(crate) struct Slot {
    pub(crate) ids: Vec<u32>,
    /// `None` until something was run, and always for a request without cache.
    pub(crate) cache: Option<KvCache>,
    /// What is kept of their hidden states.
    states: States,
}

impl Slots {
    /// One empty slot for each model, of a request with so many rows of embeddings.
    pub(crate) fn new(embeds: usize) -> Self {
        Self { embeds, target: vec![Slot::default()], assistant: vec![Slot::default()] }
    }

    fn of(&mut self, model: ModelRole) -> &mut Vec<Slot> {
        match model {
            ModelRole::Target => &mut self.target,
            ModelRole::Assistant => &mut self.assistant,
        }
    }

    fn slot(&mut self, model: ModelRole, slot: usize) -> Result<&mut Slot> {
        let slots = self.of(model);
        let count = slots.len();
        slots.get_mut(slot).ok_or_else(|| {
            let message =
                format!("the strategy named cache slot {slot} of {count}; this is a mistake in the strategy");
            Error::new(ErrorKind::Unsupported, message)
        })
    }

    fn apply(&mut self, op: &CacheOp) -> Result<()> {
        match op {
            CacheOp::Truncate { model, slot, len } => {
                let embeds = self.embeds;
                self.slot(*model, *slot)?.apply_truncate(embeds, *len)
            }
            CacheOp::Reorder { model, parents } => {
                let mut old: Vec<Option<Slot>> =
                    std::mem::take(self.of(*model)).into_iter().map(Some).collect();
                let mut new = Vec::with_capacity(parents.len());
                for (index, &parent) in parents.iter().enumerate() {
                    let last_use = !parents[index + 1..].contains(&parent);
                    let place = old.get_mut(parent).filter(|slot| slot.is_some()).ok_or_else(|| {
                        let message = format!("the strategy named cache slot {parent}, which is not there");
                        Error::new(ErrorKind::Unsupported, message)
                    })?;
                    new.extend(if last_use {
                        place.take()
                    } else {
                        place.as_ref().map(Slot::fork).transpose()?
                    });
                }
                *self.of(*model) = new;
                Ok(())
            }
        }
    }

    /// The target's slot that has run most of `ids`, or a fork of it: taken out if nobody else needs it.
    fn longest(&mut self, ids: &[u32], take: bool) -> Result<Option<Slot>> {
        let common = |slot: &Slot| slot.ids.iter().zip(ids).take_while(|(a, b)| a == b).count();
        if take {
            let slot = std::mem::take(&mut self.target).into_iter().max_by_key(common);
            return Ok(slot.filter(|slot| slot.states.have_begun()));
        }
        let begun = self.target.iter().filter(|slot| slot.states.have_begun());
        begun.max_by_key(|slot| common(slot)).map(Slot::fork).transpose()
    }

    /// The slot of the target that has run most of `ids`, cut to what they have in common.
    pub(crate) fn take_prefix(&mut self, ids: &[u32]) -> Result<Option<Slot>> {
        let common = |slot: &Slot| slot.ids.iter().zip(ids).take_while(|(a, b)| a == b).count();
        let Some(mut best) = std::mem::take(&mut self.target).into_iter().max_by_key(common) else {
            return Ok(None);
        };
        let len = common(&best);
        best.ids.truncate(len);
        if let Some(cache) = &mut best.cache {
            cache.truncate(len)?;
        }
        Ok(Some(best))
    }
}

impl Slot {
    /// Forgets all but the first `len` positions, of which `embeds` are rows of embeddings.
    fn apply_truncate(&mut self, embeds: usize, len: usize) -> Result<()> {
        self.ids.truncate(len.saturating_sub(embeds));
        self.states.truncate(len);
        self.cache.as_mut().map_or(Ok(()), |cache| cache.truncate(len))
    }

    fn fork(&self) -> Result<Self> {
        let cache = self.cache.as_ref().map(KvCache::fork).transpose()?;
        Ok(Self { ids: self.ids.clone(), cache, states: self.states.clone() })
    }
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
        let mut plans: Vec<Plan> = Vec::with_capacity(self.requests.len());
        for (request, finished) in self.requests.iter_mut().zip(&mut self.finished) {
            request.cancel.check("generation")?;
            if *finished {
                plans.push(Plan::default());
                continue;
            }
            let plan = request.strategy.plan();
            *finished = plan.runs.is_empty();
            for op in &plan.cache {
                request.slots.apply(op)?;
            }
            plans.push(plan);
        }

        let mut target = Vec::new();
        let mut replies: Vec<Vec<Reply>> =
            plans.iter().map(|plan| vec![Reply::default(); plan.runs.len()]).collect();
        for (index, (request, plan)) in self.requests.iter_mut().zip(&plans).enumerate() {
            let mut draft = Vec::new();
            for (at, run) in plan.runs.iter().enumerate() {
                match (run.model, &request.assistant) {
                    (ModelRole::Target, _) => {
                        target.push(Job::new(&*self.engine, request, run, (index, at))?)
                    }
                    (ModelRole::Assistant, Some(Assistant { engine, .. })) => {
                        let engine = Arc::clone(engine);
                        draft.push(Job::new(&*engine, request, run, (index, at))?);
                    }
                    (ModelRole::Assistant, None) => {
                        return Err(Error::new(
                            ErrorKind::Option,
                            "assisted decoding: expected an assistant model",
                        ));
                    }
                }
            }
            if let Some(Assistant { engine, .. }) = request.assistant.clone().filter(|_| !draft.is_empty()) {
                run_jobs(&*engine, &mut draft, &cancels, watch.as_deref_mut()).await?;
                finish_jobs(draft, std::slice::from_mut(request), index, &mut replies)?;
            }
        }
        if !target.is_empty() {
            run_jobs(&*self.engine, &mut target, &cancels, watch).await?;
            finish_jobs(target, &mut self.requests, 0, &mut replies)?;
        }

        let elapsed = self.started.elapsed();
        let several = self.requests.len() > 1;
        let mut rests = Vec::new();
        let each = self.requests.iter_mut().zip(&self.finished).zip(replies).enumerate();
        for (index, ((request, _), replies)) in each.filter(|(_, ((_, finished), _))| !**finished) {
            let advanced = request.strategy.advance(replies);
            advanced.map_err(|e| if several { e.at(format_args!("request {}", index + 1)) } else { e })?;
            let ended = request.strategy.ended();
            if request.embed.is_some() {
                for Ended { ids, slot } in ended {
                    let slot = request.slots.slot(ModelRole::Target, slot)?.fork()?;
                    rests.push(Rest { request: index, ids, slot });
                }
            }
            // Before the new token is handed out, so that it can say that it is the last.
            if request.max_time.is_some_and(|most| elapsed >= most) {
                request.strategy.interrupt(FinishReason::Length);
            }
        }
        self.run_rests(rests).await?;
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
        let outputs: Vec<Vec<SequenceOutput>> =
            self.requests.iter_mut().map(|request| request.strategy.finish()).collect();
        let mut rests = Vec::new();
        for (index, (request, outputs)) in self.requests.iter_mut().zip(&outputs).enumerate() {
            for output in outputs {
                let Some(ids) = request.ids_of(output) else { continue };
                if !request.embedded.contains_key(&ids)
                    && let Some(slot) = request.slots.longest(&ids, outputs.len() == 1)?
                {
                    rests.push(Rest { request: index, ids, slot });
                }
            }
        }
        for Rest { request, slot, .. } in self.run_rests(rests).await? {
            // Where it was taken from, the rest of a conversation may go on.
            if let Some(request) = self.requests.get_mut(request).filter(|r| r.slots.target.is_empty()) {
                request.slots.target.push(slot);
            }
        }
        let each = self.requests.into_iter().zip(outputs);
        Ok(each
            .map(|(request, outputs)| {
                let with_vector = |output: SequenceOutput| {
                    let embedding = request.ids_of(&output).and_then(|ids| request.embedded.get(&ids));
                    let embedding = embedding.cloned();
                    (output, embedding)
                };
                (outputs.into_iter().map(with_vector).collect(), request.slots)
            })
            .collect())
    }

    /// Runs what slots still lack of sequences that have ended, all as one batch, and keeps their vectors.
    async fn run_rests(&mut self, mut rests: Vec<Rest>) -> Result<Vec<Rest>> {
        let mut jobs = Vec::new();
        for (at, Rest { request, ids, slot }) in rests.iter_mut().enumerate() {
            let Some(request) = self.requests.get(*request) else { continue };
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
                jobs.push(Job::in_slot(&*self.engine, request, slot, None, &run, (at, 0))?);
            }
        }
        if !jobs.is_empty() {
            let cancels: Vec<CancelToken> = self.requests.iter().map(|r| r.cancel.clone()).collect();
            run_jobs(&*self.engine, &mut jobs, &cancels, None).await?;
        }
        for job in jobs {
            if let Some(Rest { slot, .. }) = rests.get_mut(job.whose.0) {
                job.put_back(slot);
            }
        }
        for Rest { request, ids, slot } in &rests {
            let Some(request) = self.requests.get_mut(*request) else { continue };
            let embedding = request.embed.as_ref().map(|embed| embed.embedding(&slot.states)).transpose()?;
            if let Some(embedding) = embedding.flatten() {
                request.embedded.insert(ids.clone(), embedding);
            }
        }
        Ok(rests)
    }
}

/// A finished sequence and its vector, if one was asked for.
pub(crate) type Ending = (SequenceOutput, Option<Embedding>);

/// A sequence that has ended, and a slot that holds its beginning.
struct Rest {
    /// The index of its request.
    request: usize,
    /// Those of the prompt first.
    ids: Vec<u32>,
    slot: Slot,
}

impl Active {
    /// All ids of a sequence, if a vector of it is wanted.
    fn ids_of(&self, output: &SequenceOutput) -> Option<Vec<u32>> {
        self.embed.as_ref().map(|embed| [&embed.prompt[..], &output.ids].concat())
    }
}

/// A run under way: what is left of it and what came of it.
struct Job {
    /// Request and place among its runs.
    whose: (usize, usize),
    model: ModelRole,
    slot: usize,
    prompt: bool,
    cache: KvCache,
    adapter: Option<Arc<str>>,
    keep_cache: bool,
    /// Everything to run, embeddings first.
    embeds: Option<Array2<f32>>,
    tokens: Vec<u32>,
    /// The tokens that are new to the slot.
    appended: Vec<u32>,
    /// Rows that are new to the slot.
    fresh: usize,
    done: usize,
    need: Need,
    /// The layer of which states are kept.
    keeps: Option<usize>,
    /// Layers of the model.
    layers: usize,
    kept: Vec<Array2<f32>>,
    reply: Reply,
}

impl Job {
    fn new(engine: &dyn Engine, request: &mut Active, run: &Run, whose: (usize, usize)) -> Result<Self> {
        let start = (run.prompt && run.model == ModelRole::Target && !run.need.hidden)
            .then(|| request.start.take())
            .flatten();
        let mut slot = std::mem::take(request.slots.slot(run.model, run.slot)?);
        let job = Self::in_slot(engine, request, &mut slot, start, run, whose);
        *request.slots.slot(run.model, run.slot)? = slot;
        job
    }

    /// A run in a slot, whose cache it takes, or in a restored cache.
    fn in_slot(
        engine: &dyn Engine,
        request: &Active,
        slot: &mut Slot,
        start: Option<KvCache>,
        run: &Run,
        whose: (usize, usize),
    ) -> Result<Self> {
        let embeds = request.embeds.as_ref();
        let mut tokens = run.tokens.clone();
        let mut with_embeds = run.prompt.then_some(embeds).flatten().cloned();
        let cache = match (slot.cache.take(), start) {
            (Some(cache), _) => cache,
            (None, Some(start)) => {
                tokens.drain(..start.len().min(tokens.len()));
                start
            }
            (None, None) => {
                // Nothing is cached: what the slot has run before is run again.
                if !run.prompt {
                    tokens.splice(0..0, slot.ids.iter().copied());
                    with_embeds = embeds.cloned();
                }
                engine.new_cache(request.cache_dtype)?
            }
        };
        let keeps = request.embed.as_ref().filter(|embed| {
            run.model == ModelRole::Target && (!run.prompt || embed.part == EmbedPart::Whole)
        });
        let fresh =
            run.tokens.len() + if run.prompt { request.embeds.as_ref().map_or(0, Array2::nrows) } else { 0 };
        Ok(Self {
            whose,
            fresh,
            model: run.model,
            slot: run.slot,
            prompt: run.prompt,
            cache,
            adapter: match run.model {
                ModelRole::Target => request.adapter.clone(),
                ModelRole::Assistant => {
                    request.assistant.as_ref().and_then(|assistant| assistant.adapter.clone())
                }
            },
            keep_cache: request.use_cache,
            embeds: with_embeds,
            tokens,
            appended: run.tokens.clone(),
            done: 0,
            need: run.need,
            keeps: keeps.map(|embed| embed.layer),
            layers: engine.config().num_hidden_layers,
            kept: Vec::new(),
            reply: Reply::default(),
        })
    }

    fn len(&self) -> usize {
        self.tokens.len() + self.embeds.as_ref().map_or(0, Array2::nrows)
    }

    /// The next piece of at most `rows` tokens; embeddings are a piece of their own.
    fn piece(&mut self, rows: usize) -> (usize, Sequence<'_>) {
        let total = self.len();
        let embeds = self.embeds.as_ref().map_or(0, Array2::nrows);
        let (input, len) = match &self.embeds {
            Some(rows) if self.done == 0 => (Input::Embeds(rows.view()), embeds),
            _ => {
                let from = self.done - embeds;
                let len = rows.min(self.tokens.len() - from);
                (Input::Ids(&self.tokens[from..from + len]), len)
            }
        };
        // Of the run's last `rows` rows, those that lie in this piece.
        let wanted = (self.done + len).saturating_sub(total.saturating_sub(self.need.rows)).min(len);
        let want = match self.need.scores {
            ScoreNeed::None => Want::Nothing,
            _ if wanted == 0 => Want::Nothing,
            ScoreNeed::TopK(k) => Want::TopK { rows: wanted, k },
            ScoreNeed::Full => Want::Logits { rows: wanted },
        };
        let hidden = match (self.need.hidden, self.keeps) {
            (false, None) => Hidden::None,
            (false, Some(layer)) => Hidden::Layer(layer),
            (true, Some(layer)) if layer < self.layers => Hidden::All,
            (true, _) => Hidden::Last,
        };
        let (cache, adapter) = (Some(&mut self.cache), self.adapter.as_deref());
        (len, Sequence { cache, hidden, adapter, ..Sequence::new(input).want(want) })
    }

    fn take(&mut self, len: usize, output: Output) -> Result<()> {
        self.done += len;
        self.reply.scores.extend(output.top_k.into_iter().map(RowScores::TopK));
        if let Some(logits) = output.logits {
            if logits.nrows() == 1 {
                let (row, _) = logits.into_raw_vec_and_offset();
                self.reply.scores.push(RowScores::Full(row));
            } else {
                self.reply.scores.extend(logits.outer_iter().map(|row| RowScores::Full(row.to_vec())));
            }
        }
        let mut hidden = output.hidden;
        if let Some(layer) = self.keeps {
            // Of all layers, or the one.
            let at = if hidden.len() > 1 { layer } else { 0 };
            self.kept.extend(hidden.get(at).cloned());
        }
        let rows = hidden.pop().filter(|_| self.need.hidden);
        if let Some(rows) = rows {
            self.reply.hidden = Some(match self.reply.hidden.take() {
                None => rows,
                Some(before) => concatenate(Axis(0), &[before.view(), rows.view()])
                    .map_err(|e| Error::because(ErrorKind::Backend, "hidden states of unequal width", e))?,
            });
        }
        Ok(())
    }

    /// Puts the cache back into its slot, with the tokens that are new to it and what is kept of their states. The reply.
    fn put_back(self, slot: &mut Slot) -> Reply {
        let (rows, fresh) = (self.len(), self.fresh);
        slot.ids.extend(self.appended);
        slot.cache = self.keep_cache.then_some(self.cache);
        // What was run again for want of a cache is not new.
        let mut again = rows.saturating_sub(fresh);
        if self.keeps.is_none() {
            slot.states.skip(fresh);
        }
        for states in self.kept {
            let known = again.min(states.nrows());
            again -= known;
            slot.states.extend(states.slice(ndarray::s![known.., ..]));
        }
        let mut reply = self.reply;
        reply.hidden = reply.hidden.map(|hidden| {
            let again = hidden.nrows().saturating_sub(fresh);
            hidden.slice_move(ndarray::s![again.., ..])
        });
        reply
    }
}

/// Runs jobs to their end, as many rows at a time as [`MAX_ROWS`] lets.
async fn run_jobs(
    engine: &dyn Engine,
    jobs: &mut [Job],
    cancels: &[CancelToken],
    watch: Option<&mut ProgressFn<'_>>,
) -> Result<()> {
    let total: usize = jobs.iter().map(Job::len).sum();
    // Only prompts are worth a report: all else is a few tokens.
    let mut watch = watch.filter(|_| jobs.iter().any(|job| job.prompt));
    let mut done = 0;
    while done < total {
        let mut budget = MAX_ROWS;
        let mut sequences = Vec::new();
        let mut taking = Vec::new();
        for (index, job) in jobs.iter_mut().enumerate() {
            if job.done == job.len() || budget == 0 {
                continue;
            }
            let (len, sequence) = job.piece(budget);
            budget = budget.saturating_sub(len);
            sequences.push(sequence);
            taking.push((index, len));
        }
        let rows: usize = taking.iter().map(|(_, len)| len).sum();
        let mut in_tokens = |layers: Progress<'_>| match &mut watch {
            _ if cancels.iter().any(CancelToken::is_cancelled) => ControlFlow::Break(()),
            Some(watch) => {
                let now = done as u64 + rows as u64 * layers.done / layers.total.max(1);
                watch(Progress::new("prompt", now, total as u64))
            }
            None => ControlFlow::Continue(()),
        };
        let watch = Some(&mut in_tokens as &mut ProgressFn<'_>);
        let outputs = engine.forward(Forward { sequences, cancel: None, watch }).await?;
        for ((index, len), output) in taking.into_iter().zip(outputs) {
            jobs[index].take(len, output)?;
        }
        done += rows;
    }
    Ok(())
}

/// Puts caches back into their slots and replies into their places. `first` is the index of `requests[0]`.
fn finish_jobs(
    jobs: Vec<Job>,
    requests: &mut [Active],
    first: usize,
    replies: &mut [Vec<Reply>],
) -> Result<()> {
    for job in jobs {
        let (request, at) = job.whose;
        let slot = requests[request - first].slots.slot(job.model, job.slot)?;
        replies[request][at] = job.put_back(slot);
    }
    Ok(())
}
