use super::{Bleu, BleuStatistics, closest_length, ngrams, number};
use crate::{Result, error::at_least};
use std::collections::HashMap;

/// Self-BLEU (Zhu et al., "Texygen", 2018): the mean over all texts of the sentence BLEU of each with all others as its
/// references. The higher, the less diverse the texts.
///
/// ```
/// use opt_metrics::bleu::{Bleu, self_bleu};
/// let same = ["a b c d e", "a b c d e", "a b c d e"];
/// assert!((self_bleu(&Bleu::default(), &same)? - 100.0).abs() < 1e-9);
/// # Ok::<(), opt_metrics::Error>(())
/// ```
///
/// # Errors
/// [`crate::Error::TooFew`] for less than two texts.
pub fn self_bleu<S: AsRef<str>>(bleu: &Bleu, texts: &[S]) -> Result<f64> {
    at_least("texts of a self-BLEU", 2, texts.len())?;
    let order = bleu.options().max_order;
    let tokens: Vec<Vec<String>> = texts.iter().map(|t| bleu.tokens(t.as_ref())).collect();
    let mut ids = HashMap::new();
    let texts: Vec<Vec<u32>> = tokens.iter().map(|t| number(t, &mut ids)).collect();

    // Of each n-gram the text that has it most often, and the two highest counts: enough for the highest count among
    // the others of any text.
    let mut highest: HashMap<&[u32], (usize, u64, u64)> = HashMap::new();
    for (i, text) in texts.iter().enumerate() {
        for (ngram, count) in ngrams(text, order) {
            let (owner, first, second) = highest.entry(ngram).or_default();
            if count > *first {
                (*owner, *second, *first) = (i, *first, count);
            } else {
                *second = count.max(*second);
            }
        }
    }
    let mut lengths: Vec<usize> = texts.iter().map(Vec::len).collect();
    lengths.sort_unstable();

    let mut sum = 0.0;
    for (i, text) in texts.iter().enumerate() {
        let mut found = BleuStatistics::empty(order);
        for (ngram, count) in ngrams(text, order) {
            let (owner, first, second) = highest.get(ngram).copied().unwrap_or_default();
            found.add_ngram(ngram.len(), count, if owner == i { second } else { first });
        }
        // The nearest neighbours in length, without one text of this text's own length.
        let at = lengths.partition_point(|&l| l < text.len());
        let before = lengths.get(at.saturating_sub(1)).filter(|_| at > 0);
        let others = before.into_iter().chain(lengths.get(at + 1)).copied();
        found.hypothesis_length = text.len() as u64;
        found.reference_length = closest_length(text.len(), others) as u64;
        sum += bleu.score(&found).score;
    }
    Ok(sum / texts.len() as f64)
}
