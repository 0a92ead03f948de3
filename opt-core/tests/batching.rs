//! A changing batch gives what each of its tasks gives alone, whatever comes and goes beside it.

#[path = "common/calls.rs"]
mod calls;
mod common;

use calls::{call, cases, request, run};
use common::{
    backend::{deterministic, difference, same_numbers},
    novels,
    tiny::{Tiny, random_ids},
};
use opt_core::{
    CancelToken, ErrorKind, Generated, Load, Opt, Request, ScoreInput, StreamToken,
    batching::{Batch, BatchOptions, Event, Task, TaskId},
    embedding::{EmbedOptions, EmbedPart, Embedder},
    generation::{GenerationConfig, LogitsProcessor},
};
use proptest::{collection::vec, prelude::*};
use std::{
    collections::{BTreeMap, HashMap},
    sync::LazyLock,
};

static TINY: LazyLock<Opt> = LazyLock::new(|| Tiny::default().opt());
static LONG: LazyLock<Opt> =
    LazyLock::new(|| Tiny { context: 600, hidden: 16, heads: 2, embed: 16, ..Tiny::default() }.opt());

/// What a task is for, when it comes and whether it is ended before its time.
#[derive(Debug, Clone)]
struct Arrival {
    step: usize,
    call: (Vec<u32>, GenerationConfig),
    /// Its prompt begins with so many tokens of what others begin with too.
    head: usize,
    goal: u8,
    cancel: Option<usize>,
}

fn arrivals() -> impl Strategy<Value = Vec<Arrival>> {
    let one = (0usize..12, call(), 0usize..48, 0u8..10, proptest::option::weighted(0.2, 0usize..10));
    let one = one.prop_map(|(step, call, head, goal, cancel)| Arrival { step, call, head, goal, cancel });
    vec(one, 1..9)
}

fn options() -> impl Strategy<Value = BatchOptions> {
    // A position of the tiny model takes 512 bytes.
    (1usize..64, 12usize..24, 1200u64..4000, any::<bool>()).prop_map(|(rows, sequences, positions, share)| {
        let options = BatchOptions::default().rows(rows).sequences(sequences);
        options.cache_bytes(positions * 512).share_prefixes(share)
    })
}

impl Arrival {
    fn prompt(&self) -> Vec<u32> {
        let shared = random_ids(99, 48, 61);
        let mut ids = shared[..self.head].to_vec();
        ids.extend(&self.call.0);
        ids.truncate(90);
        ids
    }

    fn request(&self) -> Request {
        let request = request(&(self.prompt(), self.call.1.clone()));
        // Vectors of what is generated, whose prompt may begin with another's or must be run.
        match self.goal {
            2 => request.embed(EmbedOptions::default().layer(1), EmbedPart::Produced),
            3 => request.embed(EmbedOptions::default().layer(1), EmbedPart::Whole),
            _ => request,
        }
    }

    fn task(&self) -> Task {
        let task = match self.goal {
            0 => Task::embed(&TINY, self.prompt(), EmbedOptions::default().layer(1)),
            1 => Task::score(&TINY, self.prompt(), 3),
            _ => Task::generate(&TINY, self.request()),
        };
        task.unwrap()
    }
}

/// What came of a task.
#[derive(Default)]
struct Outcome {
    tokens: Vec<StreamToken>,
    last: Option<Event>,
}

/// Drives a batch to its end and checks what holds in every step.
fn drive(arrivals: &[Arrival], options: &BatchOptions) -> Vec<Outcome> {
    let mut batch = Batch::new(&TINY, options.clone()).unwrap();
    let mut ids: HashMap<TaskId, usize> = HashMap::new();
    let mut outcomes: Vec<Outcome> = arrivals.iter().map(|_| Outcome::default()).collect();
    for step in 0.. {
        for (index, arrival) in arrivals.iter().enumerate().filter(|(_, a)| a.step == step) {
            ids.insert(batch.add(arrival.task()).unwrap(), index);
        }
        let due = |&(_, index): &(&TaskId, &usize)| {
            arrivals[*index].cancel.is_some_and(|after| arrivals[*index].step + after == step)
        };
        ids.iter().filter(due).for_each(|(id, _)| batch.cancel(*id));
        if batch.is_idle() && arrivals.iter().all(|a| a.step <= step) {
            return outcomes;
        }
        for event in batch.step().unwrap() {
            let outcome = &mut outcomes[ids[&event.task()]];
            assert!(outcome.last.is_none(), "an event behind the last");
            match event {
                Event::Token { token, .. } => outcome.tokens.push(token),
                event if event.is_last() => outcome.last = Some(event),
                _ => {}
            }
        }
        let stats = batch.stats();
        assert!(stats.cache_reserved + stats.cache_kept <= options.cache_bytes, "{stats:?}");
        assert!(stats.sequences <= options.sequences, "{stats:?}");
        // Sequences that grow come first, each with a few rows (candidates, drafts), and a quarter is left for prompts.
        assert!(stats.rows <= options.rows + options.rows.div_ceil(4) + 32 * options.sequences, "{stats:?}");
        assert!(step < 4000, "no end: {stats:?}");
    }
    outcomes
}

