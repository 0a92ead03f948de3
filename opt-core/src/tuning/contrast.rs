//! Training for search: texts that belong together are drawn towards each other and away from the others of the batch,
//! while the model goes on learning to predict tokens.

use super::{
    Example, Goal,
    head::cross_entropy,
    tape::{Taped, Var},
};
use crate::{Error, ErrorKind, Result, embedding::Pooling};
use ndarray::{Array1, Array2, ArrayView2, Axis};
use opt_backend::{Span, Train};
use serde::{Deserialize, Serialize};

/// How texts that belong together are learned: InfoNCE (arXiv 1807.03748) with the other passages of a batch as
/// negatives, which is sentence-transformers' `MultipleNegativesRankingLoss`, and the language-model loss beside it:
///
/// mean over queries of -log softmax(cos(query, passages) / `temperature`)\[its own\] + `lm` · mean cross-entropy of the
/// tokens of queries and passages.
///
/// Passages that are equal to the query's own are no negatives of it. A batch of one pair teaches nothing but its tokens.
///
/// ```
/// use opt_core::tuning::{ContrastOptions, Pooling};
/// let options = ContrastOptions::default().temperature(0.1).lm(0.2).pooling(Pooling::WeightedMean);
/// options.validate()?;
/// # Ok::<(), opt_core::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct ContrastOptions {
    /// What cosines are divided by.
    pub temperature: f32,
    /// How much the language-model loss counts.
    pub lm: f32,
    /// How a text becomes one vector.
    pub pooling: Pooling,
}

impl Default for ContrastOptions {
    fn default() -> Self {
        Self { temperature: 0.05, lm: 0.1, pooling: Pooling::Mean }
    }
}

impl ContrastOptions {
    /// Sets [`ContrastOptions::temperature`].
    #[must_use]
    pub fn temperature(self, temperature: f32) -> Self {
        Self { temperature, ..self }
    }

    /// Sets [`ContrastOptions::lm`].
    #[must_use]
    pub fn lm(self, lm: f32) -> Self {
        Self { lm, ..self }
    }

    /// Sets [`ContrastOptions::pooling`].
    #[must_use]
    pub fn pooling(self, pooling: Pooling) -> Self {
        Self { pooling, ..self }
    }

    /// # Errors
    /// [`ErrorKind::Option`] for a temperature that is not above 0, a weight below 0, and a pooling that is no weighted
    /// sum ([`Pooling::Max`], [`Pooling::None`]).
    pub fn validate(&self) -> Result<()> {
        let fail = |message: String| Err(Error::new(ErrorKind::Option, message));
        if !(self.temperature.is_finite() && self.temperature > 0.0) {
            return fail(format!("temperature: expected a number above 0, found {}", self.temperature));
        }
        if !(self.lm.is_finite() && self.lm >= 0.0) {
            return fail(format!("lm: expected a number of at least 0, found {}", self.lm));
        }
        check_pooling(self.pooling)
    }
}

/// How well passages are found; see [`recall`].
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Recall {
    /// The part of queries whose own passage is found first.
    pub at_1: f64,
    /// The part whose own is among the first ten.
    pub at_10: f64,
}

/// The part of queries whose own passage is among the `k` that are most like them: recall at k. Row i of
/// `passages` `[n, width]` is that of row i of `queries`; what is compared are cosines. A passage that is as like as the
/// query's own does not come before it.
///
/// ```
/// use ndarray::array;
/// use opt_core::tuning::recall;
///
/// let queries = array![[1.0, 0.0], [0.0, 1.0]];
/// let passages = array![[1.0, 0.0], [1.0, -0.5]];
/// assert_eq!(recall(queries.view(), passages.view(), 1), 0.5);
/// assert_eq!(recall(queries.view(), passages.view(), 2), 1.0);
/// ```
///
/// # Panics
/// If the two have different shapes.
pub fn recall(queries: ArrayView2<'_, f32>, passages: ArrayView2<'_, f32>, k: usize) -> f64 {
    within(&ranks(queries, passages), k)
}

