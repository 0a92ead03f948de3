//! Closures of the caller's: `Send` everywhere but on wasm32, where JavaScript's values belong to one thread.

use crate::Progress;
use std::{ops::ControlFlow, sync::Arc};

/// Is told how far work has come; returning `Break` cancels it.
#[cfg(not(target_arch = "wasm32"))]
pub type ProgressFn<'a> = dyn FnMut(Progress<'_>) -> ControlFlow<()> + Send + 'a;
/// Is told how far work has come; returning `Break` cancels it.
#[cfg(target_arch = "wasm32")]
pub type ProgressFn<'a> = dyn FnMut(Progress<'_>) -> ControlFlow<()> + 'a;

/// The tokens that may follow `ids` (prompt and generated).
#[cfg(not(target_arch = "wasm32"))]
pub type PrefixFn = Arc<dyn Fn(&[u32]) -> Vec<u32> + Send + Sync>;
/// The tokens that may follow `ids` (prompt and generated).
#[cfg(target_arch = "wasm32")]
pub type PrefixFn = Arc<dyn Fn(&[u32]) -> Vec<u32>>;
