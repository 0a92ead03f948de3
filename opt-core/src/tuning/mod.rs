//! Fine-tuning.

pub mod data;
pub mod schedule;

/// Token ids to learn from, and from which of them on to learn.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Example {
    ids: Vec<u32>,
    from: usize,
}

impl Example {
    /// An example of which every token but the first is a target.
    pub fn new(ids: Vec<u32>) -> Self {
        Self { ids, from: 1 }
    }

    /// An example whose first `from` tokens are given: they are no targets. The first token never is.
    pub fn completion(ids: Vec<u32>, from: usize) -> Self {
        Self { ids, from: from.max(1) }
    }

    /// The tokens.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// Places and ids of the tokens to be predicted, each from those in front of it.
    pub fn targets(&self) -> impl Iterator<Item = (usize, u32)> {
        self.ids.iter().copied().enumerate().skip(self.from)
    }
}
