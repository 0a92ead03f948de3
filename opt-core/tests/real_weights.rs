//! What the published weights say, against outputs of theirs that are on record in public repositories (test data,
//! opt-reference/recorded_outputs.json, which names the sources).
//!
//! `OPT_WEIGHTS` names a directory with folders such as `opt-125m` or `facebook--opt-125m`, or a hub cache. What is
//! not there is skipped, and said so on stderr.

mod common;

use common::test_data;
use opt_core::{Opt, Request, generation::GenerationConfig, tokenizer::Bos};
use serde_json::Value;
use std::{fs, path::PathBuf};

/// The recorded outputs, if the test data is there.
fn recorded() -> Option<Value> {
    let bytes = fs::read(test_data("opt-reference/recorded_outputs.json")?).unwrap();
    Some(serde_json::from_slice(&bytes).unwrap())
}

/// The folder of one of the published models.
fn folder(name: &str) -> Option<PathBuf> {
    let Some(root) = std::env::var_os("OPT_WEIGHTS").map(PathBuf::from) else {
        common::backend::skipped(format_args!(
            "{name} (set OPT_WEIGHTS to a directory with the published weights)"
        ));
        return None;
    };
    let named = [name.to_owned(), format!("facebook--{name}"), format!("facebook/{name}")];
    let mut places: Vec<PathBuf> = named.iter().map(|folder| root.join(folder)).collect();
    let snapshots = root.join(format!("models--facebook--{name}/snapshots"));
    places.extend(fs::read_dir(snapshots).into_iter().flatten().map(|entry| entry.unwrap().path()));
    let found = places.into_iter().find(|place| place.join("config.json").exists());
    if found.is_none() {
        common::backend::skipped(format_args!("{name} is not in {}", root.display()));
    }
    found
}

fn open(name: &str) -> Option<Opt> {
    Some(Opt::open(folder(name)?).unwrap_or_else(|e| panic!("{name}: {e}")))
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap()
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(number).collect()
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap()
}

/// Prompt and continuation, without special tokens.
fn whole_text(opt: &Opt, found: &opt_core::Generated) -> String {
    let ids = [&found.prompt_ids[..], found.ids()].concat();
    opt.tokenizer().unwrap().decode(&ids, true).unwrap()
}

#[test]
fn last_hidden_state_of_350m() {
    let Some(recorded) = recorded() else { return };
    let Some(opt) = open("opt-350m") else { return };
    let case = &recorded["transformers_tests"]["opt-350m_last_hidden_state"];
    let ids: Vec<u32> = serde_json::from_value(case["input_ids"].clone()).unwrap();
    let last = opt.hidden_states(&ids).unwrap().pop().unwrap();
    assert_eq!([1, last.nrows(), last.ncols()].map(|n| n as f64).to_vec(), numbers(&case["shape"]));
    let rows = case["slice_[0,:3,:3]"].as_array().unwrap();
    for (i, row) in rows.iter().enumerate() {
        for (j, expected) in numbers(row).into_iter().enumerate() {
            let found = f64::from(last[[i, j]]);
            let off = (found - expected).abs();
            assert!(off <= number(&case["atol"]), "[{i}, {j}]: found {found}, expected {expected}");
        }
    }
}

#[test]
fn mean_logits_of_350m() {
    let Some(recorded) = recorded() else { return };
    let Some(opt) = open("opt-350m") else { return };
    let case = &recorded["transformers_tests"]["opt-350m_logits_mean_over_vocab"];
    let prompts = case["prompts"].as_array().unwrap();
    let rows = case["logits.mean(-1)"].as_array().unwrap();
    assert_eq!(prompts.len(), rows.len());
    for (prompt, expected) in prompts.iter().map(text).zip(rows) {
        let ids = opt.tokenizer().unwrap().encode(prompt, Bos::Never).unwrap();
        let logits = opt.logits(&ids).unwrap();
        // Behind the prompt's own tokens come those of the padding.
        let expected = numbers(expected);
        assert!(ids.len() > 3 && ids.len() <= expected.len(), "{prompt}: {ids:?}");
        for (i, (row, expected)) in logits.outer_iter().zip(expected).enumerate() {
            let found = row.iter().map(|logit| f64::from(*logit)).sum::<f64>() / row.len() as f64;
            // Both tolerances of torch.allclose, as in the test the numbers come from.
            let allowed = number(&case["atol"]) + 1e-5 * expected.abs();
            assert!(
                (found - expected).abs() <= allowed,
                "{prompt}, token {i}: found {found}, expected {expected}"
            );
        }
    }
}

#[test]
fn greedy_texts() {
    let Some(recorded) = recorded() else { return };
    let models = recorded["transformers_tests"]["greedy_max_length_10"].as_object().unwrap();
    for (name, cases) in models {
        let Some(opt) = open(name) else { continue };
        for (prompt, expected) in cases.as_object().unwrap() {
            let found = opt.generate(prompt, &GenerationConfig::default().max_length(10)).unwrap();
            assert_eq!(whole_text(&opt, &found), text(expected), "{name}");
        }
    }
}

/// The record is of a padded batch that ends at 20 tokens, padding included.
#[test]
fn a_batch_of_350m() {
    let Some(recorded) = recorded() else { return };
    let Some(opt) = open("opt-350m") else { return };
    let cases = recorded["transformers_tests"]["opt-350m_greedy_max_length_20_left_padded_batch"]
        .as_object()
        .unwrap();
    let longest =
        cases.keys().map(|prompt| opt.tokenizer().unwrap().encode(prompt, Bos::Model).unwrap().len()).max();
    let settings = GenerationConfig::default().max_new_tokens(20 - longest.unwrap());
    let requests = cases.keys().map(|prompt| Request::new(prompt).config(settings.clone()));
    let found = opt.generate_batch(requests).unwrap();
    for (found, expected) in found.iter().zip(cases.values()) {
        assert_eq!(whole_text(&opt, found), text(expected));
    }
}