impl Recall {
    pub(super) fn of(ranks: &[usize]) -> Self {
        Self { at_1: within(ranks, 1), at_10: within(ranks, 10) }
    }
}

fn within(ranks: &[usize], k: usize) -> f64 {
    ranks.iter().filter(|rank| **rank < k).count() as f64 / ranks.len().max(1) as f64
}

/// Queries that are compared with all passages at a time.
const BLOCK: usize = 256;

/// For each query how many passages are more like it than its own; what is no number is.
pub(super) fn ranks(queries: ArrayView2<'_, f32>, passages: ArrayView2<'_, f32>) -> Vec<usize> {
    assert_eq!(queries.dim(), passages.dim(), "a passage for each query, of one width");
    let (queries, passages) = (unit(queries), unit(passages));
    let mut ranks = Vec::new();
    for block in queries.axis_chunks_iter(Axis(0), BLOCK) {
        for row in block.dot(&passages.t()).outer_iter() {
            let like = row.iter().nth(ranks.len()).copied().unwrap_or(f64::NAN);
            let not_more = row.iter().filter(|other| **other <= like).count();
            ranks.push(row.len() - not_more);
        }
    }
    ranks
}

/// Rows of length 1, in f64.
fn unit(rows: ArrayView2<'_, f32>) -> Array2<f64> {
    let mut rows = rows.mapv(f64::from);
    for mut row in rows.outer_iter_mut() {
        let length = length(row.view());
        row /= length;
    }
    rows
}

fn length(row: ndarray::ArrayView1<'_, f64>) -> f64 {
    row.dot(&row).sqrt().max(f64::from(f32::MIN_POSITIVE))
}

/// Queries and passages of some pairs, as sequences: all queries, then all passages.
pub(super) fn sequences(examples: &[Example]) -> Vec<&[u32]> {
    let passage = |example| match example {
        &Example { goal: Goal::Passage(ref ids), .. } => &ids[..],
        _ => &[],
    };
    examples.iter().map(|example| &example.ids[..]).chain(examples.iter().map(passage)).collect()
}

/// Whether an example is a pair.
///
/// # Errors
/// [`ErrorKind::Prompt`].
pub(super) fn check(example: &Example) -> Result<()> {
    let fail = |found: &str| {
        let message = format_args!("expected a text and a passage that belongs to it, found {found}");
        Err(Error::new(ErrorKind::Prompt, message))
    };
    match &example.goal {
        Goal::Passage(ids) if ids.is_empty() || example.ids.is_empty() => fail("nothing for one of them"),
        Goal::Passage(_) => Ok(()),
        _ => fail("no passage"),
    }
}

/// The sum over queries of InfoNCE's loss, and its gradient, of vectors `[2 pairs, width]`: queries, then passages.
pub(super) fn info_nce(
    vectors: ArrayView2<'_, f32>,
    examples: &[Example],
    temperature: f32,
) -> (f64, Array2<f32>) {
    let pairs = examples.len();
    let units = unit(vectors);
    let (queries, passages) = units.view().split_at(Axis(0), pairs);
    let mut scores = (queries.dot(&passages.t()) / f64::from(temperature)).mapv(|v| v as f32);
    let same =
        |i: usize, j: usize| i != j && examples.get(i).map(|e| &e.goal) == examples.get(j).map(|e| &e.goal);
    for ((i, j), score) in scores.indexed_iter_mut() {
        if same(i, j) {
            *score = f32::NEG_INFINITY;
        }
    }
    let mut of_scores = Array2::<f64>::zeros((pairs, pairs));
    let mut loss = 0.0;
    for ((own, row), mut d) in scores.outer_iter().enumerate().zip(of_scores.outer_iter_mut()) {
        let (of_row, gradient) = cross_entropy(row, own);
        loss += of_row;
        d.assign(&Array1::from(gradient).mapv(|d| f64::from(d) / f64::from(temperature)));
    }
    let mut gradient = Array2::<f64>::zeros(vectors.dim());
    let (mut of_queries, mut of_passages) = gradient.view_mut().split_at(Axis(0), pairs);
    of_queries.assign(&of_scores.dot(&passages));
    of_passages.assign(&of_scores.t().dot(&queries));
    // From unit vectors to what they were made of: what lies along the vector does not count.
    for ((mut d, unit), vector) in gradient.outer_iter_mut().zip(units.outer_iter()).zip(vectors.outer_iter())
    {
        let along = d.dot(&unit);
        d.scaled_add(-along, &unit);
        d /= length(vector.mapv(f64::from).view());
    }
    (loss, gradient.mapv(|d| d as f32))
}

