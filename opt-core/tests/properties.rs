//! Ways of computing the same thing that must give the same result, over random models, prompts and settings.

#[path = "common/calls.rs"]
mod calls;
mod common;

use calls::{
    beams, call, cases, contrastive, drawn, early, lookup, prompt, request, run, settings, with_processors,
};
use common::{
    backend::{assert_same, deterministic, prop_assert_same, same_numbers},
    tiny::{Tiny, random_ids},
};
use ndarray::s;
use opt_core::{
    CacheDType, Generated, GeneratedSequence, Opt, Request, Result,
    generation::{GenerationConfig, LogitsProcessor},
};
use proptest::{collection::vec, prelude::*, sample::select};
use std::sync::LazyLock;

/// Pre-norm, and post-norm with projections, as the 350m shape has them.
static MODELS: LazyLock<[(Tiny, Opt); 2]> = LazyLock::new(|| {
    let post = Tiny { pre_norm: false, embed: 16, heads: 4, seed: 2, ..Tiny::default() };
    [Tiny::default(), post].map(|tiny| (tiny.clone(), tiny.opt()))
});

/// Draft models: the target itself, a smaller one, and one that is sometimes right.
static DRAFTS: LazyLock<[Opt; 3]> = LazyLock::new(|| {
    let small = Tiny { hidden: 8, heads: 1, embed: 8, layers: 1, seed: 3, ..Tiny::default() };
    [MODELS[0].1.clone(), small.opt(), Tiny { layers: 1, ..Tiny::default() }.opt()]
});

/// Context over two pieces of a prompt.
static LONG: LazyLock<Opt> =
    LazyLock::new(|| Tiny { context: 1300, hidden: 16, heads: 2, embed: 16, ..Tiny::default() }.opt());

/// A processor of the caller's that depends on all ids so far.
struct Shift(u32);

impl LogitsProcessor for Shift {
    fn name(&self) -> &str {
        "shift"
    }

    fn process(&self, ids: &[u32], scores: &mut [f32]) -> Result<()> {
        let sum: u32 = ids.iter().sum::<u32>() + self.0;
        for (id, score) in scores.iter_mut().enumerate() {
            *score += ((id as u32 * 7 + sum) % 5) as f32;
        }
        Ok(())
    }
}

#[test]
fn the_models_write_something() {
    // If every continuation were one token over and over, the properties below would show little.
    for (_, opt) in MODELS.iter() {
        let config = GenerationConfig::default().max_new_tokens(40);
        let different = (0..20).map(|seed| {
            let ids = opt.generate(random_ids(seed, 10, 61), &config).unwrap().ids().to_vec();
            ids.iter().collect::<std::collections::HashSet<_>>().len()
        });
        assert!(different.sum::<usize>() > 20 * 5);
    }
}

