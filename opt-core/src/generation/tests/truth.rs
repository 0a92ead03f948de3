//! Against transformers: see tests/fixtures/strategies/make.py for the model and the versions.

use super::toy::{Toy, drive, request};
use crate::generation::*;
use serde::Deserialize;
use std::rc::Rc;

const CURRENT: &str = include_str!("../../../tests/fixtures/strategies/current.json");
const CLASSICAL: &str = include_str!("../../../tests/fixtures/strategies/classical.json");

#[derive(Deserialize)]
struct Fixture {
    vocab: usize,
    logits: Vec<Vec<f32>>,
    hidden: Vec<Vec<f32>>,
    pad: u32,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    prompt: Vec<u32>,
    settings: serde_json::Map<String, serde_json::Value>,
    sequences: Vec<Vec<u32>>,
    #[serde(default)]
    scores: Vec<f32>,
    #[serde(default)]
    beams: Vec<Vec<usize>>,
    /// The processed log-probability of each token.
    #[serde(default)]
    steps: Vec<Vec<f32>>,
    #[serde(default)]
    log_probs: Vec<f32>,
}

impl Fixture {
    fn read(text: &str) -> (Self, Toy) {
        let fixture: Self = serde_json::from_str(text).expect("the fixture");
        let (logits, hidden) = (Rc::new(fixture.logits.clone()), Rc::new(fixture.hidden.clone()));
        let row = |a: usize, b: usize, n: usize| {
            move |ids: &[u32], rows: &[Vec<f32>]| {
                let before = ids.len().checked_sub(2).map_or(0, |i| ids[i] as usize);
                let last = *ids.last().expect("at least one id") as usize;
                rows[(a * before + b * last + n * ids.len()) % rows.len()].clone()
            }
        };
        let (of_logits, of_hidden) = (row(7, 3, 5), row(5, 11, 1));
        let toy = Toy {
            logits: Box::new(move |ids| of_logits(ids, &logits)),
            hidden: Box::new(move |ids| of_hidden(ids, &hidden)),
        };
        (fixture, toy)
    }
}

impl Case {
    fn number(&self, name: &str) -> Option<f64> {
        self.settings.get(name).and_then(|v| v.as_f64())
    }

    fn count(&self, name: &str) -> Option<usize> {
        self.number(name).map(|v| v as usize)
    }

    fn method(&self) -> Method {
        let beams = self.count("num_beams").unwrap_or(1);
        if let Some(groups) = self.count("num_beam_groups") {
            let diversity = self.number("diversity_penalty").unwrap_or(0.0) as f32;
            Method::GroupBeam { beams, groups, diversity }
        } else if beams > 1 {
            Method::Beam { beams }
        } else if let Some(tokens) = self.count("prompt_lookup_num_tokens") {
            Method::PromptLookup { tokens, max_ngram: self.count("max_matching_ngram_size").unwrap_or(2) }
        } else if let Some(alpha) = self.number("penalty_alpha") {
            Method::Contrastive { alpha: alpha as f32, k: self.count("top_k").unwrap_or(50) }
        } else {
            Method::Single
        }
    }

    fn request(&self, fixture: &Fixture) -> Request {
        let eos = self.settings["eos_token_id"].clone();
        let config = GenerationConfig {
            eos_token_id: Some(TokenIds::Many(serde_json::from_value(eos).expect("ids"))),
            pad_token_id: Some(fixture.pad),
            max_new_tokens: self.count("max_new_tokens"),
            min_new_tokens: self.count("min_new_tokens"),
            no_repeat_ngram_size: self.count("no_repeat_ngram_size"),
            repetition_penalty: self.number("repetition_penalty").map(|p| p as f32),
            length_penalty: self.number("length_penalty").map(|p| p as f32),
            num_return_sequences: self.count("num_return_sequences"),
            num_beams: self.count("num_beams"),
            early_stopping: self.settings.get("early_stopping").map(|v| match v.as_bool() {
                Some(true) => EarlyStopping::Yes,
                Some(false) => EarlyStopping::No,
                None => EarlyStopping::Never,
            }),
            ..GenerationConfig::default()
        };
        request(&self.prompt, fixture.vocab, &config, |settings| settings.method = self.method())
    }
}

#[track_caller]
fn close(ours: &[f32], theirs: &[f32], what: &str) {
    assert_eq!(ours.len(), theirs.len(), "{what}");
    for (a, b) in ours.iter().zip(theirs) {
        assert!((a - b).abs() < 1e-4, "{what}: expected {theirs:?}, found {ours:?}");
    }
}

/// Compares every case of `text` that `select` wants; how many there were.
fn compare(text: &str, select: impl Fn(&Method) -> bool) -> usize {
    let (fixture, toy) = Fixture::read(text);
    let mut compared = 0;
    for case in fixture.cases.iter().filter(|c| select(&c.method())) {
        let place = format!("{:?} {:?}", case.prompt, case.settings);
        for keep in [false, true] {
            let mut request = case.request(&fixture);
            request.settings.keep_scores = keep;
            request.settings.keep_logits = keep;
            let outputs = drive(request, &toy, None).outputs;
            let ids: Vec<_> = outputs.iter().map(|o| o.ids.clone()).collect();
            assert_eq!(ids, case.sequences, "{place}");
            let scores: Vec<f32> = outputs.iter().filter_map(|o| o.score).collect();
            close(&scores, &case.scores, &place);
            for (output, beams) in outputs.iter().zip(&case.beams) {
                assert_eq!(&output.beam_indices, beams, "{place}");
            }
            for (output, steps) in outputs.iter().zip(&case.steps).filter(|_| keep) {
                let chosen = output.scores.iter().zip(&output.ids).map(|(row, id)| row[*id as usize]);
                close(&chosen.collect::<Vec<_>>(), steps, &place);
            }
            if !case.log_probs.is_empty() {
                close(&outputs[0].log_probs, &case.log_probs, &place);
            }
        }
        compared += 1;
    }
    compared
}

#[test]
fn greedy() {
    assert_eq!(compare(CURRENT, |m| matches!(m, Method::Single)), 20);
}

#[test]
fn beam_search() {
    assert_eq!(compare(CURRENT, |m| matches!(m, Method::Beam { .. })), 101);
}

#[test]
fn prompt_lookup() {
    assert_eq!(compare(CURRENT, |m| matches!(m, Method::PromptLookup { .. })), 12);
}

#[test]
fn diverse_beam_search() {
    assert_eq!(compare(CLASSICAL, |m| matches!(m, Method::GroupBeam { .. })), 60);
}

#[test]
fn contrastive_search() {
    assert_eq!(compare(CLASSICAL, |m| matches!(m, Method::Contrastive { .. })), 32);
}
