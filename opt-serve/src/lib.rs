//! OPT language models behind an HTTP API like OpenAI's: an axum [`Router`](axum::Router), and the engine loop behind it.
//!
//! ```
//! use opt_core::Opt;
//! use opt_serve::Server;
//!
//! # fn main() -> opt_core::Result<()> {
//! let opt = Opt::open("../models/opt-novels")?;
//! let app: axum::Router = axum::Router::new().nest("/llm", Server::new(opt)?.router());
//! # Ok(())
//! # }
//! ```
//!
//! [`Server::router`] goes into a program's own server, with layers of its own around it; [`Server::serve`] is a whole
//! server on a listener, and what `opt serve` runs. Requests of all clients run in one batch
//! ([`opt_core::batching`]) that they join and leave while it runs.
//!
//! The routes, their fields, the metrics and advice for operation are in `docs/serving.md` of the repository;
//! `/openapi.json` describes them for programs.

mod accept;
mod app;
mod auth;
mod body;
mod completions;
mod embeddings;
mod engine;
mod error;
mod fields;
mod gather;
mod metrics;
mod models;
mod openapi;
mod options;
mod page;
mod patience;
mod server;
mod status;
mod timing;

pub use options::ServeOptions;
pub use server::{Handle, Server};
