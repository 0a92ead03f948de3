//! Every knob of the architecture against transformers: logits, hidden states, attentions, log-probabilities, greedy.
//!
//! The models run on the CPU backend and on the reference bodies of the trait layer, so that a mistake of the decoder
//! is told from one of a kernel.

mod common;

use common::{arrays, assert_close, fixture_model, fixture_names, fixtures, ids, json, matrix};
use opt_core::{
    Load, Opt, ScoreInput,
    backends::Cpu,
    engine::{Forward, Hidden, Output, Sequence, Want},
    generation::GenerationConfig,
    ndarray::{Array2, Axis, Ix2, Ix3, s},
};

fn on_cpu(name: &str) -> Opt {
    fixture_model(name, Load::on(Cpu::new().expect("the CPU backend")))
}

fn on_reference(name: &str) -> Opt {
    fixture_model(name, Load::on(opt_backend::Reference::new()))
}

/// Runs `check` for each fixture on both backends.
fn each(check: impl Fn(&Opt, &str, &serde_json::Value, &std::collections::HashMap<String, ndarray::ArrayD<f32>>)) {
    for name in fixture_names() {
        let dir = fixtures().join("models").join(&name);
        let expected = json(&dir.join("expected.json"));
        let arrays = arrays(&dir.join("expected.safetensors"));
        check(&on_cpu(&name), &format!("{name} on cpu"), &expected, &arrays);
        check(&on_reference(&name), &format!("{name} on the reference"), &expected, &arrays);
    }
}

use common::ndarray;

fn run<'a>(opt: &'a Opt, sequence: Sequence<'a>) -> Output {
    let batch = Forward { sequences: vec![sequence], ..Forward::default() };
    opt.engine().forward_blocking(batch).expect("forward").remove(0)
}

#[test]
fn logits_and_hidden_states() {
    each(|opt, name, expected, arrays| {
        for (i, sequence) in expected["sequences"].as_array().expect("sequences").iter().enumerate() {
            let ids = ids(sequence);
            let what = format!("{name}, sequence {i}");
            let logits = opt.logits(&ids).expect("logits");
            assert_close(logits.view(), matrix(&arrays[&format!("seq{i}.logits")]).view(), &format!("{what}: logits"));
            let hidden = opt.hidden_states(&ids).expect("hidden states");
            assert_eq!(hidden.len(), opt.config().num_hidden_layers + 1, "{what}");
            for (layer, found) in hidden.iter().enumerate() {
                let expected = matrix(&arrays[&format!("seq{i}.hidden.{layer}")]);
                assert_close(found.view(), expected.view(), &format!("{what}: hidden state {layer}"));
            }
            if ids.len() > 1 {
                let expected = arrays[&format!("seq{i}.logprobs")].clone().insert_axis(Axis(0));
                let scored = opt.score(&[ScoreInput::all(ids)]).expect("score").remove(0);
                let found = Array2::from_shape_vec((1, scored.log_probs.len()), scored.log_probs).expect("row");
                let expected = expected.into_dimensionality::<Ix2>().expect("row");
                assert_close(found.view(), expected.view(), &format!("{what}: log-probabilities"));
            }
        }
    });
}

#[test]
fn attention_weights() {
    let mut seen = 0;
    each(|opt, name, expected, arrays| {
        for (i, sequence) in expected["sequences"].as_array().expect("sequences").iter().enumerate() {
            if !arrays.contains_key(&format!("seq{i}.attentions.0")) {
                continue;
            }
            let found = opt.attentions(&ids(sequence)).expect("attentions");
            assert_eq!(found.len(), opt.config().num_hidden_layers);
            for (layer, found) in found.iter().enumerate() {
                let expected = arrays[&format!("seq{i}.attentions.{layer}")].clone();
                let expected = expected.into_dimensionality::<Ix3>().expect("three dimensions");
                for head in 0..expected.len_of(Axis(0)) {
                    let (found, expected) = (found.slice(s![head, .., ..]), expected.slice(s![head, .., ..]));
                    assert_close(found, expected, &format!("{name}: attention of layer {layer}, head {head}"));
                }
            }
        }
    });
    for name in fixture_names() {
        let arrays = arrays(&fixtures().join("models").join(name).join("expected.safetensors"));
        seen += usize::from(arrays.contains_key("seq0.attentions.0"));
    }
    assert!(seen > 0, "no fixture has attentions");
}

#[test]
fn explicit_positions_and_embeddings() {
    let mut seen = (0, 0);
    for name in fixture_names() {
        let dir = fixtures().join("models").join(&name);
        let (expected, arrays) = (json(&dir.join("expected.json")), arrays(&dir.join("expected.safetensors")));
        let opt = on_cpu(&name);
        if let Some(positions) = expected.get("positions").filter(|p| !p.is_null()) {
            let (ids, positions) = (ids(&positions["ids"]), ids(&positions["position_ids"]));
            let mut sequence = Sequence::new(&ids[..]).want(Want::Logits { rows: ids.len() });
            sequence.positions = Some(&positions);
            let found = run(&opt, sequence).logits.expect("logits");
            assert_close(found.view(), matrix(&arrays["positions.logits"]).view(), &format!("{name}: positions"));
            seen.0 += 1;
        }
        if let Some(input) = arrays.get("embeds.input") {
            let input = matrix(input);
            let mut sequence = Sequence::new(input.view()).want(Want::Logits { rows: input.nrows() });
            sequence.hidden = Hidden::Last;
            let found = run(&opt, sequence);
            let logits = found.logits.expect("logits");
            assert_close(logits.view(), matrix(&arrays["embeds.logits"]).view(), &format!("{name}: embeddings"));
            seen.1 += 1;
        }
    }
    assert!(seen.0 > 0 && seen.1 > 0, "fixtures with positions and embeddings: {seen:?}");
}

#[test]
fn greedy() {
    each(|opt, name, expected, _| {
        for case in expected["greedy"].as_array().expect("greedy") {
            let prompt = ids(&case["prompt"]);
            let new = case["max_new_tokens"].as_u64().expect("max_new_tokens") as usize;
            let settings = GenerationConfig::default().max_new_tokens(new);
            let found = opt.generate(prompt.clone(), &settings).unwrap_or_else(|e| panic!("{name}: {e}"));
            assert_eq!(found.ids(), ids(&case["output"]), "{name}, prompt {prompt:?}");
        }
    });
}
