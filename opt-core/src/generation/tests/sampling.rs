//! Distributions of what is drawn, against the exact ones.

use super::toy::{Toy, drive, log_softmax, request};
use crate::generation::*;
use std::collections::HashMap;

const VOCAB: usize = 4;
const DRAWS: u64 = 20_000;

/// Pearson's χ² of `counts` against `expected` probabilities, and the degrees of freedom.
fn chi_square(counts: &HashMap<Vec<u32>, u64>, expected: &HashMap<Vec<u32>, f64>) -> (f64, usize) {
    let total: u64 = counts.values().sum();
    assert!(counts.keys().all(|k| expected.contains_key(k)), "something impossible was drawn");
    let terms = expected.iter().map(|(outcome, p)| {
        let wanted = p * total as f64;
        (counts.get(outcome).copied().unwrap_or(0) as f64 - wanted).powi(2) / wanted
    });
    (terms.sum(), expected.len() - 1)
}

/// Fails where χ² is further than 5 standard deviations (√2n) above its mean n.
#[track_caller]
fn fits(counts: &HashMap<Vec<u32>, u64>, expected: &HashMap<Vec<u32>, f64>) {
    let (chi, freedom) = chi_square(counts, expected);
    let n = freedom as f64;
    assert!(chi < n + 5.0 * (2.0 * n).sqrt(), "χ² {chi} with {freedom} degrees of freedom");
}

/// Probabilities of all outputs behind `prompt`; `change` is what processors make of a row of logits.
fn exact(
    toy: &Toy,
    prompt: &[u32],
    max_new: usize,
    eos: u32,
    change: impl Fn(&mut [f32]),
) -> HashMap<Vec<u32>, f64> {
    let mut outcomes = HashMap::new();
    let mut open = vec![(Vec::new(), 1.0f64)];
    while let Some((ids, p)) = open.pop() {
        let mut row = (toy.logits)(&[prompt, &ids].concat());
        change(&mut row);
        for (id, log_prob) in log_softmax(&row).into_iter().enumerate().filter(|(_, l)| l.is_finite()) {
            let longer = ([&ids[..], &[id as u32]].concat(), p * log_prob.exp());
            match longer.0.len() == max_new || id as u32 == eos {
                true => drop(outcomes.insert(longer.0, longer.1)),
                false => open.push(longer),
            }
        }
    }
    outcomes
}

fn counts(
    prompt: &[u32],
    config: &GenerationConfig,
    method: &Method,
    toy: &Toy,
    draft: Option<&Toy>,
) -> HashMap<Vec<u32>, u64> {
    let mut counts = HashMap::new();
    for seed in 0..DRAWS {
        let request = request(prompt, VOCAB, config, |s| (s.method, s.seed) = (method.clone(), seed));
        let output = drive(request, toy, draft).outputs.remove(0);
        *counts.entry(output.ids).or_insert(0) += 1;
    }
    counts
}

fn config(max_new: usize) -> GenerationConfig {
    GenerationConfig {
        do_sample: Some(true),
        max_new_tokens: Some(max_new),
        top_k: Some(0),
        eos_token_id: Some(TokenIds::One(3)),
        ..GenerationConfig::default()
    }
}

#[test]
fn plain_sampling() {
    let toy = Toy::new(5, VOCAB, 3, 1.5);
    let counts = counts(&[0, 1], &config(3), &Method::Single, &toy, None);
    fits(&counts, &exact(&toy, &[0, 1], 3, 3, |_| {}));
}

#[test]
fn plain_sampling_in_one_request() {
    let toy = Toy::new(5, VOCAB, 3, 1.5);
    let request = request(&[0, 1], VOCAB, &config(3), |s| (s.num_return_sequences, s.seed) = (10_000, 9));
    let mut counts = HashMap::new();
    for output in drive(request, &toy, None).outputs {
        *counts.entry(output.ids).or_insert(0) += 1;
    }
    fits(&counts, &exact(&toy, &[0, 1], 3, 3, |_| {}));
}

/// A sequence is what it is alone, whatever else the request returns.
#[test]
fn sequences_have_their_own_draws() {
    let toy = Toy::new(6, VOCAB, 3, 1.0);
    let with = |n| {
        drive(request(&[1], VOCAB, &config(8), |s| (s.num_return_sequences, s.seed) = (n, 3)), &toy, None)
    };
    let (one, five) = (with(1).outputs, with(5).outputs);
    assert_eq!(one[0], five[0]);
    assert!(five[1..].iter().any(|o| o.ids != five[0].ids));
}

/// Whatever the draft model is like, the target's distribution is what comes out.
#[test]
fn assisted_sampling_is_distributed_as_the_target() {
    let toy = Toy::new(7, VOCAB, 3, 1.5);
    let expected = exact(&toy, &[0, 2], 4, 3, |_| {});
    for (seed, spread) in [(7, 1.5), (70, 1.5), (71, 4.0)] {
        for (tokens, confidence) in [(2, 0.0), (3, 0.3)] {
            let draft = Toy::new(seed, VOCAB, 2, spread);
            let schedule = AssistantSchedule::Heuristic;
            let method = Method::Assisted { tokens, schedule, confidence };
            fits(&counts(&[0, 2], &config(4), &method, &toy, Some(&draft)), &expected);
        }
    }
}

#[test]
fn assisted_sampling_draws_from_processed_scores() {
    let (toy, draft) = (Toy::new(8, VOCAB, 3, 1.5), Toy::new(80, VOCAB, 3, 2.0));
    let config = GenerationConfig { temperature: Some(0.7), suppress_tokens: Some(vec![1]), ..config(3) };
    let expected = exact(&toy, &[0, 2], 3, 3, |row| {
        row[1] = f32::NEG_INFINITY;
        row.iter_mut().for_each(|x| *x /= 0.7);
    });
    let method = Method::Assisted { tokens: 2, schedule: AssistantSchedule::Constant, confidence: 0.0 };
    fits(&counts(&[0, 2], &config, &method, &toy, Some(&draft)), &expected);
}

#[test]
fn prompt_lookup_sampling_is_distributed_as_the_target() {
    let toy = Toy::new(9, VOCAB, 2, 1.5);
    let prompt = [0, 1, 2, 0, 1];
    let method = Method::PromptLookup { tokens: 2, max_ngram: 2 };
    fits(&counts(&prompt, &config(3), &method, &toy, None), &exact(&toy, &prompt, 3, 3, |_| {}));
}

/// One step of beam sampling returns the two tokens drawn, without replacement, the better one first.
#[test]
fn beam_sampling_draws_without_replacement() {
    let toy = Toy::new(10, VOCAB, 2, 1.5);
    let p: Vec<f64> = log_softmax(&(toy.logits)(&[0, 1])).into_iter().map(f64::exp).collect();
    let mut expected = HashMap::new();
    for a in 0..VOCAB {
        for b in (0..VOCAB).filter(|&b| p[b] < p[a]) {
            expected
                .insert(vec![a as u32, b as u32], p[a] * p[b] / (1.0 - p[a]) + p[b] * p[a] / (1.0 - p[b]));
        }
    }
    let mut counts = HashMap::new();
    for seed in 0..DRAWS {
        let request = request(&[0, 1], VOCAB, &config(1), |s| {
            (s.method, s.num_return_sequences, s.seed) = (Method::Beam { beams: 2 }, 2, seed);
        });
        let pair = drive(request, &toy, None).outputs.iter().map(|o| o.ids[0]).collect();
        *counts.entry(pair).or_insert(0) += 1;
    }
    fits(&counts, &expected);
}