proptest! {
    #![proptest_config(cases(96))]

    #[test]
    fn without_cache_as_with(call in call(), model in 0usize..2) {
        let opt = &MODELS[model].1;
        let mut without = request(&call);
        without.config.use_cache = Some(false);
        prop_assert_same!(run(opt, request(&call)).sequences, run(opt, without).sequences);
    }

    #[test]
    fn in_a_batch_as_alone(calls in vec(call(), 2..6), model in 0usize..2) {
        let opt = &MODELS[model].1;
        let each = |(i, call): (usize, &(Vec<u32>, GenerationConfig))| {
            let request = request(call);
            if i % 2 == 1 && call.1.num_beams.is_none() { request.processor(Shift(i as u32)) } else { request }
        };
        let batch = opt.generate_batch(calls.iter().enumerate().map(each)).unwrap();
        for (i, together) in batch.into_iter().enumerate() {
            let alone = run(opt, each((i, &calls[i])));
            prop_assert_same!(together.sequences, alone.sequences, "request {}", i);
        }
    }

    #[test]
    fn a_stream_as_collected(calls in vec(call(), 1..4)) {
        let opt = &MODELS[0].1;
        let collected = opt.generate_batch(calls.iter().map(request)).unwrap();
        let empty = |of: &Generated| vec![(Vec::new(), Vec::new(), None); of.sequences.len()];
        let mut streamed: Vec<_> = collected.iter().map(empty).collect();
        let mut stream = opt.stream_batch(calls.iter().map(request)).unwrap();
        for token in &mut stream {
            let token = token.unwrap();
            let (ids, log_probs, finish) = &mut streamed[token.request][token.sequence];
            prop_assert!(finish.is_none(), "a token behind the last");
            ids.push(token.id);
            log_probs.push(token.log_prob);
            *finish = token.finish;
        }
        for (found, streamed) in collected.iter().zip(streamed) {
            for (sequence, streamed) in found.sequences.iter().zip(streamed) {
                prop_assert_eq!(&sequence.ids, &streamed.0);
                prop_assert!(same_numbers(&sequence.log_probs, &streamed.1));
                prop_assert!(sequence.ids.is_empty() || streamed.2 == Some(sequence.finish));
            }
        }
        for (found, late) in collected.iter().zip(stream.collect_all().unwrap()) {
            prop_assert_same!(found.sequences, late.sequences, "collected behind the stream's end");
        }
    }

    #[test]
    fn embeddings_as_ids(
        ids in prompt(1..40), config in settings(false), model in 0usize..2, cache in any::<bool>(),
    ) {
        let (tiny, opt) = &MODELS[model];
        let by_ids = run(opt, Request::new(&ids[..]).config(config.clone()));
        let config = config.use_cache(cache);
        let by_rows = run(opt, Request::new(tiny.embeddings(&ids)).config(config.clone()));
        prop_assert_same!(by_ids.sequences, by_rows.sequences);
    }

    #[test]
    fn assisted_is_greedy(
        ids in prompt(1..90), processors in with_processors(), new in 1usize..30, draft in 0usize..3,
        tokens in 1usize..8, confidence in 0.0f32..0.6, heuristic in any::<bool>(), cache in any::<bool>(),
        plain in any::<bool>(), eos in any::<bool>(),
    ) {
        let opt = &MODELS[0].1;
        let mut config = if plain { GenerationConfig::default() } else { processors }.max_new_tokens(new);
        if eos {
            config = config.eos_token_id([3, 17, 30]);
        }
        let greedy = run(opt, Request::new(&ids[..]).config(config.clone()));
        let schedule = if heuristic { "heuristic" } else { "constant" };
        let config = config.num_assistant_tokens(tokens).num_assistant_tokens_schedule(schedule);
        let config = config.assistant_confidence_threshold(confidence).use_cache(cache);
        let request = Request::new(&ids[..]).config(config).assistant(DRAFTS[draft].clone());
        prop_assert_same!(greedy.sequences, run(opt, request).sequences);
    }

    #[test]
    fn prompt_lookup_is_what_it_speeds_up(
        ids in prompt(1..90), processors in with_processors(), lookup in lookup(), drawn in drawn(),
        sample in any::<bool>(), cache in any::<bool>(), new in 1usize..30,
    ) {
        let opt = &MODELS[0].1;
        let config = if sample { drawn.num_return_sequences(1) } else { processors }.max_new_tokens(new);
        let plain = run(opt, Request::new(&ids[..]).config(config.clone()));
        let request = Request::new(&ids[..]).config(lookup.over(&config).use_cache(cache));
        prop_assert_same!(plain.sequences, run(opt, request).sequences);
    }

    #[test]
    fn one_beam_is_greedy(ids in prompt(1..40), penalty in -1.0f32..2.0, early in early()) {
        let opt = &MODELS[1].1;
        let config = GenerationConfig::default().num_beams(1).num_beam_groups(1).length_penalty(penalty);
        let one = run(opt, Request::new(&ids[..]).config(config.early_stopping(early)));
        prop_assert_same!(one.sequences, opt.generate(ids, &GenerationConfig::default()).unwrap().sequences);
    }
}

/// Ids of several pieces: run by generation in pieces, and in one pass by [`Opt::logits`].
fn long(lens: std::ops::Range<usize>) -> impl Strategy<Value = Vec<u32>> {
    (any::<u64>(), lens).prop_map(|(seed, len)| random_ids(seed, len, 61))
}

