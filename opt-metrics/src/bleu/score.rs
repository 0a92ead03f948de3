use super::{Bleu, Smoothing};
use std::{fmt, ops::AddAssign};

/// The counts that BLEU is made of; those of a corpus are the sums of its sentences'.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct BleuStatistics {
    /// Tokens of the hypotheses.
    pub hypothesis_length: u64,
    /// Tokens of the references closest to them in length.
    pub reference_length: u64,
    /// Matches of each order.
    pub counts: Vec<u64>,
    /// N-grams of the hypotheses, of each order.
    pub totals: Vec<u64>,
}

impl BleuStatistics {
    pub(super) fn empty(order: usize) -> Self {
        Self { counts: vec![0; order], totals: vec![0; order], ..Self::default() }
    }

    /// Counts an n-gram of length `n` that a hypothesis has `count` times and its references at most `limit` times.
    pub(super) fn add_ngram(&mut self, n: usize, count: u64, limit: u64) {
        if let (Some(total), Some(matches)) = (self.totals.get_mut(n - 1), self.counts.get_mut(n - 1)) {
            *total += count;
            *matches += count.min(limit);
        }
    }
}

impl AddAssign<&Self> for BleuStatistics {
    /// Adds counts of other texts. Orders that only one of both has are those of the longer.
    fn add_assign(&mut self, other: &Self) {
        self.hypothesis_length = self.hypothesis_length.saturating_add(other.hypothesis_length);
        self.reference_length = self.reference_length.saturating_add(other.reference_length);
        for (to, from) in [(&mut self.counts, &other.counts), (&mut self.totals, &other.totals)] {
            to.resize(to.len().max(from.len()), 0);
            for (a, b) in to.iter_mut().zip(from) {
                *a = a.saturating_add(*b);
            }
        }
    }
}

/// A BLEU score and what it is made of. It prints as sacrebleu's.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct BleuScore {
    /// From 0 to 100.
    pub score: f64,
    /// Matches of each order, after [`Smoothing::AddK`].
    pub counts: Vec<f64>,
    /// N-grams of each order, after [`Smoothing::AddK`].
    pub totals: Vec<f64>,
    /// Precisions of each order in percent, after smoothing.
    pub precisions: Vec<f64>,
    /// The brevity penalty, 1 for texts no shorter than their references.
    pub brevity_penalty: f64,
    /// Tokens of the hypotheses.
    pub hypothesis_length: u64,
    /// Tokens of the references closest to them in length.
    pub reference_length: u64,
}

impl fmt::Display for BleuScore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let precisions: Vec<String> = self.precisions.iter().map(|p| format!("{p:.1}")).collect();
        let (hypothesis, reference) = (self.hypothesis_length, self.reference_length);
        let ratio = if reference == 0 { 0.0 } else { hypothesis as f64 / reference as f64 };
        write!(
            f,
            "BLEU = {:.2} {} (BP = {:.3} ratio = {ratio:.3} hyp_len = {hypothesis} ref_len = {reference})",
            self.score,
            precisions.join("/"),
            self.brevity_penalty
        )
    }
}

/// The logarithm, with a floor for 0.
fn floored_log(value: f64) -> f64 {
    if value == 0.0 { -9_999_999_999.0 } else { value.ln() }
}

impl Bleu {
    /// The score of counts: the geometric mean of the precisions times the brevity penalty, in percent.
    pub fn score(&self, statistics: &BleuStatistics) -> BleuScore {
        let (hypothesis, reference) = (statistics.hypothesis_length, statistics.reference_length);
        let mut brevity_penalty = 1.0;
        if hypothesis < reference {
            brevity_penalty =
                if hypothesis > 0 { (1.0 - reference as f64 / hypothesis as f64).exp() } else { 0.0 };
        }
        let as_floats = |counts: &[u64]| counts.iter().map(|&c| c as f64).collect::<Vec<_>>();
        let mut score = BleuScore {
            score: 0.0,
            counts: as_floats(&statistics.counts),
            totals: as_floats(&statistics.totals),
            precisions: vec![0.0; statistics.counts.len()],
            brevity_penalty,
            hypothesis_length: hypothesis,
            reference_length: reference,
        };
        if statistics.counts.iter().all(|&c| c == 0) {
            return score;
        }
        let mut halving = 1.0;
        let mut orders = score.precisions.len();
        let rows = score.counts.iter_mut().zip(&mut score.totals).zip(&mut score.precisions);
        for (n, ((count, total), precision)) in (1..).zip(rows) {
            if let Smoothing::AddK(k) = self.options.smoothing
                && n > 1
            {
                *count += k;
                *total += k;
            }
            if *total == 0.0 {
                break;
            }
            if self.options.effective_order {
                orders = n;
            }
            if *count != 0.0 {
                *precision = 100.0 * *count / *total;
                continue;
            }
            match self.options.smoothing {
                Smoothing::Exp => {
                    halving *= 2.0;
                    *precision = 100.0 / (halving * *total);
                }
                Smoothing::Floor(value) => *precision = 100.0 * value / *total,
                Smoothing::None | Smoothing::AddK(_) => {}
            }
        }
        let logs = score.precisions.iter().take(orders).fold(0.0, |sum, &p| sum + floored_log(p));
        score.score = brevity_penalty * (logs / orders as f64).exp();
        score
    }
}
