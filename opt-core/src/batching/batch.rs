use super::{
    BatchOptions, Event, Task, TaskId,
    lane::{Lane, choose},
    prefixes::{Prefixes, WORTH, common},
    task::position_bytes,
};
use crate::{Error, ErrorKind, Opt, Result, driver::run_pieces, engine::KvCache};
use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
    time::Duration,
};
use web_time::Instant;

/// Tasks that are advanced together. See the [module](super).
pub struct Batch {
    opt: Opt,
    options: BatchOptions,
    next: u64,
    waiting: VecDeque<(TaskId, u64, Task)>,
    /// In the order in which they came.
    lanes: Vec<Lane>,
    prefixes: Prefixes,
    /// Ended by their owner; the next step says so.
    cancelled: Vec<TaskId>,
    /// Whether a step has failed, or was dropped before its end: caches and turns may then be anything.
    broken: bool,
    totals: BatchStats,
}

/// How full a [`Batch`] is, and what it has done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct BatchStats {
    /// Tasks that wait for a place.
    pub waiting: usize,
    /// Tasks that run.
    pub running: usize,
    /// Sequences of the tasks that run.
    pub sequences: usize,
    /// Bytes set aside for keys and values of the tasks that run.
    pub cache_reserved: u64,
    /// Bytes of keys and values kept for prompts that begin alike.
    pub cache_kept: u64,
    /// Rows of the last forward pass.
    pub rows: usize,
    /// Steps so far that ran something.
    pub steps: u64,
    /// Tokens of prompts that began to run so far, those that did not have to be run included.
    pub prompt_tokens: u64,
    /// Those that did not have to be run.
    pub cached_tokens: u64,
    /// Tokens handed out so far.
    pub generated_tokens: u64,
    /// Time of all steps so far.
    pub step_time: Duration,
    /// How much of it the model took.
    pub model_time: Duration,
}

impl Batch {
    /// An empty batch on a model.
    ///
    /// # Errors
    /// [`ErrorKind::Option`] for limits of 0.
    pub fn new(opt: &Opt, options: BatchOptions) -> Result<Self> {
        for (name, value) in [("rows", options.rows), ("sequences", options.sequences)] {
            if value == 0 {
                return Err(Error::new(ErrorKind::Option, format!("{name}: expected at least 1, found 0")));
            }
        }
        Ok(Self {
            opt: opt.clone(),
            options,
            next: 0,
            waiting: VecDeque::new(),
            lanes: Vec::new(),
            prefixes: Prefixes::default(),
            cancelled: Vec::new(),
            broken: false,
            totals: BatchStats::default(),
        })
    }

    /// Puts a task at the end of the queue.
    ///
    /// # Errors
    /// [`ErrorKind::Option`] for a task of another model, and for one that needs more than the whole batch may have.
    pub fn add(&mut self, task: Task) -> Result<TaskId> {
        // Of no group but its own; other numbers are the caller's.
        self.add_of(u64::MAX - self.next, task)
    }

    /// [`Batch::add`] for one of a group of tasks, such as those of one request or one user: as long as not all can
    /// run, the next to begin is the first that waits of the group of which the fewest sequences run.
    ///
    /// # Errors
    /// Those of [`Batch::add`].
    pub fn add_of(&mut self, group: u64, task: Task) -> Result<TaskId> {
        self.check(&task)?;
        let id = TaskId(self.next);
        self.next += 1;
        self.waiting.push_back((id, group, task));
        Ok(id)
    }

    /// Whether a task could be added.
    ///
    /// # Errors
    /// Those of [`Batch::add`].
    pub fn check(&self, task: &Task) -> Result<()> {
        if !Arc::ptr_eq(&task.engine, self.opt.engine()) {
            let message = "task: expected one of the model that the batch is for, found another model's";
            return Err(Error::new(ErrorKind::Option, message));
        }
        self.options.check(task)
    }

    /// Ends a task, whether it waits or runs: the next step says that it has failed as cancelled, and its place is free
    /// in that step. Nothing happens if it is not there any more.
    pub fn cancel(&mut self, task: TaskId) {
        let waits = self.waiting.iter().any(|(id, ..)| *id == task);
        if waits || self.lanes.iter().any(|lane| lane.id == task) {
            self.waiting.retain(|(id, ..)| *id != task);
            self.lanes.retain(|lane| lane.id != task);
            self.cancelled.push(task);
        }
    }

