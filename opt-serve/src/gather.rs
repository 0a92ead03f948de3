//! Sending the tasks of a request, and waiting for all of them.

use crate::{
    engine::{Engine, Job, Place, Update},
    error::ApiError,
    timing::Deadline,
};
use opt_core::batching::Task;
use std::time::Instant;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

/// What is told of tasks.
pub(crate) type Updates = UnboundedReceiver<(usize, Update)>;

/// A request on its way to the engine.
pub(crate) struct Sent<'a> {
    engine: &'a Engine,
    epoch: u64,
    since: Instant,
    /// Its tasks are told from those of others, so that none of many requests waits for all tasks of another.
    group: u64,
}

impl<'a> Sent<'a> {
    pub(crate) fn new(engine: &'a Engine, epoch: u64, since: Instant) -> Self {
        Self { engine, epoch, since, group: engine.state.new_group() }
    }

    fn send(&self, tasks: Vec<Task>, places: Vec<Place>, tokens: bool) -> Result<Updates, ApiError> {
        let (reply, receiver) = unbounded_channel();
        for (index, (task, place)) in tasks.into_iter().zip(places).enumerate() {
            let (reply, epoch, since, group) = (reply.clone(), self.epoch, self.since, self.group);
            self.engine.submit(Job { index, task, tokens, reply, place, since, epoch, group })?;
        }
        Ok(receiver)
    }

    /// Sends tasks, and gives what tells of them token by token; its end comes when none of them is left, and they end
    /// when it is dropped.
    ///
    /// # Errors
    /// 500 if there is no engine.
    pub(crate) fn stream(&self, tasks: Vec<Task>, places: Vec<Place>) -> Result<Updates, ApiError> {
        self.send(tasks, places, true)
    }

    /// The results of all tasks, in order.
    ///
    /// # Errors
    /// That of the first task that fails, and the deadline's; the others are then ended.
    pub(crate) async fn gather(
        &self,
        tasks: Vec<Task>,
        places: Vec<Place>,
        deadline: &Deadline,
    ) -> Result<Vec<Update>, ApiError> {
        let count = tasks.len();
        let mut receiver = self.send(tasks, places, false)?;
        let mut results: Vec<Option<Update>> = (0..count).map(|_| None).collect();
        for _ in 0..count {
            match deadline.within(receiver.recv()).await? {
                Some((_, Update::Failed(error))) => return Err(error),
                Some((index, update)) => {
                    if let Some(result) = results.get_mut(index) {
                        *result = Some(update);
                    }
                }
                None => return Err(ApiError::internal("the engine has dropped the request")),
            }
        }
        Ok(results.into_iter().flatten().collect())
    }
}

/// Does work that takes a while on a thread made for that.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| {
        tracing::error!(%error, "a request could not be prepared");
        Err(ApiError::internal("the request could not be prepared"))
    })
}
