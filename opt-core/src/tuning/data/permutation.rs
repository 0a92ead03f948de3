//! Orders that need no memory: the place of each item is computed.

use crate::generation::Random;

/// A random order of `len` items: place to item, each item once.
///
/// A Feistel network over the smallest square of a power of two that holds `len`, walked on until it lands below
/// (Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002). Its round function is Philox, so the
/// order depends on seed, stream and length alone, on every machine.
#[derive(Debug, Clone)]
pub(super) struct Permutation {
    random: Random,
    len: u64,
    /// Bits of each half.
    bits: u32,
}

/// Rounds of a network whose halves have so many bits. Four make large ones indistinguishable from random; where
/// there are few functions to draw, orders are even only after many.
fn rounds(bits: u32) -> u64 {
    if bits < 4 { 40 } else { 12 }
}

impl Permutation {
    /// Order number `stream` of those of `seed`.
    pub(super) fn new(len: u64, seed: u64, stream: u64) -> Self {
        // Bits that hold len - 1, in two halves.
        let bits = (u64::BITS - len.saturating_sub(1).leading_zeros()).div_ceil(2).max(1);
        Self { random: Random::new(seed, stream), len, bits }
    }

    /// The item at `place`, which must be below the length; places past it give themselves.
    pub(super) fn at(&self, place: u64) -> u64 {
        if place >= self.len {
            return place;
        }
        let mut at = place;
        // A permutation of the square: walking it from a place below leads back below.
        loop {
            at = self.shuffle(at);
            if at < self.len {
                return at;
            }
        }
    }

    fn shuffle(&self, place: u64) -> u64 {
        let mask = (1_u64 << self.bits) - 1;
        let (mut left, mut right) = (place >> self.bits, place & mask);
        for round in 0..rounds(self.bits) {
            let draw = (self.random.at(round << 32 | right) * 2.0_f64.powi(32)) as u64;
            // The upper bits: 32 of them were drawn.
            let key = draw >> (32 - self.bits);
            (left, right) = (right, left ^ key);
        }
        left << self.bits | right
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    fn order(len: u64, seed: u64, stream: u64) -> Vec<u64> {
        let order = Permutation::new(len, seed, stream);
        (0..len).map(|place| order.at(place)).collect()
    }

    #[test]
    fn each_item_once() {
        for len in (0..70).chain([255, 256, 257, 1000, 4097, 65_536, 100_003]) {
            let mut items = order(len, 7, 1);
            items.sort_unstable();
            assert!(items.into_iter().eq(0..len), "{len}");
        }
        // A length whose halves are as large as they get.
        let huge = Permutation::new(u64::MAX, 7, 1);
        assert!((0..100).all(|place| huge.at(place) < u64::MAX));
    }

    #[test]
    fn seeds_and_streams_differ_and_repeat() {
        assert_eq!(order(1000, 3, 4), order(1000, 3, 4));
        assert_ne!(order(1000, 3, 4), order(1000, 3, 5));
        assert_ne!(order(1000, 3, 4), order(1000, 4, 4));
        // The same on every machine: these were computed once.
        assert_eq!(order(10, 7, 0), FIRST);
    }

    const FIRST: [u64; 10] = [1, 2, 0, 6, 3, 4, 5, 7, 8, 9];

    /// All orders of few items are about equally frequent.
    #[test]
    fn small_orders_are_uniform() {
        for (len, orders) in [(2, 2), (3, 6), (4, 24), (5, 120)] {
            let mut counts: HashMap<Vec<u64>, f64> = HashMap::new();
            let draws = 80 * orders;
            for seed in 0..draws {
                *counts.entry(order(len, seed, 0)).or_default() += 1.0;
            }
            assert_eq!(counts.len() as u64, orders);
            let chi: f64 = counts.values().map(|n| (n - 80.0) * (n - 80.0) / 80.0).sum();
            let freedom = orders as f64 - 1.0;
            assert!(chi < freedom + 4.0 * (2.0 * freedom).sqrt(), "{len} items: χ² {chi} of {freedom}");
        }
    }

    /// One item stays where it is, and one follows the one before it, in the mean over seeds.
    #[test]
    fn orders_of_some_items_look_random() {
        for len in [6, 10, 16, 17, 40] {
            let (mut fixed, mut runs) = (0, 0);
            for seed in 0..400 {
                let items = order(len, seed, 3);
                fixed += items.iter().zip(0..).filter(|(item, place)| *item == place).count();
                runs += items.windows(2).filter(|pair| pair[1] == pair[0] + 1).count();
            }
            let expected = [400.0, 400.0 * (len as f64 - 1.0) / len as f64];
            for (found, expected) in [fixed, runs].into_iter().zip(expected) {
                assert!((found as f64 - expected).abs() < 80.0, "{len}: {found}, expected {expected}");
            }
        }
    }

    /// Places and items are not related: no drift, no runs.
    #[test]
    fn large_orders_are_mixed() {
        let items = order(10_007, 1, 2);
        let moved: f64 = items.iter().enumerate().map(|(i, &item)| (i as f64 - item as f64).abs()).sum();
        // Of a random order: a third of the length.
        assert!((moved / 10_007.0 / 10_007.0 - 1.0 / 3.0).abs() < 0.01);
        let runs = items.windows(2).filter(|pair| pair[1] == pair[0] + 1).count();
        assert!(runs < 10, "{runs}");
    }
}
