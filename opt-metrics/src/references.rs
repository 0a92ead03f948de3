//! Hypotheses and their references.

use crate::{
    Result,
    error::{at_least, same_length},
};

/// Longest n-grams that can be asked for.
pub(crate) const MAX_ORDER: usize = 64;

/// Fails unless there are hypotheses, and a list of references for each.
pub(crate) fn check_pairs(hypotheses: usize, references: usize) -> Result<()> {
    at_least("hypotheses", 1, hypotheses)?;
    same_length("hypotheses and lists of references", hypotheses, references)
}

/// A signature as sacrebleu writes them.
pub(crate) fn signature_of(references: Option<usize>, options: &str) -> String {
    let references = references.map_or_else(|| "var".to_owned(), |n| n.to_string());
    format!("nrefs:{references}|{options}|version:opt-metrics-{}", env!("CARGO_PKG_VERSION"))
}

/// How many references each item has; none if the number varies or there are no items.
///
/// ```
/// assert_eq!(opt_metrics::reference_count(&[vec!["a", "b"], vec!["c", "d"]]), Some(2));
/// assert_eq!(opt_metrics::reference_count(&[vec!["a", "b"], vec!["c"]]), None);
/// ```
pub fn reference_count<R: AsRef<[S]>, S>(references: &[R]) -> Option<usize> {
    let count = references.first()?.as_ref().len();
    references.iter().all(|r| r.as_ref().len() == count).then_some(count)
}

/// The references that every item has: of each list as many as the shortest has. The harness hands no more to
/// sacrebleu where items have different numbers of references, so its figures need this.
///
/// ```
/// let references = [vec!["a", "b"], vec!["c"]];
/// assert_eq!(opt_metrics::common_references(&references), [["a"], ["c"]]);
/// ```
pub fn common_references<R: AsRef<[S]>, S>(references: &[R]) -> Vec<&[S]> {
    let shortest = references.iter().map(|r| r.as_ref().len()).min().unwrap_or(0);
    references.iter().map(|r| r.as_ref().get(..shortest).unwrap_or_default()).collect()
}
