use super::sample_stddev;
use crate::{Error, Result, error::at_least, random::PythonRandom};

/// Resamples of one seed.
const CHUNK: usize = 1000;

/// How many chunks a bootstrap of `iterations` has, and how many resamples each: thousands, and what is left is
/// dropped; one chunk if there are fewer than a thousand.
///
/// # Errors
/// [`Error::Option`] for no iterations.
pub fn bootstrap_chunks(iterations: usize) -> Result<(usize, usize)> {
    if iterations == 0 {
        return Err(Error::option("iterations of a bootstrap", 0, "at least 1"));
    }
    let size = iterations.min(CHUNK);
    Ok((iterations / size, size))
}

/// One chunk of [`bootstrap_stderr`]: `resamples` values of the statistic, by the generator of seed `chunk`. Chunks
/// depend on nothing but their number, so they can be made in any order, in parallel, and with a look at the clock
/// between them.
///
/// # Errors
/// [`Error::TooFew`] for no items, and what the statistic returns.
pub fn bootstrap_chunk(
    items: usize,
    chunk: usize,
    resamples: usize,
    mut statistic: impl FnMut(&[usize]) -> Result<f64>,
) -> Result<Vec<f64>> {
    at_least("items of a bootstrap", 1, items)?;
    let mut random = PythonRandom::new(chunk as u64);
    let mut drawn = Vec::new();
    (0..resamples)
        .map(|_| {
            random.choices_into(items, items, &mut drawn);
            statistic(&drawn)
        })
        .collect()
}

/// The bootstrap's standard error of any statistic of `items` items: the standard deviation of the statistic over
/// resamples drawn with replacement (Efron 1979), drawn as lm-evaluation-harness draws them, so that the digits are
/// the same. The statistic gets the indices of a resample.
///
/// ```
/// use opt_metrics::statistics::{bootstrap_stderr, median};
/// let values = [3.0, 1.0, 4.0, 1.0, 5.0];
/// let found = bootstrap_stderr(values.len(), 100, |drawn| {
///     median(&drawn.iter().map(|&i| values[i]).collect::<Vec<_>>())
/// })?;
/// assert!(found > 0.0 && found < 2.0);
/// # Ok::<(), opt_metrics::Error>(())
/// ```
///
/// # Errors
/// [`Error::Option`] for no iterations, [`Error::TooFew`] for one or for no items, and what the statistic returns.
pub fn bootstrap_stderr(
    items: usize,
    iterations: usize,
    mut statistic: impl FnMut(&[usize]) -> Result<f64>,
) -> Result<f64> {
    let (chunks, size) = bootstrap_chunks(iterations)?;
    let mut replicates = Vec::new();
    for chunk in 0..chunks {
        replicates.extend(bootstrap_chunk(items, chunk, size, &mut statistic)?);
    }
    sample_stddev(&replicates)
}
