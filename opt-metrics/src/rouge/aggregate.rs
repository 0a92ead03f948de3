use super::RougeScore;
use crate::{Error, Result, error::at_least, random::NumpyRandom, statistics::sum};

/// The mean of scores, part by part.
///
/// # Errors
/// [`Error::TooFew`] for no scores.
pub fn mean_scores(scores: &[RougeScore]) -> Result<RougeScore> {
    at_least("scores of a mean", 1, scores.len())?;
    let mean = |part: fn(&RougeScore) -> f64| sum(scores.iter().map(part)) / scores.len() as f64;
    Ok(RougeScore {
        precision: mean(|s| s.precision),
        recall: mean(|s| s.recall),
        f_measure: mean(|s| s.f_measure),
    })
}

/// Percentiles of a mean over resamples.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct RougeInterval {
    /// The lower end of the interval.
    pub low: RougeScore,
    /// The median. rouge_score's comments call it the mean, which it is close to.
    pub mid: RougeScore,
    /// The upper end of the interval.
    pub high: RougeScore,
}

/// The interval of the mean score as rouge_score's `BootstrapAggregator` finds it: percentiles of the means of
/// `resamples` (there 1000) resamples, at `confidence` (there 0.95) around the median.
///
/// rouge_score draws from NumPy's global generator and does not seed it. With a [`NumpyRandom`] of a seed, handed from
/// kind to kind in rouge_score's order, this gives what it gives after `numpy.random.seed` of that seed.
///
/// # Errors
/// [`Error::TooFew`] for no scores; [`Error::Option`] for a confidence outside of 0 to 1, or no resamples.
pub fn bootstrap_interval(
    scores: &[RougeScore],
    confidence: f64,
    resamples: usize,
    random: &mut NumpyRandom,
) -> Result<RougeInterval> {
    at_least("scores of a mean", 1, scores.len())?;
    if !(0.0..=1.0).contains(&confidence) {
        return Err(Error::option("confidence of an interval", confidence, "0 to 1"));
    }
    if resamples == 0 {
        return Err(Error::option("resamples of an interval", 0, "at least 1"));
    }
    let mut parts = [Vec::new(), Vec::new(), Vec::new()];
    let mut drawn = Vec::with_capacity(scores.len());
    for _ in 0..resamples {
        drawn.clear();
        drawn.extend(
            random.choice(scores.len(), scores.len())?.iter().filter_map(|&i| scores.get(i)).copied(),
        );
        let mean = mean_scores(&drawn)?;
        for (part, value) in parts.iter_mut().zip([mean.precision, mean.recall, mean.f_measure]) {
            part.push(value);
        }
    }
    for part in &mut parts {
        part.sort_by(f64::total_cmp);
    }
    let at = |q: f64| {
        let [precision, recall, f_measure] = parts.each_ref().map(|part| percentile(part, q));
        RougeScore { precision, recall, f_measure }
    };
    let outside = (1.0 - confidence) / 2.0;
    Ok(RougeInterval { low: at(outside), mid: at(0.5), high: at(1.0 - outside) })
}

/// NumPy's percentile with linear interpolation, of sorted values.
fn percentile(sorted: &[f64], q: f64) -> f64 {
    let place = q * (sorted.len() as f64 - 1.0);
    let (below, t) = (place.floor(), place.fract());
    let value = |i: f64| sorted.get(i as usize).copied().unwrap_or(f64::NAN);
    let low = value(below);
    if t == 0.0 { low } else { low + (value(below + 1.0) - low) * t }
}
