//! Every processor, and random chains of them, beside transformers' (tests/fixtures/make_processors.py).

use opt_core::{
    config::OptConfig,
    generation::{Extras, GenerationConfig, Hooks, ProcessorChain},
};
use safetensors::SafeTensors;
use serde_json::Value;
use std::{fs, path::Path, sync::Arc};

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as u32).collect()
}

fn array(arrays: &SafeTensors<'_>, name: &str) -> Vec<f32> {
    let view = arrays.tensor(name).unwrap();
    view.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

/// The rule that the fixtures' `prefix_allowed_tokens_fn` follows.
fn prefix_hooks(rule: Option<&Value>, vocab: u32) -> Hooks {
    let mut hooks = Hooks::default();
    if let Some(rule) = rule {
        let part = |name: &str| rule[name].as_u64().unwrap() as u32;
        let (a, modulus, keep) = (part("a"), part("modulus"), part("keep"));
        hooks.prefix_allowed_tokens = Some(Arc::new(move |ids: &[u32]| {
            let (len, last) = (ids.len() as u32, *ids.last().unwrap());
            (0..vocab).filter(|t| (a * t + last + len) % modulus < keep).collect()
        }));
    }
    hooks
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
