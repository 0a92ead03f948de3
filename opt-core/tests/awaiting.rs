//! The awaitable forms, on an event loop of one thread where nothing can be waited for, give what the blocking ones do.

mod common;

use common::{
    late::{Events, Late},
    tiny::{Tiny, random_ids},
};
use opt_backend::{BoxFuture, Reference};
use opt_core::{
    CancelToken, ErrorKind, Generated, Load, Opt, Progress, Request, Result, ScoreInput, Session,
    embedding::{EmbedOptions, EmbedPart, Embedder, Index, Metric, Pooling},
    engine::{Forward, Input, Sequence, Want},
    generation::{FinishReason, GenerationConfig},
};
use std::ops::ControlFlow;

/// The model on the device whose values come late, its event loop, and the model where they are there at once.
fn both(tiny: &Tiny) -> (Opt, Events, Opt) {
    let events = Events::default();
    (tiny.load(Load::on(Late::on(&events))), events, tiny.load(Load::on(Reference::new())))
}

fn new_tokens(n: usize) -> GenerationConfig {
    GenerationConfig::default().max_new_tokens(n)
}

/// A request of each kind: every method, what looks at whole rows or hidden states, embeddings, several pieces of a
/// long prompt. `assistant` proposes for those that want one.
fn requests(tiny: &Tiny, assistant: Opt) -> Vec<Request> {
    let prompt = |seed| random_ids(seed, 5 + seed as usize, tiny.vocab);
    let with = |seed, config| Request::new(prompt(seed)).config(config);
    vec![
        with(0, new_tokens(9)),
        with(1, new_tokens(7).do_sample(true).seed(5).num_return_sequences(2)).top_alternatives(3),
        with(2, new_tokens(6).num_beams(3).num_return_sequences(2)),
        with(3, new_tokens(5).num_beams(4).num_beam_groups(2).diversity_penalty(0.7)),
        with(4, new_tokens(5).penalty_alpha(0.6).top_k(3)),
        with(5, new_tokens(6)).assistant(assistant),
        with(6, new_tokens(6).prompt_lookup_num_tokens(3)),
        with(7, new_tokens(6).repetition_penalty(1.3).use_cache(false)).keep_logits(),
        Request::new(tiny.embeddings(&prompt(8))).config(new_tokens(4)),
    ]
}

