//! The trait layer: what a machine must offer so that OPT (arXiv 2205.01068) runs on it.
//!
//! A backend is a value that implements [`Backend`]. It must store tensors, weights and caches and move them
//! to and from the host; every *computation* has a default body that goes through the host and the functions of
//! [`oracle`], so a new backend is correct from its first day and becomes fast one override at a time. The same
//! default bodies are what the conformance suite (feature `conformance`) checks the overrides against.
//!
//! [`Train`] adds what training needs, the gradients of the ops and optimizers, in the same manner.
//!
//! This crate knows no files, no configurations and no text. Rows of a batch lie end to end in one
//! `[rows, width]` tensor, and [`Span`]s say which rows belong to which sequence: nothing is ever padded.
//!
//! ```
//! use ndarray::array;
//! use opt_backend::{oracle, Activation};
//!
//! // What `linear` means: x W^T + b, accumulated in f64.
//! let x = array![[1.0, 2.0]];
//! let weight = array![[3.0, 4.0], [5.0, -6.0]];
//! let y = oracle::linear(x.view(), weight.view(), None, Some(Activation::Relu));
//! assert_eq!(y, array![[11.0, 0.0]]);
//! ```

mod activation;
mod backend;
pub mod check;
mod counters;
mod dtype;
mod error;
mod info;
pub mod moments;
pub mod oracle;
pub mod quant;
mod readback;
mod reference;
mod train;

#[cfg(feature = "conformance")]
pub mod conformance;

pub use activation::Activation;
pub use backend::{
    Attend, Backend, CacheDType, CacheLayer, CacheSpec, HostLinear, HostNorm, NormParams, Span, TargetScore,
    Then, TopK,
};
pub use counters::{Counters, Counts, Op};
pub use dtype::{DType, HostMatrix, HostVector};
pub use error::{Error, ErrorKind, Result};
pub use info::{Info, host_memory};
pub use moments::Moments8;
pub use readback::{BoxFuture, MaybeSend, MaybeSync, Readback, block_on, ready};
pub use reference::{Reference, ReferenceCache};
pub use train::{AdamW, Clip, Dropout, Layout, Sgd, Smoothing, Train};

pub use {half, ndarray};
