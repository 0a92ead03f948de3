//! Answers that stand in a text.

use super::{Headed, Task, classify::softmax};
use crate::{Error, ErrorKind, Load, Opt, Result, tokenizer::Tokenizer};
use ndarray::Array2;
use std::{ops::Range, path::Path};

/// A model that finds an answer in a text: transformers' `OPTForQuestionAnswering`.
pub struct QuestionAnswerer(Headed);

/// How answers are looked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct AnswerOptions {
    /// The most tokens that an answer has.
    pub max_tokens: usize,
    /// How many answers to give, best first.
    pub top_k: usize,
}

impl Default for AnswerOptions {
    fn default() -> Self {
        Self { max_tokens: 15, top_k: 1 }
    }
}

impl AnswerOptions {
    /// Sets [`AnswerOptions::max_tokens`].
    #[must_use]
    pub fn max_tokens(self, max_tokens: usize) -> Self {
        Self { max_tokens, ..self }
    }

    /// Sets [`AnswerOptions::top_k`].
    #[must_use]
    pub fn top_k(self, top_k: usize) -> Self {
        Self { top_k, ..self }
    }
}

/// A part of a text that may be the answer.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Answer {
    /// The part itself.
    pub text: String,
    /// Where it stands in the text, in bytes.
    pub bytes: Range<usize>,
    /// The probability of its beginning times that of its end, both among the tokens of the text.
    pub score: f32,
}

impl QuestionAnswerer {
    /// Loads a model with a head of its own.
    ///
    /// # Errors
    /// Those of [`Opt::load`] and [`super::Head::of`]; [`ErrorKind::Config`] for a model without a head for answers.
    pub fn load(path: impl AsRef<Path>, load: Load<'_>) -> Result<Self> {
        Self(Headed::load(path.as_ref(), load, "with a head for answers")?).checked()
    }

    /// Loads a model and an adapter, with the head that was trained beside it.
    ///
    /// # Errors
    /// As [`QuestionAnswerer::load`]; those of [`crate::adapter::Adapter::open`] and [`super::Head::beside`].
    pub fn adapted(path: impl AsRef<Path>, adapter: impl AsRef<Path>, load: Load<'_>) -> Result<Self> {
        Self(Headed::adapted(path.as_ref(), adapter.as_ref(), load)?).checked()
    }

    fn checked(self) -> Result<Self> {
        match self.0.head.task() {
            Task::Answer => Ok(self),
            _ => Err(self.0.wrong_task("answers in a text")),
        }
    }

    /// The model below the head.
    pub fn opt(&self) -> &Opt {
        &self.0.opt
    }

    /// For each token of each sequence how likely an answer begins and ends there: logits `[tokens, 2]`.
    ///
    /// # Errors
    /// [`ErrorKind::Prompt`] for a sequence that is empty or too long, and ids outside the vocabulary;
    /// [`ErrorKind::Backend`].
    pub fn logits(&self, sequences: &[&[u32]]) -> Result<Vec<Array2<f32>>> {
        let hidden = self.0.last_hidden(sequences)?;
        Ok(hidden.iter().map(|rows| self.0.head.apply(rows.view())).collect())
    }

    /// Looks for answers to `question` in `context`. The two are one sequence, as transformers' tokenizer joins them:
    /// what the tokenizer puts in front of a text, the question, the context.
    ///
    /// # Errors
    /// [`ErrorKind::Tokenizer`] for a model without tokenizer; [`ErrorKind::Prompt`] for an empty context and for
    /// more tokens than the model takes.
    pub fn answer(&self, question: &str, context: &str, options: AnswerOptions) -> Result<Vec<Answer>> {
        let Asked { ids, tokens } = Asked::new(self.0.opt.require_tokenizer()?, question, context)?;
        let logits = self.logits(&[&ids])?.pop().unwrap_or_default();
        let first = ids.len() - tokens.len();
        let [begin, end] = [0, 1]
            .map(|column| softmax(&logits.column(column).iter().skip(first).copied().collect::<Vec<_>>()));
        let mut found: Vec<Answer> = Vec::new();
        for (i, (starts, begins)) in tokens.iter().zip(&begin).enumerate() {
            for (ends, finishes) in tokens.iter().zip(&end).skip(i).take(options.max_tokens) {
                let bytes = starts.start..ends.end;
                let score = begins * finishes;
                if found.len() < options.top_k || found.last().is_some_and(|worst| worst.score < score) {
                    // A token may begin with the space before a word.
                    let part = context.get(bytes.clone()).unwrap_or_default();
                    let text = part.trim().to_owned();
                    let start = bytes.start + part.len() - part.trim_start().len();
                    let bytes = start..start + text.len();
                    let at = found.partition_point(|other| other.score >= score);
                    found.insert(at, Answer { text, bytes, score });
                    found.truncate(options.top_k);
                }
            }
        }
        Ok(found)
    }
}

/// A question and a context as one sequence.
pub(crate) struct Asked {
    pub(crate) ids: Vec<u32>,
    /// For each of the last ids, those of the context, its bytes there.
    pub(crate) tokens: Vec<Range<usize>>,
}

impl Asked {
    pub(crate) fn new(tokenizer: &Tokenizer, question: &str, context: &str) -> Result<Self> {
        let mut ids = tokenizer.encode(question, crate::tokenizer::Bos::Model)?;
        let (of_context, tokens) = tokenizer.encode_with_places(context)?;
        if of_context.is_empty() {
            return Err(Error::new(ErrorKind::Prompt, "expected a text to look for answers in, found none"));
        }
        ids.extend(of_context);
        Ok(Self { ids, tokens })
    }

    /// The first and the last token of what stands at these bytes of the context; `None` if no token does.
    pub(crate) fn covering(&self, bytes: Range<usize>) -> Option<[usize; 2]> {
        let first = self.ids.len() - self.tokens.len();
        let touches = |token: &Range<usize>| token.start < bytes.end && bytes.start < token.end;
        let begin = self.tokens.iter().position(touches)?;
        let end = self.tokens.iter().rposition(touches)?;
        Some([first + begin, first + end])
    }
}
