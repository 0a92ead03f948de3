//! Tokens as they come: threads, texts, cancelling, time.

mod common;

use common::{backend::assert_same, named, tiny::Tiny, tiny::random_ids};
use opt_core::{
    CancelToken, Error, ErrorKind, Opt, Request, Result,
    generation::{FinishReason, GenerationConfig, LogitsProcessor},
    tokenizer::Bos,
};
use std::{
    ops::ControlFlow,
    sync::{LazyLock, mpsc},
    thread,
};

/// Large enough that a prompt of 1300 tokens takes a while.
static SLOW: LazyLock<Opt> = LazyLock::new(|| {
    Tiny { vocab: 300, context: 1400, hidden: 64, layers: 4, heads: 4, embed: 64, ..Tiny::default() }.opt()
});

fn new_tokens(n: usize) -> GenerationConfig {
    GenerationConfig::default().max_new_tokens(n)
}

fn go_on(_: opt_core::Progress<'_>) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

#[test]
fn a_stream_moves_to_another_thread_and_may_be_dropped() {
    let opt = named("opt-novels");
    let expected = opt.generate("The river", &new_tokens(12)).unwrap();
    let stream = opt.stream("The river", &new_tokens(12)).unwrap();
    let dropped = opt.stream("The river", &new_tokens(12)).unwrap();
    drop(opt);
    let text = thread::spawn(move || stream.map(|token| token.unwrap().text).collect::<String>());
    thread::spawn(move || dropped.take(2).count()).join().unwrap();
    assert_eq!(text.join().unwrap(), expected.text());
}

#[test]
fn characters_are_never_broken() {
    let opt = named("opt-novels");
    let tokenizer = opt.tokenizer().unwrap();
    let text = " naïve 😀 and 日本語, 👩‍👩‍👧 — “Ωmega” 🇨🇭é";
    let ids = tokenizer.encode(text, Bos::Never).unwrap();
    assert!(ids.len() > text.chars().count(), "expected characters of several tokens");
    let forced = |ids: Vec<u32>| {
        let new = new_tokens(ids.len());
        Request::new("It").config(new).allow_only(move |so_far| {
            let start = 2.min(so_far.len());
            vec![ids.get(so_far.len() - start).copied().unwrap_or(5)]
        })
    };
    assert_eq!(tokenizer.encode("It", Bos::Model).unwrap().len(), 2);
    let tokens: Vec<_> = opt.stream_batch([forced(ids.clone())]).unwrap().map(Result::unwrap).collect();
    assert_eq!(tokens.iter().map(|t| t.id).collect::<Vec<_>>(), ids);
    assert!(tokens.iter().all(|t| !t.text.contains(char::REPLACEMENT_CHARACTER)), "{tokens:?}");
    assert_eq!(tokens.iter().map(|t| &t.text[..]).collect::<String>(), text);

    // Cut within a character: what is left of it comes with the last token, as in the text.
    let emoji = tokenizer.encode("😀", Bos::Never).unwrap();
    let found = opt.generate_batch([forced(emoji[..emoji.len() - 1].to_vec())]).unwrap().remove(0);
    let stream = opt.stream_batch([forced(emoji[..emoji.len() - 1].to_vec())]).unwrap();
    assert_eq!(stream.map(|t| t.unwrap().text).collect::<String>(), found.text());
    assert!(found.text().contains(char::REPLACEMENT_CHARACTER));

    // And whatever hot sampling comes up with.
    for seed in 0..6 {
        let config = new_tokens(40).do_sample(true).top_k(0).temperature(9.0).seed(seed);
        let found = opt.generate("It", &config).unwrap();
        let streamed: String = opt.stream("It", &config).unwrap().map(|t| t.unwrap().text).collect();
        assert_eq!(streamed, found.text(), "seed {seed}");
    }
}

#[test]
fn a_callback_ends_it_at_a_token() {
    let opt = named("opt-novels");
    let whole = opt.generate("The river", &new_tokens(20)).unwrap();
    let mut seen = Vec::new();
    let requests = [Request::new("The river").config(new_tokens(20))];
    let see = |token: &opt_core::StreamToken| {
        seen.push(token.id);
        if seen.len() == 5 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    let found = opt.generate_with(requests, see, go_on).unwrap().remove(0);
    assert_eq!(seen, whole.ids()[..5]);
    assert_eq!(found.ids(), seen);
    assert_eq!(found.sequences[0].finish, FinishReason::Stop);
    assert_eq!(found.text(), opt.tokenizer().unwrap().decode(&seen, true).unwrap());
}

#[test]
fn a_callback_ends_it_within_a_long_prompt() {
    let ids = random_ids(1, 1300, 300);
    let mut reports: Vec<(u64, u64)> = Vec::new();
    let progress = |report: opt_core::Progress<'_>| {
        assert_eq!(report.item, "prompt");
        reports.push((report.done, report.total));
        ControlFlow::Continue(())
    };
    let request = || Request::new(&ids[..]).config(new_tokens(3));
    let whole = SLOW.generate_with([request()], |_| ControlFlow::Continue(()), progress).unwrap().remove(0);
    assert!(reports.len() > 4, "{reports:?}");
    assert!(reports.iter().all(|(_, total)| *total == 1300), "{reports:?}");
    assert!(reports.is_sorted() && reports[0].0 == 0 && reports[reports.len() - 1].0 > 1000, "{reports:?}");

    for stop_at in [0, 3, reports.len() - 1] {
        let mut count = 0;
        let progress = |_: opt_core::Progress<'_>| {
            count += 1;
            if count > stop_at { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        let see = |_: &opt_core::StreamToken| panic!("a token of a prompt that was not run");
        let error = SLOW.generate_with([request()], see, progress).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Cancelled, "{error}");
        assert_eq!(count, stop_at + 1);
    }
    // A pass that was broken off leaves nothing behind.
    assert_same(&SLOW.generate(&ids[..], &new_tokens(3)).unwrap().sequences, &whole.sequences);
}

#[test]
fn a_session_runs_only_what_is_new() {
    let mut session = SLOW.session();
    session.append(random_ids(2, 300, 300)).unwrap();
    let mut totals = std::collections::BTreeSet::new();
    let mut watch = |report: opt_core::Progress<'_>| {
        totals.insert(report.total);
        ControlFlow::Continue(())
    };
    let request = Request::new(random_ids(3, 17, 300)).config(new_tokens(4));
    let mut stream = session.start(request).unwrap();
    while stream.next_watched(&mut watch).is_some() {}
    session.absorb(stream).unwrap();
    assert_eq!(totals.into_iter().collect::<Vec<_>>(), [17]);
}

