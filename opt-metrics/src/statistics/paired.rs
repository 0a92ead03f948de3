//! Comparisons of two systems on the same items.

use super::{mean, sample_stddev, special};
use crate::{
    Error, Result,
    error::{at_least, same_length},
    random::PythonRandom,
    statistics::sum,
};

/// McNemar's exact test of two systems that are right or wrong on the same items.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Mcnemar {
    /// Items that only the first has right.
    pub only_first: u64,
    /// Items that only the second has right.
    pub only_second: u64,
    /// Two-sided p-value: how probable a split at least as uneven is if both are right equally often.
    pub p_value: f64,
}

/// McNemar's test (McNemar 1947) in its exact form: of the items on which the systems differ, those that the first has
/// right are binomial with chance 1/2. The p-value is twice the smaller tail, at most 1, as
/// `scipy.stats.binomtest(b, b + c, 0.5)`; it is 1 where the systems nowhere differ.
///
/// ```
/// use opt_metrics::statistics::mcnemar;
/// let first = [true, true, true, true, true, false];
/// let second = [false, false, false, false, false, false];
/// let found = mcnemar(&first, &second)?;
/// assert_eq!((found.only_first, found.only_second, found.p_value), (5, 0, 0.0625));
/// # Ok::<(), opt_metrics::Error>(())
/// ```
///
/// # Errors
/// [`Error::Lengths`] unless both have as many items.
pub fn mcnemar(first: &[bool], second: &[bool]) -> Result<Mcnemar> {
    same_length("items of the first and second system", first.len(), second.len())?;
    let count = |of: (bool, bool)| first.iter().zip(second).filter(|(a, b)| (**a, **b) == of).count() as u64;
    let (only_first, only_second) = (count((true, false)), count((false, true)));
    let tail = special::binomial_half_at_most(only_first.min(only_second), only_first + only_second);
    // At equal halves the tails overlap in the middle.
    Ok(Mcnemar { only_first, only_second, p_value: (2.0 * tail).min(1.0) })
}

/// The mean difference of two systems on the same items, first less second.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct PairedDifference {
    /// Items.
    pub items: usize,
    /// Mean difference.
    pub mean: f64,
    /// Its standard error, the standard deviation of the differences over √n.
    pub stderr: f64,
    /// Mean over standard error.
    pub statistic: f64,
    /// Two-sided p-value by Student's distribution with n - 1 degrees of freedom, as `scipy.stats.ttest_rel`.
    pub p_student: f64,
    /// Two-sided p-value by the normal distribution.
    pub p_normal: f64,
}

/// The paired test of means (Student 1908; for evaluations of language models Miller, "Adding Error Bars to Evals",
/// 2024, section 4.2). Differences that are all alike have no standard error: the statistic is then 0 with p = 1 where
/// they are 0, else infinite with p = 0.
///
/// ```
/// use opt_metrics::statistics::paired_difference;
/// let found = paired_difference(&[1.0, 2.0, 4.0], &[0.0, 1.0, 1.0])?;
/// assert!((found.mean - 5.0 / 3.0).abs() < 1e-12 && (found.statistic - 2.5).abs() < 1e-12);
/// # Ok::<(), opt_metrics::Error>(())
/// ```
///
/// # Errors
/// [`Error::Lengths`] unless both have as many items, [`Error::TooFew`] for less than two.
pub fn paired_difference(first: &[f64], second: &[f64]) -> Result<PairedDifference> {
    same_length("items of the first and second system", first.len(), second.len())?;
    at_least("items of a paired test", 2, first.len())?;
    let differences: Vec<f64> = first.iter().zip(second).map(|(a, b)| a - b).collect();
    let items = differences.len();
    let mean = mean(&differences)?;
    let stderr = sample_stddev(&differences)? / (items as f64).sqrt();
    let statistic = if mean == 0.0 && stderr == 0.0 { 0.0 } else { mean / stderr };
    Ok(PairedDifference {
        items,
        mean,
        stderr,
        statistic,
        p_student: special::student_two_sided(statistic, items as f64 - 1.0),
        p_normal: special::normal_two_sided(statistic),
    })
}

/// What resampling the same items for both systems says about a difference of theirs.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct PairedBootstrap {
    /// The difference on all items.
    pub difference: f64,
    /// Mean over the resamples.
    pub mean: f64,
    /// Standard deviation over the resamples: the difference's standard error.
    pub stderr: f64,
    /// The middle 95 % of the resamples, the 1/40 at either end cut off.
    pub interval: (f64, f64),
    /// Two-sided p-value.
    pub p_value: f64,
}

/// The paired bootstrap (Koehn 2004) of any difference of two systems over `items` items, for instance of two corpora's
/// BLEU: `difference` gets the indices of a resample, drawn by `random.Random(seed).choices`, and gives the first
/// system's figure less the second's.
///
/// The p-value is sacrebleu's (`--paired-bs`): with D the differences' sizes |dᵢ| over the resamples and d that on all
/// items, (1 + #{Dᵢ - mean(D) > |d|}) / (1 + resamples).
///
/// ```
/// use opt_metrics::statistics::{mean, paired_bootstrap};
/// let (first, second) = ([1.0, 1.0, 0.0, 1.0], [0.0, 1.0, 0.0, 1.0]);
/// let of = |values: &[f64], drawn: &[usize]| mean(&drawn.iter().map(|&i| values[i]).collect::<Vec<_>>());
/// let found = paired_bootstrap(4, 200, 1, |drawn| Ok(of(&first, drawn)? - of(&second, drawn)?))?;
/// assert_eq!(found.difference, 0.25);
/// # Ok::<(), opt_metrics::Error>(())
/// ```
///
/// # Errors
/// [`Error::TooFew`] for no items, [`Error::Option`] for less than two resamples, and what `difference` returns.
pub fn paired_bootstrap(
    items: usize,
    resamples: usize,
    seed: u64,
    mut difference: impl FnMut(&[usize]) -> Result<f64>,
) -> Result<PairedBootstrap> {
    at_least("items of a paired test", 1, items)?;
    if resamples < 2 {
        return Err(Error::option("resamples of a paired bootstrap", resamples, "at least 2"));
    }
    let all: Vec<usize> = (0..items).collect();
    let observed = difference(&all)?;
    let mut random = PythonRandom::new(seed);
    let mut drawn = all;
    let mut found = Vec::new();
    for _ in 0..resamples {
        random.choices_into(items, items, &mut drawn);
        found.push(difference(&drawn)?);
    }
    let mean_size = sum(found.iter().map(|d| d.abs())) / resamples as f64;
    let beyond = found.iter().filter(|d| d.abs() - mean_size > observed.abs()).count();
    let (mean, stderr) = (mean(&found)?, sample_stddev(&found)?);
    found.sort_by(f64::total_cmp);
    let cut = resamples / 40;
    let at = |i: usize| found.get(i).copied().unwrap_or(f64::NAN);
    Ok(PairedBootstrap {
        difference: observed,
        mean,
        stderr,
        interval: (at(cut), at(resamples - cut - 1)),
        p_value: (beyond as f64 + 1.0) / (resamples as f64 + 1.0),
    })
}
