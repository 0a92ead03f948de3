use super::math::{argmax, exp_difference, maximum};

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
        let draw = self.uniform();
        pick(scores, draw, |_| false).unwrap_or_else(|| argmax(scores).unwrap_or(0))
    }

    /// Draws `n` different indices in turn, each from the softmax of those not drawn yet, with one uniform number each.
    ///
    /// Where fewer than `n` have a probability, the lowest indices of the others follow; never more than there are.
    pub fn sample_without_replacement(&mut self, scores: &[f32], n: usize) -> Vec<usize> {
        let n = n.min(scores.len());
        let mut drawn: Vec<usize> = Vec::with_capacity(n);
        while drawn.len() < n {
            let draw = self.uniform();
            let next = pick(scores, draw, |i| drawn.contains(&i))
                .or_else(|| (0..scores.len()).find(|i| !drawn.contains(i)));
            drawn.extend(next);
        }
        drawn
    }
}

/// The index at which the running sum of probabilities, without the `skip`ped, passes `draw` of the whole.
fn pick(scores: &[f32], draw: f64, skip: impl Fn(usize) -> bool) -> Option<usize> {
    let max = f64::from(maximum(scores));
    if !max.is_finite() {
        return None;
    }
    let weights =
        || scores.iter().enumerate().filter(|(i, _)| !skip(*i)).map(|(i, &s)| (i, exp_difference(s, max)));
    let target = draw * weights().map(|(_, w)| w).sum::<f64>();
    let mut sum = 0.0;
    let mut last = None;
    for (i, weight) in weights().filter(|(_, w)| *w > 0.0) {
        sum += weight;
        last = Some(i);
        if sum > target {
            break;
        }
    }
    last
}
