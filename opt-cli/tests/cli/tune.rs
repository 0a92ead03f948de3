//! `opt tune`: what it writes and prints, resuming after a kill, and what it refuses.

use super::{opt, run, tiny};
use serde_json::json;
use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

/// A file of lines of ids that `pre_ln` can learn.
fn data(dir: &Path) -> PathBuf {
    let line =
        |i: u32| json!({ "ids": (0..9).map(|j| 3 + (i * 7 + j) % 90).collect::<Vec<u32>>() }).to_string();
    let path = dir.join("data.jsonl");
    fs::write(&path, (0..12).map(line).collect::<Vec<_>>().join("\n")).unwrap();
    path
}

fn tune(method: &str, model: &Path, data: &Path, output: &Path) -> Command {
    let mut command = opt();
    command.args(["tune", method, "--quiet", "--batch-size", "4", "--max-steps", "6", "--model"]);
    command.arg(model).arg("--data").arg(data).arg("--output").arg(output);
    command
}

#[test]
fn every_method_leaves_something_to_use() {
    let dir = tempfile::tempdir().unwrap();
    let data = data(dir.path());
    let model = tiny("pre_ln");
    for (method, flags) in [
        ("full", &[][..]),
        (
            "lora",
            &["--rank", "2", "--alpha", "4", "--target-modules", "q_proj,fc2", "--rslora", "--bias", "all"],
        ),
        ("lora", &["--dora", "--target-modules", "all-linear", "--lora-dropout", "0.1"]),
        ("prefix", &["--virtual-tokens", "3", "--prefix-projection"]),
        ("prompt", &["--virtual-tokens", "3", "--init", "sample-vocab"]),
    ] {
        let output = dir.path().join(format!("{method}-{}", flags.len()));
        let lines =
            run(tune(method, &model, &data, &output).args(flags).args(["--json", "--lr", "0.01"])).json();
        assert_eq!(lines.len(), 7, "{method}: {lines:?}");
        assert!(lines[..6].iter().all(|line| line["loss"].as_f64().is_some_and(f64::is_finite)), "{lines:?}");
        assert_eq!(lines[6]["steps"], 6, "{method}");
        let memory = |part: &str| lines[6]["memory"][part].as_u64().unwrap();
        assert_eq!(memory("gradients"), 4 * lines[6]["trainable"].as_u64().unwrap(), "{method}");
        assert_eq!(memory("optimizer"), 2 * memory("gradients"), "{method}");
        let parts = ["weights", "gradients", "optimizer", "activations"];
        assert_eq!(parts.map(memory).iter().sum::<u64>(), memory("total"), "{method}");
        assert_eq!(fs::read_to_string(output.join("log.jsonl")).unwrap().lines().count(), 6, "{method}");
        // What came out can be used.
        let scored = dir.path().join("score.jsonl");
        fs::write(&scored, r#"{"ids": [5, 6, 7, 8]}"#).unwrap();
        let mut score = opt();
        score.args(["score", "--quiet", "--json", "--input"]).arg(&scored);
        match method {
            "full" => score.arg("--model").arg(&output),
            _ => score.arg("--model").arg(&model).arg("--adapter").arg(&output),
        };
        let tuned = run(&mut score).json();
        let plain = run(opt()
            .args(["score", "--quiet", "--json", "--model"])
            .arg(&model)
            .arg("--input")
            .arg(&scored))
        .json();
        assert_ne!(tuned[0]["logprob"], plain[0]["logprob"], "{method}");
    }
}

#[test]
fn what_it_takes_is_told_first() {
    let dir = tempfile::tempdir().unwrap();
    let mut command = opt();
    command.args(["tune", "full", "--batch-size", "4", "--max-steps", "1", "--model"]).arg(tiny("pre_ln"));
    command.arg("--data").arg(data(dir.path())).arg("--output").arg(dir.path().join("out"));
    let told = run(&mut command).done().stderr;
    let line = told.lines().find(|line| line.starts_with("up to about ")).unwrap_or_default();
    for part in
        ["B of memory: ", "B for weights", "B for gradients", "B for the optimizer", "B for activations"]
    {
        assert!(line.contains(part), "expected {part:?} in {told}");
    }
}

#[test]
fn evaluation_and_the_best() {
    let dir = tempfile::tempdir().unwrap();
    let data = data(dir.path());
    let output = dir.path().join("out");
    let mut command = tune("full", &tiny("pre_ln"), &data, &output);
    command.args(["--eval-split", "0.25", "--eval-steps", "2", "--json"]);
    let lines = run(&mut command).json();
    assert_eq!(lines.iter().filter(|line| line.get("eval_loss").is_some()).count(), 3);
    assert!(lines.last().unwrap()["best"]["loss"].is_number());
}

/// Killed at any moment, a training goes on from what it has, and ends where it would have.
#[test]
fn resumes_after_a_kill() {
    let dir = tempfile::tempdir().unwrap();
    let data = data(dir.path());
    let model = tiny("pre_ln");
    let through = dir.path().join("through");
    let flags = ["--save-steps", "1", "--save-limit", "3", "--max-steps", "60"];
    let start = |output: &Path| {
        let mut command = opt();
        command.args(["tune", "full", "--quiet", "--batch-size", "4", "--model"]).arg(&model);
        command.arg("--data").arg(&data).arg("--output").arg(output).args(flags);
        command
    };
    run(&mut start(&through));
    let killed = dir.path().join("killed");
    for round in 0..4_u64 {
        let mut command = start(&killed);
        if round > 0 {
            command.arg("--resume");
        }
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        // Once there is a checkpoint, at another moment each time.
        let began = Instant::now();
        let any = || {
            fs::read_dir(&killed).is_ok_and(|entries| {
                entries.flatten().any(|e| e.file_name().to_string_lossy().starts_with("checkpoint-"))
            })
        };
        while !any() && began.elapsed() < Duration::from_secs(60) {
            std::thread::sleep(Duration::from_millis(5));
        }
        std::thread::sleep(Duration::from_millis(7 + 31 * round));
        let _ = child.kill();
        let _ = child.wait();
    }
    run(start(&killed).arg("--resume"));
    for file in ["model.safetensors", "checkpoint-60/optimizer.safetensors"] {
        assert!(
            fs::read(killed.join(file)).unwrap() == fs::read(through.join(file)).unwrap(),
            "{file} differs"
        );
    }
}

#[test]
fn a_model_from_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let text = dir.path().join("text.txt");
    fs::write(&text, "The sea was calm, and the ship lay still.\n".repeat(60)).unwrap();
    let config = dir.path().join("config.json");
    let shape = json!({
        "model_type": "opt", "vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "ffn_dim": 64, "max_position_embeddings": 64, "word_embed_proj_dim": 32, "dropout": 0.0,
    });
    fs::write(&config, shape.to_string()).unwrap();
    let output = dir.path().join("new");
    let mut command = opt();
    command.args([
        "tune",
        "full",
        "--quiet",
        "--json",
        "--max-steps",
        "30",
        "--lr",
        "0.01",
        "--seq-len",
        "32",
    ]);
    command.arg("--from-scratch").arg(&config).arg("--data").arg(&text).arg("--output").arg(&output);
    let lines = run(&mut command).json();
    let loss = |i: usize| lines[i]["loss"].as_f64().unwrap();
    assert!((loss(0) - 300_f64.ln()).abs() < 0.3 && loss(29) < 3.0, "{} to {}", loss(0), loss(29));
    let made =
        run(opt().args(["generate", "--quiet", "--json", "--model"]).arg(&output).arg("The sea")).json();
    assert!(made[0]["sequences"][0]["text"].as_str().is_some_and(|text| !text.is_empty()), "{made:?}");
}

