//! chrF and chrF++ (Popović 2015, 2017), equal to sacrebleu's.

use crate::{
    Error, Result,
    error::at_least,
    python::{is_ascii_punctuation, is_space, split},
    references::{MAX_ORDER, check_pairs, signature_of},
};
use std::{collections::HashMap, fmt, hash::Hash, ops::AddAssign};

/// How chrF is computed. The default is sacrebleu's.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct ChrfOptions {
    /// Longest n-grams of characters, up to 64.
    pub char_order: usize,
    /// Longest n-grams of words, up to 64: 0 for chrF, 2 for chrF++.
    pub word_order: usize,
    /// How many times as much recall weighs as precision.
    pub beta: f64,
    /// Lowercase both sides.
    pub lowercase: bool,
    /// White space counts as characters.
    pub whitespace: bool,
    /// Average F over all orders, with 10⁻¹⁶ where an order is empty, as chrF++.py, NLTK and Moses do, and not F of
    /// average precision and recall over the orders that both sides have.
    pub eps_smoothing: bool,
}

impl Default for ChrfOptions {
    fn default() -> Self {
        Self {
            char_order: 6,
            word_order: 0,
            beta: 2.0,
            lowercase: false,
            whitespace: false,
            eps_smoothing: false,
        }
    }
}

/// Counts of one order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct ChrfOrder {
    /// N-grams of the hypotheses, of those whose reference has any of this order.
    pub hypothesis: u64,
    /// N-grams of the references.
    pub reference: u64,
    /// N-grams of both.
    pub matches: u64,
}

/// The counts that chrF is made of, characters first, then words; those of a corpus are the sums of its sentences'.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct ChrfStatistics {
    /// Counts of each order.
    pub orders: Vec<ChrfOrder>,
}

impl AddAssign<&Self> for ChrfStatistics {
    fn add_assign(&mut self, other: &Self) {
        self.orders.resize(self.orders.len().max(other.orders.len()), ChrfOrder::default());
        for (a, b) in self.orders.iter_mut().zip(&other.orders) {
            a.hypothesis = a.hypothesis.saturating_add(b.hypothesis);
            a.reference = a.reference.saturating_add(b.reference);
            a.matches = a.matches.saturating_add(b.matches);
        }
    }
}

/// A chrF score. It prints as sacrebleu's.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct ChrfScore {
    /// From 0 to 100.
    pub score: f64,
    /// The weight of recall.
    pub beta: f64,
    /// Longest n-grams of characters.
    pub char_order: usize,
    /// Longest n-grams of words.
    pub word_order: usize,
}

impl fmt::Display for ChrfScore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "chrF{}{} = {:.2}", self.beta, "+".repeat(self.word_order), self.score)
    }
}

/// Computes chrF and chrF++.
///
/// ```
/// use opt_metrics::chrf::{Chrf, ChrfOptions};
/// let mut options = ChrfOptions::default();
/// options.word_order = 2; // chrF++
/// let found = Chrf::new(options)?.corpus(&["the cat sat"], &[["the cat sat"]])?;
/// assert_eq!(found.to_string(), "chrF2++ = 100.00");
/// # Ok::<(), opt_metrics::Error>(())
/// ```
#[derive(Debug, Clone, Copy, Default)]
pub struct Chrf {
    options: ChrfOptions,
}

impl Chrf {
    /// chrF with other options than the default.
    ///
    /// # Errors
    /// [`Error::Option`] for orders out of range or both 0, or a beta that is negative or no number.
    pub fn new(options: ChrfOptions) -> Result<Self> {
        let (chars, words) = (options.char_order, options.word_order);
        if chars > MAX_ORDER || words > MAX_ORDER || chars + words == 0 {
            return Err(Error::option(
                "longest n-gram of chrF",
                format!("{chars} characters and {words} words"),
                "at most 64 of each and not 0 of both",
            ));
        }
        if !(options.beta >= 0.0 && options.beta.is_finite()) {
            return Err(Error::option("beta of chrF", options.beta, "a number from 0 on"));
        }
        Ok(Self { options })
    }

    /// The options.
    pub fn options(&self) -> &ChrfOptions {
        &self.options
    }

    /// Counts of one hypothesis against that of its references which gives the highest score, the first of equals.
    ///
    /// # Errors
    /// [`Error::TooFew`] for no reference.
    pub fn statistics<S: AsRef<str>>(&self, hypothesis: &str, references: &[S]) -> Result<ChrfStatistics> {
        at_least("references of a hypothesis", 1, references.len())?;
        let hypothesis = Text::new(hypothesis, &self.options);
        let counted = hypothesis.ngrams(&self.options);
        let mut best: Option<(f64, ChrfStatistics)> = None;
        for reference in references {
            let reference = Text::new(reference.as_ref(), &self.options);
            let found = counted.against(&reference.ngrams(&self.options));
            let score = self.score(&found).score;
            if best.as_ref().is_none_or(|(highest, _)| score > *highest) {
                best = Some((score, found));
            }
        }
        Ok(best.map(|(_, found)| found).unwrap_or_default())
    }

    /// The score of counts.
    pub fn score(&self, statistics: &ChrfStatistics) -> ChrfScore {
        let ChrfOptions { char_order, word_order, beta, .. } = self.options;
        ChrfScore { score: self.f_score(&statistics.orders), beta, char_order, word_order }
    }

