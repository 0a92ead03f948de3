use crate::{Error, ErrorKind, Result};
use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

/// Ends long work from elsewhere: another thread, a signal handler, a dropped request. Clones share one state.
///
/// ```
/// let cancel = opt_core::CancelToken::new();
/// let elsewhere = cancel.clone();
/// elsewhere.cancel();
/// assert!(cancel.is_cancelled());
/// ```
#[derive(Debug, Clone, Default)]
pub struct CancelToken(Arc<AtomicBool>);

impl CancelToken {
    /// A token that nobody has used yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Asks the work that watches this token to end.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Whether [`CancelToken::cancel`] was called.
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// # Errors
    /// [`ErrorKind::Cancelled`] once the token was used; `work` is what is then said to have ended.
    pub fn check(&self, work: &str) -> Result<()> {
        if self.is_cancelled() {
            return Err(Error::new(ErrorKind::Cancelled, format_args!("{work} was cancelled")));
        }
        Ok(())
    }
}

/// How far long work has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Progress<'a> {
    /// What is being worked on, such as a tensor's or file's name.
    pub item: &'a str,
    /// Units done.
    pub done: u64,
    /// Units in all; 0 where unknown.
    pub total: u64,
}

impl<'a> Progress<'a> {
    /// A report of `done` out of `total` units.
    pub fn new(item: &'a str, done: u64, total: u64) -> Self {
        Self { item, done, total }
    }
}
