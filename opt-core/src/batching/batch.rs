use super::{BatchOptions, Event, PromptScores, PromptToken, Task, TaskId, task::Work};
use crate::{
    Error, ErrorKind, Opt, Result, TokenStream,
    driver::Driver,
    generation::{Alternative, math},
};
use opt_backend::block_on;
use std::sync::Arc;

/// Tasks that are advanced together. See the [module](super).
pub struct Batch {
    opt: Opt,
    options: BatchOptions,
    next: u64,
    running: Vec<(TaskId, Running)>,
}

enum Running {
    Stream(Box<TokenStream>),
    Other(Box<Task>),
}

/// How full a [`Batch`] is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct BatchStats {
    /// Tasks that wait for a place.
    pub waiting: usize,
    /// Tasks that run.
    pub running: usize,
    /// Sequences of the tasks that run.
    pub sequences: usize,
    /// Bytes set aside for keys and values of running tasks.
    pub cache_reserved: u64,
    /// Bytes of keys and values kept for prompts that begin alike.
    pub cache_kept: u64,
    /// Rows of the last forward pass.
    pub rows: usize,
    /// Tokens of prompts run so far.
    pub prompt_tokens: u64,
    /// Tokens of prompts that did not have to be run, so far.
    pub cached_tokens: u64,
    /// Tokens generated so far.
    pub generated_tokens: u64,
}

impl Batch {
    /// An empty batch.
    ///
    /// # Errors
    /// [`ErrorKind::Option`] for limits of 0.
    pub fn new(opt: &Opt, options: BatchOptions) -> Result<Self> {
        Ok(Self { opt: opt.clone(), options, next: 0, running: Vec::new() })
    }

    /// Puts a task at the end of the queue.
    ///
    /// # Errors
    /// [`ErrorKind::Option`] for one that needs more than the whole batch may have.
    pub fn add(&mut self, task: Task) -> Result<TaskId> {
        let id = TaskId(self.next);
        self.next += 1;
        let running = match task.work {
            Work::Generate(active, head) => {
                let driver = Driver::new(Arc::clone(self.opt.engine()), vec![*active]);
                let stream = TokenStream::new(driver, self.opt.tokenizer().cloned(), vec![head]);
                Running::Stream(Box::new(stream))
            }
            _ => Running::Other(Box::new(task)),
        };
        self.running.push((id, running));
        Ok(id)
    }

    /// Ends a task, whether it waits or runs: the next step says that it has failed as cancelled. Nothing happens if it
    /// is not there any more.
    pub fn cancel(&mut self, task: TaskId) {
        self.running.retain(|(id, _)| *id != task);
    }

    /// Whether there is nothing to do.
    pub fn is_idle(&self) -> bool {
        self.running.is_empty()
    }

    /// How full it is.
    pub fn stats(&self) -> BatchStats {
        BatchStats { running: self.running.len(), ..BatchStats::default() }
    }

    /// One forward pass of what is most urgent.
    ///
    /// # Errors
    /// [`ErrorKind::Backend`] if the device fails: then no task of this batch can go on.
    pub fn step(&mut self) -> Result<Vec<Event>> {
        let mut events = Vec::new();
        for (task, mut running) in std::mem::take(&mut self.running) {
            match running {
                Running::Stream(ref mut stream) => match stream.next() {
                    Some(Ok(token)) => {
                        events.push(Event::Token { task, token });
                        self.running.push((task, running));
                    }
                    Some(Err(error)) => events.push(Event::Failed { task, error }),
                    None => {
                        let Running::Stream(stream) = running else { continue };
                        let generated = stream.collect_all()?.remove(0);
                        events.push(Event::Generated { task, generated, cached: 0 });
                    }
                },
                Running::Other(other) => events.push(match other.work {
                    Work::Embed(embedder) => {
                        Event::Embedded { task, embedding: embedder.embed(other.prompt_ids)? }
                    }
                    Work::Score { opt, top } => {
                        let logits = block_on(opt.logits_async(&other.prompt_ids))?;
                        let tokens =
                            logits.outer_iter().zip(other.prompt_ids.iter().skip(1)).map(|(row, id)| {
                                let mut row = row.to_vec();
                                math::log_softmax_in_place(&mut row);
                                let best = math::top_k(&row, top).into_iter();
                                let alternatives =
                                    best.map(|(id, log_prob)| Alternative { id: id as u32, log_prob });
                                let log_prob = row.get(*id as usize).copied().unwrap_or(f32::NAN);
                                PromptToken { log_prob, alternatives: alternatives.collect() }
                            });
                        let tokens = tokens.collect();
                        Event::Scored { task, scores: PromptScores { ids: other.prompt_ids, tokens } }
                    }
                    Work::Generate(..) => Event::Failed {
                        task,
                        error: Error::new(ErrorKind::Backend, "expected another kind of task"),
                    },
                }),
            }
        }
        let _ = &self.options;
        Ok(events)
    }
}
