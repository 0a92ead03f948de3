//! The one thread that runs the model, and what everybody else knows of it.
//!
//! Handlers make tasks themselves and send them over a channel; what becomes of a task comes back over a channel of its
//! request. That one is unbounded, so that a reader who is slow holds up nobody, and holds no more than the tokens it
//! asked for. A receiver that is dropped ends its tasks at the next step.

mod clock;
mod turn;

use crate::{error::ApiError, metrics::Metrics, options::ServeOptions};
use axum::http::StatusCode;
use clock::StepClock;
use opt_core::{
    Error, ErrorKind, Generated, Opt, Result, StreamToken,
    batching::{Batch, PromptScores, Task},
    embedding::Embedding,
};
use std::{
    sync::{
        Arc, Mutex, PoisonError, RwLock,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};
use tokio::sync::{Notify, mpsc::UnboundedSender};

/// Loads the model again after its device was lost.
pub(crate) type Reload = Box<dyn FnMut() -> Result<Opt> + Send>;

/// What a request hears of its tasks.
#[derive(Debug)]
pub(crate) enum Update {
    Token(StreamToken),
    Generated { generated: Generated, cached: usize },
    Embedded(Embedding),
    Scored(PromptScores),
    Failed(ApiError),
}

/// A task on its way to the engine.
pub(crate) struct Job {
    /// Which of its request's tasks.
    pub(crate) index: usize,
    pub(crate) task: Task,
    /// Whether tokens are told as they come.
    pub(crate) tokens: bool,
    pub(crate) reply: UnboundedSender<(usize, Update)>,
    pub(crate) place: Place,
    /// When its request came.
    pub(crate) since: Instant,
    /// The model that it was made with.
    pub(crate) epoch: u64,
    /// The request that it is of.
    pub(crate) group: u64,
}

/// One of the places that [`ServeOptions::queue`] counts; dropping it gives it back.
pub(crate) struct Place(Arc<State>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.pending.fetch_sub(1, Ordering::AcqRel);
    }
}

/// What the engine's thread and the others share.
pub(crate) struct State {
    /// The model, with how many came before it.
    model: RwLock<(u64, Opt)>,
    reload: Mutex<Option<Reload>>,
    alive: AtomicBool,
    closing: AtomicBool,
    cut: AtomicBool,
    /// The step that runs.
    step: StepClock,
    stall: Duration,
    pending: AtomicUsize,
    queue: usize,
    groups: AtomicU64,
    /// Told when the engine comes back, or the server begins to end.
    pub(crate) changed: Notify,
    pub(crate) metrics: Metrics,
}

impl State {
    /// The model and its epoch.
    pub(crate) fn model(&self) -> (u64, Opt) {
        self.model.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn is_ready(&self) -> bool {
        self.readiness().is_ok()
    }

    /// # Errors
    /// 503 while nothing is taken.
    pub(crate) fn readiness(&self) -> std::result::Result<(), ApiError> {
        if self.is_closing() {
            Err(closing())
        } else if !self.alive.load(Ordering::Acquire) {
            Err(restarting())
        } else if self.step.elapsed().is_some_and(|time| time > self.stall) {
            let message = "the engine has been at one step for too long: try again later";
            Err(ApiError::unavailable("engine_stalled", message))
        } else {
            Ok(())
        }
    }

    pub(crate) fn is_closing(&self) -> bool {
        self.closing.load(Ordering::Acquire)
    }

    /// A number for a request.
    pub(crate) fn new_group(&self) -> u64 {
        self.groups.fetch_add(1, Ordering::Relaxed)
    }

    pub(crate) fn pending(&self) -> usize {
        self.pending.load(Ordering::Acquire)
    }

    /// From here on nothing new is taken.
    pub(crate) fn close(&self) {
        self.closing.store(true, Ordering::Release);
        self.changed.notify_waiters();
    }

    /// Ends what still runs, at the next step.
    pub(crate) fn cut_off(&self) {
        self.close();
        self.cut.store(true, Ordering::Release);
    }

    fn set_alive(&self, alive: bool) {
        self.alive.store(alive, Ordering::Release);
        self.changed.notify_waiters();
    }

    /// Places for so many tasks.
    ///
    /// # Errors
    /// 503 while the engine is not there or hangs, 429 when too many wait.
    pub(crate) fn admit(self: &Arc<Self>, count: usize) -> std::result::Result<Vec<Place>, ApiError> {
        self.readiness()?;
        let admitted = self.pending.fetch_update(Ordering::AcqRel, Ordering::Acquire, |pending| {
            let together = pending.saturating_add(count);
            // A request that is larger than the queue must be possible too, when nothing else is there.
            (pending == 0 || together <= self.queue).then_some(together)
        });
        if admitted.is_err() {
            let message = format!(
                "the server is busy: {} prompts wait or run, of at most {}",
                self.pending(),
                self.queue
            );
            return Err(ApiError::new(StatusCode::TOO_MANY_REQUESTS, Some("queue_full"), message));
        }
        Ok((0..count).map(|_| Place(Arc::clone(self))).collect())
    }
}

pub(crate) fn closing() -> ApiError {
    ApiError::unavailable("shutting_down", "the server is shutting down")
}

fn restarting() -> ApiError {
    ApiError::unavailable("engine_restarting", "the engine has failed and is being restarted: try again")
}

/// The way to the engine's thread, which ends when the last of these is gone.
#[derive(Clone)]
pub(crate) struct Engine {
    sender: mpsc::Sender<Job>,
    pub(crate) state: Arc<State>,
}

impl Engine {
    /// Starts the thread.
    ///
    /// # Errors
    /// Those of [`Batch::new`]; [`ErrorKind::Io`] if there can be no thread.
    pub(crate) fn start(opt: Opt, options: &ServeOptions) -> Result<Self> {
        // Whether the options are possible is to be known now.
        Batch::new(&opt, options.batch.clone())?;
        let (sender, receiver) = mpsc::channel();
        let state = Arc::new(State {
            model: RwLock::new((0, opt)),
            reload: Mutex::new(None),
            alive: AtomicBool::new(true),
            closing: AtomicBool::new(false),
            cut: AtomicBool::new(false),
            step: StepClock::new(),
            stall: options.stall,
            pending: AtomicUsize::new(0),
            queue: options.queue,
            groups: AtomicU64::new(0),
            changed: Notify::new(),
            metrics: Metrics::new(),
        });
        let turn = turn::Turn::new(receiver, Arc::clone(&state), options.batch.clone());
        thread::Builder::new()
            .name("opt-serve engine".to_owned())
            .spawn(move || turn.run())
            .map_err(|error| Error::because(ErrorKind::Io, "the engine's thread cannot be started", error))?;
        Ok(Self { sender, state })
    }

    pub(crate) fn reload_with(&self, reload: Reload) {
        *self.state.reload.lock().unwrap_or_else(PoisonError::into_inner) = Some(reload);
    }

    /// Hands a task over.
    ///
    /// # Errors
    /// 503 if the thread is gone.
    pub(crate) fn submit(&self, job: Job) -> std::result::Result<(), ApiError> {
        self.sender.send(job).map_err(|_| ApiError::internal("the engine's thread has ended"))
    }
}
