//! Random calls: prompts, and settings of any way of generating. A module beside `common`, of those tests that draw
//! some.
#![allow(dead_code, unreachable_pub)]

use crate::common::backend::deterministic;
use opt_core::{
    Generated, Opt, Request,
    generation::{EarlyStopping, GenerationConfig},
};
use proptest::{
    collection::vec,
    prelude::*,
    sample::select,
    test_runner::{Config, RngSeed},
};

/// So many cases, or as many as `PROPTEST_CASES` says.
pub fn cases(count: u32) -> Config {
    let asked = std::env::var("PROPTEST_CASES").ok().and_then(|asked| asked.parse().ok());
    // A case drawn anew may always be one where two candidates tie within rounding.
    let seed = if deterministic() { RngSeed::Random } else { RngSeed::Fixed(7) };
    Config { cases: asked.unwrap_or(count), failure_persistence: None, rng_seed: seed, ..Config::default() }
}

pub fn early() -> impl Strategy<Value = EarlyStopping> {
    select(vec![EarlyStopping::Yes, EarlyStopping::No, EarlyStopping::Never])
}

/// Greedy or sampled, one token after the other, with filters.
pub fn drawn() -> impl Strategy<Value = GenerationConfig> {
    (any::<u64>(), 0.5f32..2.0, 0usize..20, 0.5f32..1.0, 0.0f32..0.2, 1usize..4).prop_map(
        |(seed, temperature, k, p, min_p, returns)| {
            let config = GenerationConfig::default().do_sample(true).seed(seed).temperature(temperature);
            let config = config.top_k(k).top_p(p).num_return_sequences(returns);
            if seed % 2 == 0 { config.min_p(min_p) } else { config.typical_p(p) }
        },
    )
}

pub fn with_processors() -> impl Strategy<Value = GenerationConfig> {
    let ngram = select(vec![0usize, 2, 3]);
    (0.7f32..2.0, ngram, 0usize..8, 0u32..61, -3.0f32..3.0).prop_map(|(penalty, ngram, least, id, bias)| {
        let config = GenerationConfig::default().repetition_penalty(penalty).no_repeat_ngram_size(ngram);
        let config = config.min_new_tokens(least).suppress_tokens([id]);
        config.sequence_bias([(vec![(id + 1) % 61], bias)].into())
    })
}

pub fn beams() -> impl Strategy<Value = GenerationConfig> {
    (2usize..5, 1usize..3, early(), -1.0f32..2.0, any::<bool>(), any::<u64>()).prop_map(
        |(beams, returns, early, penalty, sample, seed)| {
            let config = GenerationConfig::default().num_beams(beams).num_return_sequences(returns);
            let config = config.early_stopping(early).length_penalty(penalty);
            if sample { config.do_sample(true).seed(seed).top_k(0) } else { config }
        },
    )
}

pub fn groups() -> impl Strategy<Value = GenerationConfig> {
    (2usize..4, 1usize..3, 0.1f32..2.0).prop_map(|(groups, each, diversity)| {
        let config = GenerationConfig::default().num_beams(groups * each).num_beam_groups(groups);
        config.diversity_penalty(diversity).num_return_sequences(groups)
    })
}

pub fn contrastive() -> impl Strategy<Value = GenerationConfig> {
    (0.1f32..0.9, 2usize..6).prop_map(|(alpha, k)| GenerationConfig::default().penalty_alpha(alpha).top_k(k))
}

pub fn lookup() -> impl Strategy<Value = GenerationConfig> {
    (1usize..8, 1usize..4).prop_map(|(tokens, ngram)| {
        GenerationConfig::default().prompt_lookup_num_tokens(tokens).max_matching_ngram_size(ngram)
    })
}

/// Any method; `processors` only where the prompt's ids may count.
pub fn settings(processors: bool) -> impl Strategy<Value = GenerationConfig> {
    let greedy =
        if processors { with_processors().boxed() } else { Just(GenerationConfig::default()).boxed() };
    let beams_too = (beams(), greedy.clone()).prop_map(|(beams, other)| beams.over(&other));
    let contrastive = (contrastive(), greedy.clone()).prop_map(|(it, other)| it.over(&other));
    let lookup = (lookup(), greedy.clone()).prop_map(|(it, other)| it.over(&other));
    let method = prop_oneof![greedy, drawn(), beams(), beams_too, groups(), contrastive, lookup];
    (method, 1usize..14, any::<bool>()).prop_map(|(config, new, eos)| {
        let config = config.max_new_tokens(new);
        if eos { config.eos_token_id([3, 17, 30]) } else { config }
    })
}

/// Ids that repeat here and there, so that n-grams and prompt lookup find something.
pub fn prompt(len: std::ops::Range<usize>) -> impl Strategy<Value = Vec<u32>> {
    prop_oneof![vec(0u32..61, len.clone()), vec(0u32..4, len)]
}

pub fn call() -> impl Strategy<Value = (Vec<u32>, GenerationConfig)> {
    prop_oneof![(prompt(1..30), settings(true)), (prompt(80..96), settings(true))]
}

pub fn run(opt: &Opt, request: Request) -> Generated {
    opt.generate_batch([request]).unwrap().remove(0)
}

pub fn request((prompt, config): &(Vec<u32>, GenerationConfig)) -> Request {
    Request::new(&prompt[..]).config(config.clone())
}
