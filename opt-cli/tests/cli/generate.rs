//! `opt generate` does what transformers did, through its flags.

use super::*;
use serde_json::json;
use std::collections::BTreeSet;

/// What of a recorded config has a flag, as that flag's arguments.
fn flag(name: &str, value: &Value) -> Option<Vec<String>> {
    let no_flag = [
        "bad_words_ids",
        "sequence_bias",
        "exponential_decay_length_penalty",
        "remove_invalid_values",
        "renormalize_logits",
        "max_matching_ngram_size",
    ];
    if no_flag.contains(&name) || value.is_null() {
        return None;
    }
    let flag = format!("--{}", name.replace('_', "-"));
    Some(match value {
        Value::Bool(false) if name == "do_sample" => vec![],
        Value::Bool(true) if name == "do_sample" => vec![flag],
        Value::Array(list) if name == "stop_strings" => list
            .iter()
            .flat_map(|text| ["--stop".to_owned(), text.as_str().expect("a text").to_owned()])
            .collect(),
        Value::Array(list) => vec![flag, list.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")],
        Value::String(text) => vec![flag, text.clone()],
        other => vec![flag, other.to_string()],
    })
}

/// Runs a recorded case: what has a flag is given as flag, the rest in a file.
fn replay(case: &Value, model: &Path) -> Vec<Value> {
    let mut command = opt();
    command.args(["generate", "--json", "--quiet", "--prompts", "-", "--model"]).arg(model);
    let mut rest = serde_json::Map::new();
    for (name, value) in case["config"].as_object().expect("a config") {
        match flag(name, value) {
            Some(arguments) => drop(command.args(arguments)),
            None => drop(rest.insert(name.clone(), value.clone())),
        }
    }
    let dir = tempfile::tempdir().expect("a directory");
    if !rest.is_empty() {
        let file = dir.path().join("settings.json");
        std::fs::write(&file, Value::Object(rest).to_string()).expect("it can be written");
        command.arg("--generation-config").arg(file);
    }
    let prompts = match case.get("prompts") {
        Some(prompts) => prompts.as_array().expect("prompts").clone(),
        None => vec![case["prompt"].clone()],
    };
    let lines: String = prompts.iter().map(|ids| format!("{}\n", json!({ "ids": ids }))).collect();
    let lines = run_with_stdin(&mut command, lines.as_bytes()).json();
    assert_eq!(lines.len(), prompts.len());
    lines.iter().zip(prompts).for_each(|(line, prompt)| assert_eq!(line["prompt_ids"], prompt));
    lines
}

/// The first case of each set of settings in a file of recorded cases.
fn cases(file: &str) -> Vec<Value> {
    let mut seen = BTreeSet::new();
    let all = fixture_json(file);
    let unknown = |case: &Value| {
        ["prefix_rule", "guidance_scale", "assistant"].iter().any(|key| case["config"].get(key).is_some())
    };
    let mut new = |case: &Value| seen.insert(format!("{:?}", keys(&case["config"])));
    all.as_array().expect("cases").iter().filter(|case| !unknown(case) && new(case)).cloned().collect()
}

fn check(line: &Value, outputs: &Value, case: &Value) {
    let name = case["name"].as_str().expect("a name");
    let found: Vec<&Value> =
        line["sequences"].as_array().expect("sequences").iter().map(|s| &s["ids"]).collect();
    let expected: Vec<&Value> = outputs.as_array().expect("outputs").iter().collect();
    assert_eq!(found, expected, "{name}");
}

#[test]
fn recorded_cases_through_flags() {
    let mut count = 0;
    for file in ["greedy", "beam", "group_beam", "contrastive"] {
        for case in cases(&format!("generation/{file}.json")) {
            let model = tiny(case["model"].as_str().expect("a model"));
            let line = replay(&case, &model).remove(0);
            check(&line, &case["outputs"], &case);
            let sequences = line["sequences"].as_array().expect("sequences");
            for (index, sequence) in sequences.iter().enumerate() {
                assert_eq!(sequence["text"], Value::Null);
                assert_eq!(sequence["finish_reason"], case["finish"][index], "{}", case["name"]);
                match case["sequences_scores"].get(index) {
                    Some(score) => close(
                        &[sequence["score"].as_f64().expect("a score")],
                        &[score.as_f64().expect("a score")],
                        "score",
                    ),
                    None => assert_eq!(sequence["score"], Value::Null),
                }
            }
            // Recorded are those after processors, ours are the model's own.
            let plain = keys(&case["config"])
                .iter()
                .all(|key| ["max_new_tokens", "max_length", "eos_token_id"].contains(key));
            if let Some(expected) = case.get("token_logprobs").filter(|_| plain) {
                close(&numbers(&sequences[0]["logprobs"]), &numbers(expected), "logprobs");
            }
            count += 1;
        }
    }
    assert!(count > 40, "only {count} cases");
}

#[test]
fn recorded_batches() {
    for case in fixture_json("generation/batch.json").as_array().expect("cases") {
        let lines = replay(case, &tiny(case["model"].as_str().expect("a model")));
        lines
            .iter()
            .zip(case["outputs"].as_array().expect("outputs"))
            .for_each(|(line, outputs)| check(line, outputs, case));
    }
}

#[test]
fn recorded_texts() {
    for case in cases("texts/generation.json") {
        let line = replay(&case, &root().join("models/opt-novels")).remove(0);
        check(&line, &case["outputs"], &case);
        for (sequence, text) in line["sequences"]
            .as_array()
            .expect("sequences")
            .iter()
            .zip(case["output_texts"].as_array().expect("texts"))
        {
            assert_eq!(&sequence["text"], text, "{}", case["name"]);
        }
        // The same as a text, tokenized here.
        let prompt = case["text"].as_str().expect("a text");
        let again = run(opt().args(["generate", "--json", "--max-new-tokens", "1", prompt])).json();
        assert_eq!(again[0]["prompt_ids"], case["prompt"]);
    }
}

#[test]
fn recorded_lookups_are_greedy() {
    for case in fixture_json("generation/assisted.json").as_array().expect("cases") {
        let config = &case["config"];
        if config.get("prompt_lookup_num_tokens").is_some() {
            let line = replay(case, &tiny(case["model"].as_str().expect("a model"))).remove(0);
            check(&line, &case["outputs"], case);
        }
    }
}

#[test]
fn a_draft_model_changes_nothing() {
    let plain = run(opt().args(["generate", "--json", "The river"])).json();
    let drafted =
        run(opt().args(["generate", "--json", "--assistant-model", "models/opt-novels", "The river"])).json();
    assert_eq!(plain[0]["sequences"][0]["ids"], drafted[0]["sequences"][0]["ids"]);
    assert_eq!(plain[0]["sequences"][0]["text"], drafted[0]["sequences"][0]["text"]);
}

#[test]
fn json_has_the_keys_of_the_contract() {
    let lines = run(opt().args(["generate", "--json", "--max-new-tokens", "3", "The river"])).json();
    assert_eq!(lines.len(), 1);
    assert_eq!(keys(&lines[0]), ["prompt_ids", "sequences"]);
    let sequence = &lines[0]["sequences"][0];
    assert_eq!(keys(sequence), ["finish_reason", "ids", "logprobs", "score", "text"]);
    assert_eq!(ids(&sequence["ids"]).len(), 3);
    assert_eq!(numbers(&sequence["logprobs"]).len(), 3);
    assert_eq!(sequence["finish_reason"], "length");
}

#[test]
fn alternatives_begin_with_the_greedy_token() {
    let lines = run(opt().args([
        "generate",
        "--json",
        "--top-alternatives",
        "3",
        "--max-new-tokens",
        "4",
        "The river",
    ]))
    .json();
    let sequence = &lines[0]["sequences"][0];
    let places = sequence["alternatives"].as_array().expect("alternatives");
    assert_eq!(places.len(), 4);
    for (index, place) in places.iter().enumerate() {
        assert_eq!(place.as_array().map(Vec::len), Some(3));
        assert_eq!(keys(&place[0]), ["id", "logprob", "text"]);
        assert_eq!(place[0]["id"], sequence["ids"][index]);
        let logprobs: Vec<f64> = (0..3).map(|i| place[i]["logprob"].as_f64().expect("a number")).collect();
        assert!(logprobs.is_sorted_by(|a, b| a >= b), "{logprobs:?}");
    }
}

#[test]
fn prose_is_the_prompt_and_its_continuation() {
    let json = run(opt().args(["generate", "--json", "The old house stood"])).json();
    let text = json[0]["sequences"][0]["text"].as_str().expect("a text");
    let ran = run(opt().args(["generate", "The old house stood"])).done();
    assert_eq!(ran.stdout, format!("The old house stood{text}\n"));
    let summary = ran.stderr.trim_end();
    assert!(
        summary.contains("20 tokens in")
            && summary.contains("tokens/s")
            && summary.contains("first token after"),
        "{summary}"
    );
    let quiet = run(opt().args(["generate", "--quiet", "The old house stood"])).done();
    assert_eq!((quiet.stdout, &quiet.stderr[..]), (ran.stdout, ""));
    let piped = run_with_stdin(opt().args(["generate", "-q"]), b"The old house stood\n").done();
    assert_eq!(piped.stdout, quiet_text(text));
}

fn quiet_text(text: &str) -> String {
    format!("The old house stood{text}\n")
}

#[test]
fn several_sequences_are_told_apart() {
    let arguments = [
        "generate",
        "-q",
        "--num-beams",
        "2",
        "--num-return-sequences",
        "2",
        "--max-new-tokens",
        "4",
        "The river",
        "A door",
    ];
    let text = run(opt().args(arguments)).done().stdout;
    let json = run(opt().args(arguments).arg("--json")).json();
    let mut expected = String::new();
    for (index, prompt) in ["The river", "A door"].iter().enumerate() {
        let sequences = json[index]["sequences"].as_array().expect("sequences");
        for (sequence, found) in sequences.iter().enumerate() {
            let text = found["text"].as_str().expect("a text");
            let (prompt_number, sequence_number) = (index + 1, sequence + 1);
            let heading = format!("=== prompt {prompt_number}, sequence {sequence_number} ===");
            expected.push_str(&format!("{heading}\n{prompt}{text}\n"));
        }
    }
    assert_eq!(text, expected);
}

#[test]
fn a_stream_of_json_is_the_result_in_pieces() {
    let arguments = ["generate", "--json", "--max-new-tokens", "6", "The river", "A door in the wall"];
    let whole = run(opt().args(arguments)).json();
    let mut lines = run(opt().args(arguments).arg("--stream")).json();
    let tokens: Vec<Value> = lines.drain(..12).collect();
    assert_eq!(lines, whole);
    for (prompt, whole) in whole.iter().enumerate() {
        let mine: Vec<&Value> = tokens.iter().filter(|token| token["prompt"] == prompt).collect();
        assert_eq!(keys(mine[0]), ["id", "logprob", "prompt", "sequence", "text"]);
        let text: String = mine.iter().map(|token| token["text"].as_str().expect("a text")).collect();
        assert_eq!(text, whole["sequences"][0]["text"]);
        let ids: Vec<&Value> = mine.iter().map(|token| &token["id"]).collect();
        assert_eq!(Value::from_iter(ids.into_iter().cloned()), whole["sequences"][0]["ids"]);
    }
}

#[test]
fn forms_of_prompts_and_bos() {
    let lines = "\"The river\"\n\n{\"prompt\": \"The river\", \"name\": 7}\n{\"ids\": [477, 1271]}\n\"\"\n";
    let arguments = ["generate", "--json", "--max-new-tokens", "2", "--prompts", "-"];
    let with = run_with_stdin(opt().args(arguments), lines.as_bytes()).json();
    let without = run_with_stdin(
        opt().args(arguments).arg("--no-bos"),
        lines.lines().next().expect("a line").as_bytes(),
    )
    .json();
    let first = ids(&with[0]["prompt_ids"]);
    assert_eq!(with.len(), 4);
    assert_eq!(first[0], 2);
    assert_eq!(with[1], with[0]);
    assert_eq!(ids(&with[2]["prompt_ids"]), [477, 1271]);
    assert_eq!(ids(&with[3]["prompt_ids"]), [2]);
    assert_eq!(ids(&without[0]["prompt_ids"]), first[1..]);
}

#[test]
fn words_and_biases_are_tokenized_as_they_stand() {
    let greedy = |more: &[&str]| {
        let mut command = opt();
        command.args(["generate", "--json", "--max-new-tokens", "12", "The old house stood"]).args(more);
        run(&mut command).json()[0]["sequences"][0]["text"].as_str().expect("a text").to_owned()
    };
    let plain = greedy(&[]);
    // A whole word of the middle of it, with and without the space in front.
    let words: Vec<&str> = plain.split_whitespace().collect();
    let all_letters = |word: &&&str| word.chars().all(char::is_alphabetic);
    let inner = words[1..words.len() - 1].iter().filter(all_letters);
    let word = inner.max_by_key(|word| word.len()).expect("a word");
    let spaced = format!(" {word}");
    assert!(!greedy(&["--bad-words", &spaced]).contains(&spaced), "{plain}");
    assert!(greedy(&["--bad-words", word]).contains(&spaced), "{plain}");
    assert!(!greedy(&["--sequence-bias", &format!("{spaced}=-20")]).contains(&spaced), "{plain}");
    assert!(greedy(&["--sequence-bias", " sea=30"]).contains(" sea sea"));
}

#[test]
fn flags_go_before_the_file_and_it_before_the_model() {
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("settings.json");
    std::fs::write(&file, r#"{"max_new_tokens": 3, "num_beams": 2}"#).expect("it can be written");
    let run_with = |more: &[&str]| {
        let mut command = opt();
        command.args(["generate", "--json", "The river", "--generation-config"]).arg(&file).args(more);
        run(&mut command).json().remove(0)["sequences"][0].clone()
    };
    let both = run_with(&[]);
    assert_eq!((ids(&both["ids"]).len(), both["score"].is_number()), (3, true));
    let flags = run_with(&["--max-new-tokens", "5", "--num-beams", "1"]);
    assert_eq!((ids(&flags["ids"]).len(), flags["score"].is_null()), (5, true));
    let prompt = run(opt().args(["generate", "--json", "--max-new-tokens", "1", "The river"])).json();
    let total = ids(&prompt[0]["prompt_ids"]).len() + 4;
    assert_eq!(ids(&run_with(&["--max-length", &total.to_string()])["ids"]).len(), 4);
}

#[test]
fn a_seed_repeats_the_draws() {
    let sample = |more: &[&str]| {
        let mut command = opt();
        command.args(["generate", "--json", "--do-sample", "--top-p", "0.95", "--num-return-sequences", "3"]);
        run(command.args(["The old house stood"]).args(more)).done().stdout
    };
    let seven = sample(&["--seed", "7"]);
    assert_eq!(seven, sample(&["--seed", "7"]));
    assert_eq!(seven, sample(&["--seed", "7", "--threads", "1"]));
    assert_eq!(seven, sample(&["--seed", "7", "--threads", "2"]));
    assert_ne!(seven, sample(&["--seed", "8"]));
    assert_ne!(sample(&[]), sample(&[]));
}

#[test]
fn sampling_flags_without_sampling_warn_and_change_nothing() {
    let plain = run(opt().args(["generate", "The river"])).done();
    let warned = run(opt().args(["generate", "--top-p", "0.5", "--temperature", "2", "The river"])).done();
    assert_eq!(plain.stdout, warned.stdout);
    let warnings: Vec<&str> = warned.stderr.lines().filter(|line| line.starts_with("warning: ")).collect();
    assert_eq!(warnings.len(), 2, "{warnings:?}");
    assert!(warned.stderr.contains("top_p") && warned.stderr.contains("temperature"));
}

#[test]
fn long_prompts_can_lose_their_beginning() {
    let long = "the river and the sea ".repeat(200);
    let cut =
        run(opt().args(["generate", "--json", "--truncate", "left", "--max-new-tokens", "12", &long])).json();
    let ids_run = ids(&cut[0]["prompt_ids"]);
    // As much as leaves room for the new tokens, of which the last one need not be run.
    assert_eq!((ids_run.len(), ids_run[0]), (512 + 1 - 12, 2));
    assert_eq!(ids(&cut[0]["sequences"][0]["ids"]).len(), 12);
    run(opt().args(["generate", &long])).refused(1, &["512"]);
}

#[test]
fn formats_of_weights_and_cache_are_close() {
    let exact =
        numbers(&run(opt().args(["generate", "--json", "The river"])).json()[0]["sequences"][0]["logprobs"])
            [0];
    for flags in [["--dtype", "bf16"], ["--dtype", "f16"], ["--kv-dtype", "f16"], ["--kv-dtype", "int8"]] {
        let rounded = run(opt().args(["generate", "--json", "The river"]).args(flags)).json();
        let first = numbers(&rounded[0]["sequences"][0]["logprobs"])[0];
        assert!((first - exact).abs() < 0.05, "{flags:?}: {first}, {exact}");
    }
}

#[test]
fn time_can_run_out() {
    let lines =
        run(opt().args(["generate", "--json", "--max-time", "0", "--max-new-tokens", "50", "The river"]))
            .json();
    let sequence = &lines[0]["sequences"][0];
    assert!(ids(&sequence["ids"]).len() < 50);
    assert_eq!(sequence["finish_reason"], "length");
}

#[test]
fn texts_keep_their_form() {
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("schema.json");
    let schema =
        json!({"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 4});
    std::fs::write(&file, schema.to_string()).expect("it can be written");
    let mut command = opt();
    command.args(["generate", "--json", "--do-sample", "--seed", "3", "--num-return-sequences", "4"]);
    command.args(["--max-new-tokens", "40", "Numbers: ", "--json-schema"]).arg(&file);
    for sequence in run(&mut command).json()[0]["sequences"].as_array().expect("sequences") {
        let list: Vec<u8> = serde_json::from_str(sequence["text"].as_str().expect("a text")).expect("JSON");
        assert!(list.len() < 5 && list.iter().all(|n| *n < 100), "{list:?}");
        assert_eq!(sequence["finish_reason"], "eos");
    }
    let prose = run(opt().args(["generate", "--regex", " (sea|river)\\.", "He saw the"])).done().stdout;
    assert!(prose == "He saw the sea.\n" || prose == "He saw the river.\n", "{prose:?}");
}
