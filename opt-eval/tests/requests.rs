//! Requests by themselves: tokens, cuts, windows, and answers of lm-evaluation-harness 0.4.13
//! (`fixtures/make_requests.py`).

mod common;

use common::{fixtures, go, opt};
use opt_core::{ErrorKind, tokenizer::Bos};
use opt_eval::{Asker, Encoded, Generation, Shared};
use serde_json::Value;
use std::fs;

fn cases(file: &str) -> Vec<Value> {
    serde_json::from_slice(&fs::read(fixtures().join("requests").join(file)).unwrap()).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

fn near(found: f64, expected: f64) -> bool {
    (found - expected).abs() <= 1e-4 + 2e-6 * expected.abs()
}

fn asker(model: &str, bos: bool) -> Asker<'static> {
    Asker::new(opt(model)).bos(if bos { Bos::Model } else { Bos::Never })
}

/// Compares answers of log-likelihoods, `[sum, greedy]`, all at once: what they share is run once.
fn compare(asker: &Asker<'_>, encoded: &[Encoded], expected: &[(String, &Value)]) {
    for share in [true, false] {
        let found = asker.clone().share(share).log_likelihoods(encoded, &mut go).unwrap();
        assert_eq!(found.len(), expected.len());
        for (found, (title, expected)) in found.iter().zip(expected) {
            let sum = expected[0].as_f64().unwrap();
            assert!(near(found.log_prob, sum), "{title}: {} and {sum}", found.log_prob);
            assert_eq!(Some(found.greedy), expected[1].as_bool(), "{title}");
        }
    }
}

#[test]
fn pairs_are_tokenized_and_answered_as_by_the_harness() {
    let cases = cases("pairs.json");
    for (key, bos) in [("bos", true), ("no_bos", false)] {
        let asker = asker("tiny", bos);
        let (mut encoded, mut expected) = (Vec::new(), Vec::new());
        for case in &cases {
            let (context, continuation) =
                (case["context"].as_str().unwrap(), case["continuation"].as_str().unwrap());
            let title = format!("{key}: {context:?} {continuation:?}");
            let found = asker.encode(context, continuation);
            let theirs = &case[key];
            if theirs["answer"].get("error").is_some() {
                // Where the harness fails an answer may be given, or one line.
                if let Err(error) = found {
                    assert_eq!(error.kind(), ErrorKind::Prompt, "{title}: {error}");
                }
                continue;
            }
            let found = found.unwrap_or_else(|e| panic!("{title}: {e}"));
            let parts = theirs["ids"].as_array().unwrap();
            let all = [ids(&parts[0]), ids(&parts[1])];
            assert_eq!((&found.ids, found.from), (&all.concat(), all[0].len()), "{title}");
            encoded.push(found);
            expected.push((title, &theirs["answer"]));
        }
        assert!(encoded.len() > 100);
        compare(&asker, &encoded, &expected);
    }
}

#[test]
fn whole_texts_are_windowed_as_by_the_harness() {
    for case in cases("rolling.json") {
        let asker = asker(case["model"].as_str().unwrap(), case["bos"].as_bool().unwrap());
        let texts: Vec<String> =
            case["texts"].as_array().unwrap().iter().map(|text| text.as_str().unwrap().to_owned()).collect();
        let found = asker.rolling(&texts, &mut go).unwrap();
        for ((found, expected), text) in found.iter().zip(case["answers"].as_array().unwrap()).zip(&texts) {
            let Some(expected) = expected.as_f64() else {
                assert!(expected.get("error").is_some(), "{expected}");
                continue;
            };
            assert!(near(*found, expected), "{text:?}: {found} and {expected}");
        }
    }
}

#[test]
fn texts_are_made_as_by_the_harness() {
    let mut compared = 0;
    for case in cases("generated.json") {
        let bos = case["bos"].as_bool().unwrap();
        let settings = &case["gen_kwargs"];
        let prompt = case["context"].as_str().unwrap();
        // An absolute length is the harness' own way around its option.
        if settings.get("max_length").is_some() {
            continue;
        }
        let mut how = Generation::default();
        how.until = match &settings["until"] {
            Value::String(one) => vec![one.clone()],
            Value::Array(many) => many.iter().map(|one| one.as_str().unwrap().to_owned()).collect(),
            _ => Vec::new(),
        };
        let most = settings.get("max_gen_toks").or(settings.get("max_new_tokens")).and_then(Value::as_u64);
        how.max_gen_toks = most.map_or(256, |most| most as usize);
        let found = asker("opt-novels", bos).generate(&[prompt.to_owned()], &how, &mut go);
        let title = format!("bos {bos}, {settings}: {prompt:?}");
        match case["answer"].as_str() {
            Some(expected) => {
                assert_eq!(found.unwrap_or_else(|e| panic!("{title}: {e}"))[0].text, expected, "{title}");
                compared += 1;
            }
            // No room for a prompt, or no prompt.
            None => {
                if let Err(error) = found {
                    assert!(
                        matches!(error.kind(), ErrorKind::Option | ErrorKind::Prompt),
                        "{title}: {error}"
                    );
                }
            }
        }
    }
    assert!(compared > 80, "{compared}");
}

#[test]
fn what_requests_share_changes_no_answer() {
    let asker = asker("opt-novels", true);
    let head = "The captain looked at the sea. The sea was grey.\n\n".repeat(4);
    let mut encoded = Vec::new();
    for question in ["The old man said that the", "The old man said that they", "In the morning", "In the"] {
        for choice in [" boat", " boat was", " boat was lost", " house", " sea", " sea and the sky"] {
            encoded.push(asker.encode(&format!("{head}{question}"), choice).unwrap());
            encoded.push(asker.encode(question, choice).unwrap());
        }
    }
    let rows = |share| Shared::plan(&encoded, share).rows();
    assert!(rows(true) * 3 < rows(false), "{} of {}", rows(true), rows(false));
    let shared = asker.log_likelihoods(&encoded, &mut go).unwrap();
    let alone = asker.clone().share(false).log_likelihoods(&encoded, &mut go).unwrap();
    for (shared, alone) in shared.iter().zip(&alone) {
        assert!(near(shared.log_prob, alone.log_prob), "{} and {}", shared.log_prob, alone.log_prob);
        assert_eq!(shared.greedy, alone.greedy);
    }
}

#[test]
fn what_cannot_be_asked_is_one_line() {
    let asker = asker("tiny", true);
    let long = " sat".repeat(300);
    let error = asker.encode("The cat", &long).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Prompt);
    assert!(error.to_string().contains("at most 256 tokens"), "{error}");
    assert!(asker.encode("The cat", "").is_err());
    // What comes before is cut.
    let encoded = asker.encode(&long, " on the mat").unwrap();
    assert_eq!((encoded.ids.len(), encoded.cut), (257, 301 + 3 - 257));
    let cancel = opt_core::CancelToken::new();
    cancel.cancel();
    let error = asker.cancel(cancel).log_likelihoods(&[encoded], &mut go).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Cancelled);
}
