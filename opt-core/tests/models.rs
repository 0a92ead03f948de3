//! Every knob of the architecture against transformers: logits, hidden states, attentions, log-probabilities, greedy.
//!
//! The models run on the backend under test and on the reference bodies of the trait layer, so that a mistake of the decoder
//! is told from one of a kernel.

mod common;

use common::{Model, assert_close, backend, models};
use ndarray::{Array1, Axis, Ix3, s};
use opt_core::{
    Opt, ScoreInput,
    engine::{Forward, Hidden, Output, Sequence, Want},
    generation::GenerationConfig,
};

/// Runs `check` for each fixture on both backends.
fn each(check: impl Fn(&Opt, &str, &Model)) {
    let models = models();
    assert!(models.len() > 30, "expected the model fixtures, found {}", models.len());
    for model in &models {
        check(&model.opt(), &format!("{} on {}", model.name, backend::name()), model);
        check(&model.on_reference(), &format!("{} on the reference", model.name), model);
    }
}

fn run<'a>(opt: &'a Opt, sequence: Sequence<'a>) -> Output {
    let batch = Forward { sequences: vec![sequence], ..Forward::default() };
    opt.engine().forward_blocking(batch).unwrap().remove(0)
}

#[test]
fn logits_and_hidden_states() {
    each(|opt, name, model| {
        for (i, ids) in model.meta.sequences.iter().enumerate() {
            let what = format!("{name}, sequence {i}");
            let logits = opt.logits(ids).unwrap();
            assert_close(logits.view(), model.expected.matrix(&format!("seq{i}.logits")).view(), &what);
            let expected = model.expected.hidden(&format!("seq{i}"));
            let found = opt.hidden_states(ids).unwrap();
            assert_eq!(found.len(), expected.len(), "{what}: number of hidden states");
            assert_eq!(found.len(), opt.config().num_hidden_layers + 1, "{what}");
            for (layer, (found, expected)) in found.iter().zip(&expected).enumerate() {
                assert_close(found.view(), expected.view(), &format!("{what}: hidden state {layer}"));
            }
            if ids.len() > 1 {
                let scored = opt.score(&[ScoreInput::all(ids.clone())]).unwrap().remove(0);
                let expected = model.expected.vector(&format!("seq{i}.logprobs"));
                assert_close(Array1::from(scored.log_probs).view(), expected.view(), &what);
            }
        }
    });
}

#[test]
fn batches_are_equal_to_single_runs() {
    each(|opt, name, model| {
        let sequences: Vec<Sequence<'_>> = model
            .meta
            .sequences
            .iter()
            .map(|ids| Sequence::new(&ids[..]).want(Want::Logits { rows: ids.len() }))
            .collect();
        let outputs = opt.engine().forward_blocking(Forward { sequences, ..Forward::default() }).unwrap();
        for (i, output) in outputs.iter().enumerate() {
            let expected = model.expected.matrix(&format!("seq{i}.logits"));
            let found = output.logits.as_ref().unwrap();
            assert_close(found.view(), expected.view(), &format!("{name}, sequence {i} of the batch"));
            if opt.info().deterministic {
                assert_eq!(
                    *found,
                    opt.logits(&model.meta.sequences[i]).unwrap(),
                    "{name}, sequence {i}: bit-equal"
                );
            }
        }
    });
}

#[test]
fn attention_weights() {
    let seen = std::cell::Cell::new(0);
    each(|opt, name, model| {
        for (i, ids) in model.meta.sequences.iter().enumerate() {
            if model.expected.find(&format!("seq{i}.attentions.0")).is_none() {
                continue;
            }
            let found = opt.attentions(ids).unwrap();
            assert_eq!(found.len(), opt.config().num_hidden_layers);
            for (layer, found) in found.iter().enumerate() {
                let expected = model.expected.get(&format!("seq{i}.attentions.{layer}")).clone();
                let expected = expected.into_dimensionality::<Ix3>().unwrap();
                for head in 0..expected.len_of(Axis(0)) {
                    let (found, expected) = (found.slice(s![head, .., ..]), expected.slice(s![head, .., ..]));
                    assert_close(
                        found,
                        expected,
                        &format!("{name}: attention of layer {layer}, head {head}"),
                    );
                }
            }
            seen.set(seen.get() + 1);
        }
    });
    assert!(seen.get() > 0, "no fixture has attentions");
}

#[test]
fn explicit_positions_and_embeddings() {
    let (positions_seen, embeds_seen) = (std::cell::Cell::new(0), std::cell::Cell::new(0));
    each(|opt, name, model| {
        if let Some(positions) = &model.meta.positions {
            let at: Vec<u32> = positions.position_ids.iter().map(|p| *p as u32).collect();
            let mut sequence = Sequence::new(&positions.ids[..]).want(Want::Logits { rows: at.len() });
            sequence.positions = Some(&at);
            let found = run(opt, sequence).logits.unwrap();
            let expected = model.expected.matrix("positions.logits");
            assert_close(found.view(), expected.view(), &format!("{name}: positions"));
            positions_seen.set(positions_seen.get() + 1);
        }
        if model.expected.find("embeds.input").is_some() {
            let input = model.expected.matrix("embeds.input");
            let mut sequence = Sequence::new(input.view()).want(Want::Logits { rows: input.nrows() });
            sequence.hidden = Hidden::Last;
            let found = run(opt, sequence).logits.unwrap();
            let expected = model.expected.matrix("embeds.logits");
            assert_close(found.view(), expected.view(), &format!("{name}: embeddings"));
            embeds_seen.set(embeds_seen.get() + 1);
        }
    });
    assert!(positions_seen.get() > 0 && embeds_seen.get() > 0);
}

#[test]
fn greedy() {
    each(|opt, name, model| {
        for case in &model.meta.greedy {
            let settings = GenerationConfig::default().max_new_tokens(case.max_new_tokens);
            let found = opt.generate(&case.prompt[..], &settings).unwrap_or_else(|e| panic!("{name}: {e}"));
            assert_eq!(found.ids(), case.output, "{name}, prompt {:?}", case.prompt);
        }
    });
}
