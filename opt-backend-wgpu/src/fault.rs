//! What went wrong on the device outside any call: loss, and errors that no scope caught.

use opt_backend::{Error, ErrorKind, Result};
use std::sync::{
    Mutex, MutexGuard, PoisonError,
    atomic::{AtomicBool, Ordering},
};

/// Locks what a panicking thread may have held: all that is kept in these mutexes is valid at any time.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The first thing that went wrong. From then on every op fails with it: results can no longer be trusted.
pub(crate) struct Fault {
    adapter: String,
    raised: AtomicBool,
    cause: Mutex<Option<(ErrorKind, String)>>,
}

impl Fault {
    pub(crate) fn new(adapter: String) -> Self {
        Self { adapter, raised: AtomicBool::new(false), cause: Mutex::new(None) }
    }

    /// The adapter's name, for messages.
    pub(crate) fn adapter(&self) -> &str {
        &self.adapter
    }

    /// Notes a cause. The first stays, except that the loss of the device explains all else.
    pub(crate) fn raise(&self, kind: ErrorKind, message: String) {
        let mut cause = lock(&self.cause);
        let lost = |cause: &Option<(ErrorKind, String)>| matches!(cause, Some((ErrorKind::DeviceLost, _)));
        if cause.is_none() || (kind == ErrorKind::DeviceLost && !lost(&cause)) {
            *cause = Some((kind, message));
        }
        self.raised.store(true, Ordering::Release);
    }

    /// Notes an error that wgpu reported.
    pub(crate) fn raise_wgpu(&self, error: &wgpu::Error) {
        let (kind, message) = self.describe(error);
        self.raise(kind, message);
    }

    /// Kind and message of an error that wgpu reported.
    pub(crate) fn describe(&self, error: &wgpu::Error) -> (ErrorKind, String) {
        let kind = match error {
            wgpu::Error::OutOfMemory { .. } => ErrorKind::OutOfMemory,
            _ => ErrorKind::Device,
        };
        (kind, format!("adapter {}: {error}", self.adapter))
    }

    /// Fails if anything went wrong before.
    pub(crate) fn check(&self, op: &'static str) -> Result<()> {
        if !self.raised.load(Ordering::Acquire) {
            return Ok(());
        }
        match &*lock(&self.cause) {
            Some((kind, message)) => Err(Error::new(*kind, op, message)),
            None => Ok(()),
        }
    }
}
