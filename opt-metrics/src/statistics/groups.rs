//! Scores of groups of tasks.

use super::sum;
use crate::{
    Error, Result,
    error::{at_least, same_length},
};

/// The mean of tasks' scores, weighted by their numbers of items or each alike.
///
/// ```
/// use opt_metrics::statistics::aggregate_subtask_metrics;
/// assert_eq!(aggregate_subtask_metrics(&[0.5, 1.0], &[30, 10], true)?, 0.625);
/// assert_eq!(aggregate_subtask_metrics(&[0.5, 1.0], &[30, 10], false)?, 0.75);
/// # Ok::<(), opt_metrics::Error>(())
/// ```
///
/// # Errors
/// [`Error::Lengths`] unless there is a size for each score; [`Error::TooFew`] for no items at all.
pub fn aggregate_subtask_metrics(metrics: &[f64], sizes: &[usize], weight_by_size: bool) -> Result<f64> {
    same_length("scores and sizes of tasks", metrics.len(), sizes.len())?;
    let weight = |size: &usize| if weight_by_size { *size as f64 } else { 1.0 };
    let total = sum(sizes.iter().map(weight));
    at_least("items of a group", 1, usize::from(total > 0.0))?;
    Ok(sum(metrics.iter().zip(sizes).map(|(metric, size)| metric * weight(size))) / total)
}

/// The standard error of a mean of tasks weighted by size, from the pooled variance Σ (nᵢ - 1) sᵢ² / Σ (nᵢ - 1) with
/// sᵢ² = nᵢ seᵢ², over the square root of all items.
///
/// # Errors
/// [`Error::Lengths`] unless there is a size for each error; [`Error::TooFew`] unless some task has two items.
pub fn pooled_sample_stderr(stderrs: &[f64], sizes: &[usize]) -> Result<f64> {
    same_length("standard errors and sizes of tasks", stderrs.len(), sizes.len())?;
    let items = sum(sizes.iter().map(|&n| n as f64));
    let degrees = items - sizes.len() as f64;
    at_least("items of a group beyond one for each task", 1, degrees.max(0.0) as usize)?;
    let variance = sum(stderrs.iter().zip(sizes).map(|(se, &n)| {
        let n = n as f64;
        (n - 1.0) * (se * se) * n
    })) / degrees;
    Ok((variance / items).sqrt())
}

/// The standard error of a plain mean of independent tasks, √(Σ seᵢ²) / k.
///
/// # Errors
/// [`Error::TooFew`] for no tasks.
pub fn unweighted_mean_stderr(stderrs: &[f64]) -> Result<f64> {
    at_least("standard errors of a group", 1, stderrs.len())?;
    Ok(sum(stderrs.iter().map(|se| se * se)).sqrt() / stderrs.len() as f64)
}

/// The harness' other error of a group, which it keeps and no longer uses: variances combined task by task with a term
/// for the distance of the means. It is here for figures made by older versions and, like the harness', leaves the
/// first task's size in place of the running one.
///
/// # Errors
/// [`Error::Lengths`] unless there is a size and a score for each error; [`Error::TooFew`] for no tasks.
pub fn combined_sample_stderr(stderrs: &[f64], sizes: &[usize], metrics: &[f64]) -> Result<f64> {
    same_length("standard errors and sizes of tasks", stderrs.len(), sizes.len())?;
    same_length("standard errors and scores of tasks", stderrs.len(), metrics.len())?;
    let mut tasks = stderrs.iter().zip(sizes).zip(metrics).map(|((&se, &n), &score)| (se, n as f64, score));
    let (first, current, mut score) =
        tasks.next().ok_or(Error::TooFew { what: "standard errors of a group", needed: 1, found: 0 })?;
    let mut variance = first * first;
    for (se, n, metric) in tasks {
        score = (score * current + metric * n) / (current + n);
        let degrees = current + n - 1.0;
        variance = ((current - 1.0) * variance + (n - 1.0) * (se * se)) / degrees
            + current * n / ((current + n) * degrees) * ((score - metric) * (score - metric));
    }
    Ok(variance.sqrt())
}
