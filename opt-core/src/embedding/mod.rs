//! Embeddings: texts as vectors, made of a decoder's hidden states.
//!
//! [`Embedder`] runs texts up to a layer and pools what it finds there, as transformers' hidden states pooled by
//! sentence-transformers; layers behind are not run, and logits never. [`Index`] finds what is alike among vectors in
//! memory, [`export`] writes them for other programs. [`Request::embed`](crate::Request::embed) hands out the vector of
//! a text while it is generated.
//!
//! ```
//! use opt_core::{Opt, embedding::{EmbedOptions, Embedder, Pooling}};
//!
//! let opt = Opt::open("../models/opt-novels")?;
//! let options = EmbedOptions::default().pooling(Pooling::WeightedMean).normalize(true);
//! let embedder = Embedder::new(&opt, options)?;
//! let texts = ["The ship sailed at dawn.", "A boat left the harbour.", "He was a lawyer of some fame."];
//! let found = embedder.embed_batch(texts)?;
//! let alike = |i: usize| found[0].vector().iter().zip(found[i].vector()).map(|(a, b)| a * b).sum::<f32>();
//! assert!(alike(1) > alike(2));
//! # Ok::<(), opt_core::Error>(())
//! ```

mod embedder;
pub mod export;
mod generated;
mod identity;
mod index;
mod options;
mod pooling;

pub use embedder::{Embedder, Embedding};
pub use generated::EmbedPart;
pub(crate) use generated::{Capture, States};
pub use identity::Identity;
pub use index::{Hit, Index, Metric};
pub use options::{EmbedOptions, Precision};
pub use pooling::Pooling;
