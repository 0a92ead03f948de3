//! What is asked of the model, what is handed out with the tokens, and what is refused.

use super::toy::{Driver, EMBEDDING, Toy, drive, log_softmax, methods, request, try_drive};
use crate::generation::*;
use crate::{ErrorKind, Result};
use std::sync::Arc;

const VOCAB: usize = 9;

fn toy() -> Toy {
    Toy::new(11, VOCAB, 4, 3.0)
}

fn config(max_new: usize) -> GenerationConfig {
    GenerationConfig { max_new_tokens: Some(max_new), ..GenerationConfig::default() }
}

fn refused(request: Request) -> (ErrorKind, String) {
    let error = try_drive(request, &toy(), Some(&toy())).expect_err("an error");
    (error.kind(), error.to_string())
}

/// What a request's first two plans need.
fn needs(config: &GenerationConfig, change: impl FnOnce(&mut Settings)) -> [Need; 2] {
    let toy = toy();
    let mut driver = Driver::new(&toy, None);
    let mut strategy = strategy(request(&[1, 2], VOCAB, config, change)).expect("a strategy");
    let first = strategy.plan();
    let need = first.runs[0].need;
    strategy.advance(driver.carry_out(first)).expect("an answer");
    [need, strategy.plan().runs[0].need]
}

#[test]
fn no_more_is_asked_than_needed() {
    let plain = config(5);
    let top = |k| Need { scores: ScoreNeed::TopK(k), rows: 1, hidden: false };
    let full = Need { scores: ScoreNeed::Full, rows: 1, hidden: false };
    let beam = Method::Beam { beams: 2 };
    assert_eq!(needs(&plain, |_| {}), [top(1); 2]);
    assert_eq!(needs(&plain, |s| s.top_alternatives = 3), [top(3); 2]);
    assert_eq!(needs(&plain, |s| s.top_alternatives = 100), [top(VOCAB); 2]);
    assert_eq!(needs(&plain, |s| s.keep_scores = true), [full; 2]);
    assert_eq!(needs(&plain, |s| s.keep_logits = true), [full; 2]);
    assert_eq!(needs(&plain, |s| s.do_sample = true), [full; 2]);
    assert_eq!(
        needs(&GenerationConfig { repetition_penalty: Some(1.2), ..plain.clone() }, |_| {}),
        [full; 2]
    );
    assert_eq!(needs(&plain, |s| s.method = beam.clone()), [top(4); 2]);
    assert_eq!(needs(&plain, |s| (s.method, s.eos) = (beam.clone(), vec![0, 3])), [top(6); 2]);
    let contrastive = Method::Contrastive { alpha: 0.6, k: 4 };
    assert_eq!(needs(&plain, |s| s.method = contrastive), [Need { hidden: true, ..top(4) }; 2]);
}

#[test]
fn alternatives_scores_and_logits_are_those_of_each_token() {
    let (toy, draft) = (toy(), Toy::new(12, VOCAB, 2, 3.0));
    let prompt = [3, 1];
    for (method, do_sample) in methods() {
        let config =
            GenerationConfig { suppress_tokens: Some(vec![5]), do_sample: Some(do_sample), ..config(6) };
        let beams = matches!(method, Method::Beam { .. } | Method::GroupBeam { .. });
        let plain_scores = !beams && !do_sample;
        let request = request(&prompt, VOCAB, &config, |s| {
            (s.method, s.top_alternatives, s.keep_scores, s.keep_logits) = (method, 3, true, true);
        });
        let transcript = drive(request, &toy, Some(&draft));
        let output = &transcript.outputs[0];
        let mut ids = prompt.to_vec();
        for (i, &id) in output.ids.iter().enumerate() {
            let row = (toy.logits)(&ids);
            assert_eq!(output.logits[i], row);
            assert_eq!(output.scores[i][5], f32::NEG_INFINITY);
            if plain_scores {
                assert_eq!(output.scores[i][..5], row[..5]);
            }
            // Alternatives are the model's own opinion: the suppressed token may be among them.
            let expected = math::top_k(&row, 3);
            let log_probs = log_softmax(&row);
            assert_eq!(output.alternatives[i].len(), 3);
            for (alternative, (other, _)) in output.alternatives[i].iter().zip(expected) {
                assert_eq!(alternative.id as usize, other);
                assert!((f64::from(alternative.log_prob) - log_probs[other]).abs() < 1e-5);
            }
            assert_eq!(transcript.events[i].alternatives, output.alternatives[i]);
            ids.push(id);
        }
        assert_eq!(output.beam_indices.len(), if beams { 6 } else { 0 });
        assert_eq!(output.score.is_some(), beams);
    }
}

