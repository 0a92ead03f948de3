//! What is done with rows of logits: log-probabilities of targets, and the top k.

use super::{Kernels, simd};
use crate::host;
use candle_core::Tensor;
use opt_backend::{Result, TargetScore, TopK};
use pulp::Arch;
use std::{cmp::Ordering, collections::BinaryHeap};

/// Logits that are compared with the k-th largest at a time.
const CHUNK: usize = 64;

impl Kernels {
    /// Scores of `targets`, one a row of `logits` `[_, entries]`.
    pub(crate) fn target_scores(
        &self,
        logits: &Tensor,
        entries: usize,
        targets: &[u32],
    ) -> Result<Vec<TargetScore>> {
        let (storage, layout) = logits.storage_and_layout();
        let logits = host::numbers::<f32>("log_probs", &storage, layout)?;
        let mut scores = vec![TargetScore { log_prob: 0.0, greedy: false }; targets.len()];
        let rows = logits.chunks_exact(entries.max(1)).zip(targets).zip(&mut scores).collect();
        self.pool.each(
            10 * logits.len(),
            rows,
            |((row, &target), score): ((&[f32], _), &mut TargetScore)| {
                let log_sum_exp = log_sum_exp(self.arch, row);
                let target = target as usize;
                let log_prob = (f64::from(row[target]) - log_sum_exp) as f32;
                *score =
                    TargetScore { log_prob, greedy: largest_k(row, 1).first() == Some(&(target as u32)) };
            },
        );
        Ok(scores)
    }

    /// The top `k` of each row of `logits` `[rows, entries]`.
    pub(crate) fn top_k(&self, logits: &Tensor, [rows, entries]: [usize; 2], k: usize) -> Result<Vec<TopK>> {
        let (storage, layout) = logits.storage_and_layout();
        let logits = host::numbers::<f32>("top_k", &storage, layout)?;
        let mut tops = vec![None; rows];
        let each = logits.chunks_exact(entries.max(1)).zip(&mut tops).collect();
        self.pool.each(10 * logits.len(), each, |(row, top): (&[f32], &mut Option<TopK>)| {
            *top = Some(row_top_k(self.arch, row, k));
        });
        // Rows of no entries have been left out.
        Ok(tops.into_iter().map(|top| top.unwrap_or_else(|| row_top_k(self.arch, &[], k))).collect())
    }
}

/// The top `k` of each row of logits that are at hand, on this thread.
pub(crate) fn top_k_of(logits: &[f32], [rows, entries]: [usize; 2], k: usize) -> Vec<TopK> {
    (0..rows).map(|row| row_top_k(Arch::new(), &logits[row * entries..(row + 1) * entries], k)).collect()
}

fn row_top_k(arch: Arch, row: &[f32], k: usize) -> TopK {
    let ids = largest_k(row, k);
    let logits = ids.iter().map(|&id| row[id as usize]).collect();
    TopK { ids, logits, log_sum_exp: log_sum_exp(arch, row) as f32 }
}

/// log Σ exp(x): f32 exponentials, added in f64 every thousand.
fn log_sum_exp(arch: Arch, row: &[f32]) -> f64 {
    arch.dispatch(|| {
        let max = simd::largest(row);
        if max.is_infinite() {
            return f64::from(max);
        }
        let mut part = [0.0; 1024];
        let mut sum = 0.0;
        for chunk in row.chunks(part.len()) {
            let part = &mut part[..chunk.len()];
            part.copy_from_slice(chunk);
            sum += f64::from(simd::exp_minus(part, max));
        }
        f64::from(max) + sum.ln()
    })
}

/// A logit and its id, ordered so that the better is the less: the larger logit, among equals the lower id; NaN is
/// the worst.
#[derive(Clone, Copy, PartialEq)]
struct Ranked(f32, u32);

impl Eq for Ranked {}

impl PartialOrd for Ranked {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Ranked {
    fn cmp(&self, other: &Self) -> Ordering {
        let (a, b) = (self.0, other.0);
        let by_logit = b.partial_cmp(&a).unwrap_or_else(|| a.is_nan().cmp(&b.is_nan()));
        by_logit.then(self.1.cmp(&other.1))
    }
}

/// The ids of the `k` largest, largest first.
fn largest_k(row: &[f32], k: usize) -> Vec<u32> {
    if k == 0 {
        return Vec::new();
    }
    // The worst of the best so far is on top.
    let mut best = BinaryHeap::with_capacity(k.min(row.len()) + 1);
    for (i, chunk) in row.chunks(CHUNK).enumerate() {
        if let Some(&Ranked(least, _)) = best.peek().filter(|_| best.len() == k)
            // Ids only grow, so that an equal logit is no better. A least that is NaN is worse than any number.
            && !least.is_nan()
            && simd::largest(chunk) <= least
        {
            continue;
        }
        for (j, &logit) in chunk.iter().enumerate() {
            let ranked = Ranked(logit, (i * CHUNK + j) as u32);
            if best.len() < k {
                best.push(ranked);
            } else if best.peek().is_some_and(|worst| ranked < *worst) {
                best.pop();
                best.push(ranked);
            }
        }
    }
    best.into_sorted_vec().into_iter().map(|Ranked(_, id)| id).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use opt_backend::{ndarray::aview1, oracle};

    #[test]
    fn the_largest_k_are_the_oracles() {
        let mut state = 7u32;
        let mut number = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state >> 20
        };
        for len in [0, 1, 63, 64, 65, 1000] {
            for k in [0, 1, 2, 7, 64, 2000] {
                for kind in 0..4 {
                    let row: Vec<f32> = (0..len)
                        .map(|_| match (kind, number()) {
                            // Many equals; NaN and infinities among numbers; nothing but NaN.
                            (0, n) => n as f32,
                            (1, n) => (n % 5) as f32 - 2.0,
                            (2, n) => [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -0.0, 0.0][n as usize % 5],
                            _ => f32::NAN,
                        })
                        .collect();
                    let expected = oracle::top_k(aview1(&row), k);
                    assert_eq!(largest_k(&row, k), expected.ids, "{len} of kind {kind}, top {k}");
                }
            }
        }
    }
}