    /// Whether there is nothing to do.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.lanes.is_empty() && self.cancelled.is_empty()
    }

    /// How full it is, and what it has done.
    pub fn stats(&self) -> BatchStats {
        BatchStats {
            waiting: self.waiting.len(),
            running: self.lanes.len(),
            sequences: self.lanes.iter().map(|lane| lane.branches).sum(),
            cache_reserved: self.reserved(),
            cache_kept: self.prefixes.bytes(),
            ..self.totals
        }
    }

    /// One forward pass of what comes first, waiting for it.
    ///
    /// # Errors
    /// [`ErrorKind::Backend`] if the device fails: then no task of this batch can go on.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn step(&mut self) -> Result<Vec<Event>> {
        opt_backend::block_on(self.step_async())
    }

    /// [`Batch::step`], awaited. If the future is dropped before its end, the batch has failed.
    ///
    /// # Errors
    /// Those of [`Batch::step`].
    pub async fn step_async(&mut self) -> Result<Vec<Event>> {
        if self.broken {
            let message = "the batch has failed before: none of its tasks can go on";
            return Err(Error::new(ErrorKind::Backend, message));
        }
        self.broken = true;
        let begun = Instant::now();
        let mut events: Vec<Event> = self.cancelled.drain(..).map(cancelled).collect();
        for gone in self.lanes.extract_if(.., |lane| lane.is_cancelled()) {
            events.push(cancelled(gone.id));
        }
        self.admit(&mut events);
        self.begin(&mut events).await?;
        self.run().await?;
        self.end(&mut events).await?;
        self.totals.step_time += begun.elapsed();
        self.broken = false;
        Ok(events)
    }

    /// Lets tasks in, as long as there is room for the next. That one is never passed over for want of room, so that
    /// large ones get their turn.
    fn admit(&mut self, events: &mut Vec<Event>) {
        let gone = |(_, _, task): &(TaskId, u64, Task)| task.active.cancel.is_cancelled();
        events.extend(self.waiting.iter().filter(|entry| gone(entry)).map(|(id, ..)| cancelled(*id)));
        self.waiting.retain(|entry| !gone(entry));
        loop {
            let mut running: HashMap<u64, usize> = HashMap::new();
            self.lanes.iter().for_each(|lane| *running.entry(lane.group).or_default() += lane.branches);
            let of =
                |(_, (_, group, _)): &(usize, &(TaskId, u64, Task))| running.get(group).copied().unwrap_or(0);
            let Some((at, (_, _, task))) = self.waiting.iter().enumerate().min_by_key(of) else { return };
            let sequences: usize = running.values().sum();
            let bytes = self.reserved().saturating_add(task.cache_bytes);
            if sequences + task.branches > self.options.sequences || bytes > self.options.cache_bytes {
                return;
            }
            let Some((id, group, task)) = self.waiting.remove(at) else { return };
            self.prefixes.shrink((self.options.cache_bytes - bytes).min(self.options.prefix_bytes));
            self.lanes.push(Lane::new(id, group, task));
        }
    }

    fn reserved(&self) -> u64 {
        self.lanes.iter().map(|lane| lane.cache_bytes).sum()
    }

    /// Lays out the first turns of tasks that are new, from what others have run where that helps.
    async fn begin(&mut self, events: &mut Vec<Event>) -> Result<()> {
        let mut at = 0;
        while let Some(lane) = self.lanes.get(at) {
            if !lane.is_fresh() {
                at += 1;
                continue;
            }
            let start = match self.options.share_prefixes {
                true => self.start(at)?,
                false => Start::Now(None),
            };
            let (Start::Now(cache), Some(lane)) = (start, self.lanes.get_mut(at)) else {
                at += 1;
                continue;
            };
            if let Some(cache) = cache {
                lane.start_from(cache);
            }
            let begun = lane.begin(&**self.opt.engine()).await;
            if begun.is_ok() {
                self.totals.prompt_tokens += lane.prompt_len() as u64;
                self.totals.cached_tokens += lane.cached() as u64;
            }
            match begun {
                Ok(true) => at += 1,
                Ok(false) => {
                    let lane = self.lanes.remove(at);
                    events.push(lane.finish(&**self.opt.engine()).await);
                }
                Err(error) => {
                    let task = self.lanes.remove(at).id;
                    events.push(Event::Failed { task, error });
                }
            }
        }
        Ok(())
    }

    /// What the task at this place can begin from.
    fn start(&mut self, at: usize) -> Result<Start> {
        let Some((earlier, lane)) = self.lanes.get(..at).zip(self.lanes.get(at)) else {
            return Ok(Start::Now(None));
        };
        let Some(ids) = lane.wants_prefix() else { return Ok(Start::Now(None)) };
        let kind = lane.kind();
        let (mut len, mut best) = self.prefixes.longest(ids, &kind).map_or((0, None), |(n, c)| (n, Some(c)));
        for other in earlier.iter().filter(|other| other.kind() == kind) {
            let Some((theirs, cache)) = other.prefix() else { continue };
            let shared = common(theirs, ids);
            if shared < len + WORTH {
                continue;
            }
            // What is being run just now is worth waiting for.
            match cache.filter(|cache| cache.len() >= shared) {
                Some(cache) => (len, best) = (shared, Some(cache)),
                None => return Ok(Start::Later),
            }
        }
        let forked = best.filter(|_| len >= WORTH).map(KvCache::fork).transpose()?;
        Ok(Start::Now(match forked {
            Some(mut cache) => {
                cache.truncate(len)?;
                Some(cache)
            }
            None => None,
        }))
    }

    /// One forward pass.
    async fn run(&mut self) -> Result<()> {
        let urgent: usize = self.lanes.iter().map(Lane::urgent_rows).sum();
        // However many sequences there are, prompts get on.
        let most = self.options.rows;
        let mut room = most.saturating_sub(urgent).max(most.div_ceil(4));
        let mut pieces = Vec::new();
        for lane in &mut self.lanes {
            lane.pieces(&mut room, &mut pieces);
        }
        if pieces.is_empty() {
            return Ok(());
        }
        let begun = Instant::now();
        self.totals.rows = run_pieces(&**self.opt.engine(), pieces, None).await?;
        self.totals.model_time += begun.elapsed();
        self.totals.steps += 1;
        Ok(())
    }

    /// Ends the turns that have been run and lays out the next ones.
    async fn end(&mut self, events: &mut Vec<Event>) -> Result<()> {
        let engine = Arc::clone(self.opt.engine());
        let mut lanes = std::mem::take(&mut self.lanes);
        choose(&mut lanes, self.options.threads);
        for mut lane in lanes {
            events.extend(lane.announce());
            let before = events.len();
            let ended = lane.end(&*engine, events).await;
            self.totals.generated_tokens += (events.len() - before) as u64;
            let goes_on = match ended {
                Ok(None) => Ok(true),
                Ok(Some(first)) => {
                    if first {
                        self.keep(&lane)?;
                    }
                    lane.begin(&*engine).await
                }
                Err(error) => Err(error),
            };
            match goes_on {
                Ok(true) => self.lanes.push(lane),
                Ok(false) => {
                    self.keep(&lane)?;
                    events.push(lane.finish(&*engine).await);
                }
                Err(error) => events.push(Event::Failed { task: lane.id, error }),
            }
        }
        let free = self.options.cache_bytes.saturating_sub(self.reserved());
        self.prefixes.shrink(free.min(self.options.prefix_bytes));
        Ok(())
    }

    /// Keeps what a task has run for others that begin alike.
    fn keep(&mut self, lane: &Lane) -> Result<()> {
        if let Some((ids, cache)) = lane.leaves().filter(|_| self.options.share_prefixes) {
            let kind = lane.kind();
            let position = position_bytes(&self.opt, kind.dtype);
            self.prefixes.keep(ids, &kind, cache, position)?;
        }
        Ok(())
    }
}

