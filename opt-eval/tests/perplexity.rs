//! Perplexities by windows are torch's (`fixtures/make_perplexity.py`).

mod common;

use common::{fixtures, go, opt};
use opt_core::tokenizer::Bos;
use opt_eval::{Asker, PerplexityOptions, perplexity};
use serde_json::Value;
use std::fs;

#[test]
fn windows_give_what_torch_gives() {
    let truth: Value =
        serde_json::from_slice(&fs::read(fixtures().join("perplexity.json")).unwrap()).unwrap();
    let rows = fs::read_to_string(fixtures().join("data/wikitext/test.jsonl")).unwrap();
    let page = |line: &str| serde_json::from_str::<Value>(line).unwrap()["page"].as_str().unwrap().to_owned();
    let text = rows.lines().map(page).collect::<Vec<_>>().join("\n");
    let text: String = text.chars().take(truth["characters"].as_u64().unwrap() as usize).collect();
    for case in truth["cases"].as_array().unwrap() {
        let bos = if case["bos"] == true { Bos::Model } else { Bos::Never };
        let mut options = PerplexityOptions::new(case["window"].as_u64().unwrap() as usize);
        options.stride = case["stride"].as_u64().map(|stride| stride as usize);
        let found = perplexity(&Asker::new(opt("opt-novels")).bos(bos), &text, options, &mut go).unwrap();
        let expected = case["perplexity"].as_f64().unwrap();
        assert!((found.perplexity / expected - 1.0).abs() < 1e-5, "{case}: {}", found.perplexity);
        if let Some(windows) = case["windows"].as_u64() {
            assert_eq!(found.windows as u64, windows);
        }
        if let Some(tokens) = case["tokens"].as_u64() {
            assert_eq!(found.tokens as u64, tokens);
        }
    }
}

#[test]
fn windows_that_cannot_be_are_refused() {
    let asker = Asker::new(opt("opt-novels"));
    for (options, text, expected) in [
        (PerplexityOptions::new(1), "The sea was grey.", "window: expected 2 to 512 (the context), found 1"),
        (PerplexityOptions::new(513), "The sea was grey.", "found 513"),
        (
            PerplexityOptions::new(8).stride(0),
            "The sea was grey.",
            "stride: expected 1 to 8 (the window), found 0",
        ),
        (PerplexityOptions::new(8).stride(9), "The sea was grey.", "found 9"),
        (PerplexityOptions::new(8), "", "expected a text of at least 2 tokens, found 1"),
    ] {
        let error = perplexity(&asker, text, options, &mut go).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}
