//! The trained models: perplexity, logits of a sentence, and a model that sorts.

mod common;

use common::{assert_close, backend, held_out, logits, named, perplexity, sorting, test_data};
use ndarray::Axis;
use opt_core::{Opt, ScoreInput, generation::GenerationConfig, tokenizer::Bos};

fn relative(found: f64, expected: f64) -> f64 {
    (found - expected).abs() / expected.abs()
}

#[test]
fn perplexity_of_a_passage() {
    let expected = perplexity().passage;
    let opt = named("opt-novels");
    let ids = opt.tokenizer().unwrap().encode(&expected.text, Bos::Model).unwrap();
    assert_eq!(ids, expected.ids);
    let scored = opt.score(&[ScoreInput::all(ids)]).unwrap().remove(0);
    for (i, (found, expected)) in scored.log_probs.iter().zip(&expected.nll).enumerate() {
        assert!(
            (f64::from(-found) - expected).abs() < 1e-4,
            "token {i}: found {}, expected {expected}",
            -found
        );
    }
    assert!(relative(-scored.log_prob, expected.nll_sum) < 1e-4);
    let found = (-scored.log_prob / scored.log_probs.len() as f64).exp();
    assert!(relative(found, expected.perplexity) < 1e-4, "found {found}, expected {}", expected.perplexity);
}

#[test]
fn perplexity_of_a_held_out_novel() {
    let expected = perplexity();
    let Some(text) = held_out(&expected) else { return };
    let opt = named("opt-novels");
    let ids = opt.tokenizer().unwrap().encode(&text, Bos::Never).unwrap();
    assert_eq!(ids.len(), expected.tokens);
    assert_eq!(ids.iter().map(|id| u64::from(*id)).sum::<u64>(), expected.ids_sum);
    let windows = expected.windows.iter().map(|w| ScoreInput::all(ids[w.start..w.start + w.tokens].to_vec()));
    let scored = opt.score(&windows.collect::<Vec<_>>()).unwrap();
    let nll: f64 = scored.iter().map(|s| -s.log_prob).sum();
    let count: usize = scored.iter().map(|s| s.log_probs.len()).sum();
    assert_eq!(count, expected.scored);
    let found = (nll / count as f64).exp();
    assert!(relative(found, expected.perplexity) < 1e-4, "found {found}, expected {}", expected.perplexity);
}

#[test]
fn logits_of_a_sentence() {
    let (expected, arrays) = logits();
    let opt = named("opt-novels");
    let found = opt.logits(&expected.ids).unwrap();
    for (row, top) in found.outer_iter().zip(&expected.positions) {
        for (id, value) in top.ids.iter().zip(&top.values) {
            let found = f64::from(row[*id as usize]);
            assert!((found - value).abs() < 2e-5 * value.abs().max(1.0), "found {found}, expected {value}");
        }
    }
    let last = found.index_axis(Axis(0), found.nrows() - 1);
    assert_close(last, arrays.vector("last_logits").view(), "last logits");
    let expected_hidden = arrays.matrix("last_hidden");
    for (layer, hidden) in opt.hidden_states(&expected.ids).unwrap().iter().enumerate() {
        let last = hidden.index_axis(Axis(0), hidden.nrows() - 1);
        assert_close(last, expected_hidden.index_axis(Axis(0), layer), &format!("hidden state {layer}"));
    }
}

#[test]
fn a_model_that_sorts() {
    let expected = sorting();
    let Some(dir) = test_data(&expected.model) else { return };
    let opt = Opt::load(dir, backend::load()).unwrap();
    let settings = GenerationConfig::default().max_new_tokens(6);
    for case in &expected.cases {
        let found = opt.generate(&case.prompt[..], &settings).unwrap();
        assert_eq!(found.ids(), case.output);
    }
    // All inputs of six letters of three, in batches.
    for first in 0..27u32 {
        let inputs: Vec<Vec<u32>> =
            (0..27).map(|rest| (0..6).map(|i| (first * 27 + rest) / 3u32.pow(i) % 3).collect()).collect();
        let requests = inputs
            .iter()
            .map(|ids| opt_core::Request::new(&ids[..]).config(settings.clone()))
            .collect::<Vec<_>>();
        for (input, found) in inputs.iter().zip(opt.generate_batch(requests).unwrap()) {
            let mut sorted = input.clone();
            sorted.sort_unstable();
            assert_eq!(found.ids(), sorted, "input {input:?}");
        }
    }
    // As text: no BOS is added by this model's tokenizer.
    let case = &expected.cases[0];
    assert_eq!(opt.generate(&case.text[..], &settings).unwrap().text(), case.output_text);
}
