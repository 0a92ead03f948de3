//! Figures of predicted labels.

use crate::{
    Error, Result,
    error::{at_least, same_length},
};
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    hash::Hash,
};

fn check<T>(gold: &[T], predicted: &[T]) -> Result<()> {
    same_length("right and predicted labels", gold.len(), predicted.len())?;
    at_least("labels", 1, gold.len())
}

/// The index of the highest value, the first of equals; NaN counts as highest. As `numpy.argmax`, by which the harness
/// picks a choice. None for no values.
///
/// ```
/// assert_eq!(opt_metrics::labels::argmax(&[-3.0, -1.0, -1.0]), Some(1));
/// ```
pub fn argmax(values: &[f64]) -> Option<usize> {
    let mut best: Option<(usize, f64)> = None;
    for (i, &value) in values.iter().enumerate() {
        if best.is_none_or(|(_, highest)| !highest.is_nan() && (value > highest || value.is_nan())) {
            best = Some((i, value));
        }
    }
    best.map(|(i, _)| i)
}

/// The part of labels that are right, from 0 to 1.
///
/// # Errors
/// [`Error::Lengths`] unless there is a prediction for each label; [`Error::TooFew`] for none.
pub fn accuracy<T: PartialEq>(gold: &[T], predicted: &[T]) -> Result<f64> {
    check(gold, predicted)?;
    Ok(gold.iter().zip(predicted).filter(|(g, p)| g == p).count() as f64 / gold.len() as f64)
}

/// F1 of labels of which `positive` is the one looked for, as scikit-learn's `f1_score` of two classes; 0 if nothing
/// is, or is taken for, that label. The harness' f1 is this with label 1.
///
/// ```
/// use opt_metrics::labels::f1_binary;
/// assert_eq!(f1_binary(&[1, 1, 0, 0], &[1, 0, 1, 0], &1)?, 0.5);
/// # Ok::<(), opt_metrics::Error>(())
/// ```
///
/// # Errors
/// [`Error::Lengths`] unless there is a prediction for each label; [`Error::TooFew`] for none; [`Error::Option`] for
/// more than two labels, or two others than `positive`.
pub fn f1_binary<T: Ord>(gold: &[T], predicted: &[T], positive: &T) -> Result<f64> {
    check(gold, predicted)?;
    let labels: BTreeSet<&T> = gold.iter().chain(predicted).collect();
    if labels.len() > 2 || labels.len() == 2 && !labels.contains(positive) {
        let expected = "at most 2, one of them the positive label";
        return Err(Error::option("number of labels of a binary F1", labels.len(), expected));
    }
    Ok(f1(gold, predicted, positive))
}

/// The mean of F1 over all labels that occur on either side, as scikit-learn's `f1_score` with `average="macro"`.
///
/// # Errors
/// [`Error::Lengths`] unless there is a prediction for each label; [`Error::TooFew`] for none.
pub fn f1_macro<T: Ord>(gold: &[T], predicted: &[T]) -> Result<f64> {
    check(gold, predicted)?;
    let labels: BTreeSet<&T> = gold.iter().chain(predicted).collect();
    let count = labels.len() as f64;
    Ok(labels.into_iter().map(|label| f1(gold, predicted, label)).sum::<f64>() / count)
}

/// 2 TP / (2 TP + FP + FN).
fn f1<T: PartialEq>(gold: &[T], predicted: &[T], label: &T) -> f64 {
    let of = |labels: &[T]| labels.iter().filter(|l| *l == label).count();
    let both = gold.iter().zip(predicted).filter(|(g, p)| *g == label && *p == label).count();
    let all = of(gold) + of(predicted);
    if all == 0 { 0.0 } else { 2.0 * both as f64 / all as f64 }
}

/// Matthews' correlation of right and predicted labels, of any number of classes (Gorodkin 2004), from -1 to 1; 0 if
/// one side has only one label. As scikit-learn's.
///
/// ```
/// use opt_metrics::labels::matthews_corrcoef;
/// assert_eq!(matthews_corrcoef(&[1, 1, 0, 0], &[1, 1, 0, 0])?, 1.0);
/// # Ok::<(), opt_metrics::Error>(())
/// ```
///
/// # Errors
/// [`Error::Lengths`] unless there is a prediction for each label; [`Error::TooFew`] for none.
pub fn matthews_corrcoef<T: Ord>(gold: &[T], predicted: &[T]) -> Result<f64> {
    check(gold, predicted)?;
    // For each label how often it is right, and how often predicted.
    let mut counts: BTreeMap<&T, (f64, f64)> = BTreeMap::new();
    for label in gold {
        counts.entry(label).or_default().0 += 1.0;
    }
    for label in predicted {
        counts.entry(label).or_default().1 += 1.0;
    }
    let n = gold.len() as f64;
    let correct = gold.iter().zip(predicted).filter(|(g, p)| g == p).count() as f64;
    let dot = |of: fn(&(f64, f64)) -> f64| counts.values().map(of).sum::<f64>();
    let both = correct * n - dot(|c| c.0 * c.1);
    let spread = (n * n - dot(|c| c.1 * c.1)) * (n * n - dot(|c| c.0 * c.0));
    Ok(if spread == 0.0 { 0.0 } else { both / spread.sqrt() })
}

/// One value for each group, in order of first occurrence: 1 where all its members are right, else 0. Its mean is the
/// harness' acc_all, over groups of paragraph and question; its standard error there, of groups of the question alone.
///
/// ```
/// use opt_metrics::labels::all_right;
/// assert_eq!(all_right(&["a", "a", "b"], &[true, false, true])?, [0.0, 1.0]);
/// # Ok::<(), opt_metrics::Error>(())
/// ```
///
/// # Errors
/// [`Error::Lengths`] unless there is a group for each answer.
pub fn all_right<K: Hash + Eq>(groups: &[K], right: &[bool]) -> Result<Vec<f64>> {
    same_length("groups and answers", groups.len(), right.len())?;
    let mut places = HashMap::new();
    let mut values = Vec::new();
    for (group, right) in groups.iter().zip(right) {
        let place = *places.entry(group).or_insert(values.len());
        if place == values.len() {
            values.push(1.0);
        }
        if let (Some(value), false) = (values.get_mut(place), *right) {
            *value = 0.0;
        }
    }
    Ok(values)
}
