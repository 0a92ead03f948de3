//! Vectors of texts while they are generated.

use super::*;
use opt_core::{
    Generated, Request,
    embedding::EmbedPart,
    generation::{FinishReason, GenerationConfig},
};

fn new_tokens(n: usize) -> GenerationConfig {
    GenerationConfig::default().max_new_tokens(n)
}

/// The states of prompt and new ids, run anew, pooled over those from `from` on.
fn expected(opt: &Opt, with: &EmbedOptions, ids: &[u32], from: usize) -> Array2<f32> {
    let layers = opt.config().num_hidden_layers as i32 + 1;
    let layer = if with.layer < 0 { with.layer + layers } else { with.layer } as usize;
    let states = opt.hidden_states(ids).unwrap();
    with.pooling.pool(states[layer].slice(s![from.., ..]))
}

#[track_caller]
fn check(opt: &Opt, with: &EmbedOptions, part: EmbedPart, generated: &Generated, what: &str) {
    let prompt = &generated.prompt_ids;
    for sequence in &generated.sequences {
        let ids = [&prompt[..], &sequence.ids].concat();
        let from = if part == EmbedPart::Whole { 0 } else { prompt.len() };
        let found = sequence.embedding.as_ref().unwrap_or_else(|| panic!("{what}: no embedding"));
        assert_eq!((found.tokens, found.cut), (ids.len() - from, 0), "{what}");
        common::assert_close(found.rows.view(), expected(opt, with, &ids, from).view(), what);
    }
}

/// Every way of generating, at an inner layer and at the last, alone and all as one batch.
#[test]
fn every_way_of_generating() {
    let tiny = Tiny::default();
    let opt = tiny.opt();
    let draft = Tiny { layers: 1, seed: 2, ..Tiny::default() }.opt();
    let prompt = |seed: u64| random_ids(seed, 5 + seed as usize, 61);
    // An eos that some of several sequences meet before others do.
    let eos = |config: GenerationConfig| config.eos_token_id(vec![7, 11, 19, 23, 31, 43]);
    let requests = |with: &EmbedOptions, part: EmbedPart| -> Vec<Request> {
        let with = |seed, config| Request::new(prompt(seed)).config(config).embed(with.clone(), part);
        vec![
            with(0, new_tokens(9)),
            with(1, eos(new_tokens(12).do_sample(true).seed(5).num_return_sequences(4))),
            with(2, eos(new_tokens(10).num_beams(4).num_return_sequences(4))),
            with(
                3,
                eos(new_tokens(10)
                    .num_beams(4)
                    .num_beam_groups(2)
                    .diversity_penalty(0.7)
                    .num_return_sequences(4)),
            ),
            with(4, new_tokens(7).penalty_alpha(0.6).top_k(3)),
            with(5, new_tokens(8)).assistant(draft.clone()),
            with(6, new_tokens(8).prompt_lookup_num_tokens(3)),
            with(7, new_tokens(6).repetition_penalty(1.3).use_cache(false)),
            with(8, new_tokens(1)),
        ]
    };
    for (layer, pooling) in [(-1, Pooling::Mean), (1, Pooling::LastToken), (0, Pooling::None)] {
        let with = options().layer(layer).pooling(pooling);
        for part in [EmbedPart::Produced, EmbedPart::Whole] {
            let together = opt.generate_batch(requests(&with, part)).unwrap();
            let mut ends = Vec::new();
            for (index, (request, together)) in requests(&with, part).into_iter().zip(&together).enumerate() {
                let what = format!("request {index}, layer {layer}, {part:?}");
                check(&opt, &with, part, together, &what);
                let alone = opt.generate_batch([request]).unwrap().remove(0);
                check(&opt, &with, part, &alone, &what);
                ends.extend(together.sequences.iter().map(|s| s.finish));
            }
            assert!(ends.contains(&FinishReason::Eos) && ends.contains(&FinishReason::Length), "{ends:?}");
        }
    }
}