#[test]
fn a_token_ends_a_prompt_and_a_text_from_another_thread() {
    let prompt = random_ids(1, 1300, 300);
    // Which request of the batch the token belongs to makes no difference.
    for which in 0..2 {
        let cancel = CancelToken::new();
        let requests = (0..2).map(|i| {
            let request = Request::new(&prompt[..]).config(new_tokens(40));
            if i == which { request.cancel(cancel.clone()) } else { request }
        });
        let (tell, told) = mpsc::channel();
        let elsewhere = {
            let cancel = cancel.clone();
            thread::spawn(move || {
                told.recv().unwrap();
                cancel.cancel();
            })
        };
        let mut last = 0;
        let mut stream = SLOW.stream_batch(requests).unwrap();
        let mut watch = |report: opt_core::Progress<'_>| {
            if report.done > 100 && last <= 100 {
                tell.send(()).unwrap();
            }
            last = report.done;
            ControlFlow::Continue(())
        };
        let error = stream.next_watched(&mut watch).unwrap().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Cancelled);
        assert!(last < 2500, "it ran to the end: {last}");
        assert!(stream.next().is_none());
        assert_eq!(stream.collect_all().unwrap_err().kind(), ErrorKind::Cancelled);
        elsewhere.join().unwrap();
    }

    let cancel = CancelToken::new();
    let request = Request::new(&prompt[..20]).config(new_tokens(1300)).cancel(cancel.clone());
    let stream = SLOW.stream_batch([request]).unwrap();
    let (send, receive) = mpsc::channel();
    let reader = thread::spawn(move || {
        let mut end = None;
        for token in stream {
            match token {
                Ok(token) => send.send(token.id).unwrap(),
                Err(error) => end = Some(error.kind()),
            }
        }
        end
    });
    assert_eq!(receive.iter().take(3).count(), 3);
    cancel.cancel();
    assert_eq!(reader.join().unwrap(), Some(ErrorKind::Cancelled));
    assert!(receive.try_iter().count() < 1200);

    let before = Request::new(&prompt[..]).cancel(cancel);
    assert_eq!(SLOW.generate_batch([before]).unwrap_err().kind(), ErrorKind::Cancelled);
}