#[test]
fn finished_sequences_leave_their_slot() {
    let toy = toy();
    let mut driver = Driver::new(&toy, None);
    let request = request(&[1], VOCAB, &config(30), |s| {
        (s.do_sample, s.num_return_sequences, s.eos) = (true, 6, vec![0, 1, 2]);
    });
    let mut strategy = strategy(request).expect("a strategy");
    let (mut open, mut finished) = (6, 0);
    loop {
        let plan = strategy.plan();
        assert_eq!(plan.runs.len(), if finished == 0 && open == 6 && plan.runs[0].prompt { 1 } else { open });
        if plan.runs.is_empty() {
            break;
        }
        strategy.advance(driver.carry_out(plan)).expect("an answer");
        finished += strategy.take_events().iter().filter(|e| e.finish.is_some()).count();
        open = 6 - finished;
    }
    assert_eq!(strategy.finish().len(), 6);
}

#[test]
fn beams_are_streamed_at_the_end() {
    let toy = toy();
    let mut driver = Driver::new(&toy, None);
    let request = request(&[1], VOCAB, &config(5), |s| {
        (s.method, s.num_return_sequences) = (Method::Beam { beams: 3 }, 2);
    });
    let mut strategy = strategy(request).expect("a strategy");
    let mut plan = strategy.plan();
    while !plan.runs.is_empty() {
        assert!(strategy.take_events().is_empty());
        strategy.advance(driver.carry_out(plan)).expect("an answer");
        plan = strategy.plan();
    }
    let order: Vec<usize> = strategy.take_events().iter().map(|e| e.sequence).collect();
    assert_eq!(order, [0, 0, 0, 0, 0, 1, 1, 1, 1, 1]);
    assert!(strategy.take_events().is_empty());
}

/// How many rows each run of the target asks for.
fn verified(schedule: AssistantSchedule, confidence: f32, draft: &Toy) -> Vec<usize> {
    let toy = toy();
    let mut driver = Driver::new(&toy, Some(draft));
    let request = request(&[1, 2], VOCAB, &config(40), |s| {
        s.method = Method::Assisted { tokens: 4, schedule, confidence };
    });
    let mut strategy = strategy(request).expect("a strategy");
    let mut rows = Vec::new();
    loop {
        let plan = strategy.plan();
        let Some(run) = plan.runs.first() else { return rows };
        if run.model == ModelRole::Target {
            rows.push(run.need.rows);
        }
        strategy.advance(driver.carry_out(plan)).expect("an answer");
    }
}

#[test]
fn the_length_of_drafts() {
    let (itself, contrary) = (
        toy(),
        Toy { logits: Box::new(|ids| (toy().logits)(ids).into_iter().map(|x| -x).collect()), ..toy() },
    );
    let (constant, heuristic) = (AssistantSchedule::Constant, AssistantSchedule::Heuristic);
    // 1 token of the prompt's run, then drafts of 4 and one more each; 39 = 7 · 5 + 4.
    assert_eq!(verified(constant, 0.0, &itself), [1, 5, 5, 5, 5, 5, 5, 5, 4]);
    // Drafts of 4, 6, 8, 10, and what is left.
    assert_eq!(verified(heuristic, 0.0, &itself), [1, 5, 7, 9, 11, 7]);
    // Nothing is ever accepted: 4, 3, 2, 1, 1, ...
    let rows = verified(heuristic, 0.0, &contrary);
    assert_eq!(rows[..7], [1, 5, 4, 3, 2, 2, 2]);
    assert_eq!(rows.len(), 40);
    // A draft that is never certain ends behind its first token; with the last token there is nothing to draft.
    let unsure = verified(constant, 1.1, &itself);
    assert_eq!(unsure[..4], [1, 2, 2, 2]);
    assert_eq!(unsure.len(), 21);
}

