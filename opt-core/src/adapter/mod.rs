//! Adapters: small sets of weights that change what a model does, in PEFT's format.
//!
//! [`Adapter`] is one in memory, read from and written to the directories that PEFT 0.21 reads and writes, key for key:
//! LoRA (with rsLoRA, DoRA, biases, modules that are trained whole), prefix tuning and prompt tuning (P-tuning saves
//! the same). [`Load::adapter`](crate::Load::adapter) loads any number beside a model, and each request of a batch
//! wears its own; [`merge`] makes a model of model and adapter; [`combine`] makes one adapter of several.
//!
//! Where the LM head is the token table, an adapter for `embed_tokens` changes the embedding and not the head, as in
//! PEFT.

mod applied;
mod combine;
mod config;
mod file;
mod loaded;
mod merge;
mod target;
mod term;

pub(crate) use applied::Adapted;
pub use combine::{Combination, combine};
pub use config::{
    AdapterConfig, AdapterMethod, Bias, Layers, LoraConfig, Names, PrefixConfig, PromptConfig, VirtualTokens,
};
pub use file::{Adapter, AdapterSource};
pub(crate) use loaded::Loaded;
pub use merge::{MergeOptions, Merged, merge};
#[cfg(not(target_arch = "wasm32"))]
pub(crate) use target::{HEADS, PREFIX};
pub use target::{Part, Slot, Target, TargetKind};
