//! Threads of one backend value: a rayon pool, in which candle's own parallel loops run too.

use opt_backend::{Error, ErrorKind, Result};
use rayon::{ThreadPool, ThreadPoolBuilder};
use std::sync::{Mutex, PoisonError};

/// Multiplications that are not worth waking a thread for.
const INLINE: usize = 1 << 15;

/// The threads that compute.
#[derive(Debug)]
pub(crate) struct Pool {
    pool: ThreadPool,
    threads: usize,
}

impl Pool {
    pub(crate) fn new(threads: usize) -> Result<Self> {
        let pool = ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|i| format!("opt-candle-{i}"))
            .build()
            .map_err(|error| Error::new(ErrorKind::Device, "candle", error))?;
        Ok(Self { pool, threads })
    }

    pub(crate) fn threads(&self) -> usize {
        self.threads
    }

    /// Runs `body` where parallel loops, candle's included, use these threads.
    pub(crate) fn install<R: Send>(&self, body: impl FnOnce() -> R + Send) -> R {
        self.pool.install(body)
    }

    /// Runs `body` on each task. `work` is about the number of multiplications of all together.
    pub(crate) fn each<T: Send>(&self, work: usize, tasks: Vec<T>, body: impl Fn(T) + Send + Sync) {
        let helpers = (self.threads - 1).min(tasks.len().saturating_sub(1));
        if helpers == 0 || work < INLINE {
            tasks.into_iter().for_each(body);
            return;
        }
        // The caller works too, from the first moment: it takes a while until a sleeping thread does.
        let tasks = Mutex::new(tasks.into_iter());
        let next = || tasks.lock().unwrap_or_else(PoisonError::into_inner).next();
        let drain = || {
            while let Some(task) = next() {
                body(task);
            }
        };
        self.pool.in_place_scope(|scope| {
            (0..helpers).for_each(|_| scope.spawn(|_| drain()));
            drain();
        });
    }

    /// How many of `items` make one of the tasks that a loop of `work` multiplications is cut into.
    pub(crate) fn share(&self, items: usize, work: usize) -> usize {
        // A few tasks a thread, so that one that is late costs little.
        let tasks = if self.threads == 1 || work < INLINE { 1 } else { 4 * self.threads };
        items.div_ceil(tasks).max(1)
    }
}
