//! How far stated probabilities can be trusted.

use crate::{
    Error, Result,
    error::{at_least, same_length},
    statistics::pairwise_sum,
};

/// Answers of about the same confidence.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
#[non_exhaustive]
pub struct CalibrationBin {
    /// Answers in this bin.
    pub items: usize,
    /// Mean confidence, 0 for an empty bin.
    pub confidence: f64,
    /// Part of answers that are right, 0 for an empty bin.
    pub accuracy: f64,
}

/// Confidence against accuracy.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Calibration {
    /// Expected calibration error: the mean over answers of how far their bin's confidence and accuracy are apart.
    pub expected_error: f64,
    /// Maximum calibration error: how far they are apart in the worst bin.
    pub maximum_error: f64,
    /// The bins, from 0 on: what a reliability diagram shows.
    pub bins: Vec<CalibrationBin>,
}

/// The calibration errors of Guo et al., "On Calibration of Modern Neural Networks" (2017), with M bins of equal width:
/// bin m of 1 to M has the confidences in ((m - 1) / M, m / M], and the first has 0 too. 15 bins are usual.
///
/// ```
/// use opt_metrics::calibration::calibration;
/// let found = calibration(&[0.95, 0.95, 0.55, 0.55], &[true, true, true, false], 10)?;
/// assert!((found.expected_error - 0.05).abs() < 1e-12);
/// # Ok::<(), opt_metrics::Error>(())
/// ```
///
/// # Errors
/// [`Error::Lengths`] unless there is a confidence for each answer; [`Error::TooFew`] for none; [`Error::Value`] for a
/// confidence outside of 0 to 1; [`Error::Option`] for no bins or more than a million.
pub fn calibration(confidences: &[f64], right: &[bool], bins: usize) -> Result<Calibration> {
    same_length("confidences and answers", confidences.len(), right.len())?;
    at_least("answers", 1, right.len())?;
    if !(1..=1_000_000).contains(&bins) {
        return Err(Error::option("bins of a calibration error", bins, "1 to 1000000"));
    }
    let mut sums = vec![CalibrationBin::default(); bins];
    for (index, (&confidence, &right)) in confidences.iter().zip(right).enumerate() {
        if !(0.0..=1.0).contains(&confidence) {
            return Err(Error::Value {
                what: "confidence",
                index,
                found: confidence.to_string(),
                expected: "0 to 1".to_owned(),
            });
        }
        // By comparison with the edges m / M themselves, which a product with M would miss by its rounding.
        let edge = |m: usize| m as f64 / bins as f64;
        let mut m = (confidence * bins as f64).ceil().max(1.0) as usize;
        if m > 1 && confidence <= edge(m - 1) {
            m -= 1;
        } else if confidence > edge(m) {
            m += 1;
        }
        if let Some(bin) = sums.get_mut(m.min(bins) - 1) {
            bin.items += 1;
            bin.confidence += confidence;
            bin.accuracy += f64::from(u8::from(right));
        }
    }
    let (mut expected_error, mut maximum_error) = (0.0, 0.0_f64);
    for bin in sums.iter_mut().filter(|bin| bin.items > 0) {
        let items = bin.items as f64;
        bin.confidence /= items;
        bin.accuracy /= items;
        let gap = (bin.confidence - bin.accuracy).abs();
        expected_error += gap * items / right.len() as f64;
        maximum_error = maximum_error.max(gap);
    }
    Ok(Calibration { expected_error, maximum_error, bins: sums })
}

/// The score of Brier (1950) for any number of classes, from 0 for certainty that is right to 2: the mean over items of
/// Σ (pᵢ - [i is right])², as the harness' brier_score.
///
/// ```
/// use opt_metrics::calibration::brier_score;
/// let found = brier_score(&[0, 1], &[[1.0, 0.0], [0.5, 0.5]])?;
/// assert_eq!(found, 0.25);
/// # Ok::<(), opt_metrics::Error>(())
/// ```
///
/// # Errors
/// [`Error::Lengths`] unless there are probabilities for each item, and for every item as many as for the first;
/// [`Error::TooFew`] for no items; [`Error::Value`] for a right class that has no probability.
pub fn brier_score<P: AsRef<[f64]>>(gold: &[usize], probabilities: &[P]) -> Result<f64> {
    same_length("right classes and lists of probabilities", gold.len(), probabilities.len())?;
    at_least("items", 1, gold.len())?;
    let classes = probabilities.first().map_or(0, |p| p.as_ref().len());
    let mut scores = Vec::with_capacity(gold.len());
    for (index, (&class, row)) in gold.iter().zip(probabilities).enumerate() {
        let row = row.as_ref();
        same_length("probabilities of the first item and another", classes, row.len())?;
        if class >= classes {
            return Err(Error::Value {
                what: "right class",
                index,
                found: class.to_string(),
                expected: format!("less than {classes}"),
            });
        }
        let squares: Vec<f64> = row
            .iter()
            .enumerate()
            .map(|(i, p)| {
                let difference = p - if i == class { 1.0 } else { 0.0 };
                difference * difference
            })
            .collect();
        scores.push(pairwise_sum(&squares));
    }
    Ok(pairwise_sum(&scores) / gold.len() as f64)
}
