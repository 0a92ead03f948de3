/// How lm-evaluation-harness makes one number of the values of a metric over all items; the names are its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Aggregation {
    /// [`super::mean`]
    Mean,
    /// [`super::nan_mean`]
    NanMean,
    /// [`super::median`]
    Median,
    /// [`super::perplexity`]
    Perplexity,
    /// [`super::weighted_perplexity`]
    WeightedPerplexity,
    /// [`super::bits_per_byte`]
    BitsPerByte,
    /// [`crate::labels::f1_binary`]
    F1,
    /// [`crate::labels::matthews_corrcoef`]
    MatthewsCorrcoef,
    /// [`crate::bleu::Bleu`] as it comes.
    Bleu,
    /// [`crate::chrf::Chrf`] as it comes.
    Chrf,
    /// [`crate::chrf::Chrf`] with words up to pairs.
    ChrfPlusPlus,
    /// [`crate::ter::Ter`] as it comes.
    Ter,
    /// [`crate::calibration::brier_score`]
    BrierScore,
    /// [`crate::labels::all_right`] and its mean.
    AccAll,
    /// No number at all.
    Bypass,
}

const NAMES: [(&str, Aggregation); 15] = [
    ("mean", Aggregation::Mean),
    ("nanmean", Aggregation::NanMean),
    ("median", Aggregation::Median),
    ("perplexity", Aggregation::Perplexity),
    ("weighted_perplexity", Aggregation::WeightedPerplexity),
    ("bits_per_byte", Aggregation::BitsPerByte),
    ("f1", Aggregation::F1),
    ("matthews_corrcoef", Aggregation::MatthewsCorrcoef),
    ("bleu", Aggregation::Bleu),
    ("chrf", Aggregation::Chrf),
    ("chrf++", Aggregation::ChrfPlusPlus),
    ("ter", Aggregation::Ter),
    ("brier_score", Aggregation::BrierScore),
    ("acc_all", Aggregation::AccAll),
    ("bypass", Aggregation::Bypass),
];

impl Aggregation {
    /// The aggregation of a name in a task's file.
    pub fn from_name(name: &str) -> Option<Self> {
        NAMES.iter().find(|(n, _)| *n == name).map(|(_, aggregation)| *aggregation)
    }

    /// Its name in a task's file.
    pub fn name(self) -> &'static str {
        NAMES.iter().find(|(_, a)| *a == self).map_or("", |(name, _)| name)
    }
}

/// How the standard error of an aggregate is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum StderrRule {
    /// Not at all: "N/A" in the harness' table.
    None,
    /// [`super::mean_stderr`] of the values.
    Mean,
    /// [`super::mean_stderr`] of one value for each question, 1 where all its answers are right.
    AccAll,
    /// [`super::bootstrap_stderr`] of the aggregate.
    Bootstrap {
        /// Resamples.
        iterations: usize,
    },
}

/// What lm-evaluation-harness 0.4.13 does for the standard error of `metric`, a name in a task's file, over `items`
/// values: nothing for less than two items, for no iterations, and for aggregates it knows no error of; the bootstrap
/// for the ones it lists, at most 100 resamples where the metric's own name is that of a metric of translations.
///
/// ```
/// use opt_metrics::statistics::{Aggregation, StderrRule, stderr_rule};
/// let rule = stderr_rule("bleu", Aggregation::Bleu, 2000, 100_000);
/// assert_eq!(rule, StderrRule::Bootstrap { iterations: 100 });
/// assert_eq!(stderr_rule("acc", Aggregation::Mean, 2000, 100_000), StderrRule::Mean);
/// ```
pub fn stderr_rule(metric: &str, aggregation: Aggregation, items: usize, iterations: usize) -> StderrRule {
    if items < 2 || iterations == 0 {
        return StderrRule::None;
    }
    let slow = matches!(metric, "bleu" | "chrf" | "chrf++" | "ter");
    let iterations = if slow { iterations.min(100) } else { iterations };
    match aggregation {
        Aggregation::Mean => StderrRule::Mean,
        Aggregation::AccAll => StderrRule::AccAll,
        Aggregation::Median
        | Aggregation::NanMean
        | Aggregation::MatthewsCorrcoef
        | Aggregation::F1
        | Aggregation::Perplexity
        | Aggregation::Bleu
        | Aggregation::Chrf
        | Aggregation::ChrfPlusPlus
        | Aggregation::Ter => StderrRule::Bootstrap { iterations },
        Aggregation::WeightedPerplexity
        | Aggregation::BitsPerByte
        | Aggregation::BrierScore
        | Aggregation::Bypass => StderrRule::None,
    }
}