/// The vector changes nothing of the text, and costs one more run than there were: of the last token.
#[test]
fn nothing_is_run_twice() {
    let opt = Tiny::default().opt();
    let prompt = random_ids(1, 12, 61);
    let count = |request: Request| {
        let mut runs = 0;
        let mut progress = |_: Progress<'_>| {
            runs += 1;
            ControlFlow::Continue(())
        };
        let made =
            opt.generate_with([request], |_| ControlFlow::Continue(()), &mut progress).unwrap().remove(0);
        (made, runs)
    };
    let request = Request::new(prompt).config(new_tokens(9));
    let before = opt.engine().counts();
    let (plain, plain_runs) = count(request.clone());
    let between = opt.engine().counts();
    let (made, runs) = count(request.embed(options(), EmbedPart::Produced));
    let after = opt.engine().counts();
    assert_eq!((plain.ids(), plain_runs), (made.ids(), runs));
    assert!(plain.sequences[0].embedding.is_none());
    if backend::name() == "reference" {
        // Each run of the reference calls this body once a layer and once for the head: 9 runs, and one without head.
        let bodies = |counts: opt_backend::Counts| counts.defaults[opt_backend::Op::Attend as usize];
        let (plain, made) = (bodies(between.since(&before)), bodies(after.since(&between)));
        assert_eq!((plain, made), (9 * 2, 10 * 2));
    }
}

/// Ended from outside, before anything was made, and at the context.
#[test]
fn sequences_that_are_ended() {
    let opt = Tiny::default().opt();
    let with = options();
    let request =
        || Request::new(random_ids(2, 9, 61)).config(new_tokens(40)).embed(with.clone(), EmbedPart::Produced);
    let mut stream = opt.stream_batch([request()]).unwrap();
    for _ in 0..5 {
        stream.next().unwrap().unwrap();
    }
    stream.stop(FinishReason::Stop);
    let made = stream.collect_all().unwrap().remove(0);
    assert_eq!((made.ids().len(), made.sequences[0].finish), (5, FinishReason::Stop));
    check(&opt, &with, EmbedPart::Produced, &made, "stopped");

    let mut stream = opt.stream_batch([request()]).unwrap();
    stream.stop(FinishReason::Stop);
    let made = stream.collect_all().unwrap().remove(0);
    assert_eq!((made.ids().len(), &made.sequences[0].embedding), (0, &None));

    // The last token needs a position.
    let long = Request::new(random_ids(3, 90, 61)).config(new_tokens(40));
    assert_eq!(opt.generate_batch([long.clone()]).unwrap()[0].ids().len(), 7);
    let made = opt.generate_batch([long.embed(with.clone(), EmbedPart::Whole)]).unwrap().remove(0);
    assert_eq!(made.ids().len(), 6);
    check(&opt, &with, EmbedPart::Whole, &made, "the context");
    let full = Request::new(random_ids(3, 96, 61)).config(new_tokens(1));
    assert_eq!(opt.generate_batch([full.clone()]).unwrap()[0].ids().len(), 1);
    let error = opt.generate_batch([full.embed(with, EmbedPart::Produced)]).unwrap_err();
    assert!(error.to_string().contains("none can follow"), "{error}");
    let wrong = Request::new(vec![3]).embed(options().layer(3), EmbedPart::Produced);
    let error = opt.generate_batch([wrong]).unwrap_err();
    assert_eq!(error.to_string(), "layer: expected -3 to 2, found 3");
}

#[test]
fn conversations_and_embedded_prompts() {
    let tiny = Tiny::default();
    let opt = tiny.opt();
    let with = options().pooling(Pooling::WeightedMean);
    let mut session = opt.session();
    session.append(random_ids(1, 8, 61)).unwrap();
    let mut plain = session.fork().unwrap();
    for part in [EmbedPart::Produced, EmbedPart::Whole, EmbedPart::Produced] {
        let request = Request::new(random_ids(2, 5, 61)).config(new_tokens(4));
        let expected = plain.run(request.clone()).unwrap();
        let made = session.run(request.embed(with.clone(), part)).unwrap();
        assert_eq!(made.ids(), expected.ids());
        check(&opt, &with, part, &made, "a turn");
    }
    assert_eq!(session.ids(), plain.ids());

    let prompt = random_ids(6, 11, 61);
    for part in [EmbedPart::Produced, EmbedPart::Whole] {
        let request = |prompt: Prompt| Request::new(prompt).config(new_tokens(5)).embed(with.clone(), part);
        let of_ids = opt.generate_batch([request(prompt.clone().into())]).unwrap().remove(0);
        let of_rows = opt.generate_batch([request(tiny.embeddings(&prompt).into())]).unwrap().remove(0);
        let [a, b] = [&of_ids, &of_rows].map(|made| made.sequences[0].embedding.clone().unwrap());
        assert_eq!((of_ids.ids(), a.tokens), (of_rows.ids(), b.tokens));
        common::assert_close(a.rows.view(), b.rows.view(), "embeddings");
    }
}
