//! Filters of sampling: each rules out improbable tokens and keeps at least `min_keep`.
//!
//! Arithmetic is in f32 with sums in f64, as torch does it on a CPU, so that the same tokens are kept.

use super::LogitsProcessor;
use crate::{
    Result,
    generation::math::{exp, maximum, sum_exp, top_k},
};

/// The denominator of softmax, from which each probability follows.
struct Softmax {
    max: f32,
    sum: f32,
    log_sum: f32,
}

impl Softmax {
    /// `None` where there are no probabilities: no finite score, NaN, or positive infinity.
    fn of(scores: &[f32]) -> Option<Self> {
        let max = maximum(scores);
        if !max.is_finite() {
            return None;
        }
        let sum = sum_exp(scores, max) as f32;
        sum.is_finite().then(|| Self { max, sum, log_sum: sum.ln() })
    }

    fn probability(&self, score: f32) -> f32 {
        exp(score - self.max) / self.sum
    }

    /// Scores around that of a probability: one surely below it and one surely above.
    fn around(&self, probability: f32) -> (f32, f32) {
        let score = self.max + (probability * self.sum).ln();
        let margin = 0.01 + self.max.abs() * 1e-6;
        (score - margin, score + margin)
    }

    /// Whether a score has less than a probability: the exponential only where the score itself does not tell.
    fn below(&self, threshold: f32) -> impl Fn(f32) -> bool {
        let (surely, perhaps) = self.around(threshold);
        move |s| s < surely || (s < perhaps && self.probability(s) < threshold)
    }

    fn log_probability(&self, score: f32) -> f32 {
        score - self.max - self.log_sum
    }

    /// Entropy in nats.
    fn entropy(&self, scores: &[f32]) -> f32 {
        let terms = scores.iter().filter(|s| **s > f32::NEG_INFINITY);
        -terms.map(|&s| f64::from(self.log_probability(s) * self.probability(s))).sum::<f64>() as f32
    }
}

/// A list of values with indices whose front is sorted as far as it was looked at, since filters look at few of 50
/// thousand. Smaller values come first, and among equals the smaller index.
struct LazySort {
    /// Those of [`key`].
    keys: Vec<u64>,
    sorted: usize,
}

/// A value's bits, in an order that is the floats', above an index: integers sort several times faster.
fn key(value: f32, index: u32) -> u64 {
    // Adding zero makes -0 the equal of 0.
    let bits = (value + 0.0).to_bits();
    let ordered = if bits >> 31 == 1 { !bits } else { bits | 1 << 31 };
    u64::from(ordered) << 32 | u64::from(index)
}

/// The value of a [`key`].
fn value(key: u64) -> f32 {
    let ordered = (key >> 32) as u32;
    f32::from_bits(if ordered >> 31 == 1 { ordered & !(1 << 31) } else { !ordered })
}

impl LazySort {
    fn new(items: impl Iterator<Item = (f32, u32)>) -> Self {
        Self { keys: items.map(|(value, index)| key(value, index)).collect(), sorted: 0 }
    }

    fn len(&self) -> usize {
        self.keys.len()
    }

    /// The value at a place of the sorted list, and its index.
    fn get(&mut self, place: usize) -> Option<(f32, u32)> {
        if place >= self.sorted && self.sorted < self.keys.len() {
            let end = (place + 1).max(self.sorted * 8).max(256).min(self.keys.len());
            let rest = &mut self.keys[self.sorted..];
            let count = end - self.sorted;
            if count < rest.len() {
                rest.select_nth_unstable(count - 1);
            }
            rest[..count].sort_unstable();
            self.sorted = end;
        }
        let key = *self.keys.get(place)?;
        Some((value(key), key as u32))
    }

    /// The indices at the first `count` places, which have been looked at.
    fn indices(&self, count: usize) -> impl Iterator<Item = u32> {
        self.keys.iter().take(count).map(|key| *key as u32)
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
    for score in scores {
        *score = if test(*score) { f32::NEG_INFINITY } else { *score };
    }
}

/// The finite scores with their indices.
fn finite(scores: &[f32]) -> impl Iterator<Item = (f32, u32)> {
    scores.iter().zip(0u32..).filter(|(s, _)| **s > f32::NEG_INFINITY).map(|(&s, i)| (s, i))
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
        // Tokens of less than rest / count have together less than the rest, so they go and need no sorting.
        let least = match self.min_keep {
            1 => softmax.around(self.rest / scores.len() as f32).0,
            _ => f32::NEG_INFINITY,
        };
        // Largest first, and among equals the later token: the reference sums upwards in stable order.
        let place = |s: f32, i: u32| key(-s, u32::MAX - i);
        let likely = finite(scores).filter(|(s, _)| *s >= least);
        let keys = likely.map(|(s, i)| place(s, i)).collect();
        if let Some(last) = self.last(&softmax, keys) {
            for (score, i) in scores.iter_mut().zip(0..) {
                *score = if place(*score, i) > last { f32::NEG_INFINITY } else { *score };
            }
        }
        Ok(())
    }
}

impl TopP {
    /// The largest key that stays; `None` where there are none.
    ///
    /// Halves are set apart by their keys until few are left to sort: where probabilities are flat, nearly all stay, and
    /// sorting them would take longer than all else.
    fn last(&self, softmax: &Softmax, mut keys: Vec<u64>) -> Option<u64> {
        const FEW: usize = 512;
        let (mut start, mut end) = (0, keys.len());
        // What the token at `start` and all less probable ones have.
        let mut mass = 1.0f64;
        let mut half = Vec::new();
        while end - start > FEW {
            let middle = (end - start) / 2;
            keys[start..end].select_nth_unstable(middle);
            half.clear();
            half.extend(keys[start..start + middle].iter().map(|&key| -value(key)));
            let rest = mass - sum_exp(&half, softmax.max) / f64::from(softmax.sum);
            if rest as f32 <= self.rest {
                end = start + middle;
            } else {
                (start, mass) = (start + middle, rest);
            }
        }
        keys[start..end].sort_unstable();
        let mut kept = start;
        while kept < end && mass as f32 > self.rest {
            mass -= f64::from(softmax.probability(-value(keys[kept])));
            kept += 1;
        }
        if kept < self.min_keep.min(keys.len()) {
            let more = self.min_keep.min(keys.len()) - kept;
            keys[kept..].select_nth_unstable(more - 1);
            kept += more;
        }
        keys.get(kept.checked_sub(1)?).copied()
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
        rule_out(scores, softmax.below(threshold));
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
        let mut items = LazySort::new(finite(scores).map(|(s, i)| (surprise(s), i)));
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
        if kept < items.len() {
            keep_only(scores, items.indices(kept));
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
        let rare = softmax.below(self.epsilon);
        rule_out(scores, |s| s < safe && rare(s));
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
        let rare = softmax.below(eta);
        rule_out(scores, |s| s < safe && rare(s));
        Ok(())
    }
}
