//! Classes and numbers of whole sequences.

use super::{Headed, Task};
use crate::{Error, ErrorKind, Load, Opt, Result, tokenizer::Bos};
use ndarray::{Array2, Axis};
use std::path::Path;

/// A model that tells the class of a text, or numbers about it: transformers' `OPTForSequenceClassification`.
pub struct SequenceClassifier(Headed);

/// One class or number of a text.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Prediction {
    /// Its name.
    pub label: String,
    /// The probability of a class; the number itself for a regression.
    pub score: f32,
}

impl SequenceClassifier {
    /// Loads a model with a head of its own.
    ///
    /// # Errors
    /// Those of [`Opt::load`] and [`super::Head::of`]; [`ErrorKind::Config`] for a model without a head for classes.
    pub fn load(path: impl AsRef<Path>, load: Load<'_>) -> Result<Self> {
        Self(Headed::load(path.as_ref(), load, "with a head for classes")?).checked()
    }

    /// Loads a model and an adapter, with the head that was trained beside it.
    ///
    /// # Errors
    /// As [`SequenceClassifier::load`]; those of [`crate::adapter::Adapter::open`] and [`super::Head::beside`].
    pub fn adapted(path: impl AsRef<Path>, adapter: impl AsRef<Path>, load: Load<'_>) -> Result<Self> {
        Self(Headed::adapted(path.as_ref(), adapter.as_ref(), load)?).checked()
    }

    fn checked(self) -> Result<Self> {
        match self.task() {
            Task::Answer => Err(self.0.wrong_task("classes or numbers")),
            _ => Ok(self),
        }
    }

    /// What its outputs mean.
    pub fn task(&self) -> &Task {
        self.0.head.task()
    }

    /// The model below the head.
    pub fn opt(&self) -> &Opt {
        &self.0.opt
    }

    /// The outputs `[sequences, outputs]` for sequences of token ids, which are run as one batch. The row of a
    /// sequence is that of its last token that is not padding.
    ///
    /// # Errors
    /// [`ErrorKind::Prompt`] for a sequence that is empty or too long, and ids outside the vocabulary;
    /// [`ErrorKind::Backend`].
    pub fn logits(&self, sequences: &[&[u32]]) -> Result<Array2<f32>> {
        if let Some(place) = sequences.iter().position(|ids| ids.is_empty()) {
            let message = format_args!("sequence {place}: expected at least one token, found none");
            return Err(Error::new(ErrorKind::Prompt, message));
        }
        let padding = self.0.opt.config().pad_token_id;
        let head = &self.0.head;
        let mut rows = Array2::zeros((sequences.len(), head.weight().ncols()));
        for ((mut row, hidden), ids) in
            rows.outer_iter_mut().zip(self.0.last_hidden(sequences)?).zip(sequences)
        {
            row.assign(&hidden.index_axis(Axis(0), last_token(ids, padding)));
        }
        Ok(head.apply(rows.view()))
    }

    /// The classes of a text with their probabilities, likeliest first; numbers in their own order.
    ///
    /// # Errors
    /// [`ErrorKind::Tokenizer`] for a model without tokenizer; those of [`SequenceClassifier::logits`].
    pub fn classify(&self, text: &str) -> Result<Vec<Prediction>> {
        Ok(self.classify_batch(&[text])?.pop().unwrap_or_default())
    }

    /// [`SequenceClassifier::classify`], of several texts at once.
    ///
    /// # Errors
    /// As there.
    pub fn classify_batch(&self, texts: &[&str]) -> Result<Vec<Vec<Prediction>>> {
        let tokenizer = self.0.opt.require_tokenizer()?;
        let ids: Vec<Vec<u32>> =
            texts.iter().map(|text| tokenizer.encode(text, Bos::Model)).collect::<Result<_>>()?;
        let ids: Vec<&[u32]> = ids.iter().map(Vec::as_slice).collect();
        let logits = self.logits(&ids)?;
        Ok(logits.outer_iter().map(|row| self.named(row.to_vec())).collect())
    }

    fn named(&self, logits: Vec<f32>) -> Vec<Prediction> {
        let scores: Vec<f32> = match self.task() {
            Task::OneOf(_) => softmax(&logits),
            Task::AnyOf(_) => logits.iter().map(|&x| sigmoid(f64::from(x)) as f32).collect(),
            Task::Numbers(_) | Task::Answer => logits,
        };
        let label = |(label, score): (&String, f32)| Prediction { label: label.clone(), score };
        let mut named: Vec<Prediction> = self.task().labels().iter().zip(scores).map(label).collect();
        if !matches!(self.task(), Task::Numbers(_)) {
            named.sort_by(|a, b| b.score.total_cmp(&a.score));
        }
        named
    }
}

/// The place of the last token that is not padding; the first token, where all are.
pub(crate) fn last_token(ids: &[u32], padding: Option<u32>) -> usize {
    match padding {
        Some(padding) => ids.iter().rposition(|id| *id != padding).unwrap_or(0),
        None => ids.len().saturating_sub(1),
    }
}

pub(crate) fn sigmoid(x: f64) -> f64 {
    (1.0 + (-x).exp()).recip()
}

/// In f64, so that many classes lose nothing.
pub(super) fn softmax(logits: &[f32]) -> Vec<f32> {
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weights: Vec<f64> = logits.iter().map(|&x| f64::from(x - most).exp()).collect();
    let sum: f64 = weights.iter().sum();
    weights.iter().map(|weight| (weight / sum) as f32).collect()
}