proptest! {
    #![proptest_config(cases(64))]

    #[test]
    fn what_comes_and_goes_changes_nothing(arrivals in arrivals(), options in options()) {
        for (arrival, outcome) in arrivals.iter().zip(drive(&arrivals, &options)) {
            let fail = |what: String| Err(TestCaseError::fail(format!("{arrival:?}: {what}")));
            match outcome.last {
                Some(Event::Failed { error, .. }) => {
                    if arrival.cancel.is_none() || error.kind() != ErrorKind::Cancelled {
                        return fail(error.to_string());
                    }
                }
                Some(Event::Generated { generated, .. }) => {
                    let alone = run(&TINY, arrival.request());
                    if let Some(difference) = difference(&generated.sequences, &alone.sequences) {
                        return fail(difference);
                    }
                    let mut streamed: BTreeMap<usize, Vec<u32>> = BTreeMap::new();
                    outcome.tokens.iter().for_each(|t| streamed.entry(t.sequence).or_default().push(t.id));
                    for (index, sequence) in generated.sequences.iter().enumerate() {
                        prop_assert_eq!(streamed.remove(&index).unwrap_or_default(), sequence.ids.clone());
                    }
                }
                Some(Event::Embedded { embedding, .. }) => {
                    let embedder = Embedder::new(&TINY, EmbedOptions::default().layer(1)).unwrap();
                    let alone = embedder.embed(arrival.prompt()).unwrap();
                    // Pooled elsewhere: on the device there, on the host here.
                    let near = |(a, b): (&f32, &f32)| (a - b).abs() <= 1e-4 * b.abs().max(1.0);
                    prop_assert!(embedding.vector().iter().zip(alone.vector()).all(near));
                    prop_assert_eq!((embedding.tokens, embedding.cut), (alone.tokens, 0));
                }
                Some(Event::Scored { scores, .. }) => {
                    prop_assert_eq!(&scores.ids, &arrival.prompt());
                    let found: Vec<f32> = scores.tokens.iter().map(|token| token.log_prob).collect();
                    let expected = match arrival.prompt() {
                        ids if ids.len() > 1 => TINY.score(&[ScoreInput::all(ids)]).unwrap().remove(0).log_probs,
                        _ => Vec::new(),
                    };
                    prop_assert_eq!(found.len(), expected.len());
                    prop_assert!(found.iter().zip(&expected).all(|(a, b)| (a - b).abs() <= 1e-4 * b.abs().max(1.0)));
                    for token in &scores.tokens {
                        prop_assert_eq!(token.alternatives.len(), 3);
                        prop_assert!(token.alternatives[0].log_prob >= token.log_prob - 1e-6);
                    }
                }
                None if arrival.cancel.is_some() => {}
                _ => return fail("no end".to_owned()),
            }
        }
    }
}

fn greedy(new: usize) -> GenerationConfig {
    GenerationConfig::default().max_new_tokens(new)
}

fn generate(opt: &Opt, ids: &[u32], config: GenerationConfig) -> Task {
    Task::generate(opt, Request::new(ids).config(config)).unwrap()
}

/// Runs to the end; results in the order of their tasks.
fn finish(batch: &mut Batch) -> Vec<Generated> {
    let mut found = BTreeMap::new();
    while !batch.is_idle() {
        for event in batch.step().unwrap() {
            if let Event::Generated { task, generated, .. } = event {
                found.insert(task, generated);
            }
        }
    }
    found.into_values().collect()
}

