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

/// The text of an error in one line: wgpu sets out causes, and naga source code, in several.
pub(crate) fn one_line(error: impl std::fmt::Display) -> String {
    error.to_string().split_whitespace().collect::<Vec<_>>().join(" ")
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
        (kind, format!("adapter {}: {}", self.adapter, one_line(error)))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_of_wgpu_are_told_in_one_line() {
        let description =
            "Validation Error\n\nCaused by:\n  In Device::create_buffer\n    too large\n".to_owned();
        let error = wgpu::Error::Validation { source: description.clone().into(), description };
        let fault = Fault::new("llvmpipe".into());
        fault.raise_wgpu(&error);
        let text = fault.check("upload").expect_err("raised").to_string();
        assert!(!text.contains('\n'), "{text:?}");
        let expected = "adapter llvmpipe: Validation Error Caused by: In Device::create_buffer too large";
        assert!(text.contains(expected), "{text:?}");
    }
}
