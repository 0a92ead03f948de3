//! How much generated texts repeat themselves and each other. Tokens can be anything that compares: ids or words. For
//! texts against each other see also [`crate::bleu::self_bleu`].

use std::{collections::HashSet, hash::Hash};

/// distinct-n (Li et al., "A Diversity-Promoting Objective Function for Neural Conversation Models", 2016): the number
/// of different n-grams of all texts together over the number of all their n-grams, from near 0 to 1. None if there are
/// no n-grams.
///
/// ```
/// use opt_metrics::diversity::distinct_n;
/// assert_eq!(distinct_n(&[vec!["a", "b"], vec!["a", "c"]], 1), Some(0.75));
/// ```
pub fn distinct_n<T: Hash + Eq, S: AsRef<[T]>>(texts: &[S], n: usize) -> Option<f64> {
    let mut seen = HashSet::new();
    let mut all = 0_usize;
    for text in texts.iter().filter(|_| n > 0) {
        for ngram in text.as_ref().windows(n) {
            all += 1;
            seen.insert(ngram);
        }
    }
    (all > 0).then(|| seen.len() as f64 / all as f64)
}

/// seq-rep-n (Welleck et al., "Neural Text Generation with Unlikelihood Training", 2019, section 6): the part of a
/// text's n-grams that repeat an earlier one, 1 - different / all. There n is 4. None if there are no n-grams.
///
/// ```
/// use opt_metrics::diversity::repetition;
/// assert_eq!(repetition(&[1, 2, 1, 2, 1], 2), Some(0.5));
/// ```
pub fn repetition<T: Hash + Eq>(text: &[T], n: usize) -> Option<f64> {
    distinct_n(&[text], n).map(|distinct| 1.0 - distinct)
}

/// The mean of [`repetition`] over the texts that have n-grams: seq-rep-n of a model. None if no text has any.
pub fn mean_repetition<T: Hash + Eq, S: AsRef<[T]>>(texts: &[S], n: usize) -> Option<f64> {
    let values: Vec<f64> = texts.iter().filter_map(|text| repetition(text.as_ref(), n)).collect();
    (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
}
