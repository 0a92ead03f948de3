//! `--adapter` and `opt merge`.

use super::*;

fn adapter(name: &str) -> PathBuf {
    fixture("adapters").join(name)
}

/// The model, and the prompt and continuation that PEFT recorded.
fn recorded(name: &str) -> (PathBuf, Vec<u64>, Vec<u64>) {
    let expected = fixture_json(&format!("adapters/{name}/expected.json"));
    let greedy = &expected["greedy"];
    (tiny(expected["model"].as_str().expect("a name")), ids(&greedy["prompt"]), ids(&greedy["output"]))
}

fn continued(model: &Path, adapter: Option<&Path>, prompt: &[u64]) -> Vec<u64> {
    let mut command = opt();
    command.args([
        "generate",
        "--json",
        "-q",
        "--max-new-tokens",
        "8",
        "--min-new-tokens",
        "8",
        "--prompts",
        "-",
    ]);
    command.arg("--model").arg(model);
    if let Some(adapter) = adapter {
        command.arg("--adapter").arg(adapter);
    }
    let line = format!("{{\"ids\": {prompt:?}}}\n");
    ids(&run_with_stdin(&mut command, line.as_bytes()).json().remove(0)["sequences"][0]["ids"])
}

#[test]
fn a_model_wears_an_adapter() {
    for name in ["plain", "dora", "prefix", "p_tuning", "saved", "rslora"] {
        let (model, prompt, output) = recorded(name);
        assert_eq!(continued(&model, Some(&adapter(name)), &prompt), output, "{name}");
        assert_ne!(continued(&model, None, &prompt), output, "{name}");
    }
}

#[test]
fn every_command_that_runs_a_model_takes_one() {
    let (model, prompt, _) = recorded("plain");
    let input = format!("{{\"ids\": {prompt:?}}}\n");
    let score = |more: &[&str]| {
        let mut command = opt();
        command.args(["score", "--json", "-q", "--input", "-", "--model"]).arg(&model).args(more);
        run_with_stdin(&mut command, input.as_bytes()).json().remove(0)["logprob"].as_f64().expect("a number")
    };
    let plain = adapter("plain");
    let plain = plain.to_str().expect("UTF-8");
    assert!((score(&[]) - score(&["--adapter", plain])).abs() > 0.1);
    assert!((score(&[]) - score(&["--adapter", plain, "--quantize", "int8"])).abs() > 0.1);
    for name in ["plain", "prefix"] {
        let mut bench = opt();
        bench.args(["bench", "--json", "-q", "--prompt-tokens", "8", "--gen-tokens", "2", "--batch", "1,2"]);
        run(bench.arg("--model").arg(&model).arg("--adapter").arg(adapter(name))).json();
    }
}

#[test]
fn a_merged_model_needs_no_adapter() {
    let dir = tempfile::tempdir().expect("a directory");
    for name in ["plain", "patterns", "saved_head_tied"] {
        let (model, prompt, output) = recorded(name);
        let merged = dir.path().join(name);
        let mut command = opt();
        command.args(["merge", "--json", "--model"]).arg(&model).arg("--adapter").arg(adapter(name));
        let done = run(command.arg("--output").arg(&merged)).json().remove(0);
        assert_eq!(keys(&done), ["bytes", "files", "tensors"]);
        assert_eq!(continued(&merged, None, &prompt), output, "{name}");
        run(&mut command).refused(2, &["exists already"]);
    }
}

#[test]
fn wrong_adapters_are_one_line() {
    let dir = tempfile::tempdir().expect("a directory");
    let generate = |model: &str, adapter: &Path| {
        let mut command = opt();
        command
            .args(["generate", "--json", "--prompts", "-", "--model"])
            .arg(tiny(model))
            .arg("--adapter")
            .arg(adapter);
        run_with_stdin(&mut command, b"{\"ids\": [2, 7, 11]}\n")
    };
    generate("pre_ln", &dir.path().join("missing")).refused(1, &["missing", "found no adapter_config.json"]);
    let another =
        ["\"plain\"", "another model", "q_proj.lora_A.weight", "expected shape [4, 20], found [4, 32]"];
    generate("vocab_odd", &adapter("plain")).refused(1, &another);
    std::fs::write(dir.path().join("adapter_config.json"), r#"{"peft_type": "LOHA"}"#).expect("a file");
    generate("pre_ln", dir.path()).refused(1, &["peft_type", "LORA, PREFIX_TUNING", "LOHA"]);
    std::fs::write(dir.path().join("adapter_config.json"), r#"{"peft_type": "LORA"}"#).expect("a file");
    generate("pre_ln", dir.path()).refused(1, &["found no adapter_model.safetensors"]);
    std::fs::write(dir.path().join("adapter_model.safetensors"), "short").expect("a file");
    generate("pre_ln", dir.path()).refused(1, &["adapter_model.safetensors: truncated"]);

    let merge = |adapter: &Path| {
        let output = dir.path().join("merged");
        let ran = run(opt()
            .args(["merge", "--model"])
            .arg(tiny("pre_ln"))
            .arg("--adapter")
            .arg(adapter)
            .arg("--output")
            .arg(&output));
        assert!(!output.exists());
        ran
    };
    merge(&adapter("prefix")).refused(1, &["cannot be merged"]);
    merge(&adapter("all_linear")).refused(1, &["project_in", "no module of this model"]);
    run(opt().arg("merge")).refused(2, &["--adapter"]);
}
