use super::{mersenne::Mersenne, room};
use crate::{Error, Result, error::at_least};
use std::collections::HashSet;

/// Python's `random.Random(seed)`, for seeds that are integers from 0 on; checked against CPython 3.11.
///
/// The methods give indices where Python's give elements, so that one generator serves lists of anything.
///
/// ```
/// use opt_metrics::random::PythonRandom;
/// let mut random = PythonRandom::new(42);
/// assert_eq!(random.random(), 0.6394267984578837); // random.Random(42).random()
///
/// // random.Random(1234).sample(range(100), 3)
/// assert_eq!(PythonRandom::new(1234).sample(100, 3)?, [99, 56, 14]);
/// # Ok::<(), opt_metrics::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct PythonRandom(Mersenne);

impl PythonRandom {
    /// The generator of a seed.
    pub fn new(seed: u64) -> Self {
        let words = [seed as u32, (seed >> 32) as u32];
        // Python takes as many words as the number has.
        let used = if seed > u64::from(u32::MAX) { &words[..] } else { &words[..1] };
        Self(Mersenne::from_words(used))
    }

    /// `random()`: a multiple of 2⁻⁵³ in [0, 1).
    pub fn random(&mut self) -> f64 {
        let (high, low) = (self.0.word() >> 5, self.0.word() >> 6);
        (f64::from(high) * 67_108_864.0 + f64::from(low)) / 9_007_199_254_740_992.0
    }

    /// `getrandbits(k)`, for at most 128 bits.
    ///
    /// # Errors
    /// [`Error::Option`] for more.
    pub fn getrandbits(&mut self, k: u32) -> Result<u128> {
        if k > 128 {
            return Err(Error::option("number of random bits", k, "at most 128"));
        }
        Ok(self.bits(k))
    }

    /// Whole words from the lowest on; of the last only the upper bits are used.
    fn bits(&mut self, k: u32) -> u128 {
        let mut made = 0;
        let mut at = 0;
        while at < k {
            let word = self.0.word() >> (32 - (k - at).min(32));
            made |= u128::from(word) << at;
            at += 32;
        }
        made
    }

    /// `_randbelow(n)`: uniform over 0..n, by drawing as many bits as `n` has until they are below it.
    ///
    /// # Errors
    /// [`Error::TooFew`] for `n` = 0.
    pub fn randbelow(&mut self, n: u64) -> Result<u64> {
        at_least("numbers to draw from", 1, usize::from(n > 0))?;
        Ok(self.below(u128::from(n)) as u64)
    }

    /// Needs n > 0.
    fn below(&mut self, n: u128) -> u128 {
        let k = u128::BITS - n.leading_zeros();
        loop {
            let drawn = self.bits(k);
            if drawn < n.max(1) {
                return drawn;
            }
        }
    }

    /// As [`Self::below`], for indices.
    fn index(&mut self, n: usize) -> usize {
        self.below(n as u128) as usize
    }

    /// `randint(low, high)`, both ends included.
    ///
    /// # Errors
    /// [`Error::Option`] if `high` is below `low`.
    pub fn randint(&mut self, low: i64, high: i64) -> Result<i64> {
        let width = i128::from(high) - i128::from(low) + 1;
        let width = u128::try_from(width).ok().filter(|&w| w > 0);
        let width =
            width.ok_or_else(|| Error::option("upper end of randint", high, "no less than the lower end"))?;
        Ok((i128::from(low) + self.below(width) as i128) as i64)
    }

    /// `shuffle(items)`, in place.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            let j = self.index(i + 1);
            items.swap(i, j);
        }
    }

    /// `sample(range(n), k)`: `k` different indices below `n`, in the order drawn.
    ///
    /// # Errors
    /// [`Error::TooFew`] if `k` is more than `n`; [`Error::Option`] for more than memory can hold.
    pub fn sample(&mut self, n: usize, k: usize) -> Result<Vec<usize>> {
        at_least("population to sample from", k, n)?;
        // Above this a set of the drawn takes less space than a list of all; Python's estimate of both.
        let mut set_size = 21.0;
        if k > 5 {
            set_size += 4_f64.powf(((k as f64 * 3.0).ln() / 4_f64.ln()).ceil());
        }
        let mut drawn = Vec::new();
        if n as f64 <= set_size {
            let mut pool = room(n)?;
            pool.extend(0..n);
            for left in (n - k + 1..=n).rev() {
                // The last of those left takes the place of the drawn one.
                drawn.push(pool.swap_remove(self.index(left)));
            }
        } else {
            let mut seen = HashSet::new();
            while drawn.len() < k {
                let j = self.index(n);
                if seen.insert(j) {
                    drawn.push(j);
                }
            }
        }
        Ok(drawn)
    }

    /// `choices(range(n), k=k)`: `k` indices below `n`, with replacement.
    ///
    /// # Errors
    /// [`Error::TooFew`] for `n` = 0, unless `k` is 0 too; [`Error::Option`] for more than memory can hold.
    pub fn choices(&mut self, n: usize, k: usize) -> Result<Vec<usize>> {
        if k > 0 {
            at_least("population to choose from", 1, n)?;
        }
        let mut drawn = room(k)?;
        self.choices_into(n, k, &mut drawn);
        Ok(drawn)
    }

    /// As [`Self::choices`], in a list used again; needs n > 0 or k = 0.
    pub(crate) fn choices_into(&mut self, n: usize, k: usize, drawn: &mut Vec<usize>) {
        drawn.clear();
        let last = n.saturating_sub(1);
        drawn.extend((0..k).map(|_| ((self.random() * n as f64) as usize).min(last)));
    }
}
