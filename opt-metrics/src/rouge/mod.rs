//! ROUGE (Lin 2004), equal to the Python package rouge_score.

mod aggregate;
mod lcs;
mod porter;

pub use aggregate::{RougeInterval, bootstrap_interval, mean_scores};
pub use porter::stem;

use crate::{Error, Result, error::at_least};
use std::{collections::HashMap, fmt, hash::Hash};

/// What is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum RougeKind {
    /// N-grams of this many words, 1 to 9: rouge1, rouge2 …
    N(u8),
    /// The longest common subsequence of whole texts: rougeL.
    L,
    /// The union of longest common subsequences of lines: rougeLsum.
    Lsum,
}

impl RougeKind {
    /// The kind of one of rouge_score's names.
    ///
    /// ```
    /// use opt_metrics::rouge::RougeKind;
    /// assert_eq!(RougeKind::from_name("rouge2"), Some(RougeKind::N(2)));
    /// assert_eq!(RougeKind::from_name("rouge0"), None);
    /// ```
    pub fn from_name(name: &str) -> Option<Self> {
        match name.strip_prefix("rouge")?.as_bytes() {
            b"L" => Some(Self::L),
            b"Lsum" => Some(Self::Lsum),
            [digit @ b'1'..=b'9'] => Some(Self::N(digit - b'0')),
            _ => None,
        }
    }
}

impl fmt::Display for RougeKind {
    /// rouge_score's name.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::N(n) => write!(f, "rouge{n}"),
            Self::L => f.write_str("rougeL"),
            Self::Lsum => f.write_str("rougeLsum"),
        }
    }
}

/// One score, each part from 0 to 1.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
#[non_exhaustive]
pub struct RougeScore {
    /// Part of the prediction that the target has.
    pub precision: f64,
    /// Part of the target that the prediction has.
    pub recall: f64,
    /// Harmonic mean of both.
    pub f_measure: f64,
}

impl RougeScore {
    fn new(hits: usize, predicted: usize, wanted: usize) -> Self {
        let precision = hits as f64 / predicted.max(1) as f64;
        let recall = hits as f64 / wanted.max(1) as f64;
        let sum = precision + recall;
        let f_measure = if sum > 0.0 { 2.0 * precision * recall / sum } else { 0.0 };
        Self { precision, recall, f_measure }
    }
}

/// Computes ROUGE of kinds chosen once.
///
/// Tokens are runs of ASCII letters and digits after lowercasing; all else separates, so texts of other scripts have
/// none and score 0, as in rouge_score.
///
/// ```
/// use opt_metrics::rouge::{Rouge, RougeKind};
/// let rouge = Rouge::new(&[RougeKind::N(1), RougeKind::L], true)?;
/// let found = rouge.score("The quick brown fox jumps", "The quick fox jumped");
/// assert_eq!((found[0].precision, found[0].recall), (1.0, 0.8));
/// # Ok::<(), opt_metrics::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Rouge {
    kinds: Vec<RougeKind>,
    stemmer: bool,
}

impl Rouge {
    /// Scores of `kinds`, in their order. With `stemmer`, words of more than three letters are compared by what
    /// [`stem`] leaves of them.
    ///
    /// # Errors
    /// [`Error::TooFew`] for no kind; [`Error::Option`] for n-grams of 0 or more than 9 words.
    pub fn new(kinds: &[RougeKind], stemmer: bool) -> Result<Self> {
        at_least("kinds of ROUGE", 1, kinds.len())?;
        for kind in kinds {
            if let RougeKind::N(n) = kind
                && !(1..=9).contains(n)
            {
                return Err(Error::option("n-gram of ROUGE", n, "1 to 9"));
            }
        }
        Ok(Self { kinds: kinds.to_vec(), stemmer })
    }

    /// The kinds, in the order of scores.
    pub fn kinds(&self) -> &[RougeKind] {
        &self.kinds
    }

    /// The tokens of a text, as they are compared.
    pub fn tokens(&self, text: &str) -> Vec<String> {
        text.to_lowercase()
            .split(|c: char| !c.is_ascii_lowercase() && !c.is_ascii_digit())
            .map(|word| if self.stemmer && word.len() > 3 { stem(word) } else { word.to_owned() })
            .filter(|word| !word.is_empty())
            .collect()
    }

    /// The scores of a prediction, one for each kind. A text without tokens scores 0.
    pub fn score(&self, target: &str, prediction: &str) -> Vec<RougeScore> {
        let (wanted, predicted) = (self.tokens(target), self.tokens(prediction));
        self.kinds
            .iter()
            .map(|kind| match *kind {
                RougeKind::N(n) => of_ngrams(&wanted, &predicted, usize::from(n)),
                RougeKind::L => {
                    RougeScore::new(lcs::length(&wanted, &predicted), predicted.len(), wanted.len())
                }
                RougeKind::Lsum => self.of_lines(target, prediction),
            })
            .collect()
    }

    /// The scores of a prediction of which several targets are right: for each kind that of the target with the
    /// highest F-measure, the first of equals.
    ///
    /// # Errors
    /// [`Error::TooFew`] for no target.
    pub fn score_multi<S: AsRef<str>>(&self, targets: &[S], prediction: &str) -> Result<Vec<RougeScore>> {
        let mut scored = targets.iter().map(|target| self.score(target.as_ref(), prediction));
        let mut best =
            scored.next().ok_or(Error::TooFew { what: "targets of ROUGE", needed: 1, found: 0 })?;
        for scores in scored {
            for (best, score) in best.iter_mut().zip(scores) {
                if score.f_measure > best.f_measure {
                    *best = score;
                }
            }
        }
        Ok(best)
    }

    fn of_lines(&self, target: &str, prediction: &str) -> RougeScore {
        let lines = |text: &str| -> Vec<Vec<String>> {
            text.split('\n').filter(|line| !line.is_empty()).map(|line| self.tokens(line)).collect()
        };
        let (wanted, predicted) = (lines(target), lines(prediction));
        let (mut left_wanted, mut left_predicted) = (counts(&wanted), counts(&predicted));
        let mut hits = 0;
        for line in &wanted {
            let mut union = vec![false; line.len()];
            for other in &predicted {
                lcs::mark(line, other, &mut union);
            }
            // A word is a hit no more often than either side has it.
            for (word, _) in line.iter().zip(union).filter(|(_, marked)| *marked) {
                if let (Some(a @ 1..), Some(b @ 1..)) =
                    (left_wanted.get_mut(word), left_predicted.get_mut(word))
                {
                    hits += 1;
                    *a -= 1;
                    *b -= 1;
                }
            }
        }
        let words = |lines: &[Vec<String>]| lines.iter().map(Vec::len).sum();
        RougeScore::new(hits, words(&predicted), words(&wanted))
    }
}

fn counts(lines: &[Vec<String>]) -> HashMap<&String, usize> {
    count(lines.iter().flatten())
}

fn count<T: Hash + Eq>(items: impl Iterator<Item = T>) -> HashMap<T, usize> {
    let mut counts = HashMap::new();
    for item in items {
        *counts.entry(item).or_insert(0) += 1;
    }
    counts
}

fn of_ngrams(wanted: &[String], predicted: &[String], n: usize) -> RougeScore {
    let (targets, found) = (count(wanted.windows(n)), count(predicted.windows(n)));
    let hits = targets.iter().filter_map(|(ngram, count)| Some(*found.get(ngram)?.min(count))).sum();
    let all = |tokens: &[String]| (tokens.len() + 1).saturating_sub(n);
    RougeScore::new(hits, all(predicted), all(wanted))
}