#[test]
fn a_long_prompt_does_not_hold_up_those_who_run() {
    let mut batch = Batch::new(&LONG, BatchOptions::default().rows(32)).unwrap();
    let running = batch.add(generate(&LONG, &random_ids(1, 8, 61), greedy(60))).unwrap();
    batch.step().unwrap();
    let long = batch.add(generate(&LONG, &random_ids(2, 500, 61), greedy(4))).unwrap();
    let (mut tokens, mut steps) = (0, 0);
    'prefill: loop {
        let events = batch.step().unwrap();
        steps += 1;
        let of = |task: TaskId| {
            events.iter().filter(move |e| matches!(e, Event::Token { .. }) && e.task() == task)
        };
        tokens += of(running).count();
        assert_eq!(tokens, steps, "a step without a token for the one that runs");
        assert!(batch.stats().rows <= 32, "{:?}", batch.stats());
        if of(long).count() > 0 {
            break 'prefill;
        }
    }
    assert_eq!(steps, 500_usize.div_ceil(31));
    assert_eq!(finish(&mut batch).len(), 2);
}

#[test]
fn what_prompts_have_in_common_is_run_once() {
    let head = random_ids(3, 64, 61);
    let prompts: Vec<Vec<u32>> = (0..8).map(|i| [&head[..], &random_ids(10 + i, 9, 61)].concat()).collect();
    let mut batch = Batch::new(&LONG, BatchOptions::default().rows(24)).unwrap();
    // All at once: the others wait for the first.
    for ids in &prompts {
        batch.add(generate(&LONG, ids, greedy(5))).unwrap();
    }
    let found = finish(&mut batch);
    let run = |batch: &Batch| batch.stats().prompt_tokens - batch.stats().cached_tokens;
    // What two of them share by chance behind the head may be spared as well.
    assert!((64 + 7 * 9..=64 + 8 * 9).contains(&run(&batch)), "{:?}", batch.stats());
    // And again later, when the first have ended: one token of each.
    let before = run(&batch);
    for ids in &prompts {
        batch.add(generate(&LONG, ids, greedy(5))).unwrap();
    }
    let again = finish(&mut batch);
    assert_eq!(run(&batch) - before, 8);
    for ((ids, found), again) in prompts.iter().zip(found).zip(again) {
        let alone = LONG.generate(&ids[..], &greedy(5)).unwrap();
        for with_others in [found, again] {
            assert_eq!(difference(&with_others.sequences, &alone.sequences), None);
        }
    }
    // A text goes on from where it was.
    let text: Vec<u32> =
        [&prompts[0][..], LONG.generate(&prompts[0][..], &greedy(5)).unwrap().ids()].concat();
    let before = run(&batch);
    batch.add(generate(&LONG, &[&text[..], &[7, 8]].concat(), greedy(1))).unwrap();
    finish(&mut batch);
    assert_eq!(run(&batch) - before, 3, "the last token of the text, which was never run, and two new ones");
}

#[test]
fn caches_stay_within_the_budget() {
    // 512 bytes a position: room for three tasks of 50 positions, in blocks of 32.
    let options = BatchOptions::default().cache_bytes(3 * 64 * 512 + 100);
    let mut batch = Batch::new(&TINY, options).unwrap();
    let error = batch.add(generate(&TINY, &random_ids(1, 80, 61), greedy(16).num_beams(3))).unwrap_err();
    let expected = "keys and values: expected a request that needs at most 1 MiB, found one that needs 1 MiB";
    assert!(error.kind() == ErrorKind::Option && error.to_string().starts_with(expected), "{error}");
    for i in 0..8 {
        batch.add(generate(&TINY, &random_ids(i, 40, 61), greedy(10))).unwrap();
    }
    let mut most = 0;
    let mut ended = 0;
    while !batch.is_idle() {
        let events = batch.step().unwrap();
        ended += events.iter().filter(|event| matches!(event, Event::Generated { .. })).count();
        let stats = batch.stats();
        most = most.max(stats.running);
        assert!(stats.cache_reserved + stats.cache_kept <= 3 * 64 * 512 + 100, "{stats:?}");
    }
    assert_eq!((most, ended), (3, 8));
    assert!(batch.stats().cache_kept > 0, "{:?}", batch.stats());
}

