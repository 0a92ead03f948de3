//! How long requests take, and how long they may.

use crate::{engine::State, error::ApiError};
use std::{
    future::Future,
    sync::Arc,
    time::{Duration, Instant},
};

/// When a request has to be done.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Deadline {
    at: Instant,
    limit: Duration,
}

impl Deadline {
    pub(crate) fn new(since: Instant, limit: Duration) -> Self {
        // Further away than time goes is far enough.
        let at = since.checked_add(limit).unwrap_or_else(|| since + Duration::from_secs(86_400 * 365));
        Self { at, limit }
    }

    /// What `future` gives, if it does so in time.
    ///
    /// # Errors
    /// 408.
    pub(crate) async fn within<T>(&self, future: impl Future<Output = T>) -> Result<T, ApiError> {
        tokio::time::timeout_at(self.at.into(), future).await.map_err(|_| {
            ApiError::timeout(format!("the request took longer than {} s", self.limit.as_secs_f32()))
        })
    }
}

/// Measures a request to its end, also when its client goes away.
pub(crate) struct Timer {
    state: Arc<State>,
    endpoint: &'static str,
    since: Instant,
}

impl Timer {
    pub(crate) fn new(state: &Arc<State>, endpoint: &'static str, since: Instant) -> Self {
        Self { state: Arc::clone(state), endpoint, since }
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        self.state.metrics.took(self.endpoint, self.since.elapsed());
    }
}
