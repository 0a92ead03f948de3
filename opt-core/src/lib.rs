//! core

mod error;
mod progress;

pub mod checkpoint;
pub mod config;
pub mod generation;
#[cfg(feature = "hub")]
pub mod hub;
pub mod prompt;
pub mod tokenizer;

pub use error::{Error, ErrorKind, Result};
pub use progress::{CancelToken, Progress, ProgressFn};