#[test]
fn groups_take_turns() {
    let mut batch = Batch::new(&TINY, BatchOptions::default().sequences(2)).unwrap();
    for i in 0..8 {
        batch.add_of(1, generate(&TINY, &random_ids(i, 5, 61), greedy(10))).unwrap();
    }
    batch.step().unwrap();
    // Six of the first group wait; a second one does not wait behind them.
    let other = batch.add_of(2, generate(&TINY, &random_ids(9, 5, 61), greedy(2))).unwrap();
    let mut order = Vec::new();
    while !batch.is_idle() {
        let ends = batch.step().unwrap().into_iter().filter(Event::is_last);
        order.extend(ends.map(|event| event.task() == other));
    }
    assert_eq!((order.len(), order.iter().position(|of_other| *of_other)), (9, Some(2)), "{order:?}");
}

#[test]
fn limits_are_named() {
    let error = Batch::new(&TINY, BatchOptions::default().rows(0)).err().unwrap();
    assert_eq!(error.to_string(), "rows: expected at least 1, found 0");
    let mut batch = Batch::new(&TINY, BatchOptions::default().sequences(2)).unwrap();
    let error = batch.add(generate(&TINY, &[1, 2], greedy(3).num_beams(3))).unwrap_err();
    let expected = "expected at most 2 sequences side by side (beams, choices), found 3";
    assert_eq!(error.to_string(), expected);
    let other = Tiny::default().opt();
    let error = batch.add(generate(&other, &[1, 2], greedy(3))).unwrap_err();
    assert!(error.to_string().contains("another model's"), "{error}");
    for (task, expected) in [
        (Task::score(&TINY, Vec::<u32>::new(), 1), "prompt: expected at least one token, found none"),
        (Task::score(&TINY, vec![1; 98], 1), "prompt: expected at most 97 tokens, found 98"),
        (Task::score(&TINY, vec![61], 1), "expected token ids below the vocabulary size 61, found 61 at 0"),
        (Task::score(&TINY, "text", 1), "texts and stop strings need a tokenizer"),
    ] {
        let error = task.err().unwrap();
        assert!(error.to_string().starts_with(expected), "{error}");
    }
}

/// Fails, or leaves no token, after a number of tokens.
struct Fails(usize);

impl LogitsProcessor for Fails {
    fn name(&self) -> &str {
        "fails"
    }

    fn process(&self, ids: &[u32], scores: &mut [f32]) -> opt_core::Result<()> {
        if ids.len() >= self.0 {
            scores.fill(f32::NEG_INFINITY);
        }
        Ok(())
    }
}

#[test]
fn one_that_fails_leaves_the_others() {
    let mut batch = Batch::new(&TINY, BatchOptions::default()).unwrap();
    let bad = Request::new(&[1, 2, 3][..]).config(greedy(8)).processor(Fails(6));
    let bad = batch.add(Task::generate(&TINY, bad).unwrap()).unwrap();
    let good = batch.add(generate(&TINY, &[4, 5, 6], greedy(8))).unwrap();
    let cancel = CancelToken::new();
    let ended = Request::new(&[1, 2, 4][..]).config(greedy(8)).cancel(cancel.clone());
    let ended = batch.add(Task::generate(&TINY, ended).unwrap()).unwrap();
    let mut last = HashMap::new();
    let mut tokens: HashMap<TaskId, usize> = HashMap::new();
    while !batch.is_idle() {
        for event in batch.step().unwrap() {
            match event {
                Event::Token { task, .. } => *tokens.entry(task).or_default() += 1,
                event if event.is_last() => drop(last.insert(event.task(), event)),
                _ => {}
            }
        }
        if tokens.get(&ended) == Some(&2) {
            cancel.cancel();
        }
    }
    assert!(
        matches!(&last[&bad], Event::Failed { error, .. } if error.to_string().contains("no token is possible"))
    );
    assert!(matches!(&last[&good], Event::Generated { generated, .. }
        if generated.ids() == TINY.generate(&[4u32, 5, 6][..], &greedy(8)).unwrap().ids()));
    assert!(matches!(&last[&ended], Event::Failed { error, .. } if error.kind() == ErrorKind::Cancelled));
    assert_eq!((tokens[&bad], tokens[&good], tokens[&ended]), (3, 8, 2));
}

