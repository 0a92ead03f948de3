//! A model on a backend, behind an object-safe interface.
//!
//! Inside, the decoder is generic over its backend; [`Engine`] hides which one it is, so that generation,
//! scoring and serving compile once and an application chooses its backend at run time.

mod batch;
mod cache;
mod local;
mod states;
mod wardrobe;

pub use cache::KvCache;
pub use local::LocalEngine;
pub(crate) use local::check_vocabulary;
pub use opt_backend::BoxFuture;
pub(crate) use states::pool;
pub use wardrobe::LoadedAdapter;
pub(crate) use wardrobe::{Front, Piece, Wardrobe, find as find_adapter};

use crate::{CancelToken, ProgressFn, Result, config::OptConfig, embedding::Pooling};
use ndarray::{ArcArray2, Array2, Array3, ArrayView2};
use opt_backend::{CacheDType, Counts, Info, MaybeSend, MaybeSync, TargetScore, TopK};

/// A model that can be run. One engine may be used from many threads at once.
pub trait Engine: MaybeSend + MaybeSync {
    /// The model's shape.
    fn config(&self) -> &OptConfig;

    /// What the backend found on this machine.
    fn info(&self) -> Info;

    /// Default bodies called and transfers made so far.
    fn counts(&self) -> Counts;

    /// The adapters that sequences may wear.
    fn adapters(&self) -> &[LoadedAdapter] {
        &[]
    }

    /// An empty cache for one sequence.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Backend`] where the backend cannot hold it so, or is out of memory.
    fn new_cache(&self, dtype: CacheDType) -> Result<KvCache>;

    /// Runs new tokens of any number of sequences as one ragged batch; one output per sequence, in order.
    ///
    /// If it fails, every cache holds what it held before.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Prompt`] for ids outside the vocabulary, embeddings of another width, or positions past
    /// the context; [`crate::ErrorKind::Option`] for an adapter that is not loaded, or is not the cache's, and a layer
    /// that the model does not have;
    /// [`crate::ErrorKind::Cancelled`]; [`crate::ErrorKind::Backend`].
    fn forward<'a>(&'a self, batch: Forward<'a>) -> BoxFuture<'a, Result<Vec<Output>>>;

    /// [`Engine::forward`], waiting for it.
    #[cfg(not(target_arch = "wasm32"))]
    fn forward_blocking<'a>(&'a self, batch: Forward<'a>) -> Result<Vec<Output>> {
        opt_backend::block_on(self.forward(batch))
    }
}

/// One batch.
#[derive(Default)]
pub struct Forward<'a> {
    /// The sequences; their lengths may differ.
    pub sequences: Vec<Sequence<'a>>,
    /// Ends the work between layers.
    pub cancel: Option<&'a CancelToken>,
    /// Is told of each layer before it is run, and can end the work there.
    pub watch: Option<&'a mut ProgressFn<'a>>,
}

/// The new tokens of one sequence and what is wanted of them.
pub struct Sequence<'a> {
    /// What to run.
    pub input: Input<'a>,
    /// The adapter it wears; `None` is the model as it is. What a cache holds belongs to the adapter it was made with.
    pub adapter: Option<&'a str>,
    /// Positions of the tokens, each below the context; `None` continues from the cache's length. They are counted
    /// from behind the virtual tokens of an adapter.
    pub positions: Option<&'a [u32]>,
    /// What came before; receives the new keys and values. Without one the sequence begins and ends here.
    pub cache: Option<&'a mut KvCache>,
    /// What to compute from the last rows.
    pub want: Want<'a>,
    /// Which hidden states to hand out.
    pub hidden: Hidden,
    /// How the states of each layer become one row; [`Pooling::None`] hands out a row for each token.
    pub pooling: Pooling,
    /// Whether to hand out attention weights, which is slow.
    pub attentions: bool,
}

impl<'a> Sequence<'a> {
    /// An input without a cache, of which nothing is wanted yet.
    pub fn new(input: impl Into<Input<'a>>) -> Self {
        Self {
            input: input.into(),
            adapter: None,
            positions: None,
            cache: None,
            want: Want::Nothing,
            hidden: Hidden::None,
            pooling: Pooling::None,
            attentions: false,
        }
    }

