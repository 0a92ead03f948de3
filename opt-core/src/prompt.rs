//! Prompts that fit: zero- and few-shot prompts from their parts, and token ids cut to a limit.
//!
//! Too long a prompt is an error unless something else is asked for. [`PromptBuilder`] first drops whole examples and
//! says which.

use crate::{
    Error, ErrorKind, Result,
    tokenizer::{Bos, Tokenizer},
};

/// What happens to a prompt longer than its limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum Overflow {
    /// An error that names the length and the limit. The default.
    #[default]
    Error,
    /// The beginning is cut off, token by token; a BOS stays in front.
    TruncateLeft,
    /// The end is cut off, token by token.
    TruncateRight,
}

/// Which examples a prompt that is too long loses first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum DropOrder {
    /// The first ones: what stands nearest to the query weighs most. The default.
    #[default]
    Earliest,
    /// The last ones: for examples sorted from best to worst.
    Latest,
}

/// Ids that fit, from [`fit`].
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Fitted {
    /// At least one and at most `limit` ids.
    pub ids: Vec<u32>,
    /// How many ids were cut off.
    pub cut: usize,
}

/// Fits the ids of a prompt into `limit` tokens. With [`Overflow::TruncateLeft`], an id equal to `bos` at the front
/// stays there and counts towards the limit; with [`Overflow::TruncateRight`] all of the front stays.
///
/// ```
/// use opt_core::prompt::{Overflow, fit};
///
/// let fitted = fit(vec![2, 10, 11, 12, 13], 3, Overflow::TruncateLeft, Some(2))?;
/// assert_eq!((fitted.ids, fitted.cut), (vec![2, 12, 13], 2));
///
/// let error = fit(vec![2, 10, 11, 12, 13], 3, Overflow::Error, Some(2)).unwrap_err();
/// assert_eq!(error.to_string(), "the prompt is too long: expected at most 3 tokens, found 5");
/// # Ok::<(), opt_core::Error>(())
/// ```
///
/// # Errors
/// [`ErrorKind::Prompt`] when `ids` is empty, when they exceed `limit` under [`Overflow::Error`], and when `limit`
/// leaves no room for anything.
pub fn fit(mut ids: Vec<u32>, limit: usize, overflow: Overflow, bos: Option<u32>) -> Result<Fitted> {
    if ids.is_empty() {
        return Err(Error::new(
            ErrorKind::Prompt,
            "the prompt is empty: expected at least one token, found none",
        ));
    }
    if limit == 0 {
        return Err(Error::new(ErrorKind::Prompt, "no room for a prompt: the limit is 0 tokens"));
    }
    let cut = ids.len().saturating_sub(limit);
    if cut > 0 {
        if overflow == Overflow::Error {
            return Err(too_long(limit, ids.len()));
        }
        if overflow == Overflow::TruncateRight {
            ids.truncate(limit);
        } else {
            let kept = usize::from(ids.first().copied() == bos);
            ids.drain(kept..kept + cut);
        }
    }
    Ok(Fitted { ids, cut })
}

fn too_long(limit: usize, found: usize) -> Error {
    let message = format!("the prompt is too long: expected at most {limit} tokens, found {found}");
    Error::new(ErrorKind::Prompt, message)
}

/// A zero- or few-shot prompt: instruction, examples, query.
///
/// ```
/// use opt_core::{prompt::PromptBuilder, tokenizer::Tokenizer};
///
/// let tokenizer = Tokenizer::from_dir("../models/opt-novels")?;
/// let prompt = PromptBuilder::new("It rains.")
///     .instruction("Say how the sentence feels.")
///     .example("The sun is out.", "glad")
///     .example("My dog is ill.", "sad")
///     .build(&tokenizer, 512)?;
/// assert_eq!(
///     prompt.text,
///     "Say how the sentence feels.\n\nInput: The sun is out.\nOutput: glad\n\nInput: My dog is ill.\nOutput: sad\n\n\
///      Input: It rains.\nOutput:"
/// );
/// assert!(prompt.dropped.is_empty() && prompt.ids.len() <= 512);
/// # Ok::<(), opt_core::Error>(())
/// ```
///
/// The text is `instruction`, then each example as `input_prefix input output_prefix output`, then the query as
/// `input_prefix query output_prefix`, with `separator` between all of them. White space at the end of the query's
/// `output_prefix` is left out: byte-level vocabularies put a space into the word after it, and a prompt that ends in
/// a space makes that word improbable.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PromptBuilder {
    query: String,
    instruction: String,
    examples: Vec<(String, String)>,
    input_prefix: String,
    output_prefix: String,
    separator: String,
    bos: Bos,
    overflow: Overflow,
    drop_order: DropOrder,
}

/// A prompt from [`PromptBuilder::build`].
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Prompt {
    /// The prompt as text. Where `truncated` is not 0 the ids begin later than this text does.
    pub text: String,
    /// The prompt as ids, with BOS where the tokenizer puts one; at most `max_tokens` of them.
    pub ids: Vec<u32>,
    /// The examples that were left out, by their place in the order they were given, rising.
    pub dropped: Vec<usize>,
    /// How many tokens were cut off, under [`Overflow::TruncateLeft`] or [`Overflow::TruncateRight`].
    pub truncated: usize,
}

