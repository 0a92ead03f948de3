/// Words of the generator's state.
const N: usize = 624;
/// How far ahead a word of the next state looks.
const M: usize = 397;

/// MT19937 of Matsumoto and Nishimura, "Mersenne Twister: A 623-dimensionally equidistributed uniform pseudo-random
/// number generator" (1998), with the initialisation of 2002.
#[derive(Debug, Clone)]
pub(super) struct Mersenne {
    state: Box<[u32; N]>,
    next: usize,
}

impl Mersenne {
    /// `init_genrand`: from one word.
    pub(super) fn from_word(seed: u32) -> Self {
        let mut state = Box::new([0; N]);
        let mut word = seed;
        for (i, slot) in (1_u32..).zip(state.iter_mut()) {
            *slot = word;
            word = 1_812_433_253_u32.wrapping_mul(word ^ (word >> 30)).wrapping_add(i);
        }
        Self { state, next: N }
    }

    /// `init_by_array`: from any number of words; none is the same as one zero.
    pub(super) fn from_words(words: &[u32]) -> Self {
        let key = if words.is_empty() { &[0] } else { words };
        let mut made = Self::from_word(19_650_218);
        let state = &mut made.state;
        let mut i = 1;
        let mut keys = key.iter().zip(0_u32..).cycle();
        for _ in 0..key.len().max(N) {
            let (&word, place) = keys.next().unwrap_or((&0, 0));
            let before = state[i - 1];
            state[i] = (state[i] ^ (before ^ (before >> 30)).wrapping_mul(1_664_525))
                .wrapping_add(word)
                .wrapping_add(place);
            i += 1;
            if i == N {
                state[0] = state[N - 1];
                i = 1;
            }
        }
        for _ in 1..N {
            let before = state[i - 1];
            state[i] =
                (state[i] ^ (before ^ (before >> 30)).wrapping_mul(1_566_083_941)).wrapping_sub(i as u32);
            i += 1;
            if i == N {
                state[0] = state[N - 1];
                i = 1;
            }
        }
        state[0] = 0x8000_0000;
        made
    }

    /// The next 32 bits.
    pub(super) fn word(&mut self) -> u32 {
        if self.next >= N {
            self.twist();
            self.next = 0;
        }
        let mut y = self.state[self.next];
        self.next += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c_5680;
        y ^= (y << 15) & 0xefc6_0000;
        y ^ (y >> 18)
    }

    fn twist(&mut self) {
        for i in 0..N {
            let y = (self.state[i] & 0x8000_0000) | (self.state[(i + 1) % N] & 0x7fff_ffff);
            let odd = if y & 1 == 1 { 0x9908_b0df } else { 0 };
            self.state[i] = self.state[(i + M) % N] ^ (y >> 1) ^ odd;
        }
    }
}