impl BatchOptions {
    /// Whether a batch with these limits could take a task.
    ///
    /// # Errors
    /// [`ErrorKind::Option`] for one that needs more than the whole batch may have.
    pub fn check(&self, task: &Task) -> Result<()> {
        if task.branches > self.sequences {
            let (most, found) = (self.sequences, task.branches);
            let message =
                format!("expected at most {most} sequences side by side (beams, choices), found {found}");
            return Err(Error::new(ErrorKind::Option, message));
        }
        if task.cache_bytes > self.cache_bytes {
            let mib = |bytes: u64| bytes.div_ceil(1 << 20);
            let message = format!(
                "keys and values: expected a request that needs at most {} MiB, found one that needs {} MiB: ask for \
                 fewer tokens or sequences",
                mib(self.cache_bytes),
                mib(task.cache_bytes)
            );
            return Err(Error::new(ErrorKind::Option, message));
        }
        Ok(())
    }
}

/// When a task begins.
enum Start {
    /// In this step, from a cache that holds the first of its tokens.
    Now(Option<KvCache>),
    /// When an earlier one has run what they have in common.
    Later,
}

fn cancelled(task: TaskId) -> Event {
    Event::Failed { task, error: Error::new(ErrorKind::Cancelled, "the request was cancelled") }
}
