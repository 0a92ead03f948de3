//! `opt quantize` and `--quantize`.

use super::*;

/// A file of token ids, as `--eval` and `--calibration` take them.
fn ids(dir: &Path, count: usize) -> PathBuf {
    let ids: Vec<usize> = (0..count).map(|i| 4 + i * 37 % 8000).collect();
    let file = dir.join(format!("{count}.jsonl"));
    std::fs::write(&file, serde_json::json!({ "ids": ids }).to_string()).expect("a file");
    file
}

fn score(more: &[&str], model: &Path) -> Value {
    let mut command = opt();
    command.args(["score", "--json", "-q", "--input", "-", "--model"]).arg(model).args(more);
    run_with_stdin(&mut command, b"{\"ids\": [2, 77, 111, 5000, 300]}\n").json().remove(0)["logprobs"].clone()
}

fn novels() -> PathBuf {
    root().join("models/opt-novels")
}

#[test]
fn a_written_model_is_what_loading_makes_of_it() {
    let dir = tempfile::tempdir().expect("a directory");
    let plain = score(&[], &novels());
    for format in ["int8", "int4", "nf4"] {
        let out = dir.path().join(format);
        let report = run(opt()
            .args(["quantize", "--json", "--format", format, "--output"])
            .arg(&out)
            .arg(novels())
            .arg("--eval")
            .arg(ids(dir.path(), 40)))
        .json()
        .remove(0);
        let written = score(&[], &out);
        assert_eq!(written, score(&["--quantize", format], &novels()), "{format}");
        assert_ne!(written, plain, "{format}");
        let [before, after] =
            ["before", "after"].map(|key| report["file_bytes"][key].as_u64().expect("a size"));
        assert!(after < before * 8 / 10, "{format}: {before}, {after}");
        assert_eq!(report["eval"]["tokens"], 39);
        assert_eq!(report["layers"].as_array().map(Vec::len), Some(36));
        let file = std::fs::read(out.join("report.json")).expect("a report");
        assert_eq!(serde_json::from_slice::<Value>(&file).expect("JSON"), report);
    }
}

#[test]
fn gptq_leaves_a_model_and_nothing_else() {
    let dir = tempfile::tempdir().expect("a directory");
    let out = dir.path().join("out");
    let calibration = ids(dir.path(), 70);
    let ran = run(opt()
        .args(["quantize", "--format", "gptq", "--bits", "3", "--group-size", "-1", "--zero-points"])
        .args(["--desc-act", "--calibration-tokens", "64", "--model"])
        .arg(novels())
        .arg("--output")
        .arg(&out)
        .arg("--calibration")
        .arg(&calibration))
    .done();
    assert!(ran.stdout.contains("int3 (one scale a row, zero points), gptq, gptq layout"), "{}", ran.stdout);
    let config: Value =
        serde_json::from_slice(&std::fs::read(out.join("quantize_config.json")).expect("a file"))
            .expect("JSON");
    assert_eq!(
        (&config["bits"], &config["desc_act"], &config["group_size"]),
        (&3.into(), &true.into(), &(-1).into())
    );
    let mut left: Vec<_> = std::fs::read_dir(dir.path())
        .expect("a directory")
        .map(|e| e.expect("an entry").file_name())
        .collect();
    left.sort();
    assert_eq!(left, ["70.jsonl", "out"]);
    assert_ne!(score(&[], &out), score(&[], &novels()));
}

#[test]
fn bad_input_is_told_before_work_begins() {
    let dir = tempfile::tempdir().expect("a directory");
    let out = dir.path().join("out");
    let short = ids(dir.path(), 10);
    let short = short.to_str().expect("a path");
    let quantize =
        |more: &[&str]| run(opt().args(["quantize", "--output"]).arg(&out).arg(novels()).args(more));
    quantize(&["--format", "int5"]).refused(2, &["int5", "int8"]);
    quantize(&["--format", "gptq", "--bits", "5", "--calibration", short])
        .refused(2, &["--bits", "2, 3, 4 or 8", "5"]);
    quantize(&["--format", "int4", "--bits", "3"]).refused(2, &["--bits", "expected 4", "found 3"]);
    quantize(&["--format", "int8", "--group-size", "0"]).refused(2, &["--group-size", "found 0"]);
    let parts = ["layers.0.self_attn.q_proj.weight", "divides the 256 inputs", "found 48"];
    quantize(&["--format", "int4", "--group-size", "48"]).refused(2, &parts);
    quantize(&["--format", "nf4", "--zero-points"]).refused(2, &["zero points", "nf4"]);
    quantize(&["--format", "nf4", "--method", "gptq", "--calibration", short])
        .refused(2, &["integer", "nf4"]);
    quantize(&["--format", "gptq"]).refused(2, &["--calibration"]);
    quantize(&["--format", "gptq", "--table", "int8"]).refused(2, &["--table"]);
    quantize(&["--format", "gptq", "--calibration", short]).refused(1, &["at least 512 tokens", "found 10"]);
    quantize(&["--format", "int8", "--eval", "missing.txt"]).refused(1, &["missing.txt"]);
    assert!(!out.exists());
    std::fs::create_dir(&out).expect("a directory");
    std::fs::write(out.join("mine"), "mine").expect("a file");
    quantize(&["--format", "int8"]).refused(2, &["exists already"]);
    assert_eq!(std::fs::read(out.join("mine")).expect("a file"), b"mine");
    // What is quantized is not quantized again.
    let once = dir.path().join("once");
    run(opt().args(["quantize", "-q", "--format", "int8", "--output"]).arg(&once).arg(novels())).done();
    run(opt().args(["quantize", "--format", "int4", "--output"]).arg(dir.path().join("twice")).arg(&once))
        .refused(2, &["not quantized yet"]);
    let mut command = opt();
    command.args(["score", "--quantize", "int8", "--input", "-", "--model"]).arg(&once);
    run_with_stdin(&mut command, b"{\"ids\": [2, 7]}\n").refused(2, &["not quantized yet"]);
}
