use crate::{Error, ErrorKind, Result};
use ndarray::ArrayView2;
use opt_backend::{Backend, CacheLayer, MaybeSend, MaybeSync};
use std::sync::Arc;

/// An adapter that an engine has loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct LoadedAdapter {
    /// The name that sequences ask for it by.
    pub name: Arc<str>,
    /// Positions that it puts before the first token of a sequence; they count towards the context.
    pub virtual_tokens: usize,
}

/// What an adapter puts before the first token.
pub(crate) enum Front<'a> {
    Nothing,
    /// Keys and values of each layer.
    Prefix(&'a [CacheLayer]),
    /// So many embeddings.
    Prompt(usize),
}

/// Rows of a batch that come from one place.
pub(crate) enum Piece<'a> {
    Ids(&'a [u32]),
    Embeds(ArrayView2<'a, f32>),
    /// The embeddings of an adapter's prompt.
    Prompt(usize),
}

/// The adapters of an engine, for which its backend was made.
pub(crate) trait Wardrobe<B: Backend>: MaybeSend + MaybeSync {
    fn adapters(&self) -> &[LoadedAdapter];

    /// What stands before the first token of a sequence that wears the adapter of this index.
    fn front(&self, adapter: usize) -> Front<'_>;

    /// The embeddings of all pieces, one after the other, each with the adapter it wears.
    fn embed(
        &self,
        backend: &B,
        table: &B::Table,
        pieces: &[(Piece<'_>, Option<usize>)],
    ) -> Result<B::Tensor>;
}

/// The index of the adapter of this name.
///
/// # Errors
/// [`ErrorKind::Option`] naming those there are.
pub(crate) fn find(adapters: &[LoadedAdapter], name: &str) -> Result<usize> {
    adapters.iter().position(|adapter| *adapter.name == *name).ok_or_else(|| {
        let names: Vec<String> = adapters.iter().map(|adapter| format!("{:?}", adapter.name)).collect();
        let loaded = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
        Error::new(ErrorKind::Option, format_args!("no adapter {name:?}: loaded are {loaded}"))
    })
}
