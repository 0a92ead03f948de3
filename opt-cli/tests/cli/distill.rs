//! `opt distill`: both kinds of students, and what it refuses.

use super::{opt, run, tiny};
use serde_json::json;
use std::{fs, path::Path, process::Command};

fn data(dir: &Path) -> std::path::PathBuf {
    let line =
        |i: u32| json!({ "ids": (0..9).map(|j| 3 + (i * 7 + j) % 70).collect::<Vec<u32>>() }).to_string();
    let path = dir.join("data.jsonl");
    fs::write(&path, (0..12).map(line).collect::<Vec<_>>().join("\n")).unwrap();
    path
}

fn distill(teacher: &str, data: &Path, output: &Path) -> Command {
    let mut command = opt();
    command.args(["distill", "--quiet", "--batch-size", "4", "--max-steps", "5", "--teacher"]);
    command.arg(tiny(teacher)).arg("--data").arg(data).arg("--output").arg(output);
    command
}

#[test]
fn students_of_either_kind_can_be_used() {
    let dir = tempfile::tempdir().unwrap();
    let data = data(dir.path());
    let other = tiny("shape_125m");
    let other = other.to_str().unwrap();
    for (name, flags) in [
        ("half", &["--student-layers", "2", "--alpha-hidden", "0.1", "--alpha-cos", "0.1"][..]),
        (
            "other",
            &["--student", other, "--alpha-hidden", "0.1", "--temperature", "3", "--eval-split", "0.2"],
        ),
    ] {
        let output = dir.path().join(name);
        let lines = run(distill("shape_350m", &data, &output).args(flags).args(["--json"])).json();
        let steps: Vec<f64> = lines.iter().filter_map(|line| line["grad_norm"].as_f64()).collect();
        assert_eq!(steps.len(), 5, "{lines:?}");
        let scored = dir.path().join("score.jsonl");
        fs::write(&scored, r#"{"ids": [5, 6, 7, 8]}"#).unwrap();
        run(opt().args(["score", "--quiet", "--json", "--input"]).arg(&scored).arg("--model").arg(&output))
            .json();
        let config = fs::read_to_string(output.join("config.json")).unwrap();
        let config: serde_json::Value = serde_json::from_str(&config).unwrap();
        assert_eq!(config["num_hidden_layers"], 2, "{name}");
        // Going on where nothing is left to do is no error, and another temperature is one.
        let again = || distill("shape_350m", &data, &output);
        run(again().args(flags).arg("--resume")).done();
        let error = run(again().args(flags).args(["--resume", "--alpha-kd", "0.9"]));
        assert_eq!(error.code, Some(2), "{}", error.stderr);
        assert!(error.stderr.contains("alpha_kd"), "{}", error.stderr);
    }
}

/// The teacher runs once; what it made is learned from again without it.
#[test]
fn outputs_of_the_teacher_are_written_and_read() {
    let dir = tempfile::tempdir().unwrap();
    let data = data(dir.path());
    let file = dir.path().join("teacher.outputs");
    let start = |name: &str, flags: &[&str]| {
        let mut command = distill("shape_350m", &data, &dir.path().join(name));
        command.args(["--student-layers", "2", "--teacher-outputs"]).arg(&file).args(flags);
        command
    };
    run(start("first", &["--teacher-top-k", "12"]).arg("--json")).json();
    let written = fs::read(&file).unwrap();
    run(start("second", &[]).arg("--json")).json();
    assert!(fs::read(&file).unwrap() == written);
    let weights = |name: &str| fs::read(dir.path().join(name).join("model.safetensors")).unwrap();
    assert!(weights("first") == weights("second"));
    run(&mut start("third", &["--teacher-top-k", "13"])).refused(2, &["--teacher-top-k", "12", "13"]);
    run(&mut start("third", &["--temperature", "3"])).refused(2, &["temperature: expected 2", "found 3"]);
    run(&mut start("third", &["--alpha-hidden", "1"])).refused(2, &["alpha_hidden: expected 0"]);
    run(distill("shape_1.3b", &data, &dir.path().join("third"))
        .args(["--student-layers", "2", "--teacher-outputs"])
        .arg(&file))
    .refused(2, &["teacher.outputs", "another model's"]);
    let others = dir.path().join("others.jsonl");
    fs::write(&others, fs::read_to_string(&data).unwrap() + "\n{\"ids\": [9, 8, 7]}").unwrap();
    run(distill("shape_350m", &others, &dir.path().join("third"))
        .args(["--student-layers", "2", "--teacher-outputs"])
        .arg(&file))
    .refused(1, &["example 13", "one of 3 tokens", "other data"]);
    fs::write(&file, &written[..written.len() - 1]).unwrap();
    run(&mut start("third", &[])).refused(1, &["teacher.outputs", "ends early"]);
    assert!(!dir.path().join("third").exists());
}

#[test]
fn refusals() {
    let dir = tempfile::tempdir().unwrap();
    let data = data(dir.path());
    let output = dir.path().join("out");
    let start = |teacher: &str| distill(teacher, &data, &output);
    let student = |teacher: &str, student: &str| {
        let mut command = start(teacher);
        command.arg("--student").arg(tiny(student));
        command
    };
    run(&mut student("pre_ln", "shape_125m")).refused(2, &["teacher", "vocabulary of 80", "97"]);
    run(&mut student("none", "shape_125m")).refused(1, &["--teacher", "none"]);
    run(&mut student("shape_350m", "none")).refused(1, &["--student", "none"]);
    run(start("shape_350m").args(["--student-layers", "5"])).refused(2, &["expected 1 to 4, found 5"]);
    run(start("shape_350m").args(["--student-layers", "0"])).refused(2, &["expected 1 to 4, found 0"]);
    run(student("shape_350m", "shape_125m").args(["--temperature", "0"])).refused(2, &["temperature"]);
    run(student("shape_350m", "shape_125m").args(["--alpha-kd=-1"])).refused(2, &["alpha_kd"]);
    run(student("shape_350m", "shape_125m").args(["--model", "x"])).refused(2, &["--model", "--teacher"]);
    run(&mut start("shape_350m")).refused(2, &["--student"]);
    run(student("shape_350m", "shape_125m").args(["--student-layers", "2"]))
        .refused(2, &["cannot be used with"]);
    assert!(!output.exists());
}
