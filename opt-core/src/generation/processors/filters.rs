//! Filters of sampling: each rules out improbable tokens and keeps at least `min_keep`.
//!
//! Arithmetic is in f32 with sums in f64, as torch does it on a CPU, so that the same tokens are kept.

use super::LogitsProcessor;
use crate::{
    Result,
    generation::math::{maximum, top_k},
};
use std::cmp::Ordering;

/// The denominator of softmax, from which each probability follows.
struct Softmax {
    max: f32,
    sum: f32,
}

impl Softmax {
    /// `None` where there are no probabilities: no finite score, NaN, or positive infinity.
    fn of(scores: &[f32]) -> Option<Self> {
        let max = maximum(scores);
        if !max.is_finite() {
            return None;
        }
        let sum = scores.iter().map(|&s| f64::from(exp(s - max))).sum::<f64>() as f32;
        sum.is_finite().then_some(Self { max, sum })
    }

    fn probability(&self, score: f32) -> f32 {
        exp(score - self.max) / self.sum
    }

    fn log_probability(&self, score: f32) -> f32 {
        score - self.max - self.sum.ln()
    }

    /// Entropy in nats.
    fn entropy(&self, scores: &[f32]) -> f32 {
        let terms = scores.iter().filter(|s| **s > f32::NEG_INFINITY);
        -terms.map(|&s| f64::from(self.log_probability(s) * self.probability(s))).sum::<f64>() as f32
    }
}

/// After other filters most scores are negative infinity, which needs no exponential.
fn exp(difference: f32) -> f32 {
    if difference == f32::NEG_INFINITY { 0.0 } else { difference.exp() }
}

/// A list whose front is sorted as far as it was looked at, since filters look at few of 50 thousand.
struct LazySort {
    items: Vec<(f32, u32)>,
    sorted: usize,
    order: fn(&(f32, u32), &(f32, u32)) -> Ordering,
}

impl LazySort {
    fn get(&mut self, index: usize) -> Option<(f32, u32)> {
        if index >= self.sorted && self.sorted < self.items.len() {
            let end = (index + 1).max(self.sorted * 4).max(64).min(self.items.len());
            let rest = &mut self.items[self.sorted..];
            let count = end - self.sorted;
            if count < rest.len() {
                rest.select_nth_unstable_by(count - 1, self.order);
            }
            rest[..count].sort_unstable_by(self.order);
            self.sorted = end;
        }
        self.items.get(index).copied()
    }
}

/// The smallest of the `k` largest scores.
fn kth_largest(scores: &[f32], k: usize) -> f32 {
    if k == 1 {
        return maximum(scores);
    }
    top_k(scores, k).last().map_or(f32::NEG_INFINITY, |&(_, score)| score)
}

/// Keeps the scores of `kept` and rules out all others.
fn keep_only(scores: &mut [f32], kept: impl Iterator<Item = u32>) {
    let kept: Vec<_> = kept.filter_map(|i| Some((i as usize, *scores.get(i as usize)?))).collect();
    scores.fill(f32::NEG_INFINITY);
    kept.into_iter().for_each(|(i, score)| scores[i] = score);
}

/// Rules out the scores that `test` names.
fn rule_out(scores: &mut [f32], test: impl Fn(f32) -> bool) {
    scores.iter_mut().filter(|s| test(**s)).for_each(|s| *s = f32::NEG_INFINITY);
}

/// The finite scores with their indices; -0 as 0, its equal, which a total order would part.
fn finite(scores: &[f32]) -> impl Iterator<Item = (f32, u32)> {
    scores.iter().zip(0u32..).filter(|(s, _)| **s > f32::NEG_INFINITY).map(|(&s, i)| (s + 0.0, i))
}

/// Keeps the k largest scores and those equal to the smallest of them (Fan et al. 2018).
pub(super) struct TopK {
    pub(super) k: usize,
}

impl LogitsProcessor for TopK {
    fn name(&self) -> &str {
        "top_k"
    }

    fn process(&self, _ids: &[u32], scores: &mut [f32]) -> Result<()> {
        let threshold = kth_largest(scores, self.k);
        rule_out(scores, |s| s < threshold);
        Ok(())
    }
}

/// Keeps the most probable tokens that together reach a mass (nucleus sampling, Holtzman et al. 2020).
pub(super) struct TopP {
    /// 1 - p: a token goes if it and all less probable ones have no more than this.
    pub(super) rest: f32,
    pub(super) min_keep: usize,
}

impl LogitsProcessor for TopP {
    fn name(&self) -> &str {
        "top_p"
    }