proptest! {
    #![proptest_config(cases(48))]

    /// Keys and values in half precision are rounded, but alike in any company.
    #[test]
    fn a_half_precision_cache(calls in vec(call(), 2..4)) {
        let opt = &MODELS[0].1;
        let with = |call: &(Vec<u32>, GenerationConfig)| request(call).cache_dtype(CacheDType::F16);
        let batch = opt.generate_batch(calls.iter().map(with)).unwrap();
        for (call, together) in calls.iter().zip(batch) {
            let mut without = with(call);
            without.config.use_cache = Some(false);
            prop_assert_same!(together.sequences, run(opt, with(call)).sequences);
            prop_assert_same!(together.sequences, run(opt, without).sequences);
        }
    }

    #[test]
    fn alternatives_are_the_largest_log_probs(call in call(), count in select(vec![1, 4, 61, usize::MAX])) {
        let opt = &MODELS[0].1;
        let plain = run(opt, request(&call)).sequences;
        let found = run(opt, request(&call).top_alternatives(count).keep_logits()).sequences;
        for (found, plain) in found.iter().zip(&plain) {
            prop_assert_eq!(&found.ids, &plain.ids);
            prop_assert_eq!(found.alternatives.len(), found.ids.len());
            for (step, alternatives) in found.alternatives.iter().enumerate() {
                prop_assert_eq!(alternatives.len(), count.min(61));
                let logits = &found.logits[step];
                let sum = logits.iter().map(|l| f64::from(*l).exp()).sum::<f64>().ln();
                let mut all: Vec<f64> = logits.iter().map(|l| f64::from(*l) - sum).collect();
                let own = all[found.ids[step] as usize];
                prop_assert!((f64::from(found.log_probs[step]) - own).abs() < 1e-4);
                for alternative in alternatives {
                    prop_assert!((f64::from(alternative.log_prob) - all[alternative.id as usize]).abs() < 1e-4);
                }
                all.sort_by(|a, b| b.total_cmp(a));
                for (alternative, expected) in alternatives.iter().zip(all) {
                    prop_assert!((f64::from(alternative.log_prob) - expected).abs() < 1e-4);
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(cases(12))]

    #[test]
    fn a_prompt_in_pieces_as_whole(ids in long(500..1299), cache in any::<bool>()) {
        let config = GenerationConfig::default().max_new_tokens(3).use_cache(cache);
        let found = run(&LONG, Request::new(&ids[..]).config(config).keep_logits()).sequences.remove(0);
        let mut all = ids.clone();
        all.extend(&found.ids);
        let whole = LONG.logits(&all[..all.len() - 1]).unwrap();
        for (i, row) in found.logits.iter().enumerate() {
            let expected = whole.row(ids.len() - 1 + i);
            prop_assert!(same_numbers(row, expected.to_slice().unwrap()), "step {i}");
        }
    }

    #[test]
    fn long_prompts_in_a_batch_as_alone(
        prompts in vec(prop_oneof![long(1..30), long(400..700), long(1000..1290)], 2..5),
        config in prop_oneof![Just(GenerationConfig::default()), contrastive(), beams(), drawn(), lookup()],
    ) {
        let config = config.max_new_tokens(4);
        let requests = |ids: &Vec<u32>| Request::new(&ids[..]).config(config.clone());
        let batch = LONG.generate_batch(prompts.iter().map(requests)).unwrap();
        for (ids, together) in prompts.iter().zip(batch) {
            prop_assert_same!(together.sequences, run(&LONG, requests(ids)).sequences);
        }
    }

    #[test]
    fn long_embeddings_as_ids(ids in long(500..1290), config in prop_oneof![beams(), contrastive(), lookup()]) {
        let tiny = Tiny { context: 1300, hidden: 16, heads: 2, embed: 16, ..Tiny::default() };
        let config = config.max_new_tokens(4);
        let by_ids = run(&LONG, Request::new(&ids[..]).config(config.clone()));
        let by_rows = run(&LONG, Request::new(tiny.embeddings(&ids)).config(config));
        prop_assert_same!(by_ids.sequences, by_rows.sequences);
    }

    #[test]
    fn scores_of_long_inputs(inputs in vec(long(1..1302), 1..5), split in 0.0f64..1.0) {
        use opt_core::ScoreInput;
        let inputs: Vec<ScoreInput> = inputs
            .into_iter()
            .map(|ids| ScoreInput { from: ((ids.len() as f64 * split) as usize).max(1), ids })
            .collect();
        for (input, scored) in inputs.iter().zip(LONG.score(&inputs).unwrap()) {
            prop_assert_eq!(&scored.ids, &input.ids);
            prop_assert_eq!(scored.log_probs.len(), input.ids.len() - input.from);
            if input.ids.len() > 1 {
                let logits = LONG.logits(&input.ids[..input.ids.len() - 1]).unwrap();
                let (mut greedy, mut tied) = (true, false);
                for (i, target) in input.ids.iter().enumerate().skip(input.from) {
                    let row = logits.slice(s![i - 1, ..]).mapv(f64::from);
                    let max = row.fold(f64::NEG_INFINITY, |a, b| a.max(*b));
                    let sum = row.mapv(|x| (x - max).exp()).sum().ln() + max;
                    let expected = row[*target as usize] - sum;
                    let found = f64::from(scored.log_probs[i - input.from]);
                    prop_assert!((found - expected).abs() < 1e-4, "{}: {} {}", i, found, expected);
                    // Where results are not bit-equal, a target that ties for the maximum may fall either way.
                    let behind = max - row[*target as usize];
                    tied |= !deterministic() && behind < 1e-4;
                    greedy &= behind == 0.0;
                }
                prop_assert!(tied || scored.greedy == greedy);
            }
            let sum: f64 = scored.log_probs.iter().map(|p| f64::from(*p)).sum();
            prop_assert!((scored.log_prob - sum).abs() < 1e-9 * sum.abs().max(1.0));
        }
    }
}

#[test]
fn one_model_from_four_threads() {
    let opt = &MODELS[0].1;
    let calls: Vec<(Vec<u32>, GenerationConfig)> = (0..8u64)
        .map(|i| {
            let config = GenerationConfig::default().max_new_tokens(30);
            let config = match i % 4 {
                0 => config,
                1 => config.do_sample(true).seed(i),
                2 => config.num_beams(3),
                _ => config.penalty_alpha(0.5).top_k(4),
            };
            (random_ids(i, 5 + 6 * i as usize, 61), config)
        })
        .collect();
    let alone: Vec<Vec<GeneratedSequence>> = calls.iter().map(|c| run(opt, request(c)).sequences).collect();
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let (calls, alone) = (&calls, &alone);
            scope.spawn(move || {
                for i in (0..24).map(|i| (i * 3 + thread) % calls.len()) {
                    assert_same(&run(opt, request(&calls[i])).sequences, &alone[i]);
                }
            });
        }
    });
}