    fn f_score(&self, orders: &[ChrfOrder]) -> f64 {
        const EPS: f64 = 1e-16;
        let factor = self.options.beta * self.options.beta;
        let (mut sum, mut precisions, mut recalls, mut effective) = (0.0, 0.0, 0.0, 0.0);
        for order in orders {
            let of = |all: u64| if all > 0 { order.matches as f64 / all as f64 } else { EPS };
            let (precision, recall) = (of(order.hypothesis), of(order.reference));
            let below = factor * precision + recall;
            sum += if below > 0.0 { (1.0 + factor) * precision * recall / below } else { EPS };
            if order.hypothesis > 0 && order.reference > 0 {
                precisions += precision;
                recalls += recall;
                effective += 1.0;
            }
        }
        if self.options.eps_smoothing {
            return 100.0 * sum / (self.options.char_order + self.options.word_order) as f64;
        }
        if effective == 0.0 || precisions + recalls == 0.0 {
            return 0.0;
        }
        let (precision, recall) = (precisions / effective, recalls / effective);
        100.0 * ((1.0 + factor) * precision * recall / (factor * precision + recall))
    }

    /// The score of a corpus: counts are summed over all hypotheses before any division.
    ///
    /// # Errors
    /// [`Error::TooFew`] for no hypothesis or one without reference; [`Error::Lengths`] unless there is a list of
    /// references for each hypothesis.
    pub fn corpus<H, R, S>(&self, hypotheses: &[H], references: &[R]) -> Result<ChrfScore>
    where
        H: AsRef<str>,
        R: AsRef<[S]>,
        S: AsRef<str>,
    {
        check_pairs(hypotheses.len(), references.len())?;
        let mut total = ChrfStatistics::default();
        for (hypothesis, references) in hypotheses.iter().zip(references) {
            total += &self.statistics(hypothesis.as_ref(), references.as_ref())?;
        }
        Ok(self.score(&total))
    }

    /// The score of one sentence.
    ///
    /// # Errors
    /// [`Error::TooFew`] for no reference.
    pub fn sentence<S: AsRef<str>>(&self, hypothesis: &str, references: &[S]) -> Result<ChrfScore> {
        Ok(self.score(&self.statistics(hypothesis, references)?))
    }

    /// How a score was computed, in the form of sacrebleu's signatures; `references` as
    /// [`crate::reference_count`] has it, none for a varying number.
    pub fn signature(&self, references: Option<usize>) -> String {
        let o = &self.options;
        let yes = |on: bool| if on { "yes" } else { "no" };
        signature_of(
            references,
            &format!(
                "case:{}|eff:{}|nc:{}|nw:{}|space:{}",
                if o.lowercase { "lc" } else { "mixed" },
                yes(!o.eps_smoothing),
                o.char_order,
                o.word_order,
                yes(o.whitespace)
            ),
        )
    }
}

/// A text as chrF sees it.
struct Text {
    chars: Vec<char>,
    words: Vec<String>,
}

impl Text {
    fn new(text: &str, options: &ChrfOptions) -> Self {
        let lowered = if options.lowercase { text.to_lowercase() } else { text.to_owned() };
        let words = if options.word_order > 0 { words(&lowered) } else { Vec::new() };
        Self { chars: lowered.chars().filter(|c| options.whitespace || !is_space(*c)).collect(), words }
    }

    fn ngrams(&self, options: &ChrfOptions) -> Ngrams<'_> {
        Ngrams {
            chars: (1..=options.char_order).map(|n| counts(&self.chars, n)).collect(),
            words: (1..=options.word_order).map(|n| counts(&self.words, n)).collect(),
        }
    }
}

/// Words with one mark of punctuation split off, from the end or else from the start.
fn words(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    for word in split(text) {
        let (mut head, mut tail) = (word.chars(), word.chars());
        match (tail.next_back(), head.next()) {
            (Some(last), Some(_)) if is_ascii_punctuation(last) && !tail.as_str().is_empty() => {
                found.extend([tail.as_str().to_owned(), last.to_string()]);
            }
            (Some(_), Some(first)) if is_ascii_punctuation(first) && !head.as_str().is_empty() => {
                found.extend([first.to_string(), head.as_str().to_owned()]);
            }
            _ => found.push(word.to_owned()),
        }
    }
    found
}

type Counts<'a, T> = HashMap<&'a [T], u64>;

fn counts<T: Hash + Eq>(items: &[T], n: usize) -> Counts<'_, T> {
    let mut counts = HashMap::new();
    for ngram in items.windows(n) {
        *counts.entry(ngram).or_insert(0) += 1;
    }
    counts
}

/// N-grams of each order.
struct Ngrams<'a> {
    chars: Vec<Counts<'a, char>>,
    words: Vec<Counts<'a, String>>,
}

impl Ngrams<'_> {
    fn against(&self, reference: &Ngrams<'_>) -> ChrfStatistics {
        let chars = self.chars.iter().zip(&reference.chars).map(|(h, r)| compare(h, r));
        let words = self.words.iter().zip(&reference.words).map(|(h, r)| compare(h, r));
        ChrfStatistics { orders: chars.chain(words).collect() }
    }
}

fn compare<T: Hash + Eq>(hypothesis: &Counts<'_, T>, reference: &Counts<'_, T>) -> ChrfOrder {
    let shared = hypothesis.iter().filter_map(|(ngram, count)| Some(*reference.get(ngram)?.min(count)));
    ChrfOrder {
        matches: shared.sum(),
        // An order that the reference has not takes no part.
        hypothesis: if reference.is_empty() { 0 } else { hypothesis.values().sum() },
        reference: reference.values().sum(),
    }
}
