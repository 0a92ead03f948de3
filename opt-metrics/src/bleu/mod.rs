//! BLEU (Papineni et al. 2002), equal to sacrebleu's.

mod among;
mod score;
mod tokenize;

pub use among::self_bleu;
pub use score::{BleuScore, BleuStatistics};
pub use tokenize::BleuTokenizer;
pub(crate) use tokenize::{is_western_punctuation, space_out, split_stops};

use crate::{
    Error, Result,
    error::at_least,
    python::trim_end,
    references::{MAX_ORDER, check_pairs, signature_of},
};
use std::collections::HashMap;

/// What stands in for the precision of an order of which nothing matches; as compared by Chen and Cherry, "A
/// Systematic Comparison of Smoothing Techniques for Sentence-Level BLEU" (2014).
#[derive(Debug, Clone, Copy, PartialEq, Default)]
#[non_exhaustive]
pub enum Smoothing {
    /// Nothing: the score is 0 (by the logarithm's floor, as good as 0).
    None,
    /// This many matches; 0.1 in sacrebleu.
    Floor(f64),
    /// This is added to matches and totals of all orders but the first; 1 in sacrebleu.
    AddK(f64),
    /// Halves again at each such order, as NIST's script does.
    #[default]
    Exp,
}

/// How BLEU is computed. The default is sacrebleu's for corpora.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct BleuOptions {
    /// How texts become tokens.
    pub tokenizer: BleuTokenizer,
    /// What orders without a match count.
    pub smoothing: Smoothing,
    /// Longest n-grams, 1 to 64; 4 in all papers.
    pub max_order: usize,
    /// Leave out orders longer than the text. For single sentences this should be on.
    pub effective_order: bool,
    /// Lowercase both sides.
    pub lowercase: bool,
}

impl Default for BleuOptions {
    fn default() -> Self {
        Self {
            tokenizer: BleuTokenizer::default(),
            smoothing: Smoothing::default(),
            max_order: 4,
            effective_order: false,
            lowercase: false,
        }
    }
}

/// Computes BLEU.
///
/// References are given item by item, any number of at least one for each. A text's counts depend on nothing but
/// itself, so [`Bleu::statistics`] of single texts can be kept and summed for any part of a corpus, as a bootstrap
/// needs.
///
/// ```
/// use opt_metrics::bleu::Bleu;
/// let bleu = Bleu::default();
/// let found = bleu.corpus(&["the cat sat on the mat."], &[["the cat sat on a mat."]])?;
/// assert_eq!(
///     found.to_string(),
///     "BLEU = 48.89 85.7/66.7/40.0/25.0 (BP = 1.000 ratio = 1.000 hyp_len = 7 ref_len = 7)"
/// );
/// # Ok::<(), opt_metrics::Error>(())
/// ```
#[derive(Debug, Clone, Copy, Default)]
pub struct Bleu {
    options: BleuOptions,
}

impl Bleu {
    /// BLEU with other options than the default.
    ///
    /// # Errors
    /// [`Error::Option`] for an order out of range, or a smoothing value that is negative or no number.
    pub fn new(options: BleuOptions) -> Result<Self> {
        if !(1..=MAX_ORDER).contains(&options.max_order) {
            return Err(Error::option("longest n-gram of BLEU", options.max_order, "1 to 64"));
        }
        if let Smoothing::Floor(value) | Smoothing::AddK(value) = options.smoothing
            && !(value >= 0.0 && value.is_finite())
        {
            return Err(Error::option("smoothing value of BLEU", value, "a number from 0 on"));
        }
        Ok(Self { options })
    }

    /// The options.
    pub fn options(&self) -> &BleuOptions {
        &self.options
    }

    /// The tokens of a text, as they are compared.
    pub fn tokens(&self, text: &str) -> Vec<String> {
        if self.options.lowercase {
            self.options.tokenizer.tokenize(trim_end(&text.to_lowercase()))
        } else {
            self.options.tokenizer.tokenize(trim_end(text))
        }
    }

