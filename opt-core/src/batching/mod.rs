//! Continuous batching: requests join and leave a batch while it runs.
//!
//! A [`Task`] is one request, checked and tokenized: to generate, to embed, or to score a prompt. A [`Batch`] takes
//! tasks at any time and advances all of them together, one forward pass a [`Batch::step`]. It is what a server drives
//! from one thread of its own; it starts no thread itself.
//!
//! Tasks begin in the order in which they came. In each pass the next tokens of all sequences come first; in the rest of
//! its rows prompts are run, the oldest first, in pieces ([`BatchOptions::rows`]). What a prompt has in common with one
//! that has been run, or is being run, is not run again. Results do not depend on what else is in the batch, within
//! the backend's tolerance, and draws not at all.
//!
//! ```
//! use opt_core::{Opt, Request, batching::{Batch, BatchOptions, Event, Task}, generation::GenerationConfig};
//!
//! let opt = Opt::open("../models/opt-novels")?;
//! let mut batch = Batch::new(&opt, BatchOptions::default())?;
//! let request = |text: &str| Request::new(text).config(GenerationConfig::default().max_new_tokens(6));
//! let first = batch.add(Task::generate(&opt, request("The river"))?)?;
//! batch.step()?;
//! // Another one joins while the first runs.
//! let second = batch.add(Task::generate(&opt, request("A letter"))?)?;
//! let mut done = Vec::new();
//! while !batch.is_idle() {
//!     for event in batch.step()? {
//!         if let Event::Generated { task, generated, .. } = event {
//!             done.push((task, generated.text().to_owned()));
//!         }
//!     }
//! }
//! assert_eq!([done[0].0, done[1].0], [first, second]);
//! # Ok::<(), opt_core::Error>(())
//! ```

mod batch;
mod lane;
mod prefixes;
mod reading;
mod task;

pub use batch::{Batch, BatchStats};
pub use reading::{PromptScores, PromptToken};
pub use task::{Task, TaskId};

use crate::{Error, Generated, StreamToken, embedding::Embedding};

/// Limits of a [`Batch`].
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct BatchOptions {
    /// Most rows (tokens) of one forward pass. Tokens of running sequences come first; prompts are run in the room
    /// that is left, in pieces, so that a long one does not hold up the others for longer than such a pass takes.
    pub rows: usize,
    /// Most sequences that are advanced together; a request with several beams or returned sequences counts as many.
    pub sequences: usize,
    /// Bytes of keys and values that all caches may take together, those kept for shared prefixes included.
    pub cache_bytes: u64,
    /// Whether prompts start from what earlier prompts that began alike have computed.
    pub share_prefixes: bool,
    /// How many of [`BatchOptions::cache_bytes`] may be kept for that when nothing else needs them.
    pub prefix_bytes: u64,
    /// Most threads that choose tokens where that takes long, which is where many sequences draw; `None` for as many as
    /// there are cores. Browsers have one.
    pub threads: Option<usize>,
}

impl Default for BatchOptions {
    fn default() -> Self {
        Self {
            rows: 256,
            sequences: 64,
            cache_bytes: 2 << 30,
            share_prefixes: true,
            prefix_bytes: 512 << 20,
            threads: None,
        }
    }
}

impl BatchOptions {
    /// Sets [`BatchOptions::rows`].
    #[must_use]
    pub fn rows(self, rows: usize) -> Self {
        Self { rows, ..self }
    }

    /// Sets [`BatchOptions::sequences`].
    #[must_use]
    pub fn sequences(self, sequences: usize) -> Self {
        Self { sequences, ..self }
    }

    /// Sets [`BatchOptions::cache_bytes`].
    #[must_use]
    pub fn cache_bytes(self, cache_bytes: u64) -> Self {
        Self { cache_bytes, ..self }
    }

    /// Sets [`BatchOptions::prefix_bytes`].
    #[must_use]
    pub fn prefix_bytes(self, prefix_bytes: u64) -> Self {
        Self { prefix_bytes, ..self }
    }

    /// Sets [`BatchOptions::share_prefixes`].
    #[must_use]
    pub fn share_prefixes(self, share_prefixes: bool) -> Self {
        Self { share_prefixes, ..self }
    }

    /// Sets [`BatchOptions::threads`].
    #[must_use]
    pub fn threads(self, threads: Option<usize>) -> Self {
        Self { threads, ..self }
    }
}

/// What happened in a step.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event {
    /// A task left the queue: the first tokens of its prompt have been run.
    Started {
        /// Which.
        task: TaskId,
        /// Tokens of the prompt that did not have to be run, since an earlier prompt began with them.
        cached: usize,
    },
    /// A token of a task became certain.
    Token {
        /// Which.
        task: TaskId,
        /// Its [`StreamToken::request`] is 0.
        token: StreamToken,
    },
    /// A task to generate is done.
    Generated {
        /// Which.
        task: TaskId,
        /// All that came of it.
        generated: Generated,
        /// Tokens of the prompt that were not run, since an earlier prompt began with them.
        cached: usize,
    },
    /// A task to embed is done.
    Embedded {
        /// Which.
        task: TaskId,
        /// Its vector.
        embedding: Embedding,
    },
    /// A task to score is done.
    Scored {
        /// Which.
        task: TaskId,
        /// What was found.
        scores: PromptScores,
    },
    /// A task ended without a result; the others go on. The kind is [`crate::ErrorKind::Cancelled`] for one that was
    /// cancelled.
    Failed {
        /// Which.
        task: TaskId,
        /// Why.
        error: Error,
    },
}

impl Event {
    /// Whose event it is.
    pub fn task(&self) -> TaskId {
        match self {
            Event::Started { task, .. }
            | Event::Token { task, .. }
            | Event::Generated { task, .. }
            | Event::Embedded { task, .. }
            | Event::Scored { task, .. }
            | Event::Failed { task, .. } => *task,
        }
    }

    /// Whether it is the task's last.
    pub fn is_last(&self) -> bool {
        !matches!(self, Event::Started { .. } | Event::Token { .. })
    }
}
