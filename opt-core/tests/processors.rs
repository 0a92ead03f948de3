//! Every processor, and random chains of them, beside transformers' (tests/fixtures/make_processors.py).

use opt_core::{
    ErrorKind,
    config::OptConfig,
    generation::{Extras, GenerationConfig, Hooks, LogitsProcessor, ProcessorChain},
};
use proptest::prelude::*;
use safetensors::SafeTensors;
use serde_json::Value;
use std::{fs, path::Path};

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as u32).collect()
}

fn array(arrays: &SafeTensors<'_>, name: &str) -> Vec<f32> {
    let view = arrays.tensor(name).unwrap();
    view.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

/// The rule that the fixtures' `prefix_allowed_tokens_fn` follows.
fn prefix_hooks(rule: Option<&Value>, vocab: u32) -> Hooks {
    let Some(rule) = rule else { return Hooks::default() };
    let part = |name: &str| rule[name].as_u64().unwrap() as u32;
    let (a, modulus, keep) = (part("a"), part("modulus"), part("keep"));
    Hooks::default().prefix_allowed_tokens(move |ids| {
        let (len, last) = (ids.len() as u32, *ids.last().unwrap());
        (0..vocab).filter(|t| (a * t + last + len) % modulus < keep).collect()
    })
}

struct Case {
    name: String,
    chain: ProcessorChain,
    ids: Vec<u32>,
    picked: Vec<u32>,
    scores: Vec<f32>,
    expected: Vec<f32>,
}

/// The case, or `None` for the one setting that is an error here: a top_p of 0.
fn case(value: &Value, arrays: &SafeTensors<'_>) -> Option<Case> {
    let name = value["name"].as_str().unwrap().to_owned();
    let picked = ids(&value["picked"]);
    let scores = array(arrays, &format!("{name}.scores"));
    let vocab = scores.len() / picked.len();
    let prompt = ids(&value["prompt"]);

    let text = value["config"].to_string();
    let mut config = GenerationConfig::from_json(&text).unwrap();
    // The fixtures' chains are built without what generate() does before: it replaces min_length by min_new_tokens.
    if let (Some(min), Some(new)) = (config.min_length, config.min_new_tokens) {
        config.min_length = Some(min.max(prompt.len() + new));
        config.min_new_tokens = None;
    }
    let mut model = OptConfig::default();
    (model.vocab_size, model.eos_token_id) = (vocab, None);
    let settings = match config.resolve(&model, &prompt, 0, &Extras::default()) {
        Err(error) => {
            assert!(error.to_string().starts_with("top_p: expected"), "{name}: {error}");
            return None;
        }
        Ok((settings, _)) => settings,
    };
    let hooks = prefix_hooks(value["config"].get("prefix_rule"), vocab as u32);
    let chain = ProcessorChain::new(&config, &settings, &hooks).unwrap();
    let expected = array(arrays, &format!("{name}.expected"));
    Some(Case { name, chain, ids: prompt, picked, scores, expected })
}

#[test]
fn every_processor_and_random_chains_match_transformers() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/processors");
    let cases: Vec<Value> = serde_json::from_slice(&fs::read(folder.join("cases.json")).unwrap()).unwrap();
    let bytes = fs::read(folder.join("arrays.safetensors")).unwrap();
    let arrays = SafeTensors::deserialize(&bytes).unwrap();

    let (mut rows, mut failures, mut refused) = (0, Vec::new(), 0);
    for value in &cases {
        // transformers' prefix constraint takes its rows in groups of num_beams and bans everything for the fixtures'
        // single rows, which no beam search hands it.
        if value["config"].get("prefix_rule").is_some() && value["config"].get("num_beams").is_some() {
            continue;
        }
        let Some(mut case) = case(value, &arrays) else {
            refused += 1;
            continue;
        };
        let vocab = case.scores.len() / case.picked.len();
        for (step, &token) in case.picked.iter().enumerate() {
            let mut scores = case.scores[step * vocab..][..vocab].to_vec();
            let expected = &case.expected[step * vocab..][..vocab];
            case.chain.apply(&case.ids, &mut scores).unwrap();
            for (i, (found, want)) in scores.iter().zip(expected).enumerate() {
                let near = found == want || (found - want).abs() <= 1e-5 * want.abs().max(1.0);
                if !near {
                    failures.push(format!("{} step {step} token {i}: {found}, expected {want}", case.name));
                }
            }
            rows += 1;
            case.ids.push(token);
        }
    }
    assert!(
        failures.is_empty(),
        "{} differ, the first: {:#?}",
        failures.len(),
        failures.iter().step_by(12).collect::<Vec<_>>()
    );
    assert_eq!(refused, 4, "the kinds of rows with top_p 0");
    assert!(rows > 500, "only {rows} rows");
}