    fn process(&self, _ids: &[u32], scores: &mut [f32]) -> Result<()> {
        let Some(softmax) = Softmax::of(scores) else { return Ok(()) };
        let mut items = LazySort {
            items: finite(scores).collect(),
            sorted: 0,
            // Among equals the later token stays: the reference sums upwards in stable order.
            order: |a, b| b.0.total_cmp(&a.0).then(b.1.cmp(&a.1)),
        };
        let mut mass: f64 = items.items.iter().map(|(s, _)| f64::from(softmax.probability(*s))).sum();
        let mut kept = 0;
        while let Some((score, _)) = items.get(kept) {
            if mass as f32 <= self.rest && kept >= self.min_keep {
                break;
            }
            mass -= f64::from(softmax.probability(score));
            kept += 1;
        }
        if kept < items.items.len() {
            keep_only(scores, items.items[..kept].iter().map(|(_, i)| *i));
        }
        Ok(())
    }
}

/// Keeps tokens with at least a share of the largest probability (Nguyen et al. 2024).
pub(super) struct MinP {
    pub(super) share: f32,
    pub(super) min_keep: usize,
}

impl LogitsProcessor for MinP {
    fn name(&self) -> &str {
        "min_p"
    }

    fn process(&self, _ids: &[u32], scores: &mut [f32]) -> Result<()> {
        let Some(softmax) = Softmax::of(scores) else { return Ok(()) };
        let threshold = self.share * softmax.probability(softmax.max);
        let protected = top_k(scores, self.min_keep);
        rule_out(scores, |s| softmax.probability(s) < threshold);
        protected.into_iter().for_each(|(i, score)| scores[i] = score);
        Ok(())
    }
}

/// Keeps the tokens whose information is nearest to the expected, up to a mass (Meister et al. 2022).
pub(super) struct Typical {
    pub(super) mass: f32,
    pub(super) min_keep: usize,
}

impl LogitsProcessor for Typical {
    fn name(&self) -> &str {
        "typical_p"
    }

    fn process(&self, _ids: &[u32], scores: &mut [f32]) -> Result<()> {
        let Some(softmax) = Softmax::of(scores) else { return Ok(()) };
        let entropy = softmax.entropy(scores);
        let surprise = |s: f32| (-softmax.log_probability(s) - entropy).abs();
        let mut items = LazySort {
            items: finite(scores).map(|(s, i)| (surprise(s), i)).collect(),
            sorted: 0,
            order: |a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)),
        };
        // The token at which the mass is reached, and all as typical as it, stay.
        let (mut sum, mut last) = (0.0f64, 0);
        while let Some((_, i)) = items.get(last) {
            sum += f64::from(softmax.probability(scores[i as usize]));
            if sum as f32 >= self.mass {
                break;
            }
            last += 1;
        }
        let Some((limit, _)) = items.get(last) else { return Ok(()) };
        let mut kept = last + 1;
        while items.get(kept).is_some_and(|(key, _)| key <= limit || kept < self.min_keep) {
            kept += 1;
        }
        if kept < items.items.len() {
            keep_only(scores, items.items[..kept].iter().map(|(_, i)| *i));
        }
        Ok(())
    }
}

/// Drops tokens below a probability (Hewitt et al. 2022).
pub(super) struct Epsilon {
    pub(super) epsilon: f32,
    pub(super) min_keep: usize,
}

impl LogitsProcessor for Epsilon {
    fn name(&self) -> &str {
        "epsilon_cutoff"
    }

    fn process(&self, _ids: &[u32], scores: &mut [f32]) -> Result<()> {
        let Some(softmax) = Softmax::of(scores) else { return Ok(()) };
        let safe = kth_largest(scores, self.min_keep);
        rule_out(scores, |s| s < safe && softmax.probability(s) < self.epsilon);
        Ok(())
    }
}

/// Drops tokens below a probability that is lower where the distribution is flat (Hewitt et al. 2022).
pub(super) struct Eta {
    pub(super) epsilon: f32,
    pub(super) min_keep: usize,
}

impl LogitsProcessor for Eta {
    fn name(&self) -> &str {
        "eta_cutoff"
    }

    fn process(&self, _ids: &[u32], scores: &mut [f32]) -> Result<()> {
        let Some(softmax) = Softmax::of(scores) else { return Ok(()) };
        let eta = self.epsilon.min(self.epsilon.sqrt() * (-softmax.entropy(scores)).exp());
        let safe = kth_largest(scores, self.min_keep);
        rule_out(scores, |s| s < safe && softmax.probability(s) < eta);
        Ok(())
    }
}