#[test]
fn prompt_lookup_needs_fewer_runs_where_text_repeats() {
    // What follows is the id before it plus one, round and round.
    let logits =
        |ids: &[u32]| (0..5).map(|i| f32::from(u8::from(i == (ids[ids.len() - 1] + 1) % 5))).collect();
    let toy = Toy { logits: Box::new(logits), ..toy() };
    let with =
        |method| drive(request(&[0, 1, 2, 3, 4, 0], 5, &config(21), |s| s.method = method), &toy, None);
    let (plain, lookup) = (with(Method::Single), with(Method::PromptLookup { tokens: 4, max_ngram: 2 }));
    assert_eq!(lookup.outputs, plain.outputs);
    assert_eq!((plain.target_runs, lookup.target_runs), (21, 5));
}

struct After(u32);

impl StoppingCriterion for After {
    fn should_stop(&self, ids: &[u32], prompt_len: usize) -> bool {
        ids.len() > prompt_len && ids.last() == Some(&self.0)
    }
}

#[test]
fn criteria_of_the_caller_end_sequences() {
    let (toy, draft) = (toy(), Toy::new(12, VOCAB, 2, 3.0));
    let mut stopped = 0;
    for (method, do_sample) in methods() {
        for id in 0..VOCAB as u32 {
            let mut request = request(&[4], VOCAB, &config(10), |s| {
                (s.method, s.do_sample) = (method.clone(), do_sample);
            });
            let hooks = Hooks { criteria: vec![Arc::new(After(id))], ..Hooks::default() };
            request.stopping = Stopping::new(&request.settings, None, &hooks);
            let output = drive(request, &toy, Some(&draft)).outputs.remove(0);
            let expected = output.ids.iter().position(|t| *t == id).map(|i| i + 1);
            assert_eq!(output.ids.len(), expected.unwrap_or(10), "{method:?}");
            assert_eq!(output.finish == FinishReason::Stop, expected.is_some(), "{method:?}");
            stopped += usize::from(expected.is_some());
        }
    }
    assert!(stopped > 20);
}

#[test]
fn prompts_of_embeddings_alone() {
    let toy = toy();
    for (method, do_sample) in methods() {
        if matches!(method, Method::Assisted { .. }) {
            continue;
        }
        let request = request(&[], VOCAB, &config(6), |s| {
            (s.method, s.do_sample, s.embeds_len) = (method, do_sample, 3);
        });
        let output = drive(request, &toy, None).outputs.remove(0);
        let mut ids = vec![EMBEDDING; 3];
        for (&id, &log_prob) in output.ids.iter().zip(&output.log_probs) {
            let expected = log_softmax(&(toy.logits)(&ids))[id as usize];
            assert!((expected - f64::from(log_prob)).abs() < 1e-5);
            ids.push(id);
        }
        assert_eq!(output.ids.len(), 6);
    }
}

#[test]
fn no_new_token_is_an_empty_sequence() {
    for (method, do_sample) in methods() {
        let beams = matches!(method, Method::Beam { .. } | Method::GroupBeam { .. });
        let request = request(&[1, 2], VOCAB, &config(1), |s| {
            (s.method, s.do_sample, s.max_length) = (method, do_sample, 2);
        });
        let transcript = drive(request, &toy(), None);
        assert_eq!(transcript.steps, 0);
        assert_eq!(transcript.outputs.len(), 1);
        let output = &transcript.outputs[0];
        assert_eq!((output.ids.len(), output.finish), (0, FinishReason::Length));
        assert_eq!(output.score, beams.then_some(0.0));
    }
}

/// Forbids everything from some length on.
struct Nothing(usize);

impl LogitsProcessor for Nothing {
    fn name(&self) -> &str {
        "nothing"
    }

    fn process(&self, ids: &[u32], scores: &mut [f32]) -> Result<()> {
        if ids.len() >= self.0 {
            scores.fill(f32::NEG_INFINITY);
        }
        Ok(())
    }
}

