use super::{mersenne::Mersenne, room};
use crate::{Result, error::at_least};

/// NumPy's legacy generator after `numpy.random.seed(seed)`.
///
/// ```
/// use opt_metrics::random::NumpyRandom;
/// // numpy.random.seed(0); numpy.random.choice(10, size=5)
/// assert_eq!(NumpyRandom::new(0).choice(10, 5)?, [5, 0, 3, 3, 7]);
/// # Ok::<(), opt_metrics::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct NumpyRandom(Mersenne);

impl NumpyRandom {
    /// The state that `numpy.random.seed(seed)` sets.
    pub fn new(seed: u32) -> Self {
        Self(Mersenne::from_word(seed))
    }

    /// `numpy.random.choice(n, size=k)`: `k` indices below `n`, with replacement.
    ///
    /// # Errors
    /// [`crate::Error::TooFew`] for `n` = 0; [`crate::Error::Option`] for more than memory can hold.
    pub fn choice(&mut self, n: usize, k: usize) -> Result<Vec<usize>> {
        at_least("population to choose from", 1, n)?;
        let largest = n as u64 - 1;
        // Bits of the largest index, so that at least half of the draws count.
        let mask = u64::MAX.checked_shr(largest.leading_zeros()).unwrap_or(0);
        let mut drawn = room(k)?;
        while drawn.len() < k {
            let bits = match u32::try_from(largest) {
                Ok(0) => 0, // takes nothing from the generator
                Ok(_) => u64::from(self.0.word()),
                // Above 32 bits a draw is two words, the high one first.
                Err(_) => u64::from(self.0.word()) << 32 | u64::from(self.0.word()),
            };
            if bits & mask <= largest {
                drawn.push((bits & mask) as usize);
            }
        }
        Ok(drawn)
    }
}