#[test]
fn many_that_draw_share_threads() {
    let mut batch = Batch::new(&TINY, BatchOptions::default().threads(Some(3))).unwrap();
    let config = |i: u64| greedy(8).do_sample(true).top_k(0).seed(i);
    let prompt = |i: u64| vec![1 + i as u32, 2, 3];
    let mut tasks = HashMap::new();
    for i in 0..20 {
        let mut request = Request::new(prompt(i)).config(config(i));
        if i % 7 == 3 {
            request = request.processor(Fails(5));
        }
        tasks.insert(batch.add(Task::generate(&TINY, request).unwrap()).unwrap(), i);
    }
    let mut ended = 0;
    while !batch.is_idle() {
        let events = batch.step().unwrap();
        // In the order of the tasks, whichever thread was first.
        let order = |event: &Event| match event {
            Event::Token { task, .. } => Some(*task),
            _ => None,
        };
        assert!(events.iter().filter_map(order).is_sorted());
        for event in events {
            match event {
                Event::Generated { task, generated, .. } => {
                    let i = tasks[&task];
                    let alone = TINY.generate(&prompt(i)[..], &config(i)).unwrap();
                    assert_eq!(generated.ids(), alone.ids());
                    assert!(i % 7 != 3);
                    ended += 1;
                }
                Event::Failed { task, .. } => {
                    assert_eq!(tasks[&task] % 7, 3);
                    ended += 1;
                }
                _ => {}
            }
        }
    }
    assert_eq!(ended, 20);
}

#[test]
fn a_panic_of_a_processor_says_what_it_said() {
    struct Panics;
    impl LogitsProcessor for Panics {
        fn name(&self) -> &str {
            "panics"
        }

        fn process(&self, _: &[u32], _: &mut [f32]) -> opt_core::Result<()> {
            panic!("meant");
        }
    }
    let mut batch = Batch::new(&TINY, BatchOptions::default().threads(Some(4))).unwrap();
    for i in 0..16_u32 {
        let request = Request::new(vec![1 + i, 2]).config(greedy(4).do_sample(true)).processor(Panics);
        batch.add(Task::generate(&TINY, request).unwrap()).unwrap();
    }
    let panic = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| batch.step())).unwrap_err();
    assert_eq!(panic.downcast_ref::<&str>(), Some(&"meant"));
    assert!(batch.step().is_err(), "a batch that was left in the middle goes no further");
}

#[test]
fn texts_of_a_trained_model() {
    let opt = Opt::load(novels(), Load::default()).unwrap();
    let opt = if deterministic() { opt } else { Opt::load(novels(), common::backend::load()).unwrap() };
    let prompts = ["The old house stood", "The old house stood at the end of", "“I have no doubt,” said"];
    let configs = [
        greedy(12),
        greedy(12).do_sample(true).seed(7).top_p(0.9).num_return_sequences(2),
        greedy(8).num_beams(3),
        greedy(24).stop_strings([",".to_owned()]),
    ];
    let each =
        || prompts.iter().flat_map(|prompt| configs.iter().map(move |config| (*prompt, config.clone())));
    let mut batch = Batch::new(&opt, BatchOptions::default().rows(16)).unwrap();
    let mut texts: HashMap<(TaskId, usize), String> = HashMap::new();
    let mut found = BTreeMap::new();
    let mut coming = each();
    loop {
        // Two more join in each step.
        for (prompt, config) in coming.by_ref().take(2) {
            batch.add(Task::generate(&opt, Request::new(prompt).config(config)).unwrap()).unwrap();
        }
        if batch.is_idle() {
            break;
        }
        for event in batch.step().unwrap() {
            match event {
                Event::Token { task, token } => {
                    texts.entry((task, token.sequence)).or_default().push_str(&token.text);
                }
                Event::Generated { task, generated, .. } => drop(found.insert(task, generated)),
                _ => {}
            }
        }
    }
    assert_eq!(found.len(), prompts.len() * configs.len());
    for ((task, generated), (prompt, config)) in found.iter().zip(each()) {
        let alone = opt.generate(prompt, &config).unwrap();
        for (index, (found, alone)) in generated.sequences.iter().zip(&alone.sequences).enumerate() {
            assert_eq!((&found.ids, &found.text), (&alone.ids, &alone.text), "{prompt} {config:?}");
            assert!(same_numbers(&found.log_probs, &alone.log_probs) || !deterministic());
            assert_eq!(found.text.as_deref(), texts.get(&(*task, index)).map(String::as_str));
        }
    }
}