#[test]
fn refusals() {
    let dir = tempfile::tempdir().unwrap();
    let good = data(dir.path());
    let file = |name: &str, contents: &str| {
        let path = dir.path().join(name);
        fs::write(&path, contents).unwrap();
        path
    };
    let model = tiny("pre_ln");
    let output = dir.path().join("out");
    let refused = |command: &mut Command, code: i32, parts: &[&str]| {
        let ran = command.output().unwrap();
        let text = String::from_utf8(ran.stderr).unwrap();
        assert_eq!(ran.status.code(), Some(code), "{text}");
        assert_eq!(text.trim_end().lines().count(), 1, "{text}");
        for part in parts {
            assert!(text.contains(part), "expected {part:?} in {text}");
        }
        assert!(!output.exists(), "{text}");
    };
    let plain = || tune("full", &model, &good, &output);
    refused(&mut tune("full", &model, &file("empty.jsonl", ""), &output), 1, &["empty.jsonl"]);
    refused(&mut tune("full", &model, &file("short.jsonl", r#"{"ids": [5]}"#), &output), 1, &["short.jsonl"]);
    let broken = file("broken.jsonl", "{\"ids\": [5, 6]}\n{\"ids\": [5,");
    refused(&mut tune("full", &model, &broken, &output), 1, &["broken.jsonl", "line 2"]);
    let outside = file("outside.jsonl", r#"{"ids": [5, 6, 4000]}"#);
    refused(&mut tune("full", &model, &outside, &output), 1, &["outside.jsonl", "4000"]);
    let long = json!({ "ids": vec![5; 90] }).to_string();
    refused(&mut tune("full", &model, &file("long.jsonl", &long), &output), 1, &["long.jsonl", "90"]);
    refused(&mut tune("full", &model, &dir.path().join("none.jsonl"), &output), 1, &["none.jsonl"]);
    refused(plain().args(["--rank", "4"]), 2, &["--rank", "lora"]);
    refused(plain().args(["--layers", "7"]), 2, &["7"]);
    refused(plain().args(["--lr", "nan"]), 2, &["lr"]);
    refused(plain().args(["--quantize", "int8"]), 1, &["quantized"]);
    let lora = || tune("lora", &model, &good, &output);
    refused(lora().args(["--target-modules", "q_prj"]), 1, &["q_prj", "q_proj"]);
    refused(lora().args(["--rank", "0"]), 1, &["r"]);
    refused(tune("prompt", &model, &good, &output).args(["--init", "text"]), 2, &["--init-text"]);
    let busy = dir.path().join("busy");
    fs::create_dir(&busy).unwrap();
    fs::write(busy.join("thesis.txt"), "mine").unwrap();
    refused(&mut tune("full", &model, &good, &busy), 2, &["holds something else"]);
    assert_eq!(fs::read_dir(&busy).unwrap().count(), 1);
}
