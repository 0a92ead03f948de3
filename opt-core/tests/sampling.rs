//! Draws through the whole engine: their distribution, and that seed and nothing else decides them.

mod common;

use common::{
    backend::{assert_same, difference},
    tiny::{Tiny, random_ids},
};
use opt_core::{Opt, Request, generation::GenerationConfig};
use std::sync::LazyLock;

const VOCAB: usize = 12;

fn tiny() -> Tiny {
    Tiny { vocab: VOCAB, hidden: 16, embed: 16, ..Tiny::default() }
}

static OPT: LazyLock<Opt> = LazyLock::new(|| tiny().opt());

const PROMPT: [u32; 5] = [3, 1, 4, 1, 5];

fn plain() -> GenerationConfig {
    GenerationConfig::default().do_sample(true).top_k(0).max_new_tokens(1)
}

/// The filters by their definitions, in f64: temperature, then the k most probable, then the fewest most probable
/// that together reach `top_p`, then those with at least `min_p` of the largest.
fn distribution(logits: &[f32], temperature: f64, k: usize, top_p: f64, min_p: f64) -> Vec<f64> {
    let normal = |weights: Vec<f64>| -> Vec<f64> {
        let sum: f64 = weights.iter().sum();
        weights.into_iter().map(|w| w / sum).collect()
    };
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut p = normal(logits.iter().map(|l| (f64::from(l - max) / temperature).exp()).collect());
    let mut order: Vec<usize> = (0..p.len()).collect();
    order.sort_by(|a, b| p[*b].total_cmp(&p[*a]));
    order.iter().skip(k).for_each(|i| p[*i] = 0.0);
    p = normal(p);
    let mut before = 0.0;
    for &i in &order {
        let own = p[i];
        if before >= top_p {
            p[i] = 0.0;
        }
        before += own;
    }
    p = normal(p);
    let least = min_p * p[order[0]];
    normal(p.into_iter().map(|p| if p < least { 0.0 } else { p }).collect())
}

/// Fails where counts are as far from the expected as one in a million is by chance (Wilson and Hilferty's
/// approximation of the chi-square quantile), or where the impossible was drawn.
#[track_caller]
fn assert_follows(counts: &[u64], expected: &[f64]) {
    let n: u64 = counts.iter().sum();
    assert!(counts.iter().zip(expected).all(|(c, p)| *p > 0.0 || *c == 0), "impossible: {counts:?}");
    // Categories of fewer than five expected draws are counted as one.
    let expected_draws = expected.iter().map(|p| p * n as f64);
    let (mut rare, mut cells) = ((0.0, 0.0), Vec::new());
    for (count, draws) in counts.iter().zip(expected_draws).filter(|(_, draws)| *draws > 0.0) {
        match draws < 5.0 {
            true => rare = (rare.0 + *count as f64, rare.1 + draws),
            false => cells.push((*count as f64, draws)),
        }
    }
    cells.extend((rare.1 > 0.5).then_some(rare));
    assert!(cells.len() > 1, "only one token is likely: the test shows nothing");
    let found: f64 = cells.iter().map(|(count, draws)| (count - draws).powi(2) / draws).sum();
    let freedom = (cells.len() - 1) as f64;
    let spread = 2.0 / (9.0 * freedom);
    let limit = freedom * (1.0 - spread + 4.753 * spread.sqrt()).powi(3);
    assert!(found < limit, "chi-square {found:.1}, limit {limit:.1}: {counts:?}, expected {expected:?}");
}

#[test]
fn first_tokens_follow_the_processed_distribution() {
    let logits = OPT.logits(&PROMPT).unwrap().row(PROMPT.len() - 1).to_vec();
    let all = usize::MAX;
    let cases = [
        (plain(), distribution(&logits, 1.0, all, 1.0, 0.0)),
        (plain().temperature(3.0), distribution(&logits, 3.0, all, 1.0, 0.0)),
        (plain().temperature(2.5).top_k(4), distribution(&logits, 2.5, 4, 1.0, 0.0)),
        (plain().temperature(4.0).top_p(0.8), distribution(&logits, 4.0, all, 0.8, 0.0)),
        (plain().temperature(4.0).min_p(0.2), distribution(&logits, 4.0, all, 1.0, 0.2)),
        (plain().temperature(5.0).top_k(6).top_p(0.9), distribution(&logits, 5.0, 6, 0.9, 0.0)),
    ];
    for (i, (config, expected)) in cases.iter().enumerate() {
        let mut counts = [0u64; VOCAB];
        // Seeds one after the other, as users choose them, in batches.
        for batch in 0..40u64 {
            let seeds = (0..100).map(|s| (i as u64) << 40 | (batch * 100 + s));
            let requests = seeds.map(|s| Request::new(&PROMPT[..]).config(config.clone().seed(s)));
            for found in OPT.generate_batch(requests).unwrap() {
                counts[found.ids()[0] as usize] += 1;
            }
        }
        assert_follows(&counts, expected);
        // And the sequences of one seed.
        let mut counts = [0u64; VOCAB];
        for seed in 0..20 {
            let config = config.clone().num_return_sequences(200).seed(seed);
            for sequence in OPT.generate(&PROMPT[..], &config).unwrap().sequences {
                counts[sequence.ids[0] as usize] += 1;
            }
        }
        assert_follows(&counts, expected);
    }
}