impl PromptBuilder {
    /// A prompt that asks `query`, with `Input: ` and `Output: ` as prefixes and an empty line between the parts.
    pub fn new(query: impl Into<String>) -> Self {
        Self {
            query: query.into(),
            instruction: String::new(),
            examples: Vec::new(),
            input_prefix: "Input: ".into(),
            output_prefix: "\nOutput: ".into(),
            separator: "\n\n".into(),
            bos: Bos::Model,
            overflow: Overflow::Error,
            drop_order: DropOrder::Earliest,
        }
    }

    /// What is asked for, before everything else. Default: nothing.
    #[must_use]
    pub fn instruction(mut self, instruction: impl Into<String>) -> Self {
        self.instruction = instruction.into();
        self
    }

    /// Adds an example after those already there.
    #[must_use]
    pub fn example(mut self, input: impl Into<String>, output: impl Into<String>) -> Self {
        self.examples.push((input.into(), output.into()));
        self
    }

    /// Adds examples, each an input and its output.
    #[must_use]
    pub fn examples<I: Into<String>, O: Into<String>>(
        mut self,
        examples: impl IntoIterator<Item = (I, O)>,
    ) -> Self {
        self.examples.extend(examples.into_iter().map(|(input, output)| (input.into(), output.into())));
        self
    }

    /// What stands before each input and the query. Default: `Input: `.
    #[must_use]
    pub fn input_prefix(mut self, prefix: impl Into<String>) -> Self {
        self.input_prefix = prefix.into();
        self
    }

    /// What stands between an input and its output. Default: a line break and `Output: `.
    #[must_use]
    pub fn output_prefix(mut self, prefix: impl Into<String>) -> Self {
        self.output_prefix = prefix.into();
        self
    }

    /// What stands between instruction, examples and query. Default: an empty line.
    #[must_use]
    pub fn separator(mut self, separator: impl Into<String>) -> Self {
        self.separator = separator.into();
        self
    }

    /// Whether a BOS goes in front. Default: as the tokenizer says.
    #[must_use]
    pub fn bos(mut self, bos: Bos) -> Self {
        self.bos = bos;
        self
    }

    /// What happens when the prompt is too long even without examples. Default: an error.
    #[must_use]
    pub fn overflow(mut self, overflow: Overflow) -> Self {
        self.overflow = overflow;
        self
    }

    /// Which examples go first when the prompt is too long. Default: the earliest.
    #[must_use]
    pub fn drop_order(mut self, order: DropOrder) -> Self {
        self.drop_order = order;
        self
    }

    /// The text with all examples.
    pub fn text(&self) -> String {
        self.text_without(0)
    }

    /// Makes the prompt fit into `max_tokens`: the context's length less what is to be generated. Examples are dropped
    /// one by one, in the chosen order, and no more of them than needed.
    ///
    /// # Errors
    /// [`ErrorKind::Prompt`] when it is too long even without examples (unless it may be cut)
    /// or has no token at all; [`ErrorKind::Tokenizer`] when the text cannot be encoded.
    pub fn build(&self, tokenizer: &Tokenizer, max_tokens: usize) -> Result<Prompt> {
        let encode = |drop| -> Result<(String, Vec<u32>)> {
            let text = self.text_without(drop);
            let ids = tokenizer.encode(&text, self.bos)?;
            Ok((text, ids))
        };
        // Fewer examples are fewer tokens, so the number to drop can be bisected: `few` are too few, `enough` will do.
        let mut enough = 0;
        let mut fitting = encode(0)?;
        if fitting.1.len() > max_tokens && !self.examples.is_empty() {
            let mut few = 0;
            enough = self.examples.len();
            fitting = encode(enough)?;
            while fitting.1.len() <= max_tokens && few + 1 < enough {
                let middle = few + (enough - few) / 2;
                let tried = encode(middle)?;
                if tried.1.len() <= max_tokens {
                    (enough, fitting) = (middle, tried);
                } else {
                    few = middle;
                }
            }
        }
        let (text, ids) = fitting;
        let bos = tokenizer.bos_id().filter(|_| self.bos != Bos::Never);
        let fitted = fit(ids, max_tokens, self.overflow, bos).map_err(|e| match self.examples.len() {
            0 => e,
            n => e.at(format_args!("even without its {n} examples")),
        })?;
        let dropped = match self.drop_order {
            DropOrder::Earliest => (0..enough).collect(),
            DropOrder::Latest => (self.examples.len() - enough..self.examples.len()).collect(),
        };
        Ok(Prompt { text, ids: fitted.ids, dropped, truncated: fitted.cut })
    }

