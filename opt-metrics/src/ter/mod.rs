//! TER, the translation edit rate (Snover et al. 2006), equal to sacrebleu's.

mod distance;
mod shifts;
mod tokenize;

use crate::{
    Result,
    error::at_least,
    python::trim_end,
    references::{check_pairs, signature_of},
};
use std::{fmt, ops::AddAssign};

/// How TER is computed. The default is sacrebleu's: nothing but lowercasing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct TerOptions {
    /// Split off punctuation, resolve entities and join lines.
    pub normalized: bool,
    /// Remove punctuation.
    pub no_punct: bool,
    /// With either of the above, do it for CJK too, and split CJK into characters.
    pub asian_support: bool,
    /// Do not lowercase.
    pub case_sensitive: bool,
}

/// The counts that TER is made of; those of a corpus are the sums of its sentences'.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
#[non_exhaustive]
pub struct TerStatistics {
    /// Insertions, deletions, substitutions and shifts to the nearest reference.
    pub edits: u64,
    /// Mean words of the references.
    pub reference_length: f64,
}

impl AddAssign<&Self> for TerStatistics {
    fn add_assign(&mut self, other: &Self) {
        self.edits = self.edits.saturating_add(other.edits);
        self.reference_length += other.reference_length;
    }
}

/// A TER score. It prints as sacrebleu's.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct TerScore {
    /// Edits for each word of the reference in percent: 0 is best, and there is no upper end.
    pub score: f64,
    /// Edits.
    pub edits: u64,
    /// Mean words of the references.
    pub reference_length: f64,
}

impl fmt::Display for TerScore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TER = {:.2}", self.score)
    }
}

/// Computes TER.
///
/// ```
/// use opt_metrics::ter::Ter;
/// // One shift and one deletion over five words.
/// let found = Ter::default().corpus(&["sat there the old cat now"], &[["the old cat sat there"]])?;
/// assert_eq!((found.edits, found.score), (2, 40.0));
/// # Ok::<(), opt_metrics::Error>(())
/// ```
#[derive(Debug, Clone, Copy, Default)]
pub struct Ter {
    options: TerOptions,
}

impl Ter {
    /// TER with other options than the default.
    pub fn new(options: TerOptions) -> Self {
        Self { options }
    }

    /// The options.
    pub fn options(&self) -> &TerOptions {
        &self.options
    }

    /// The words of a text, as they are compared.
    pub fn tokens(&self, text: &str) -> Vec<String> {
        tokenize::tokenize(trim_end(text), &self.options)
    }

    /// Edits of one hypothesis to the nearest of its references.
    ///
    /// # Errors
    /// [`crate::Error::TooFew`] for no reference.
    pub fn statistics<S: AsRef<str>>(&self, hypothesis: &str, references: &[S]) -> Result<TerStatistics> {
        at_least("references of a hypothesis", 1, references.len())?;
        let words = self.tokens(hypothesis);
        let (mut edits, mut length) = (usize::MAX, 0);
        for reference in references {
            let reference = self.tokens(reference.as_ref());
            length += reference.len();
            edits = edits.min(shifts::edits(&words, &reference));
        }
        Ok(TerStatistics { edits: edits as u64, reference_length: length as f64 / references.len() as f64 })
    }

    /// The score of counts. Edits against references without words score 100.
    pub fn score(&self, statistics: &TerStatistics) -> TerScore {
        let &TerStatistics { edits, reference_length } = statistics;
        let rate = if reference_length > 0.0 {
            edits as f64 / reference_length
        } else if edits > 0 {
            1.0
        } else {
            0.0
        };
        TerScore { score: 100.0 * rate, edits, reference_length }
    }

    /// The score of a corpus: counts are summed over all hypotheses before any division.
    ///
    /// # Errors
    /// [`crate::Error::TooFew`] for no hypothesis or one without reference; [`crate::Error::Lengths`] unless there is a
    /// list of references for each hypothesis.
    pub fn corpus<H, R, S>(&self, hypotheses: &[H], references: &[R]) -> Result<TerScore>
    where
        H: AsRef<str>,
        R: AsRef<[S]>,
        S: AsRef<str>,
    {
        check_pairs(hypotheses.len(), references.len())?;
        let mut total = TerStatistics::default();
        for (hypothesis, references) in hypotheses.iter().zip(references) {
            total += &self.statistics(hypothesis.as_ref(), references.as_ref())?;
        }
        Ok(self.score(&total))
    }

    /// The score of one sentence.
    ///
    /// # Errors
    /// [`crate::Error::TooFew`] for no reference.
    pub fn sentence<S: AsRef<str>>(&self, hypothesis: &str, references: &[S]) -> Result<TerScore> {
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
                "case:{}|tok:tercom|norm:{}|punct:{}|asian:{}",
                if o.case_sensitive { "mixed" } else { "lc" },
                yes(o.normalized),
                yes(!o.no_punct),
                yes(o.asian_support)
            ),
        )
    }
}