    /// Matches of one hypothesis against all its references: of each n-gram at most as often as in the reference that
    /// has it most often; the reference length is the one closest to the hypothesis', of two the shorter.
    ///
    /// # Errors
    /// [`Error::TooFew`] for no reference.
    pub fn statistics<S: AsRef<str>>(&self, hypothesis: &str, references: &[S]) -> Result<BleuStatistics> {
        at_least("references of a hypothesis", 1, references.len())?;
        let order = self.options.max_order;
        let hypothesis = self.tokens(hypothesis);
        let references: Vec<Vec<String>> = references.iter().map(|r| self.tokens(r.as_ref())).collect();
        let mut ids = HashMap::new();
        let hypothesis = number(&hypothesis, &mut ids);
        let references: Vec<Vec<u32>> = references.iter().map(|r| number(r, &mut ids)).collect();

        let mut limits: HashMap<&[u32], u64> = HashMap::new();
        for reference in &references {
            for (ngram, count) in ngrams(reference, order) {
                let limit = limits.entry(ngram).or_default();
                *limit = count.max(*limit);
            }
        }
        let mut found = BleuStatistics::empty(order);
        for (ngram, count) in ngrams(&hypothesis, order) {
            found.add_ngram(ngram.len(), count, limits.get(ngram).copied().unwrap_or(0));
        }
        let lengths = references.iter().map(Vec::len);
        found.hypothesis_length = hypothesis.len() as u64;
        found.reference_length = closest_length(hypothesis.len(), lengths) as u64;
        Ok(found)
    }

    /// The score of a corpus: counts are summed over all hypotheses before any division.
    ///
    /// # Errors
    /// [`Error::TooFew`] for no hypothesis or one without reference; [`Error::Lengths`] unless there is a list of
    /// references for each hypothesis.
    pub fn corpus<H, R, S>(&self, hypotheses: &[H], references: &[R]) -> Result<BleuScore>
    where
        H: AsRef<str>,
        R: AsRef<[S]>,
        S: AsRef<str>,
    {
        check_pairs(hypotheses.len(), references.len())?;
        let mut total = BleuStatistics::empty(self.options.max_order);
        for (hypothesis, references) in hypotheses.iter().zip(references) {
            total += &self.statistics(hypothesis.as_ref(), references.as_ref())?;
        }
        Ok(self.score(&total))
    }

    /// The score of one sentence. sacrebleu's `sentence_bleu` has [`BleuOptions::effective_order`] on.
    ///
    /// # Errors
    /// [`Error::TooFew`] for no reference.
    pub fn sentence<S: AsRef<str>>(&self, hypothesis: &str, references: &[S]) -> Result<BleuScore> {
        Ok(self.score(&self.statistics(hypothesis, references)?))
    }

    /// How a score was computed, in the form of sacrebleu's signatures; `references` as
    /// [`crate::reference_count`] has it, none for a varying number.
    ///
    /// ```
    /// use opt_metrics::bleu::Bleu;
    /// let signature = Bleu::default().signature(Some(1));
    /// assert!(signature.starts_with("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:opt-metrics"));
    /// ```
    pub fn signature(&self, references: Option<usize>) -> String {
        let o = &self.options;
        let smooth = match o.smoothing {
            Smoothing::None => "none".to_owned(),
            Smoothing::Exp => "exp".to_owned(),
            Smoothing::Floor(value) => format!("floor[{value:.2}]"),
            Smoothing::AddK(value) => format!("add-k[{value:.2}]"),
        };
        let case = if o.lowercase { "lc" } else { "mixed" };
        let effective = if o.effective_order { "yes" } else { "no" };
        signature_of(
            references,
            &format!("case:{case}|eff:{effective}|tok:{}|smooth:{smooth}", o.tokenizer.name()),
        )
    }
}

/// Tokens as numbers, the same for the same token.
fn number<'a>(tokens: &'a [String], ids: &mut HashMap<&'a str, u32>) -> Vec<u32> {
    tokens
        .iter()
        .map(|token| {
            let next = ids.len() as u32;
            *ids.entry(token).or_insert(next)
        })
        .collect()
}

/// How often each n-gram up to `order` occurs.
fn ngrams(tokens: &[u32], order: usize) -> HashMap<&[u32], u64> {
    let mut counts = HashMap::new();
    for n in 1..=order.min(tokens.len()) {
        for ngram in tokens.windows(n) {
            *counts.entry(ngram).or_insert(0) += 1;
        }
    }
    counts
}

/// The length closest to `length`, of two the shorter.
fn closest_length(length: usize, references: impl Iterator<Item = usize>) -> usize {
    references.min_by_key(|&r| (r.abs_diff(length), r)).unwrap_or(0)
}
