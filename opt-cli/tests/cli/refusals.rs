//! Bad input: an exit code, one clear line, no panic.

use super::*;

fn generate(more: &[&str]) -> Ran {
    run(opt().arg("generate").args(more))
}

/// `generate` on a tiny model with these prompts.
fn tiny_prompts(prompts: &[u8], more: &[&str]) -> Ran {
    run_with_stdin(
        opt().args(["generate", "--json", "--prompts", "-", "--model"]).arg(tiny("pre_ln")).args(more),
        prompts,
    )
}

#[test]
fn values_out_of_range_are_wrong_usage() {
    let wrong: [&[&str]; 16] = [
        &["--do-sample", "--temperature", "0"],
        &["--do-sample", "--temperature", "-1"],
        &["--do-sample", "--top-p", "1.5"],
        &["--do-sample", "--top-p", "0"],
        &["--do-sample", "--min-p", "2"],
        &["--do-sample", "--typical-p", "0"],
        &["--num-beams", "0"],
        &["--num-beams", "1000000"],
        &["--num-return-sequences", "2"],
        &["--repetition-penalty", "0"],
        &["--max-new-tokens", "0"],
        &["--max-new-tokens", "many"],
        &["--suppress-tokens", "9000"],
        &["--eos-token-id", "1,x"],
        &["--threads", "0"],
        &["--stop", ""],
    ];
    for flags in wrong {
        let mut all = flags.to_vec();
        all.push("The river");
        // The flag as it is, or the setting's name.
        let flag = flags.iter().rfind(|f| f.starts_with("--")).expect("a flag").trim_start_matches('-');
        let ran = generate(&all);
        let named = ran.stderr.replace('-', "_").contains(&flag.replace('-', "_"));
        assert!(named, "{flags:?}: {}", ran.stderr);
        ran.refused(2, &[]);
    }
}

#[test]
fn contradictions_are_wrong_usage() {
    let wrong: [(&[&str], &str); 5] = [
        (&["--num-beams", "4", "--penalty-alpha", "0.6"], "penalty_alpha"),
        (&["--do-sample", "--penalty-alpha", "0.6"], "penalty_alpha"),
        (&["--num-beams", "4", "--num-beam-groups", "3", "--diversity-penalty", "1"], "num_beam_groups"),
        (&["--num-beams", "2", "--prompt-lookup-num-tokens", "4"], "prompt_lookup_num_tokens"),
        (&["--num-beams", "2", "--num-return-sequences", "3"], "num_return_sequences"),
    ];
    for (flags, name) in wrong {
        let mut all = flags.to_vec();
        all.push("The river");
        generate(&all).refused(2, &[name]);
    }
    generate(&["--prompts", "-", "The river"]).refused(2, &["cannot be used with"]);
}

#[test]
fn all_commands_are_listed_and_have_examples() {
    let help = run(opt().arg("--help")).done().stdout;
    for command in [
        "generate", "score", "embed", "eval", "quantize", "tune", "distill", "convert", "merge", "inspect",
        "backends", "bench", "predict", "serve",
    ] {
        assert!(help.contains(&format!("\n  {command} ")), "{help}");
        assert!(run(opt().args([command, "--help"])).done().stdout.contains("Examples:"));
    }
}

#[test]
fn prompts_that_cannot_be_run() {
    tiny_prompts(b"{\"ids\": [2]}\n{\"ids\": []}\n", &[]).refused(1, &["at least one token"]);
    tiny_prompts(b"{\"ids\": [2, 97]}\n", &[]).refused(1, &["97"]);
    tiny_prompts(b"{\"ids\": [2, 4294967296]}\n", &[]).refused(1, &["stdin: line 1: ", "4294967296"]);
    tiny_prompts(b"{\"ids\": \"2\"}\n", &[]).refused(1, &["stdin: line 1: ids"]);
    tiny_prompts(b"\"text\"\n", &[]).refused(1, &["tokenizer"]);
    tiny_prompts(b"{\"ids\": [2, 3, 4]}\n", &["--max-length", "3"]).refused(2, &["max_length", "3"]);
    tiny_prompts(b"{\"ids\": [2, 3]}\n", &["--bad-words", "a"]).refused(1, &["--bad-words", "tokenizer"]);
    let long = format!("{{\"ids\": {:?}}}\n", vec![5; 65]);
    tiny_prompts(long.as_bytes(), &[]).refused(1, &["64", "65"]);
    let cut = tiny_prompts(long.as_bytes(), &["--truncate", "left", "--max-new-tokens", "4"]).json();
    assert_eq!(ids(&cut[0]["prompt_ids"]).len(), 64 + 1 - 4);
    assert_eq!(ids(&cut[0]["sequences"][0]["ids"]).len(), 4);
}

