use super::{Job, Place, State, Update, closing, restarting};
use opt_core::{
    Error, ErrorKind, Opt, Result,
    batching::{Batch, BatchOptions, BatchStats, Event, TaskId},
};
use std::{
    any::Any,
    collections::HashMap,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, PoisonError,
        atomic::Ordering,
        mpsc::{Receiver, RecvTimeoutError, TryRecvError},
    },
    time::{Duration, Instant},
};
use tokio::sync::mpsc::UnboundedSender;

/// First and longest time between two tries to get the engine back.
const BACK: [Duration; 2] = [Duration::from_millis(200), Duration::from_secs(30)];

/// What the engine's thread holds.
pub(super) struct Turn {
    receiver: Receiver<Job>,
    state: Arc<State>,
    options: BatchOptions,
    waiting: HashMap<TaskId, Waiting>,
    speed: Speed,
}

/// Who waits for a task.
struct Waiting {
    index: usize,
    tokens: bool,
    reply: UnboundedSender<(usize, Update)>,
    since: Instant,
    started: bool,
    /// When the last token of each sequence came.
    last: HashMap<usize, Instant>,
    _place: Place,
}

impl Waiting {
    /// Whoever has gone away misses nothing.
    fn tell(&self, update: Update) {
        let _ = self.reply.send((self.index, update));
    }
}

impl Turn {
    pub(super) fn new(receiver: Receiver<Job>, state: Arc<State>, options: BatchOptions) -> Self {
        Self { receiver, state, options, waiting: HashMap::new(), speed: Speed::new() }
    }

    /// Runs until nobody can send tasks any more; a failure, a panic included, ends the tasks that run and no more.
    pub(super) fn run(mut self) {
        loop {
            let (epoch, opt) = self.state.model();
            let ended = catch_unwind(AssertUnwindSafe(|| self.work(epoch, &opt)));
            let reason = match ended {
                Ok(Ok(())) => return,
                Ok(Err(error)) => error.to_string(),
                Err(panic) => format!("panic: {}", text(panic.as_ref())),
            };
            self.state.set_alive(false);
            self.state.metrics.restarts.inc();
            self.state.metrics.batch(&BatchStats::default());
            tracing::error!(reason, waiting = self.waiting.len(), "the engine has failed and is restarted");
            for (_, waiting) in self.waiting.drain() {
                waiting.tell(Update::Failed(restarting()));
            }
            if !self.restart(epoch, opt) {
                return;
            }
            tracing::info!("the engine is back");
        }
    }

    /// One life of a batch.
    ///
    /// # Errors
    /// What no task can go on after.
    fn work(&mut self, epoch: u64, opt: &Opt) -> Result<()> {
        let mut batch = Batch::new(opt, self.options.clone())?;
        loop {
            if !self.take(&mut batch, epoch) {
                return Ok(());
            }
            self.drop_the_gone(&mut batch);
            if batch.is_idle() {
                continue;
            }
            let (before, begin) = (batch.stats(), Instant::now());
            let running = self.state.step.run();
            let events = batch.step()?;
            drop(running);
            let now = batch.stats();
            self.state.metrics.stepped(begin.elapsed(), &before, &now);
            let speed = self.speed.count(now.generated_tokens.saturating_sub(before.generated_tokens));
            if let Some(speed) = speed {
                self.state.metrics.speed(speed);
            }
            for event in events {
                self.hand_on(event);
            }
        }
    }

    /// Takes the tasks that have come, and waits for one if there is nothing else to do. `false` when none can come.
    fn take(&mut self, batch: &mut Batch, epoch: u64) -> bool {
        loop {
            let job = if batch.is_idle() {
                self.state.metrics.batch(&batch.stats());
                self.state.metrics.speed(0.0);
                match self.receiver.recv() {
                    Ok(job) => {
                        self.speed = Speed::new();
                        job
                    }
                    Err(_) => return false,
                }
            } else {
                match self.receiver.try_recv() {
                    Ok(job) => job,
                    Err(TryRecvError::Empty) => return true,
                    // Nobody is waiting: whoever reads what still runs holds a sender.
                    Err(TryRecvError::Disconnected) => return false,
                }
            };
            let Job { index, task, tokens, reply, place, since, epoch: made, group } = job;
            if self.state.cut.load(Ordering::Acquire) {
                let _ = reply.send((index, Update::Failed(closing())));
            } else if made != epoch {
                let _ = reply.send((index, Update::Failed(restarting())));
            } else if !reply.is_closed() {
                match batch.add_of(group, task) {
                    Ok(id) => {
                        let last = HashMap::new();
                        let waiting =
                            Waiting { index, tokens, reply, since, started: false, last, _place: place };
                        self.waiting.insert(id, waiting);
                    }
                    Err(error) => drop(reply.send((index, Update::Failed(error.into())))),
                }
            }
        }
    }

