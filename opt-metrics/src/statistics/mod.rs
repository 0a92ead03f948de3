//! Aggregates of scores, their standard errors, and comparisons of two systems.
//!
//! Sums run from left to right, as Python's `sum` adds floats up to version 3.11; from 3.12 on it compensates rounding,
//! so digits may differ there in the last place. Where the harness leaves the sum to NumPy it is pairwise, as NumPy's.

mod bootstrap;
mod groups;
mod paired;
mod rules;
mod special;

pub use bootstrap::{bootstrap_chunk, bootstrap_chunks, bootstrap_stderr};
pub use groups::{
    aggregate_subtask_metrics, combined_sample_stderr, pooled_sample_stderr, unweighted_mean_stderr,
};
pub use paired::{Mcnemar, PairedBootstrap, PairedDifference, mcnemar, paired_bootstrap, paired_difference};
pub use rules::{Aggregation, StderrRule, stderr_rule};

use crate::{Result, error::at_least};

/// The sum as Python makes it.
pub(crate) fn sum(values: impl IntoIterator<Item = f64>) -> f64 {
    values.into_iter().fold(0.0, |a, b| a + b)
}

/// The sum as NumPy makes it of one row: of blocks of at most 128, each by eight running sums.
pub(crate) fn pairwise_sum(values: &[f64]) -> f64 {
    if values.len() < 8 {
        return sum(values.iter().copied());
    }
    if values.len() > 128 {
        let half = values.len() / 2;
        let (low, high) = values.split_at(half - half % 8);
        return pairwise_sum(low) + pairwise_sum(high);
    }
    let (blocks, rest) = values.as_chunks::<8>();
    let mut r = [0.0; 8];
    for block in blocks {
        for (total, value) in r.iter_mut().zip(block) {
            *total += value;
        }
    }
    let [a, b, c, d, e, f, g, h] = r;
    rest.iter().fold(((a + b) + (c + d)) + ((e + f) + (g + h)), |total, value| total + value)
}

/// The arithmetic mean.
///
/// # Errors
/// [`crate::Error::TooFew`] for no values.
pub fn mean(values: &[f64]) -> Result<f64> {
    at_least("values of a mean", 1, values.len())?;
    Ok(sum(values.iter().copied()) / values.len() as f64)
}

/// The mean of the values that are numbers; NaN if there is none. As `numpy.nanmean`.
pub fn nan_mean(values: &[f64]) -> f64 {
    let numbers = values.iter().filter(|v| !v.is_nan()).count();
    let zeroed: Vec<f64> = values.iter().map(|v| if v.is_nan() { 0.0 } else { *v }).collect();
    pairwise_sum(&zeroed) / numbers as f64
}

/// The upper median, `sorted(values)[len(values) // 2]`: for an even count the larger of the two in the middle, as the
/// harness takes it. NaN sorts last.
///
/// # Errors
/// [`crate::Error::TooFew`] for no values.
pub fn median(values: &[f64]) -> Result<f64> {
    at_least("values of a median", 1, values.len())?;
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    Ok(sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN))
}

/// The standard deviation of a sample, with n - 1 below.
///
/// # Errors
/// [`crate::Error::TooFew`] for less than two values.
pub fn sample_stddev(values: &[f64]) -> Result<f64> {
    at_least("values of a standard deviation", 2, values.len())?;
    let mu = mean(values)?;
    Ok((sum(values.iter().map(|x| (x - mu) * (x - mu))) / (values.len() as f64 - 1.0)).sqrt())
}

/// The standard error of the mean, the sample's standard deviation over √n.
///
/// ```
/// use opt_metrics::statistics::mean_stderr;
/// let right = [1.0, 0.0, 1.0, 1.0];
/// assert_eq!(mean_stderr(&right)?, 0.25);
/// # Ok::<(), opt_metrics::Error>(())
/// ```
///
/// # Errors
/// [`crate::Error::TooFew`] for less than two values.
pub fn mean_stderr(values: &[f64]) -> Result<f64> {
    Ok(sample_stddev(values)? / (values.len() as f64).sqrt())
}

/// e to the negative mean of log-likelihoods in nats.
///
/// # Errors
/// [`crate::Error::TooFew`] for no values.
pub fn perplexity(log_likelihoods: &[f64]) -> Result<f64> {
    Ok((-mean(log_likelihoods)?).exp())
}

/// The sum of values over the sum of weights. 0 / 0 is NaN.
///
/// # Errors
/// [`crate::Error::TooFew`] for no pairs.
pub fn weighted_mean(pairs: &[(f64, f64)]) -> Result<f64> {
    at_least("values of a weighted mean", 1, pairs.len())?;
    Ok(sum(pairs.iter().map(|p| p.0)) / sum(pairs.iter().map(|p| p.1)))
}

/// Perplexity per word or byte: e to the negative sum of log-likelihoods over the sum of lengths.
///
/// ```
/// use opt_metrics::statistics::weighted_perplexity;
/// // Two documents of 4 and 6 words with log-likelihoods in nats.
/// let found = weighted_perplexity(&[(-8.0, 4.0), (-12.0, 6.0)])?;
/// assert!((found - 2.0_f64.exp()).abs() < 1e-12);
/// # Ok::<(), opt_metrics::Error>(())
/// ```
///
/// # Errors
/// [`crate::Error::TooFew`] for no pairs.
pub fn weighted_perplexity(pairs: &[(f64, f64)]) -> Result<f64> {
    Ok((-weighted_mean(pairs)?).exp())
}

/// Bits per byte: the negative sum of log-likelihoods, in bits, over the sum of bytes.
///
/// # Errors
/// [`crate::Error::TooFew`] for no pairs.
pub fn bits_per_byte(pairs: &[(f64, f64)]) -> Result<f64> {
    Ok(-weighted_mean(pairs)? / std::f64::consts::LN_2)
}
