//! Evaluation of OPT models that agrees with lm-evaluation-harness: prompts character for character, tokens, scores and
//! standard errors.
//!
//! ```
//! use opt_core::Opt;
//! use opt_eval::{EvalOptions, TaskSpec, Tasks, evaluate};
//!
//! // A task is data: how rows become prompts and choices, and what is measured.
//! let mut tasks = Tasks::builtin();
//! tasks.add(r#"
//!     [[task]]
//!     name = "weather"
//!     text = "{{question}}"
//!     choices = "options"
//!     gold = "right"
//!     metrics = ["acc", "acc_norm"]
//! "#)?;
//! let dir = tempfile::tempdir()?;
//! let row = r#"{"question": "The snow was", "options": ["white", "of"], "right": 0}"#;
//! std::fs::write(dir.path().join("weather.jsonl"), row)?;
//!
//! let opt = Opt::open("../models/opt-novels")?;
//! let found = evaluate(&opt, &tasks.select(&["weather"])?, dir.path(), &EvalOptions::default(), &mut |_| {
//!     std::ops::ControlFlow::Continue(())
//! })?;
//! assert_eq!(found.report.score("weather", "acc", "none").map(|score| score.value), Some(1.0));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! | | |
//! |---|---|
//! | [`TaskSpec`], [`Tasks`] | tasks as data, the built-in ones and those of files |
//! | [`Task`], [`Document`] | rows of files as prompts, examples before them |
//! | [`Asker`] | log-likelihoods and texts of prompts; what several begin with is run once |
//! | [`evaluate`] | all of it, resumable |
//! | [`perplexity`] | of any text, by windows |
//! | [`report`], [`samples`] | what came of it, in the layout of the harness' files |
//! | [`published`], [`compare`] | scores of OPT that others measured; two runs beside each other |
//! | [`sensitivity`] | one task under several phrasings, orders of examples or numbers of them |
//! | `plot` (feature `plot`) | scores with their standard errors as SVG |

pub mod compare;
pub mod detokenize;
mod filter;
pub mod measure;
mod perplexity;
#[cfg(feature = "plot")]
pub mod plot;
pub mod published;
pub mod report;
mod requests;
mod rows;
mod run;
pub mod samples;
pub mod sensitivity;
mod task;
mod template;

pub use opt_core::{Error, ErrorKind, Result};
pub use perplexity::{Perplexity, PerplexityOptions, perplexity};
pub use report::Report;
pub use requests::{Asker, Encoded, LogLikelihood, Shared, Written};
pub use rows::Row;
pub use run::{EvalOptions, Evaluation, Prepared, evaluate};
pub use task::{
    Answer, Data, Document, Fewshot, Fields, Filter, FilterStep, Generation, GroupSpec, MetricSpec, RowShape,
    Sampler, Selection, Splits, Task, TaskKind, TaskOptions, TaskSpec, Tasks,
};