    /// Frees the places of those who do not listen any more; at the end of a shutdown everybody's.
    fn drop_the_gone(&mut self, batch: &mut Batch) {
        let cut = self.state.cut.load(Ordering::Acquire);
        self.waiting.retain(|id, waiting| {
            let gone = waiting.reply.is_closed();
            if gone {
                self.state.metrics.cancelled.inc();
            } else if cut {
                waiting.tell(Update::Failed(closing()));
            }
            if gone || cut {
                batch.cancel(*id);
            }
            !(gone || cut)
        });
    }

    /// Tells whom it concerns. Events of tasks that were cancelled concern nobody.
    fn hand_on(&mut self, event: Event) {
        let id = event.task();
        let last = event.is_last();
        let Some(waiting) = self.waiting.get_mut(&id) else { return };
        let metrics = &self.state.metrics;
        if !waiting.started {
            waiting.started = true;
            metrics.started(waiting.since.elapsed());
        }
        match event {
            Event::Token { token, .. } => {
                let now = Instant::now();
                match waiting.last.insert(token.sequence, now) {
                    Some(before) => metrics.next_token(now - before),
                    None if waiting.last.len() == 1 => metrics.first_token(now - waiting.since),
                    None => {}
                }
                if waiting.tokens {
                    waiting.tell(Update::Token(token));
                }
            }
            Event::Generated { generated, cached, .. } => {
                waiting.tell(Update::Generated { generated, cached });
            }
            Event::Embedded { embedding, .. } => waiting.tell(Update::Embedded(embedding)),
            Event::Scored { scores, .. } => waiting.tell(Update::Scored(scores)),
            Event::Failed { error, .. } => waiting.tell(Update::Failed(error.into())),
            _ => {}
        }
        if last {
            self.waiting.remove(&id);
        }
    }

    /// Gets a model that can run again, however long it takes. `false` when nobody wants one any more.
    fn restart(&mut self, epoch: u64, mut opt: Opt) -> bool {
        let [mut pause, longest] = BACK;
        loop {
            let reload = Arc::clone(&self.state);
            let mut reload = reload.reload.lock().unwrap_or_else(PoisonError::into_inner);
            let loaded = match reload.as_mut() {
                None => Ok(opt.clone()),
                Some(load) => catch_unwind(AssertUnwindSafe(load)).unwrap_or_else(|panic| {
                    Err(Error::new(ErrorKind::Backend, format!("panic: {}", text(panic.as_ref()))))
                }),
            };
            match loaded {
                Ok(loaded) => opt = loaded,
                Err(error) => {
                    tracing::error!(%error, "the model cannot be loaded again; the next try is in {pause:?}");
                    let until = Instant::now() + pause;
                    while let Some(left) = until.checked_duration_since(Instant::now()) {
                        match self.receiver.recv_timeout(left) {
                            Ok(job) => drop(job.reply.send((job.index, Update::Failed(restarting())))),
                            Err(RecvTimeoutError::Timeout) => break,
                            Err(RecvTimeoutError::Disconnected) => return false,
                        }
                    }
                    pause = (pause * 2).min(longest);
                    continue;
                }
            }
            *self.state.model.write().unwrap_or_else(PoisonError::into_inner) = (epoch + 1, opt);
            self.state.set_alive(true);
            return true;
        }
    }
}

/// What a panic said.
fn text(panic: &(dyn Any + Send)) -> &str {
    let owned = panic.downcast_ref::<String>().map(String::as_str);
    owned.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("without a message")
}

/// Tokens a second while there is work.
struct Speed {
    since: Instant,
    tokens: u64,
}

impl Speed {
    fn new() -> Self {
        Self { since: Instant::now(), tokens: 0 }
    }

    /// The speed, once a second.
    fn count(&mut self, tokens: u64) -> Option<f64> {
        self.tokens += tokens;
        let seconds = self.since.elapsed().as_secs_f64();
        if seconds < 1.0 {
            return None;
        }
        let speed = self.tokens as f64 / seconds;
        *self = Self::new();
        Some(speed)
    }
}
