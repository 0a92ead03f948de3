//! Embeddings of texts that are being generated.

use super::{EmbedOptions, Embedding};
use crate::{Error, ErrorKind, Result};
use ndarray::{Array2, ArrayView2};
use std::sync::Arc;

/// Of what of a generated text the vector is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum EmbedPart {
    /// What was produced; each token has seen the prompt.
    #[default]
    Produced,
    /// The prompt and what was produced. A session then runs its past again, as the states of it are not kept.
    Whole,
}

/// What is to be kept of a request's hidden states.
#[derive(Clone)]
pub(crate) struct Capture {
    options: EmbedOptions,
    /// The index of the state.
    pub(crate) layer: usize,
    pub(crate) part: EmbedPart,
    /// The ids of the prompt.
    pub(crate) prompt: Vec<u32>,
}

impl Capture {
    /// # Errors
    /// [`ErrorKind::Option`] for a layer that the model does not have.
    pub(crate) fn new(options: EmbedOptions, part: EmbedPart, prompt: &[u32], layers: usize) -> Result<Self> {
        let layer = options.resolve(layers)?;
        Ok(Self { options, layer, part, prompt: prompt.to_vec() })
    }

    /// The vector of kept states; `None` of none.
    ///
    /// # Errors
    /// As [`Embedder::embed`](super::Embedder::embed).
    pub(crate) fn embedding(&self, states: &States) -> Result<Option<Embedding>> {
        let Some(first) = states.rows.first() else { return Ok(None) };
        let (count, width) = (states.rows.len(), first.len());
        let all: Vec<f32> = states.rows.iter().flat_map(|row| row.iter().copied()).collect();
        let all = Array2::from_shape_vec((count, width), all)
            .map_err(|e| Error::because(ErrorKind::Backend, "hidden states of unequal width", e))?;
        let rows = self.options.finish(self.options.pooling.pool(all.view()))?;
        Ok(Some(Embedding { rows, tokens: count, cut: 0 }))
    }
}

/// What was kept of the states of one branch of a request. Branches share what they have in common.
#[derive(Clone, Default)]
pub(crate) struct States {
    /// Positions in front of which nothing is kept; `None` while nothing has run.
    skipped: Option<usize>,
    rows: Vec<Arc<[f32]>>,
}

impl States {
    /// Whether anything has run.
    pub(crate) fn have_begun(&self) -> bool {
        self.skipped.is_some()
    }

    /// So many positions were run, of which nothing is kept.
    pub(crate) fn skip(&mut self, positions: usize) {
        *self.skipped.get_or_insert(0) += positions;
    }

    pub(crate) fn extend(&mut self, states: ArrayView2<'_, f32>) {
        self.skipped.get_or_insert(0);
        self.rows.extend(states.outer_iter().map(|row| row.iter().copied().collect::<Arc<[f32]>>()));
    }

    /// Forgets all but the first `positions`.
    pub(crate) fn truncate(&mut self, positions: usize) {
        self.rows.truncate(positions.saturating_sub(self.skipped.unwrap_or(0)));
    }
}