#[test]
fn prompt_files_that_cannot_be_read() {
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("prompts.jsonl");
    let with = |bytes: &[u8]| {
        std::fs::write(&file, bytes).expect("it can be written");
        run(opt().args(["generate", "--prompts"]).arg(&file))
    };
    with(b"\"one\"\n\"t\xff\"\n").refused(1, &["prompts.jsonl: line 2: ", "UTF-8"]);
    with(b"\"one\"\n\n{\"prompt\": }\n").refused(1, &["prompts.jsonl: line 3: ", "JSON"]);
    with(b"7\n").refused(1, &["prompts.jsonl: line 1: ", "found 7"]);
    with(b"{\"prompt\": \"a\", \"ids\": [1]}\n").refused(1, &["line 1", "both"]);
    with(b"{\"text\": \"a\"}\n").refused(1, &["line 1", "neither"]);
    with(b"\n \n").refused(1, &["prompts.jsonl", "none"]);
    run(opt().args(["generate", "--prompts", "missing.jsonl"])).refused(1, &["missing.jsonl"]);
    run_with_stdin(opt().arg("generate"), b"one\ntw\xffo\n").refused(1, &["stdin: line 2: ", "UTF-8"]);
}

#[test]
fn models_and_backends_that_are_not_there() {
    generate(&["--model", "models/missing/x", "The river"]).refused(1, &["models/missing/x"]);
    generate(&["--model", "/nonexistent", "The river"]).refused(1, &["/nonexistent"]);
    let elsewhere = run(opt().env("OPT_MODEL", "/nonexistent").args(["generate", "The river"]));
    elsewhere.refused(1, &["OPT_MODEL", "/nonexistent"]);
    if !cfg!(feature = "hub") {
        generate(&["--model", "facebook/opt-125m", "The river"]).refused(1, &["facebook/opt-125m", "`hub`"]);
    }
    for backend in absent_backends() {
        generate(&["--backend", backend, "The river"]).refused(1, &[backend, "feature"]);
    }
    generate(&["--backend", "cuda", "The river"]).refused(2, &["cuda", "tch"]);
    generate(&["--device", "cuda:0", "The river"]).refused(2, &["cuda:0"]);
    generate(&["--dtype", "int3", "The river"]).refused(2, &["int3"]);
    generate(&["--assistant-model", "/nonexistent", "The river"]).refused(1, &["/nonexistent"]);
    generate(&["--generation-config", "missing.json", "The river"]).refused(1, &["missing.json"]);
}

#[test]
fn damaged_models_are_told() {
    let dir = tempfile::tempdir().expect("a directory");
    let at = |name: &str| dir.path().join(name);
    let on_it = || {
        run_with_stdin(
            opt().args(["generate", "--prompts", "-", "--model"]).arg(dir.path()),
            b"{\"ids\": [2]}\n",
        )
    };
    on_it().refused(1, &["model.safetensors"]);
    std::fs::copy(tiny("pre_ln").join("config.json"), at("config.json")).expect("a copy");
    on_it().refused(1, &[]);
    let weights = std::fs::read(tiny("pre_ln").join("model.safetensors")).expect("weights");
    std::fs::write(at("model.safetensors"), &weights[..weights.len() / 2]).expect("a file");
    on_it().refused(1, &["model.safetensors"]);
    std::fs::write(at("model.safetensors"), &weights).expect("a file");
    on_it().done();
    std::fs::write(at("generation_config.json"), "{\"top_p\": \"high\"}").expect("a file");
    on_it().refused(1, &["generation_config.json", "top_p"]);
    std::fs::remove_file(at("generation_config.json")).expect("it was there");
    std::fs::write(at("config.json"), "{\"model_type\": \"gpt2\"}").expect("a file");
    on_it().refused(1, &["gpt2"]);
}

#[test]
fn forms_that_cannot_be_meant() {
    generate(&["--regex", "(", "The river"]).refused(2, &["--regex", "unclosed group"]);
    generate(&["--json-schema", "no-such-file", "The river"]).refused(1, &["no-such-file"]);
    generate(&["--json-schema", "a", "--regex", "b", "The river"]).refused(2, &["--json-schema"]);
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("schema.json");
    for (text, code, part) in
        [("{", 1, "JSON"), (r#"{"not": {}}"#, 2, "not"), (r#"{"type": "odd"}"#, 2, "odd")]
    {
        std::fs::write(&file, text).expect("it can be written");
        generate(&["--json-schema", file.to_str().expect("a name"), "The river"])
            .refused(code, &["schema.json", part]);
    }
}
