//! What a model learns from.

/// Token ids, and what is to be learned from them.
#[derive(Debug, Clone, PartialEq)]
pub struct Example {
    pub(crate) ids: Vec<u32>,
    pub(crate) goal: Goal,
}

/// What an example teaches. Which of these a [`super::Tuner`] takes depends on what it was told to train.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Goal {
    /// The tokens from this place on, at least 1, each to be predicted from those in front of it.
    Tokens(usize),
    /// The class of the whole, by its number.
    Class(u32),
    /// A number for each output of a regression; 0 or 1 for each class where any of them may be true.
    Numbers(Vec<f32>),
    /// The first and the last token of an answer, by their places.
    Answer([usize; 2]),
    /// The tokens of a text that belongs to this one: what a search for it should find.
    Passage(Vec<u32>),
}

impl Example {
    /// An example of which every token but the first is a target.
    pub fn new(ids: Vec<u32>) -> Self {
        Self::completion(ids, 1)
    }

    /// An example whose first `from` tokens are given: they are no targets. The first token never is.
    pub fn completion(ids: Vec<u32>, from: usize) -> Self {
        Self { ids, goal: Goal::Tokens(from.max(1)) }
    }

    /// An example with another goal than its own tokens.
    ///
    /// ```
    /// use opt_core::tuning::{Example, Goal};
    ///
    /// let review = Example::with(vec![2, 100, 200], Goal::Class(1));
    /// assert_eq!((review.units(), review.targets().count()), (1, 0));
    /// ```
    pub fn with(ids: Vec<u32>, goal: Goal) -> Self {
        match goal {
            Goal::Tokens(from) => Self::completion(ids, from),
            goal => Self { ids, goal },
        }
    }

    /// The tokens.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// What it teaches.
    pub fn goal(&self) -> &Goal {
        &self.goal
    }

    /// Places and ids of the tokens to be predicted, each from those in front of it. None where the goal is another.
    pub fn targets(&self) -> impl Iterator<Item = (usize, u32)> {
        let from = if let Goal::Tokens(from) = self.goal { from } else { self.ids.len() };
        self.ids.iter().copied().enumerate().skip(from)
    }

    /// What it counts for in the mean over a batch: its targets, or 1 where the goal is another.
    pub fn units(&self) -> usize {
        match self.goal {
            Goal::Tokens(from) => self.ids.len().saturating_sub(from),
            _ => 1,
        }
    }

    /// The tokens that are run for it.
    pub(crate) fn tokens(&self) -> usize {
        let other = if let Goal::Passage(ids) = &self.goal { ids.len() } else { 0 };
        self.ids.len() + other
    }
}