#[test]
fn every_way_of_generating_alone_together_and_at_once() {
    let tiny = Tiny::default();
    let small = Tiny { layers: 1, seed: 2, ..Tiny::default() };
    let (opt, events, plain) = both(&tiny);
    // The draft model's values arrive on the same loop.
    let requests_late = requests(&tiny, small.load(Load::on(Late::on(&events))));
    let requests_now = requests(&tiny, small.load(Load::on(Reference::new())));
    let expected: Vec<Generated> = requests_now
        .iter()
        .map(|r| plain.stream_batch([r.clone()]).unwrap().collect_all().unwrap().remove(0))
        .collect();
    let seedless = |mut all: Vec<Generated>| {
        // Drawn anew for each request that does not draw.
        all.iter_mut().for_each(|generated| generated.seed = 0);
        all
    };
    let expected = seedless(expected);

    // Each on its own, all of them at once.
    let futures: Vec<BoxFuture<'_, Result<Vec<Generated>>>> = requests_late
        .iter()
        .map(|r| Box::pin(opt.generate_batch_async([r.clone()])) as BoxFuture<'_, _>)
        .collect();
    let alone = events.run(futures);
    assert!(events.arrived() > 50, "{} values arrived", events.arrived());
    assert_eq!(seedless(alone.into_iter().flat_map(Result::unwrap).collect()), expected);
    // One batch, which lays embeddings between the table's.
    let together = events.await_one(opt.generate_batch_async(requests_late.clone()));
    assert_eq!(seedless(together.unwrap()), expected);
    // One prompt.
    let config = new_tokens(9);
    let one = events.await_one(opt.generate_async(random_ids(0, 5, tiny.vocab), &config));
    assert_eq!(seedless(vec![one.unwrap()]), expected[..1]);
}

#[test]
fn streams() {
    let tiny = Tiny::default();
    let (opt, events, plain) = both(&tiny);
    let request = || Request::new(random_ids(3, 80, tiny.vocab)).config(new_tokens(8));
    let tokens: Vec<u32> = plain.stream_batch([request()]).unwrap().map(|token| token.unwrap().id).collect();
    let mut reports = 0;
    let read = async {
        let mut stream = opt.stream_batch([request()])?;
        let mut ids = Vec::new();
        while let Some(token) = stream
            .next_token_watched(&mut |_| {
                reports += 1;
                ControlFlow::Continue(())
            })
            .await
        {
            ids.push(token?.id);
        }
        Ok::<_, opt_core::Error>((ids, stream.finish().await?))
    };
    let results = events.await_one(read);
    let (ids, generated) = results.unwrap();
    assert_eq!((&ids, generated[0].ids()), (&tokens, &tokens[..]));
    assert!(reports > 0);

    // Callbacks that end it: at a token, and within the prompt.
    let go_on = |_: Progress<'_>| ControlFlow::Continue(());
    let mut seen = 0;
    let see = |_: &opt_core::StreamToken| {
        seen += 1;
        if seen == 3 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    let results = events.await_one(opt.generate_with_async([request()], see, go_on));
    let ended = results.unwrap().remove(0);
    assert_eq!((ended.ids(), ended.sequences[0].finish), (&tokens[..3], FinishReason::Stop));
    let stop = |_: Progress<'_>| ControlFlow::Break(());
    let see = |_: &opt_core::StreamToken| ControlFlow::Continue(());
    let results = events.await_one(opt.generate_with_async([request()], see, stop));
    assert_eq!(results.unwrap_err().kind(), ErrorKind::Cancelled);
}

#[test]
fn looks_into_the_model_and_scores() {
    let tiny = Tiny { embed: 16, pre_norm: false, ..Tiny::default() };
    let (opt, events, plain) = both(&tiny);
    let ids = random_ids(1, 12, tiny.vocab);
    let logits = events.await_one(opt.logits_async(&ids));
    assert_eq!(logits.unwrap(), plain.logits(&ids).unwrap());
    let hidden = events.await_one(opt.hidden_states_async(&ids));
    assert_eq!(hidden.unwrap(), plain.hidden_states(&ids).unwrap());
    let weights = events.await_one(opt.attentions_async(&ids));
    assert_eq!(weights.unwrap(), plain.attentions(&ids).unwrap());

    let inputs: Vec<ScoreInput> =
        (2..40).map(|n| ScoreInput::all(random_ids(n, n as usize, tiny.vocab))).collect();
    let scored = events.await_one(opt.score_async(&inputs));
    assert_eq!(scored.unwrap(), plain.score(&inputs).unwrap());
    let cancel = CancelToken::new();
    let mut stop = |_: Progress<'_>| ControlFlow::Break(());
    let scored = events.await_one(opt.score_with_async(&inputs, &cancel, &mut stop));
    assert_eq!(scored.unwrap_err().kind(), ErrorKind::Cancelled);
}

#[test]
fn embeddings() {
    let tiny = Tiny { embed: 16, pre_norm: false, ..Tiny::default() };
    let (opt, events, plain) = both(&tiny);
    let inputs: Vec<Vec<u32>> = (1..9).map(|n| random_ids(n, 5 * n as usize, tiny.vocab)).collect();
    for (pooling, layer) in
        [(Pooling::Mean, -1), (Pooling::Max, 1), (Pooling::LastToken, 0), (Pooling::None, 2)]
    {
        let options = || EmbedOptions::default().pooling(pooling).layer(layer).batch_tokens(64);
        let [late, now] = [&opt, &plain].map(|opt| Embedder::new(opt, options()).unwrap());
        let found = events.await_one(late.embed_batch_async(inputs.clone())).unwrap();
        for (found, expected) in found.iter().zip(now.embed_batch(inputs.clone()).unwrap()) {
            common::assert_close(found.rows.view(), expected.rows.view(), "embeddings");
        }
        let found = events.await_one(late.embed_async(&inputs[1][..])).unwrap();
        common::assert_close(found.rows.view(), now.embed(&inputs[1][..]).unwrap().rows.view(), "one");
        let index = events.await_one(Index::new_async(&late, Metric::Dot)).unwrap();
        let bytes = index.to_bytes().unwrap();
        assert!(events.await_one(Index::from_bytes_async(&now, &bytes)).unwrap().is_empty());

        let request =
            || Request::new(inputs[2].clone()).config(new_tokens(5)).embed(options(), EmbedPart::Produced);
        let found = events.await_one(opt.generate_batch_async([request()])).unwrap().remove(0);
        let expected = plain.generate_batch([request()]).unwrap().remove(0);
        assert_eq!(found.sequences, expected.sequences);
    }
}

#[test]
fn conversations() {
    let tiny = Tiny::default();
    let (opt, events, plain) = both(&tiny);
    let ids = |seed| random_ids(seed, 6, tiny.vocab);
    let config = new_tokens(5);

    let mut expected = plain.session();
    expected.append(ids(1)).unwrap();
    let first = expected.generate(ids(2), &config).unwrap();
    let second = expected.generate(ids(3), &config).unwrap();

    let talk = async {
        let mut session = opt.session();
        session.append_async(ids(1)).await?;
        let one = session.generate_async(ids(2), &config).await?;
        let kept = session.to_bytes_async().await?;
        drop(session);
        let mut session = Session::from_bytes_async(&opt, &kept).await?;
        let mut stream = session.start(Request::new(ids(3)).config(config.clone()))?;
        stream.next_token().await;
        let two = session.absorb_async(stream).await?;
        Ok::<_, opt_core::Error>((one, two, session.ids().to_vec()))
    };
    let results = events.await_one(talk);
    let (one, two, all) = results.unwrap();
    assert_eq!((one.ids(), two.ids(), &all[..]), (first.ids(), second.ids(), expected.ids()));
}

/// A future that is dropped half-way leaves a conversation as it was.
#[test]
fn a_dropped_future_leaves_a_session_as_it_was() {
    let tiny = Tiny::default();
    let (opt, events, plain) = both(&tiny);
    let config = new_tokens(4);
    let start = random_ids(1, 6, tiny.vocab);
    let mut session = opt.session();
    let results = events.await_one(session.generate_async(start.clone(), &config));
    results.unwrap();
    let before = session.ids().to_vec();
    fn poll_once<T>(future: impl Future<Output = T>) {
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        assert!(std::pin::pin!(future).poll(&mut context).is_pending());
    }
    poll_once(session.generate_async(vec![7], &config));
    assert_eq!(session.ids(), before);
    let mut expected = plain.session();
    expected.generate(start, &config).unwrap();
    let after = expected.generate(vec![9, 8], &config).unwrap();
    let results = events.await_one(session.generate_async(vec![9, 8], &config));
    assert_eq!(results.unwrap().ids(), after.ids());
}

/// Embeddings from outside need nothing of the table: it is not read back where there are no ids.
#[test]
fn embeddings_are_not_read_back() {
    let tiny = Tiny::default();
    let (opt, events, _) = both(&tiny);
    let rows = tiny.embeddings(&[3, 1, 4]);
    fn arrived<'a>(opt: &'a Opt, events: &Events, inputs: &[Input<'a>]) -> usize {
        let before = events.arrived();
        let want = Want::Logits { rows: 1 };
        let sequences = inputs.iter().map(|input| Sequence::new(*input).want(want)).collect();
        events.await_one(opt.engine().forward(Forward { sequences, ..Forward::default() })).unwrap();
        events.arrived() - before
    }
    let (rows, ids) = (Input::Embeds(rows.view()), Input::Ids(&[5, 9]));
    assert_eq!(arrived(&opt, &events, &[ids]), 1);
    assert_eq!(arrived(&opt, &events, &[rows, rows]), 1);
    assert_eq!(arrived(&opt, &events, &[rows, ids]), 2);
}
