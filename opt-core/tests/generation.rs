//! Recorded calls of transformers' `generate` against this library's, through the whole engine.

mod common;

use common::{Generated, batches, generated, named, settings};
use opt_core::{Opt, Request, generation::FinishReason};
use std::collections::HashMap;

/// Models by the name that a recorded call gives, each loaded once.
#[derive(Default)]
struct Models(HashMap<String, Opt>);

impl Models {
    fn get(&mut self, name: &str) -> Opt {
        self.0.entry(name.to_owned()).or_insert_with(|| named(name)).clone()
    }
}

/// Ids equal, scores to 1e-4.
fn close(found: f32, expected: f64) -> bool {
    (f64::from(found) - expected).abs() <= 1e-4 * expected.abs().max(1.0)
}

fn request(case: &Generated, models: &mut Models) -> Request {
    let mut request = Request::new(&case.prompt[..]).config(case.settings());
    if let Some(rule) = case.prefix_rule() {
        let vocabulary = models.get(&case.model).config().vocab_size;
        request = request.allow_only(move |ids| rule.allowed(ids, vocabulary));
    }
    if let Some(draft) = &case.draft {
        let mut assistant = settings(&case.draft_config);
        // Only the numbers of drafted tokens are of interest; the target's own settings decide the text.
        assistant = assistant.over(&request.config);
        request.config.num_assistant_tokens = assistant.num_assistant_tokens;
        request.config.num_assistant_tokens_schedule = assistant.num_assistant_tokens_schedule;
        request.config.assistant_confidence_threshold = assistant.assistant_confidence_threshold;
        request = request.assistant(models.get(draft));
    }
    request
}

fn check(file: &str, least: usize) {
    let mut models = Models::default();
    let mut count = 0;
    for case in generated(file) {
        // Classifier-free guidance is not offered.
        if case.config.contains_key("guidance_scale") {
            continue;
        }
        let what = format!("{file}: {}", case.name);
        let opt = models.get(&case.model);
        let request = request(&case, &mut models).keep_scores();
        let found = opt.generate_batch([request]).unwrap_or_else(|e| panic!("{what}: {e}")).remove(0);
        let ids: Vec<&[u32]> = found.sequences.iter().map(|sequence| &sequence.ids[..]).collect();
        assert_eq!(ids, case.outputs, "{what}");
        for (i, sequence) in found.sequences.iter().enumerate() {
            assert_eq!(sequence.log_probs.len(), sequence.ids.len(), "{what}");
            if let Some(expected) = case.sequences_scores.get(i) {
                let score = sequence.score.unwrap();
                assert!(close(score, *expected), "{what}: score {score}, expected {expected}");
            } else {
                assert_eq!(sequence.score.is_some(), !case.sequences_scores.is_empty(), "{what}");
            }
            if let Some(expected) = case.beam_indices.get(i) {
                assert_eq!(sequence.beam_indices, expected[..sequence.ids.len()], "{what}: beams");
            }
            if let Some(expected) = case.finish.get(i) {
                let found = match sequence.finish {
                    FinishReason::Eos => "eos",
                    FinishReason::Length => "length",
                    _ => "stop",
                };
                assert_eq!(found, expected, "{what}");
            }
            for (step, expected) in case.token_scores.iter().enumerate().filter(|_| i == 0) {
                let found = sequence.scores[step][sequence.ids[step] as usize];
                assert!(close(found, *expected), "{what}: step {step} scored {found}, expected {expected}");
            }
        }
        // The same, as a stream: the same tokens, in the same order for each sequence.
        let request = self::request(&case, &mut models);
        let mut streamed = vec![Vec::new(); case.outputs.len()];
        let mut texts = vec![String::new(); case.outputs.len()];
        for token in opt.stream_batch([request]).unwrap() {
            let token = token.unwrap_or_else(|e| panic!("{what}: {e}"));
            streamed[token.sequence].push(token.id);
            texts[token.sequence].push_str(&token.text);
        }
        assert_eq!(streamed, case.outputs, "{what}: streamed");
        for (i, expected) in case.output_texts.iter().enumerate() {
            assert_eq!(texts[i], *expected, "{what}: streamed text");
            assert_eq!(found.sequences[i].text.as_deref(), Some(&expected[..]), "{what}: text");
        }
        count += 1;
    }
    assert!(count >= least, "{file}: expected at least {least} cases, found {count}");
}

#[test]
fn greedy_with_processors() {
    check("greedy", 30);
}

#[test]
fn beam_search() {
    check("beam", 30);
}

#[test]
fn group_beam_search() {
    check("group_beam", 8);
}

#[test]
fn contrastive_search() {
    check("contrastive", 8);
}

#[test]
fn assisted_decoding() {
    check("assisted", 8);
}

#[test]
fn prose() {
    check("texts", 4);
}

#[test]
fn prompts_of_several_lengths_in_one_batch() {
    let mut models = Models::default();
    let mut count = 0;
    for case in batches() {
        let opt = models.get(&case.model);
        let requests =
            case.prompts.iter().map(|prompt| Request::new(&prompt[..]).config(settings(&case.config)));
        let found = opt.generate_batch(requests).unwrap_or_else(|e| panic!("{}: {e}", case.name));
        for (row, (found, expected)) in found.iter().zip(&case.outputs).enumerate() {
            let ids: Vec<&[u32]> = found.sequences.iter().map(|sequence| &sequence.ids[..]).collect();
            assert_eq!(ids, *expected, "{}: row {row}", case.name);
            for (i, expected) in case.sequences_scores.get(row).into_iter().flatten().enumerate() {
                let score = found.sequences[i].score.unwrap();
                assert!(
                    close(score, *expected),
                    "{}: row {row}: score {score}, expected {expected}",
                    case.name
                );
            }
        }
        count += 1;
    }
    assert!(count > 2, "expected batches, found {count}");
}