#[test]
fn contrastive_search_of_1_3b() {
    let Some(recorded) = recorded() else { return };
    let Some(opt) = open("opt-1.3b") else { return };
    let case =
        &recorded["transformers_tests"]["opt-1.3b_contrastive_penalty_alpha_0.6_top_k_5_max_length_256"];
    let settings = GenerationConfig::default().penalty_alpha(0.6).top_k(5).max_length(256);
    let found = opt.generate(text(&case["prompt"]), &settings).unwrap();
    let expected = text(&case["continuation_starts"]);
    assert!(found.text().starts_with(expected), "found {:?}, expected {expected:?}", found.text());
}

/// Recorded by another implementation, CTranslate2: ten tokens after `</s>` alone.
#[test]
fn greedy_tokens_of_350m_after_bos() {
    let Some(recorded) = recorded() else { return };
    let Some(opt) = open("opt-350m") else { return };
    let case = &recorded["ctranslate2_test"];
    let tokens: Vec<&str> = text(&case["greedy tokens"]).split(' ').collect();
    let found = opt.generate(vec![2], &GenerationConfig::default().max_new_tokens(tokens.len())).unwrap();
    let expected = tokens.concat().replace('Ġ', " ").replace('Ċ', "\n");
    assert_eq!((found.text(), found.ids().len()), (&expected[..], tokens.len()));
}

#[test]
fn ids_of_texts() {
    let Some(recorded) = recorded() else { return };
    let Some(opt) = ["opt-125m", "opt-350m", "opt-1.3b"].iter().find_map(|name| open(name)) else { return };
    let cases = [
        ("A photo of a cat", &recorded["transformers_tokenizer_tests"]["A photo of a cat"]),
        (text(&recorded["flexflow"]["opt-125m prompt"]), &recorded["flexflow"]["ids"]),
    ];
    for (prompt, expected) in cases {
        let expected: Vec<u32> = serde_json::from_value(expected.clone()).unwrap();
        let found = opt.tokenizer().unwrap().encode(prompt, Bos::Model).unwrap();
        // The second record goes on with a continuation of uncertain origin.
        assert!(found.len() > 5 && expected.starts_with(&found), "{prompt}: {found:?}");
    }
}

/// The test split of WikiText-2 as the table's programs read it: rows end with a line break, and are joined by two more.
#[cfg(feature = "quantize")]
fn wikitext() -> Option<String> {
    let raw = fs::read_to_string(test_data("eval/wiki.test.raw")?).unwrap();
    let rows: Vec<&str> =
        raw.split_inclusive('\n').map(|row| if row.trim().is_empty() { "" } else { row }).collect();
    Some(rows.join("\n\n"))
}

/// OPT-125m in table 3 of the GPTQ paper (arXiv 2210.17323): windows of 2048 tokens, the incomplete one left out; 4 bits,
/// a scale and a zero point a row, the token table as it was. It calibrates by C4, for which contexts of HellaSwag stand
/// here; so of GPTQ's row only the neighbourhood is expected.
#[test]
#[cfg(feature = "quantize")]
fn the_table_of_gptq() {
    use opt_core::{
        CacheDType, CancelToken, Load, Progress,
        checkpoint::Checkpoint,
        quantize::{
            GptqOptions, Method, QuantSpec, QuantizeOptions, TableFormat, calibration_sequences, compare,
            quantize_weights,
        },
    };
    use std::{ops::ControlFlow, sync::Arc};

    let (Some(wiki), Some(contexts)) = (wikitext(), test_data("eval/hellaswag_val.jsonl")) else { return };
    let Some(folder) = folder("opt-125m") else { return };
    let base = Opt::open(&folder).unwrap();
    let encode = |text: &str| base.require_tokenizer().unwrap().encode(text, Bos::Model).unwrap();
    let mut ids = encode(&wiki);
    ids.truncate(ids.len() / 2048 * 2048);
    let contexts = fs::read_to_string(contexts).unwrap();
    let contexts = contexts.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let contexts: Vec<String> = contexts.map(|row| text(&row["ctx"]).to_owned()).collect();
    let calibration = calibration_sequences(&encode(&contexts.join("\n\n")), 2048, 128).unwrap();

    let checkpoint = Checkpoint::open(&folder).unwrap();
    let spec = QuantSpec::int4().per_row().zero_points(true).table(TableFormat::Keep);
    let cancel = CancelToken::new();
    for (method, low, high) in [(Method::Rtn, 37.0, 37.6), (Method::Gptq(GptqOptions::default()), 29.0, 33.5)]
    {
        let options = QuantizeOptions::default().method(method).calibration(calibration.clone());
        let weights = quantize_weights(&checkpoint, &spec, options).unwrap();
        let other = Opt::load(&folder, Load::default().replace(Arc::new(weights))).unwrap();
        let mut quiet = |_: Progress<'_>| ControlFlow::Continue(());
        let found = compare(&base, &other, CacheDType::F32, &ids, 2048, &cancel, &mut quiet).unwrap();
        assert!(
            (found.base_perplexity - 27.65).abs() < 0.02,
            "f32: {}, published 27.65",
            found.base_perplexity
        );
        assert!((low..high).contains(&found.perplexity), "{method:?}: {found:?}, published 37.28 and 31.12");
    }
}
