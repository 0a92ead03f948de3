//! Evaluation of OPT models that agrees with lm-evaluation-harness.
//!
//! [`report`]: what an evaluation gave, in the layout of the harness' results files.

pub mod report;

pub use opt_core::{Error, ErrorKind, Result};
