//! `opt score` beside what transformers found.

use super::*;
use serde_json::json;

/// The f32 arrays of a safetensors file.
pub(super) fn arrays(path: &Path) -> impl Fn(&str) -> Vec<f64> + use<> {
    let bytes = std::fs::read(path).expect("a fixture");
    let header = 8 + u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes")) as usize;
    let names: Value = serde_json::from_slice(&bytes[8..header]).expect("a header");
    move |name| {
        let place = numbers(&names[name]["data_offsets"]);
        let data = &bytes[header + place[0] as usize..header + place[1] as usize];
        data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().expect("4 bytes")).into()).collect()
    }
}

fn score(model: &Path, lines: &[Value], more: &[&str]) -> Ran {
    let input: String = lines.iter().map(|line| format!("{line}\n")).collect();
    let mut command = opt();
    command.args(["score", "--input", "-", "--model"]).arg(model).args(more);
    run_with_stdin(&mut command, input.as_bytes())
}

#[test]
fn recorded_log_probabilities() {
    for name in ["pre_ln", "post_ln", "proj_post", "untied"] {
        let expected = fixture_json(&format!("models/{name}/expected.json"));
        let arrays = arrays(&tiny(name).join("expected.safetensors"));
        let sequences = expected["sequences"].as_array().expect("sequences");
        let lines: Vec<Value> = sequences.iter().map(|ids| json!({ "ids": ids })).collect();
        let scored = score(&tiny(name), &lines, &["--json"]).json();
        assert_eq!(scored.len(), sequences.len());
        for (index, (scored, sequence)) in scored.iter().zip(sequences).enumerate() {
            assert_eq!(keys(scored), ["greedy", "ids", "logprob", "logprobs"]);
            assert_eq!(&scored["ids"], sequence);
            let found = numbers(&scored["logprobs"]);
            if sequence.as_array().map(Vec::len) == Some(1) {
                assert!(found.is_empty());
                continue;
            }
            close(&found, &arrays(&format!("seq{index}.logprobs")), name);
            let sum = scored["logprob"].as_f64().expect("a sum");
            close(&[sum], &[found.iter().sum()], "sum");
        }
        // What greedy search made is greedy; its first token changed is not.
        let case = &expected["greedy"][0];
        let mut tokens = ids(&case["prompt"]);
        let context = tokens.len();
        tokens.extend(ids(&case["output"]));
        let one = json!({ "ids": tokens[..=context] });
        let greedy_tail = score(&tiny(name), &[one], &[]).json();
        let last = numbers(&greedy_tail[0]["logprobs"])[context - 1];
        tokens[context] = (tokens[context] + 1) % 50;
        let other = score(&tiny(name), &[json!({ "ids": tokens[..=context] })], &[]).json();
        assert!(last >= numbers(&other[0]["logprobs"])[context - 1]);
        assert_eq!(other[0]["greedy"], false);
    }
}

#[test]
fn recorded_continuations() {
    let mut matched = 0;
    for case in fixture_json("texts/generation.json").as_array().expect("cases") {
        if case["name"] != "greedy" {
            continue;
        }
        let line = json!({ "context": case["text"], "continuation": case["output_texts"][0] });
        let scored = score(&root().join("models/opt-novels"), &[line], &[]).json().remove(0);
        let expected: Vec<u64> = ids(&case["prompt"]).into_iter().chain(ids(&case["outputs"][0])).collect();
        // Text that was generated need not be tokenized again as it was made.
        if ids(&scored["ids"]) == expected {
            close(&numbers(&scored["logprobs"]), &numbers(&case["token_logprobs"]), "continuation");
            assert_eq!(scored["greedy"], true);
            matched += 1;
        }
    }
    assert!(matched > 0);
}

#[test]
fn texts_begin_with_bos_unless_told() {
    let model = root().join("models/opt-novels");
    let line = [json!({ "text": "The river ran." })];
    let with = score(&model, &line, &[]).json().remove(0);
    let without = score(&model, &line, &["--no-bos"]).json().remove(0);
    let all = ids(&with["ids"]);
    assert_eq!(all[0], 2);
    assert_eq!(ids(&without["ids"]), all[1..]);
    assert_eq!(numbers(&with["logprobs"]).len(), all.len() - 1);
    assert_eq!(numbers(&without["logprobs"]).len(), all.len() - 2);
}

#[test]
fn lines_that_cannot_be_scored_are_named() {
    let ids_only = tiny("pre_ln");
    let good = json!({ "ids": [2, 7] });
    let bad = [
        (json!({ "ids": [] }), "at least one token"),
        (json!({ "ids": [2, 97] }), "97"),
        (json!({ "ids": vec![5; 66] }), "66"),
        (json!({ "ids": [2, -1] }), "-1"),
        (json!({ "text": "no tokenizer here" }), "tokenizer"),
        (json!({ "context": "alone" }), "continuation"),
        (json!({ "ids": [2], "text": "both" }), "expected"),
        (json!([1, 2]), "expected"),
        (json!({ "text": 7 }), "text"),
    ];
    for (line, part) in bad {
        score(&ids_only, &[good.clone(), line], &["--json"]).refused(1, &["stdin: line 2: ", part]);
    }
    run(opt().args(["score", "--input", "missing.jsonl"])).refused(1, &["missing.jsonl"]);
    run(opt().args(["score"])).refused(2, &["--input"]);
}

#[test]
fn long_lines_can_lose_their_beginning() {
    let long: Vec<u64> = (0..80).map(|i| 4 + i % 60).collect();
    let scored = score(&tiny("pre_ln"), &[json!({ "ids": long })], &["--truncate", "left"]).json().remove(0);
    assert_eq!(ids(&scored["ids"]), long[80 - 65..]);
    assert_eq!(numbers(&scored["logprobs"]).len(), 64);
}
