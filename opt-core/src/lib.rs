//! OPT language models (arXiv 2205.01068) for Rust programs: checkpoints as Hugging Face ships them, and every way of
//! generating that transformers has.
//!
//! ```
//! use opt_core::{Opt, generation::GenerationConfig};
//!
//! let opt = Opt::open("../models/opt-novels")?;
//! let settings = GenerationConfig::default().max_new_tokens(16).do_sample(true).top_p(0.9).seed(7);
//! for token in opt.stream("The old house stood", &settings)? {
//!     print!("{}", token?.text);
//! }
//! # Ok::<(), opt_core::Error>(())
//! ```
//!
//! [`Opt`] is the front door. Behind it: a [`checkpoint`] is read and handed, tensor by tensor, to a backend; the
//! decoder runs on it behind the object-safe [`engine::Engine`]; [`generation`] decides, as a pure state machine,
//! what to run next. Everything is usable on its own.
//!
//! Each method that waits for the device has an awaitable twin: [`Opt::generate`] and [`Opt::generate_async`], the
//! iterator's `next` and [`TokenStream::next_token`], [`TokenStream::collect_all`] and [`TokenStream::finish`], and so
//! on. On wasm32-unknown-unknown (browsers) there are only those, since its one thread cannot wait. There are no files
//! either, so that what takes a path fails there: see [`Opt::assemble`] for a model from bytes.

#![cfg_attr(docsrs, feature(doc_cfg))]

#[cfg(not(target_arch = "wasm32"))]
mod blocking;
mod callbacks;
mod decoder;
mod driver;
mod error;
mod load;
mod opt;
mod parallel;
mod progress;
mod request;
mod score;
mod session;
mod stream;

pub mod adapter;
pub mod backends;
pub mod batching;
pub mod checkpoint;
pub mod config;
#[cfg(all(feature = "constraint", not(target_arch = "wasm32")))]
pub mod constraint;
pub mod embedding;
pub mod engine;
pub mod generation;
#[cfg(not(target_arch = "wasm32"))]
pub mod heads;
#[cfg(feature = "hub")]
pub mod hub;
pub mod prompt;
pub mod quantize;
pub mod tokenizer;
#[cfg(not(target_arch = "wasm32"))]
pub mod tuning;

pub use callbacks::ProgressFn;
use decoder::Decoder;
pub use error::{Error, ErrorKind, Result};
pub use load::Load;
pub use opt::Opt;
pub use opt_backend::{Activation, Backend, CacheDType, DType, Info, TargetScore, TopK, Train, ndarray};
pub use progress::{CancelToken, Progress};
pub use request::{Generated, GeneratedSequence, Prompt, Request};
pub use score::{ScoreInput, Scored};
pub use session::Session;
pub use stream::{StreamToken, TokenStream};
