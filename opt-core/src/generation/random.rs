use super::math::{BLOCK, Exponentials, argmax, exp};
use std::{borrow::Cow, collections::BTreeSet};

/// Random numbers that depend on seed, stream and position alone: Philox4x32-10.
///
/// A generator with memory would give a request other draws when other requests stand in its batch; here the same
/// seed gives the same draws in any company. Algorithm: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy
/// as 1, 2, 3" (SC 2011).
///
/// ```
/// use opt_core::generation::Random;
/// let mut random = Random::new(7, 0);
/// let first = random.uniform();
/// assert!((0.0..1.0).contains(&first));
/// assert_eq!(first, Random::new(7, 0).at(0));
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Random {
    seed: u64,
    stream: u64,
    counter: u64,
}

/// One block of Philox4x32-10.
fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    const MULTIPLIERS: [u64; 2] = [0xD251_1F53, 0xCD9E_8D57];
    const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
    for _ in 0..10 {
        let a = MULTIPLIERS[0] * u64::from(counter[0]);
        let b = MULTIPLIERS[1] * u64::from(counter[2]);
        counter = [
            (b >> 32) as u32 ^ counter[1] ^ key[0],
            b as u32,
            (a >> 32) as u32 ^ counter[3] ^ key[1],
            a as u32,
        ];
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    counter
}

impl Random {
    /// The draws of `seed`; each `stream` of a seed (a return sequence, say) is independent of the others.
    pub fn new(seed: u64, stream: u64) -> Self {
        Self { seed, stream, counter: 0 }
    }

    /// The draw at place `counter`, uniform over [0, 1) with 53 bits.
    pub fn at(&self, counter: u64) -> f64 {
        let low_high = |v: u64| [v as u32, (v >> 32) as u32];
        let ([c0, c1], [c2, c3]) = (low_high(counter), low_high(self.stream));
        let [a, b, _, _] = philox([c0, c1, c2, c3], low_high(self.seed));
        let bits = (u64::from(b) << 32 | u64::from(a)) >> 11;
        bits as f64 / (1u64 << 53) as f64
    }

    /// The next draw, uniform over [0, 1).
    pub fn uniform(&mut self) -> f64 {
        let value = self.at(self.counter);
        self.counter = self.counter.wrapping_add(1);
        value
    }

    /// Draws an index from softmax(`scores`) with one uniform number.
    ///
    /// Where no score is above negative infinity there is nothing to draw from, and it is [`argmax`]'s index.
    pub fn sample(&mut self, scores: &[f32]) -> usize {
        self.sample_by(scores, &Exponentials::of(scores))
    }

    /// [`Random::sample`] where the exponentials are known.
    pub(super) fn sample_by(&mut self, scores: &[f32], exponentials: &Exponentials) -> usize {
        let draw = self.uniform();
        pick(scores, exponentials, draw, &[]).unwrap_or_else(|| argmax(scores).unwrap_or(0))
    }

    /// Draws `n` different indices in turn, each from the softmax of those not drawn yet, with one uniform number each.
    ///
    /// Where fewer than `n` have a probability, the lowest indices of the others follow; never more than there are.
    pub fn sample_without_replacement(&mut self, scores: &[f32], n: usize) -> Vec<usize> {
        let n = n.min(scores.len());
        let mut drawn: Vec<usize> = Vec::with_capacity(n);
        let exponentials = Exponentials::of(scores);
        while drawn.len() < n {
            let draw = self.uniform();
            let next = pick(scores, &exponentials, draw, &drawn)
                .or_else(|| (0..scores.len()).find(|i| !drawn.contains(i)));
            drawn.extend(next);
        }
        drawn
    }
}

