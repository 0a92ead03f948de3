//! Evaluation of OPT models that agrees with lm-evaluation-harness.
//!
//! - [`report`]: what an evaluation gave, in the layout of the harness' results files
//! - [`samples`]: what was asked and answered for each document
//! - [`published`]: scores of the OPT models that others measured
//! - [`compare`]: a run beside published scores, and two runs beside each other
//! - [`sensitivity`]: one task under several phrasings, orders or numbers of shots
//! - `plot` (feature `plot`): scores with their standard errors as SVG

pub mod compare;
#[cfg(feature = "plot")]
pub mod plot;
pub mod published;
pub mod report;
pub mod samples;
pub mod sensitivity;

pub use opt_core::{Error, ErrorKind, Result};