/// # Errors
/// [`ErrorKind::Option`] for what is no weighted sum, through which alone gradients are led here.
pub(super) fn check_pooling(pooling: Pooling) -> Result<()> {
    match pooling.weights(1) {
        Some(_) => Ok(()),
        None => {
            let message = format_args!(
                "pooling: expected a weighted sum of states (mean, weighted mean, first or last token), found {pooling}"
            );
            Err(Error::new(ErrorKind::Option, message))
        }
    }
}

/// A matrix `[spans, rows]` that pools the tokens of each sequence, which are the last of its span.
fn matrix(pooling: Pooling, sequences: &[&[u32]], spans: &[Span], rows: usize) -> Array2<f32> {
    let mut matrix = Array2::zeros((spans.len(), rows));
    for ((mut row, span), ids) in matrix.outer_iter_mut().zip(spans).zip(sequences) {
        let first = span.start + span.len - ids.len();
        let weights = pooling.weights(ids.len()).unwrap_or_default();
        for (weight, value) in row.iter_mut().skip(first).zip(weights) {
            *weight = value;
        }
    }
    matrix
}

/// Vectors `[sequences, width]` of last hidden states, by a pooling that [`check_pooling`] let through.
pub(super) fn pooled<B: Train>(
    taped: &Taped<B>,
    last: &Var<B>,
    pooling: Pooling,
    sequences: &[&[u32]],
    spans: &[Span],
) -> Result<Var<B>> {
    let rows = taped.backend.shape(&last.value)[0];
    let matrix = taped.backend.upload(matrix(pooling, sequences, spans, rows).view())?;
    Ok(taped.wired_pool(matrix, last)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pairs() -> Vec<Example> {
        let pair = |i: u32| Example::with(vec![2, i], Goal::Passage(vec![2, 10 + i / 2]));
        // Passages of the first two are the same, and so are those of the last two.
        (0..4).map(pair).collect()
    }

    #[test]
    fn a_gradient_is_the_slope_of_its_loss() {
        let examples = pairs();
        let value = |i: usize, j: usize| ((i * 7 + j * 3) as f32 * 0.37).sin() + 0.1 * j as f32;
        let vectors = Array2::from_shape_fn((8, 5), |(i, j)| value(i, j));
        let (_, gradient) = info_nce(vectors.view(), &examples, 0.5);
        let step = 1e-2;
        for (at, &found) in gradient.indexed_iter() {
            let loss = |by: f32| {
                let mut moved = vectors.clone();
                moved[at] += by;
                info_nce(moved.view(), &examples, 0.5).0
            };
            let slope = (loss(step) - loss(-step)) / (2.0 * f64::from(step));
            assert!((slope - f64::from(found)).abs() < 2e-3, "{at:?}: {slope} against {found}");
        }
    }

    #[test]
    fn equal_passages_are_no_negatives() {
        let examples = pairs();
        let vectors = Array2::from_shape_fn((8, 3), |(i, j)| f32::from(u8::from(i / 2 % 2 == j)));
        // All that is left to tell apart is told apart as far as a temperature of 1 lets it: e / (e + 1 + 1).
        let (loss, _) = info_nce(vectors.view(), &examples, 1.0);
        let e = std::f64::consts::E;
        assert!((loss - 4.0 * -(e / (e + 2.0)).ln()).abs() < 1e-6, "{loss}");
    }
}