/// Drafts change how the draws are made, not what they follow. The first token is drawn before any draft, the second
/// is drafted.
#[test]
fn assisted_samples_follow_the_targets_distribution() {
    let draft = Tiny { layers: 1, ..tiny() }.opt();
    let config = plain().temperature(3.0).max_new_tokens(3);
    let first = distribution(&OPT.logits(&PROMPT).unwrap().row(4).to_vec(), 3.0, usize::MAX, 1.0, 0.0);
    let mut expected = vec![0.0; VOCAB * VOCAB];
    for (a, p) in first.iter().enumerate() {
        let logits = OPT.logits(&[&PROMPT[..], &[a as u32]].concat()).unwrap().row(5).to_vec();
        let second = distribution(&logits, 3.0, usize::MAX, 1.0, 0.0);
        second.iter().enumerate().for_each(|(b, q)| expected[a * VOCAB + b] = p * q);
    }
    let mut counts = vec![0u64; VOCAB * VOCAB];
    for batch in 0..60u64 {
        let requests = (0..100).map(|s| {
            let config = config.clone().seed(batch * 100 + s).assistant_confidence_threshold(0.0);
            Request::new(&PROMPT[..]).config(config).assistant(draft.clone())
        });
        for found in OPT.generate_batch(requests).unwrap() {
            let ids = found.ids();
            counts[ids[0] as usize * VOCAB + ids[1] as usize] += 1;
        }
    }
    assert_follows(&counts, &expected);
}

fn requests() -> Vec<Request> {
    let request = |seed: u64| {
        let config =
            GenerationConfig::default().do_sample(true).seed(seed).temperature(1.0 + seed as f32 / 5.0);
        let config = config.top_k(0).max_new_tokens(5 + 4 * seed as usize);
        let config = match seed % 4 {
            1 => config.top_p(0.9).num_return_sequences(3),
            2 => config.num_beams(3),
            _ => config,
        };
        Request::new(random_ids(seed, 3 + 5 * seed as usize, 300)).config(config)
    };
    (0..8).map(request).collect()
}

#[test]
fn a_seed_gives_the_same_on_any_threads_and_in_any_company() {
    // Wide enough that work is divided among threads.
    let tiny = Tiny { vocab: 300, hidden: 96, embed: 96, heads: 3, context: 128, ..Tiny::default() };
    let one = tiny.on_threads(1);
    let alone: Vec<_> = requests().into_iter().map(|r| one.generate_batch([r]).unwrap().remove(0)).collect();
    for (request, found) in requests().iter().zip(&alone) {
        assert_eq!(Some(found.seed), request.config.seed);
    }
    for threads in 1..=3 {
        let opt = tiny.on_threads(threads);
        let orders: [Vec<usize>; 4] =
            [(0..8).collect(), (0..8).rev().collect(), vec![5, 0, 7, 0], vec![6, 2, 2, 2, 1]];
        for order in orders {
            let all = requests();
            let found = opt.generate_batch(order.iter().map(|i| all[*i].clone())).unwrap();
            for (i, found) in order.iter().zip(found) {
                let alone = &alone[*i];
                assert_eq!((&found.prompt_ids, found.seed), (&alone.prompt_ids, alone.seed));
                let difference = difference(&found.sequences, &alone.sequences);
                assert_eq!(difference, None, "request {i} with {threads} threads in {order:?}");
            }
        }
    }
}

#[test]
fn other_seeds_give_other_texts() {
    let config = plain().temperature(4.0).max_new_tokens(24);
    let mut texts: Vec<Vec<u32>> = (0..50)
        .map(|seed| OPT.generate(&PROMPT[..], &config.clone().seed(seed)).unwrap().ids().to_vec())
        .collect();
    // Without a seed each request has its own, which it tells.
    let same = vec![Request::new(&PROMPT[..]).config(config.clone()); 10];
    for found in OPT.generate_batch(same).unwrap() {
        let again = OPT.generate(&PROMPT[..], &config.clone().seed(found.seed)).unwrap();
        assert_same(&again.sequences, &found.sequences);
        texts.push(found.ids().to_vec());
    }
    let several = OPT.generate(&PROMPT[..], &config.num_return_sequences(20).seed(1000)).unwrap();
    texts.extend(several.sequences.into_iter().map(|sequence| sequence.ids));
    let count = texts.len();
    texts.sort();
    texts.dedup();
    assert_eq!(texts.len(), count, "two texts are the same");
}