    /// Sets the adapter it wears.
    #[must_use]
    pub fn adapter(mut self, name: Option<&'a str>) -> Self {
        self.adapter = name;
        self
    }

    /// Sets what is wanted of the last rows.
    #[must_use]
    pub fn want(mut self, want: Want<'a>) -> Self {
        self.want = want;
        self
    }
}

/// What a sequence is given as.
#[derive(Debug, Clone, Copy)]
pub enum Input<'a> {
    /// Token ids.
    Ids(&'a [u32]),
    /// Embeddings `[tokens, word_embed_proj_dim]` in the place of the token table's.
    Embeds(ArrayView2<'a, f32>),
}

impl<'a> From<&'a [u32]> for Input<'a> {
    fn from(ids: &'a [u32]) -> Self {
        Input::Ids(ids)
    }
}

impl<'a> From<ArrayView2<'a, f32>> for Input<'a> {
    fn from(rows: ArrayView2<'a, f32>) -> Self {
        Input::Embeds(rows)
    }
}

impl Input<'_> {
    /// Number of tokens.
    pub fn len(&self) -> usize {
        match self {
            Input::Ids(ids) => ids.len(),
            Input::Embeds(rows) => rows.nrows(),
        }
    }

    /// Whether there is no token.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// What is wanted of the last rows of a sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Want<'a> {
    /// Nothing: only the cache is to be filled.
    Nothing,
    /// The logits of the last `rows` rows.
    Logits {
        /// How many rows; at most the number of tokens.
        rows: usize,
    },
    /// The `k` largest logits of the last `rows` rows.
    TopK {
        /// How many rows.
        rows: usize,
        /// How many of each.
        k: usize,
    },
    /// The log-probability of one target for each of the last rows: `targets[i]` follows row
    /// `tokens - targets.len() + i`.
    LogProbs {
        /// The tokens asked about.
        targets: &'a [u32],
    },
}

impl Want<'_> {
    /// How many of a sequence's last rows are needed.
    pub fn rows(&self) -> usize {
        match self {
            Want::Nothing => 0,
            Want::Logits { rows } | Want::TopK { rows, .. } => *rows,
            Want::LogProbs { targets } => targets.len(),
        }
    }
}

/// Which hidden states of a sequence's new tokens to hand out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Hidden {
    /// None.
    #[default]
    None,
    /// What the LM head sees: after the final LayerNorm and `project_out`, if there are such.
    Last,
    /// transformers' `hidden_states`: the embeddings, the output of each layer but the last, and [`Hidden::Last`].
    All,
    /// One of [`Hidden::All`], by its index from 0. Where nobody in a batch needs more (no logits, no cache to fill),
    /// the layers behind it are not run.
    Layer(usize),
}

impl Hidden {
    /// Whether it hands out the state of this index of [`Hidden::All`], in a model of so many layers.
    pub(crate) fn includes(self, index: usize, layers: usize) -> bool {
        match self {
            Hidden::None => false,
            Hidden::Last => index == layers,
            Hidden::All => true,
            Hidden::Layer(wanted) => index == wanted,
        }
    }
}

/// What came of one sequence.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct Output {
    /// `[rows, vocab_size]` where [`Want::Logits`] asked for them. Those of one pass share their memory.
    pub logits: Option<ArcArray2<f32>>,
    /// One entry a row where [`Want::TopK`] asked for them.
    pub top_k: Vec<TopK>,
    /// One entry a target where [`Want::LogProbs`] asked for them.
    pub log_probs: Vec<TargetScore>,
    /// Hidden states, each `[tokens, width]`, pooled `[1, width]`; what the LM head sees is `word_embed_proj_dim` wide,
    /// all others `hidden_size`.
    pub hidden: Vec<Array2<f32>>,
    /// For each layer `[heads, tokens, positions]`.
    pub attentions: Vec<Array3<f32>>,
}