#[test]
fn where_no_token_is_possible() {
    for (method, do_sample) in methods() {
        let config = config(8);
        let mut request = request(&[1, 2], VOCAB, &config, |s| (s.method, s.do_sample) = (method, do_sample));
        let hooks = Hooks { processors: vec![Arc::new(Nothing(5))], ..Hooks::default() };
        request.chain = ProcessorChain::new(&config, &request.settings, &hooks).expect("processors");
        let (kind, message) = refused(request);
        assert_eq!(kind, ErrorKind::Option);
        // Where sampling filters, the filters find it first.
        let found = ["after 3 new tokens no token is possible", "no token is left to draw after 5 ids"];
        assert!(found.iter().any(|f| message.contains(f)), "{message}");
    }
}

/// Allows few tokens: the beams are then fewer than asked for, and none is made up.
#[test]
fn fewer_sequences_than_beams() {
    let config = GenerationConfig { suppress_tokens: Some((2..VOCAB as u32).collect()), ..config(2) };
    for (method, expected) in
        [(Method::Beam { beams: 6 }, 4), (Method::GroupBeam { beams: 6, groups: 1, diversity: 0.0 }, 4)]
    {
        let request = request(&[1], VOCAB, &config, |s| (s.method, s.num_return_sequences) = (method, 6));
        let outputs = drive(request, &toy(), None).outputs;
        assert_eq!(outputs.len(), expected);
        assert!(outputs.iter().all(|o| o.ids.iter().all(|id| *id < 2)));
    }
}

#[test]
fn what_a_method_cannot_do_is_refused() {
    let refused = |what: &str, change: fn(&mut Settings)| {
        let (kind, message) = refused(request(&[1, 2], VOCAB, &config(3), change));
        assert_eq!(kind, ErrorKind::Option, "{message}");
        assert!(message.contains(what), "{message}");
    };
    refused("num_return_sequences: expected at most 1 without sampling or beams, found 2", |s| {
        s.num_return_sequences = 2;
    });
    refused("num_return_sequences: expected at least 1", |s| s.num_return_sequences = 0);
    refused("num_return_sequences: expected at most 3 (num_beams), found 4", |s| {
        (s.method, s.num_return_sequences) = (Method::Beam { beams: 3 }, 4);
    });
    refused("num_beams: expected at least 1", |s| s.method = Method::Beam { beams: 0 });
    refused("num_beam_groups: expected a divisor of num_beams (3), found 2", |s| {
        s.method = Method::GroupBeam { beams: 3, groups: 2, diversity: 1.0 };
    });
    refused("num_beam_groups", |s| s.method = Method::GroupBeam { beams: 3, groups: 0, diversity: 1.0 });
    refused("top_k", |s| s.method = Method::Contrastive { alpha: 0.5, k: 0 });
    refused("embeddings", |s| {
        let schedule = AssistantSchedule::Constant;
        (s.method, s.embeds_len) = (Method::Assisted { tokens: 3, schedule, confidence: 0.0 }, 2);
    });
    refused("max_matching_ngram_size", |s| s.method = Method::PromptLookup { tokens: 3, max_ngram: 0 });
    refused("vocab_size", |s| s.vocab_size = 0);
}

#[test]
fn answers_that_do_not_fit_are_errors() {
    let reply = |scores| Reply { scores, hidden: None };
    let full = |n| RowScores::Full(vec![0.0; n].into());
    for (method, do_sample) in methods() {
        let wrong = [
            vec![],
            vec![reply(vec![])],
            vec![reply(vec![full(VOCAB - 1)])],
            vec![reply(vec![RowScores::TopK(opt_backend::TopK {
                ids: vec![],
                logits: vec![],
                log_sum_exp: 0.0,
            })])],
            vec![reply(vec![full(VOCAB)]), reply(vec![full(VOCAB)])],
        ];
        for replies in wrong {
            let request =
                request(&[1], VOCAB, &config(4), |s| (s.method, s.do_sample) = (method.clone(), do_sample));
            let mut strategy = strategy(request).expect("a strategy");
            strategy.plan();
            let error = strategy.advance(replies).expect_err("an error");
            assert_eq!(error.kind(), ErrorKind::Backend, "{method:?}: {error}");
        }
    }
}