const BANNED: f32 = f32::NEG_INFINITY;

fn chain(config: &GenerationConfig, vocab: usize, prompt: &[u32], hooks: &Hooks) -> ProcessorChain {
    let mut model = OptConfig::default();
    model.vocab_size = vocab;
    let (settings, _) = config.resolve(&model, prompt, 0, &Extras::default()).unwrap();
    ProcessorChain::new(config, &settings, hooks).unwrap()
}

struct Custom(&'static str, f32);

impl LogitsProcessor for Custom {
    fn name(&self) -> &str {
        self.0
    }

    fn process(&self, _ids: &[u32], scores: &mut [f32]) -> opt_core::Result<()> {
        scores.iter_mut().for_each(|s| *s += self.1);
        Ok(())
    }
}

#[test]
fn the_order_is_that_of_transformers_and_custom_processors_have_their_place() {
    let full = GenerationConfig::default()
        .sequence_bias([(vec![4], 1.0)].into())
        .repetition_penalty(2.0)
        .no_repeat_ngram_size(2)
        .bad_words_ids(vec![vec![3], vec![2]])
        .min_new_tokens(1)
        .forced_bos_token_id(5)
        .eos_token_id([2])
        .forced_eos_token_id([2])
        .remove_invalid_values(true)
        .exponential_decay_length_penalty((1, 1.5))
        .suppress_tokens([6])
        .begin_suppress_tokens([7])
        .renormalize_logits(true)
        .temperature(0.5)
        .top_k(4)
        .top_p(0.9)
        .min_p(0.1)
        .typical_p(0.9)
        .epsilon_cutoff(0.01)
        .eta_cutoff(0.01);
    let mut hooks = Hooks::default()
        .prefix_allowed_tokens(|_| vec![1])
        .processor(Custom("own", 1.0))
        .processor(Custom("suppress_tokens", 5.0));
    let before = [
        "sequence_bias",
        "repetition_penalty",
        "no_repeat_ngram_size",
        "bad_words_ids",
        "min_length",
        "min_new_tokens",
        "prefix_allowed_tokens_fn",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "remove_invalid_values",
        "exponential_decay_length_penalty",
        "suppress_tokens",
        "begin_suppress_tokens",
        "own",
    ];
    let warpers = ["temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"];
    let greedy = chain(&full, 9, &[2, 3], &hooks);
    assert_eq!(greedy.names(), [&before[..], &["renormalize_logits"]].concat());
    let sampling = chain(&full.clone().do_sample(true), 9, &[2, 3], &hooks);
    assert_eq!(sampling.names(), [&before[..], &warpers, &["renormalize_logits"]].concat());

    // The caller's suppress_tokens stands in the place of the option's.
    let plain = GenerationConfig::default().suppress_tokens([1]);
    hooks.prefix_allowed_tokens = None;
    let mut scores = [0.0, 1.0];
    chain(&plain, 2, &[0], &hooks).apply(&[0], &mut scores).unwrap();
    assert_eq!(scores, [6.0, 7.0]);

    assert!(chain(&GenerationConfig::default(), 9, &[2], &Hooks::default()).is_empty());
    // Neutral values need no processor; sampling has its top_k of 50.
    let neutral =
        GenerationConfig::default().temperature(1.0).top_p(1.0).repetition_penalty(1.0).do_sample(true);
    assert_eq!(chain(&neutral, 99, &[2], &Hooks::default()).names(), ["top_k"]);
}

#[test]
fn constraints_that_leave_nothing() {
    let sample = GenerationConfig::default().do_sample(true);
    let hooks = |allowed: Vec<u32>| Hooks::default().prefix_allowed_tokens(move |_| allowed.clone());
    let fail = |config: &GenerationConfig, hooks| {
        let error = chain(config, 4, &[2], &hooks).apply(&[2], &mut [0.0; 4]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Option);
        error.to_string()
    };
    assert!(fail(&sample, hooks(vec![])).contains("expected at least one token id, found none"));
    assert!(fail(&sample, hooks(vec![1, 4])).contains("expected ids below the vocabulary of 4, found 4"));
    let nothing = sample.suppress_tokens([0, 1, 2, 3]);
    assert!(fail(&nothing, Hooks::default()).contains("no token is left to draw after 1 ids"));
    // Without a draw the row is handed on, as in transformers.
    let greedy = GenerationConfig::default().suppress_tokens([0, 1, 2, 3]);
    chain(&greedy, 4, &[2], &Hooks::default()).apply(&[2], &mut [0.0; 4]).unwrap();
}

/// transformers makes NaN of it.
#[test]
fn exponential_decay_leaves_a_forbidden_eos_forbidden() {
    let config = GenerationConfig::default()
        .exponential_decay_length_penalty((0, 2.0))
        .min_new_tokens(5)
        .eos_token_id([1]);
    let mut scores = [0.5, 2.0, 1.0];
    chain(&config, 3, &[0], &Hooks::default()).apply(&[0, 2], &mut scores).unwrap();
    assert_eq!(scores, [0.5, BANNED, 1.0]);
}

fn scores() -> impl Strategy<Value = Vec<f32>> {
    // Steps of a quarter make ties; -20 stands for a token that an earlier processor has banned.
    let score = || (-20i8..20).prop_map(|v| if v == -20 { BANNED } else { f32::from(v) / 4.0 });
    // The larger rows have too many candidates to sort at once.
    let row = prop_oneof![
        3 => prop::collection::vec(score(), 2..300),
        1 => prop::collection::vec(score(), 1000..3000),
    ];
    row.prop_filter("some token", |s| s.iter().any(|v| *v > BANNED))
}

fn probabilities(scores: &[f32]) -> Vec<f64> {
    let max = scores.iter().copied().fold(BANNED, f32::max);
    let exps: Vec<f64> = scores.iter().map(|s| f64::from(s - max).exp()).collect();
    let sum: f64 = exps.iter().sum();
    exps.iter().map(|e| e / sum).collect()
}

proptest! {
    #[test]
    fn top_k_keeps_k_and_their_ties(scores in scores(), k in 1usize..400) {
        let config = GenerationConfig::default().do_sample(true).top_k(k);
        let mut found = scores.clone();
        chain(&config, scores.len(), &[0], &Hooks::default()).apply(&[0], &mut found).unwrap();
        let mut sorted = scores.clone();
        sorted.sort_by(|a, b| b.total_cmp(a));
        let last = sorted[k.min(scores.len()) - 1];
        for (found, score) in found.iter().zip(&scores) {
            prop_assert_eq!(*found, if *score >= last { *score } else { BANNED });
        }
    }

    #[test]
    fn top_p_keeps_the_mass_and_no_more(scores in scores(), percent in 1u8..100) {
        let p = f32::from(percent) / 100.0;
        let config = GenerationConfig::default().do_sample(true).top_k(0).top_p(p);
        let mut found = scores.clone();
        chain(&config, scores.len(), &[0], &Hooks::default()).apply(&[0], &mut found).unwrap();
        let shares = probabilities(&scores);
        let kept: Vec<usize> = (0..scores.len()).filter(|&i| found[i] > BANNED).collect();
        let mass: f64 = kept.iter().map(|&i| shares[i]).sum();
        let least = kept.iter().map(|&i| shares[i]).fold(1.0, f64::min);
        let p = f64::from(p);
        prop_assert!(mass >= p - 1e-5, "kept {} of {}", mass, p);
        prop_assert!(kept.len() == 1 || mass - least <= p + 1e-5, "{} would do for {}", mass - least, p);
        for i in 0..scores.len() {
            prop_assert!(found[i] == scores[i] || (found[i] == BANNED && shares[i] <= least + 1e-12));
        }
        // Of equal ones the earlier go first.
        let border = kept.iter().map(|&i| scores[i]).fold(f32::INFINITY, f32::min);
        let equal = (0..scores.len()).filter(|&i| scores[i] == border);
        prop_assert!(equal.map(|i| found[i] > BANNED).is_sorted());
    }

    #[test]
    fn filters_together_never_ban_everything(
        scores in scores(),
        (temperature, top_p, min_p, typical) in (0.01f32..5.0, 0.01f32..1.0, 0.0f32..1.0, 0.01f32..1.0),
        (epsilon, eta, k, beams) in (0.0f32..0.99, 0.0f32..0.99, 0usize..9, 1usize..4),
    ) {
        let config = GenerationConfig::default().do_sample(true).temperature(temperature).top_k(k).top_p(top_p)
            .min_p(min_p).typical_p(typical).epsilon_cutoff(epsilon).eta_cutoff(eta).num_beams(beams)
            .eos_token_id([0]);
        let mut found = scores.clone();
        chain(&config, scores.len(), &[0], &Hooks::default()).apply(&[0], &mut found).unwrap();
        let possible = |row: &[f32]| row.iter().filter(|s| **s > BANNED).count();
        let most = if beams > 1 { 2 } else { 1 };
        prop_assert!(possible(&found) >= most.min(possible(&scores)), "{:?}", found);
        prop_assert!(found.iter().zip(&scores).all(|(f, s)| *f == BANNED || *s > BANNED), "a banned token came back");
    }
}