    fn text_without(&self, dropped: usize) -> String {
        let examples = match self.drop_order {
            DropOrder::Earliest => self.examples.get(dropped..),
            DropOrder::Latest => self.examples.get(..self.examples.len().saturating_sub(dropped)),
        };
        let mut text = self.instruction.clone();
        let mut part = |pieces: &[&str]| {
            if !text.is_empty() {
                text.push_str(&self.separator);
            }
            text.extend(pieces.iter().copied());
        };
        for (input, output) in examples.unwrap_or_default() {
            part(&[&self.input_prefix, input, &self.output_prefix, output]);
        }
        part(&[&self.input_prefix, &self.query, self.output_prefix.trim_end()]);
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokenizer() -> Tokenizer {
        Tokenizer::from_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/../models/opt-novels")).unwrap()
    }

    fn builder() -> PromptBuilder {
        let examples = (0..9).map(|i| (format!("example number {i}"), "yes ".repeat(i + 1)));
        PromptBuilder::new("the question").instruction("Answer.").examples(examples)
    }

    #[test]
    fn fit_keeps_bos_and_the_end() {
        let fit = |ids: &[u32], limit, overflow, bos| {
            fit(ids.to_vec(), limit, overflow, bos).map(|f| (f.ids, f.cut))
        };
        let left = Overflow::TruncateLeft;
        assert_eq!(fit(&[2, 5, 6], 3, Overflow::Error, Some(2)).unwrap(), (vec![2, 5, 6], 0));
        assert_eq!(fit(&[2, 5, 6], 2, left, Some(2)).unwrap(), (vec![2, 6], 1));
        assert_eq!(fit(&[2, 5, 6], 1, left, Some(2)).unwrap(), (vec![2], 2));
        assert_eq!(fit(&[4, 5, 6], 2, left, Some(2)).unwrap(), (vec![5, 6], 1));
        assert_eq!(fit(&[2, 5, 6], 2, left, None).unwrap(), (vec![5, 6], 1));
        assert_eq!(fit(&[2, 5, 6], 2, Overflow::TruncateRight, Some(2)).unwrap(), (vec![2, 5], 1));
        for (ids, limit) in [(&[][..], 3), (&[2][..], 0), (&[2, 5][..], 1)] {
            assert_eq!(fit(ids, limit, Overflow::Error, None).unwrap_err().kind(), ErrorKind::Prompt);
        }
        assert!(fit(&[2], 0, left, None).is_err());
    }

    #[test]
    fn drops_as_few_examples_as_needed() {
        let tokenizer = tokenizer();
        for order in [DropOrder::Earliest, DropOrder::Latest] {
            let builder = builder().drop_order(order);
            let whole = builder.build(&tokenizer, 10_000).unwrap();
            assert_eq!((whole.dropped.len(), &whole.text), (0, &builder.text()));
            let least = tokenizer.encode(&builder.text_without(9), Bos::Model).unwrap().len();
            for limit in least..=whole.ids.len() {
                let built = builder.build(&tokenizer, limit).unwrap();
                assert!(built.ids.len() <= limit);
                assert_eq!(built.ids, tokenizer.encode(&built.text, Bos::Model).unwrap());
                let n = built.dropped.len();
                if n > 0 {
                    let one_more = tokenizer.encode(&builder.text_without(n - 1), Bos::Model).unwrap();
                    assert!(one_more.len() > limit, "{n} examples were dropped where {} would do", n - 1);
                }
                let expected: Vec<usize> = match order {
                    DropOrder::Earliest => (0..n).collect(),
                    DropOrder::Latest => (9 - n..9).collect(),
                };
                assert_eq!(built.dropped, expected);
                for i in 0..9 {
                    assert_eq!(built.text.contains(&format!("number {i}\n")), !expected.contains(&i));
                }
            }
        }
    }

    #[test]
    fn too_long_without_examples() {
        let tokenizer = tokenizer();
        let error = builder().build(&tokenizer, 6).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Prompt);
        let found = tokenizer.encode(&builder().text_without(9), Bos::Model).unwrap();
        let expected = format!(
            "even without its 9 examples: the prompt is too long: expected at most 6 tokens, found {}",
            found.len()
        );
        assert_eq!(error.to_string(), expected);

        let built = builder().overflow(Overflow::TruncateLeft).build(&tokenizer, 6).unwrap();
        assert_eq!(built.ids.len(), 6);
        assert_eq!(built.ids[0], 2);
        assert_eq!(built.ids[1..], found[found.len() - 5..]);
        assert_eq!((built.dropped.len(), built.truncated), (9, found.len() - 6));
    }

    #[test]
    fn zero_shot_and_templates() {
        let tokenizer = tokenizer();
        let prompt = PromptBuilder::new("2 + 2")
            .input_prefix("Q: ")
            .output_prefix(" A: ")
            .build(&tokenizer, 99)
            .unwrap();
        assert_eq!(prompt.text, "Q: 2 + 2 A:");
        let prompt = PromptBuilder::new("c")
            .input_prefix("")
            .output_prefix("=")
            .separator(";")
            .example("a", "b")
            .bos(Bos::Never)
            .build(&tokenizer, 99)
            .unwrap();
        assert_eq!((prompt.text.as_str(), prompt.ids.contains(&2)), ("a=b;c=", false));
        let empty =
            PromptBuilder::new("").input_prefix("").output_prefix("").bos(Bos::Never).build(&tokenizer, 9);
        assert_eq!(empty.unwrap_err().kind(), ErrorKind::Prompt);
    }
}
