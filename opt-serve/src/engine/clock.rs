use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

/// How long the engine has been at a step, for those who must not wait for it.
pub(super) struct StepClock {
    origin: Instant,
    /// When the step began, in milliseconds behind the origin; [`NONE`] while there is none.
    began: AtomicU64,
}

const NONE: u64 = u64::MAX;

/// A step that runs until this is dropped, also by a panic.
pub(super) struct Running<'a>(&'a AtomicU64);

impl StepClock {
    pub(super) fn new() -> Self {
        Self { origin: Instant::now(), began: AtomicU64::new(NONE) }
    }

    pub(super) fn run(&self) -> Running<'_> {
        self.began.store(self.now(), Ordering::Release);
        Running(&self.began)
    }

    /// Since when the step runs, if there is one.
    pub(super) fn elapsed(&self) -> Option<Duration> {
        let began = self.began.load(Ordering::Acquire);
        (began != NONE).then(|| Duration::from_millis(self.now().saturating_sub(began)))
    }

    fn now(&self) -> u64 {
        self.origin.elapsed().as_millis() as u64
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.store(NONE, Ordering::Release);
    }
}
