//! Sending the tasks of a request, and waiting for all of them.

use crate::{
    engine::{Engine, Job, Place, Update},
    error::ApiError,
    timing::Deadline,
};
use opt_core::batching::Task;
use std::time::Instant;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

/// Tasks that were sent; dropping it ends them.
pub(crate) struct Sent<'a> {
    engine: &'a Engine,
    epoch: u64,
    since: Instant,
    reply: UnboundedSender<(usize, Update)>,
    receiver: UnboundedReceiver<(usize, Update)>,
}

impl<'a> Sent<'a> {
    pub(crate) fn new(engine: &'a Engine, epoch: u64, since: Instant) -> Self {
        let (reply, receiver) = unbounded_channel();
        Self { engine, epoch, since, reply, receiver }
    }

    /// # Errors
    /// 500 if there is no engine.
    pub(crate) fn send(
        &mut self,
        tasks: Vec<Task>,
        places: Vec<Place>,
        tokens: bool,
    ) -> Result<(), ApiError> {
        tasks.into_iter().zip(places).enumerate().try_for_each(|(index, (task, place))| {
            let (reply, epoch, since) = (self.reply.clone(), self.epoch, self.since);
            self.engine.submit(Job { index, task, tokens, reply, place, since, epoch })
        })
    }

    /// What tells of the tasks; its end comes when none of them is left.
    pub(crate) fn into_receiver(self) -> UnboundedReceiver<(usize, Update)> {
        self.receiver
    }

    /// The results of all tasks, in order.
    ///
    /// # Errors
    /// That of the first task that fails, and the deadline's; the others are then ended.
    pub(crate) async fn gather(
        &mut self,
        tasks: Vec<Task>,
        places: Vec<Place>,
        deadline: &Deadline,
    ) -> Result<Vec<Update>, ApiError> {
        let count = tasks.len();
        self.send(tasks, places, false)?;
        let mut results: Vec<Option<Update>> = (0..count).map(|_| None).collect();
        for _ in 0..count {
            match deadline.within(self.receiver.recv()).await? {
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