#[test]
fn a_batch_comes_in_turns() {
    let opt = named("opt-novels");
    let lengths = [3, 7, 5];
    let requests = lengths.map(|n| Request::new("The river").config(new_tokens(n)));
    let order: Vec<usize> = opt.stream_batch(requests).unwrap().map(|token| token.unwrap().request).collect();
    assert_eq!(order, [0, 1, 2, 0, 1, 2, 0, 1, 2, 1, 2, 1, 2, 1, 1]);
}

#[test]
fn time_ends_a_sequence() {
    let opt = named("opt-novels");
    let whole = opt.generate("The river", &new_tokens(50)).unwrap();
    let short = new_tokens(50).max_time(1e-9);
    let requests = || [short.clone(), new_tokens(50)].map(|c| Request::new("The river").config(c));
    let found = opt.generate_batch(requests()).unwrap();
    // As in transformers the clock is looked at behind each token.
    assert_eq!((found[0].ids(), found[0].sequences[0].finish), (&whole.ids()[..1], FinishReason::Length));
    assert_eq!(found[1].ids(), whole.ids());
    let tokens: Vec<_> = opt.stream_batch(requests()).unwrap().map(Result::unwrap).collect();
    let of_first: Vec<_> = tokens.iter().filter(|t| t.request == 0).map(|t| t.finish).collect();
    assert_eq!(of_first, [Some(FinishReason::Length)]);

    for config in
        [short.clone().num_beams(3), short.clone().penalty_alpha(0.5), short.clone().do_sample(true)]
    {
        let found = opt.generate("The river", &config).unwrap();
        assert!(found.ids().len() < 3, "{config:?}");
        assert_eq!(found.sequences[0].finish, FinishReason::Length);
    }
    let endless = new_tokens(3).max_time(1e30);
    assert_eq!(opt.generate("The river", &endless).unwrap().ids(), &whole.ids()[..3]);
}

/// Fails at the fourth token.
struct Fails;

impl LogitsProcessor for Fails {
    fn name(&self) -> &str {
        "fails"
    }

    fn process(&self, ids: &[u32], _: &mut [f32]) -> Result<()> {
        if ids.len() < 8 { Ok(()) } else { Err(Error::new(ErrorKind::Option, "out of ideas")) }
    }
}

#[test]
fn a_failure_is_the_last_item() {
    let request = || Request::new(&[1u32, 2, 3, 4, 5][..]).processor(Fails);
    let mut stream = SLOW.stream_batch([request()]).unwrap();
    let items: Vec<_> = stream.by_ref().collect();
    assert_eq!(items.len(), 4);
    assert!(items[..3].iter().all(Result::is_ok));
    assert_eq!(items[3].as_ref().unwrap_err().to_string(), "out of ideas");
    assert!(stream.next().is_none());
    assert_eq!(stream.collect_all().unwrap_err().kind(), ErrorKind::Option);
    assert_eq!(SLOW.generate_batch([request()]).unwrap_err().to_string(), "out of ideas");
    let batch = [Request::new(&[1u32][..]), request()];
    assert_eq!(SLOW.generate_batch(batch).unwrap_err().to_string(), "request 2: out of ideas");
}

#[test]
fn a_session_outlives_a_cancelled_turn() {
    let mut session = SLOW.session();
    session.append(random_ids(2, 30, 300)).unwrap();
    let mut twin = session.fork().unwrap();
    let cancel = CancelToken::new();
    let request = || Request::new(&[1u32, 2][..]).config(new_tokens(20));
    let mut stream = session.start(request().cancel(cancel.clone())).unwrap();
    assert!(stream.by_ref().take(3).all(|token| token.is_ok()));
    cancel.cancel();
    assert_eq!(session.absorb(stream).unwrap_err().kind(), ErrorKind::Cancelled);
    assert_same(&session.run(request()).unwrap().sequences, &twin.run(request()).unwrap().sequences);
}
