//! Generation as a pure state machine.
//!
//! A [`Strategy`] (greedy, sampling, beam search, ...) says which tokens to run next and what it needs to know of
//! the result ([`Plan`]); whoever drives it runs them on a model and hands the [`Reply`]s back. A strategy never
//! sees a backend, a cache or a clock it could not be given in a test, so one request and a server's changing batch
//! are driven by the same few lines. Semantics: transformers 4.57.6 `generate()`.

mod assisted;
mod beam;
mod checks;
mod config;
mod contrastive;
mod field;
#[doc(hidden)]
pub mod fuzzing;
mod group_beam;
pub mod math;
mod plan;
mod processors;
mod prompt_lookup;
mod random;
mod request;
mod sequence;
mod settings;
mod single;
mod stopping;

pub use crate::callbacks::PrefixFn;
pub use config::{EarlyStopping, GenerationConfig, TokenIds};
pub use plan::{
    Alternative, CacheOp, Ended, FinishReason, LogitsRow, ModelRole, Need, Plan, Reply, RowScores, Run,
    ScoreNeed, SequenceOutput, Strategy, TokenEvent,
};
pub use processors::{Hooks, LogitsProcessor, ProcessorChain};
pub use random::Random;
pub use request::{Request, strategy};
pub use settings::{AssistantSchedule, Extras, Method, Settings};
pub use stopping::{StopStrings, Stopping, StoppingCriterion};

#[cfg(test)]
mod tests;
