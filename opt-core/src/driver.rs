//! Runs strategies on engines: the loop behind every way of generating.

use crate::{
    CancelToken, Error, ErrorKind, Progress, ProgressFn, Result,
    engine::{Engine, Forward, Hidden, Input, KvCache, Output, Sequence, Want},
    generation::{
        CacheOp, FinishReason, ModelRole, Need, Plan, Reply, RowScores, Run, ScoreNeed, SequenceOutput,
        Strategy, TokenEvent,
    },
};
use ndarray::{Array2, Axis, concatenate};
use opt_backend::CacheDType;
use std::{collections::VecDeque, ops::ControlFlow, sync::Arc, time::Duration};
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
                let slot = self.slot(*model, *slot)?;
                slot.ids.truncate(len.saturating_sub(embeds));
                match &mut slot.cache {
                    Some(cache) => cache.truncate(*len),
                    None => Ok(()),
                }
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
    fn fork(&self) -> Result<Self> {
        Ok(Self { ids: self.ids.clone(), cache: self.cache.as_ref().map(KvCache::fork).transpose()? })
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
        let each = self.requests.iter_mut().zip(&self.finished).zip(replies).enumerate();
        for (index, ((request, _), replies)) in each.filter(|(_, ((_, finished), _))| !**finished) {
            let advanced = request.strategy.advance(replies);
            advanced.map_err(|e| if several { e.at(format_args!("request {}", index + 1)) } else { e })?;
            // Before the new token is handed out, so that it can say that it is the last.
            if request.max_time.is_some_and(|most| elapsed >= most) {
                request.strategy.interrupt(FinishReason::Length);
            }
        }
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

    /// The sequences of each request, and its slots.
    pub(crate) fn finish(self) -> Vec<(Vec<SequenceOutput>, Slots)> {
        self.requests.into_iter().map(|mut request| (request.strategy.finish(), request.slots)).collect()
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
    reply: Reply,
}

impl Job {
    fn new(engine: &dyn Engine, request: &mut Active, run: &Run, whose: (usize, usize)) -> Result<Self> {
        let embeds = request.embeds.as_ref();
        let start = (run.prompt && run.model == ModelRole::Target && !run.need.hidden)
            .then(|| request.start.take())
            .flatten();
        let slot = request.slots.slot(run.model, run.slot)?;
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
        let hidden = if self.need.hidden { Hidden::Last } else { Hidden::None };
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
        for rows in output.hidden {
            self.reply.hidden = Some(match self.reply.hidden.take() {
                None => rows,
                Some(before) => concatenate(Axis(0), &[before.view(), rows.view()])
                    .map_err(|e| Error::because(ErrorKind::Backend, "hidden states of unequal width", e))?,
            });
        }
        Ok(())
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
        slot.ids.extend(job.appended);
        slot.cache = job.keep_cache.then_some(job.cache);
        let mut reply = job.reply;
        // What was run again for want of a cache is not part of the answer.
        reply.hidden = reply.hidden.map(|hidden| {
            let again = hidden.nrows().saturating_sub(job.fresh);
            hidden.slice_move(ndarray::s![again.., ..])
        });
        replies[request][at] = reply;
    }
    Ok(())
}