/// The index at which the running sum of probabilities, without the `skipped`, passes `draw` of the whole.
fn pick(scores: &[f32], exponentials: &Exponentials, draw: f64, skipped: &[usize]) -> Option<usize> {
    let max = exponentials.max;
    let weight = |i: usize| match scores.get(i) {
        // Most scores are negative infinity after filtering, and few indices are skipped.
        Some(&s) if s > f32::NEG_INFINITY && !skipped.contains(&i) => f64::from(exp(s - max)),
        _ => 0.0,
    };
    // Exponentials have been taken once, and are again only in the block that is hit and those with skipped indices.
    let block = |b: usize| b * BLOCK..((b + 1) * BLOCK).min(scores.len());
    let mut sums = Cow::Borrowed(&exponentials.blocks);
    let hit: BTreeSet<usize> = skipped.iter().map(|i| i / BLOCK).collect();
    for b in hit {
        if let Some(sum) = sums.to_mut().get_mut(b) {
            *sum = block(b).map(weight).sum();
        }
    }
    let target = draw * sums.iter().sum::<f64>();
    let (mut before, mut last) = (0.0, None);
    for (b, sum) in sums.iter().enumerate().filter(|(_, sum)| **sum > 0.0) {
        last = Some(b);
        if before + sum > target {
            break;
        }
        before += sum;
    }
    // Rounding may leave the target behind the last sum: then it is the last index that has a weight.
    let (mut sum, mut found) = (before, None);
    for i in block(last?).filter(|i| weight(*i) > 0.0) {
        found = Some(i);
        sum += weight(i);
        if sum > target {
            break;
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        config::OptConfig,
        generation::{Extras, GenerationConfig, Hooks, ProcessorChain, math::softmax},
    };

    /// The vectors for `philox4x32 10` that the authors publish with Random123 (kat_vectors).
    #[test]
    fn philox_gives_the_published_numbers() {
        let all = u32::MAX;
        let pi = [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344];
        assert_eq!(philox([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox([all; 4], [all; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        assert_eq!(
            philox(pi, [0xa409_3822, 0x299f_31d0]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn draws_depend_on_seed_stream_and_place_alone() {
        let mut random = Random::new(3, 1);
        let draws: Vec<f64> = (0..4).map(|_| random.uniform()).collect();
        let again = Random::new(3, 1);
        assert_eq!(draws, (0..4).map(|i| again.at(i)).collect::<Vec<_>>());
        assert_eq!(Random::new(0, 0).at(0), ((0xe169_c58d_6627_e8d5u64 >> 11) as f64) / 2f64.powi(53));
        let others = [Random::new(4, 1), Random::new(3, 2), Random::new(3 << 32, 1), Random::new(3, 1 << 32)];
        for other in others {
            assert!((0..4).all(|i| other.at(i) != again.at(i)), "{other:?}");
        }
    }

    /// Fails where counts are as far from the expected as one in a million is by chance (Wilson and Hilferty's
    /// approximation of the chi-square quantile).
    fn assert_follows(counts: &[u64], expected: &[f64]) {
        let n: u64 = counts.iter().sum();
        let possible = || counts.iter().zip(expected).filter(|(_, p)| **p > 0.0);
        assert!(
            counts.iter().zip(expected).all(|(c, p)| *p > 0.0 || *c == 0),
            "drew the impossible: {counts:?}"
        );
        let found: f64 = possible().map(|(&c, p)| (c as f64 - n as f64 * p).powi(2) / (n as f64 * p)).sum();
        let freedom = (possible().count() - 1) as f64;
        let spread = 2.0 / (9.0 * freedom);
        let limit = freedom * (1.0 - spread + 4.753 * spread.sqrt()).powi(3);
        assert!(found < limit, "chi-square {found}, limit {limit}: {counts:?}");
    }

    const SCORES: [f32; 8] = [1.0, 2.5, -1.0, 0.0, f32::NEG_INFINITY, 2.5, 1.9, -0.5];

    #[test]
    fn samples_follow_the_processed_distribution() {
        let model = OptConfig { vocab_size: 8, ..OptConfig::default() };
        let plain = GenerationConfig::default().do_sample(true).top_k(0);
        let configs = [
            plain.clone(),
            plain.clone().temperature(0.6),
            plain.clone().top_k(3),
            plain.clone().top_p(0.8),
            plain.clone().min_p(0.2).temperature(1.7),
            plain.typical_p(0.7),
        ];
        for (stream, config) in configs.iter().enumerate() {
            let (settings, _) = config.resolve(&model, &[1], 0, &Extras::default()).unwrap();
            let chain = ProcessorChain::new(config, &settings, &Hooks::default()).unwrap();
            let mut scores = SCORES;
            chain.apply(&[1], &mut scores).unwrap();
            let expected: Vec<f64> = softmax(&scores).into_iter().map(f64::from).collect();
            let (mut random, mut counts) = (Random::new(11, stream as u64), [0u64; 8]);
            (0..40_000).for_each(|_| counts[random.sample(&scores)] += 1);
            assert_follows(&counts, &expected);
        }
    }

    #[test]
    fn pairs_without_replacement_follow_their_distribution() {
        let p: Vec<f64> = softmax(&SCORES).into_iter().map(f64::from).collect();
        let mut expected = vec![0.0; 64];
        for (i, j) in (0..64).map(|pair| (pair / 8, pair % 8)).filter(|(i, j)| i != j) {
            expected[i * 8 + j] = p[i] * p[j] / (1.0 - p[i]);
        }
        let (mut random, mut counts) = (Random::new(12, 0), vec![0u64; 64]);
        for _ in 0..60_000 {
            let pair = random.sample_without_replacement(&SCORES, 2);
            counts[pair[0] * 8 + pair[1]] += 1;
        }
        assert_follows(&counts, &expected);
    }

    #[test]
    fn rows_with_little_to_draw_from() {
        let none = [f32::NEG_INFINITY; 3];
        let one = [f32::NEG_INFINITY, f32::NEG_INFINITY, 0.5];
        let mut random = Random::new(1, 0);
        for _ in 0..50 {
            assert_eq!(random.sample(&one), 2);
            assert_eq!(random.sample(&none), 0);
            assert_eq!(random.sample_without_replacement(&one, 2), [2, 0]);
        }
        assert_eq!(random.sample_without_replacement(&one, 9).len(), 3);
        assert_eq!(random.sample(&[f32::NAN, 1.0]), 1);
        assert_eq!(random.sample(&[]), 0);
    }
}
