//! `opt tune --task` and `opt predict`: heads from data to predictions, and training for search.

use super::{opt, run};
use serde_json::json;
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

fn write(dir: &Path, name: &str, lines: &[serde_json::Value]) -> PathBuf {
    let path = dir.join(name);
    fs::write(&path, lines.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")).unwrap();
    path
}

fn tune(method: &str, task: &str, data: &Path, output: &Path) -> Command {
    let mut command = opt();
    command.args(["tune", method, "--task", task, "--quiet", "--json", "--batch-size", "3"]);
    command.arg("--data").arg(data).arg("--output").arg(output);
    command
}

#[test]
fn a_classifier_is_tuned_and_used() {
    let dir = tempfile::tempdir().unwrap();
    let line = |text: &str, label: &str| json!({ "text": text, "label": label });
    let data = write(
        dir.path(),
        "data.jsonl",
        &[
            line("the ship sailed over the sea", "sea"),
            line("the horse ran along the road", "land"),
            line("a wave and a sail", "sea"),
            line("a hill and a house", "land"),
        ],
    );
    for method in ["lora", "full"] {
        let output = dir.path().join(method);
        let lr = if method == "full" { "5e-4" } else { "5e-3" };
        run(tune(method, "classify", &data, &output).args(["--max-steps", "16", "--lr", lr])).json();
        let place = if method == "full" { "--model" } else { "--adapter" };
        let predict = || {
            let mut command = opt();
            command.args(["predict", "--quiet", place]).arg(&output);
            command
        };
        let found =
            run(predict().args(["--json", "the ship sailed over the sea", "a hill and a house"])).json();
        assert_eq!(found[0]["predictions"][0]["label"], "sea", "{method}: {found:?}");
        assert_eq!(found[1]["predictions"][0]["label"], "land", "{method}: {found:?}");
        let plain = run(predict().args(["--top-k", "1", "a wave and a sail"])).done().stdout;
        assert!(plain.trim_end().ends_with("\tsea") && plain.lines().count() == 1, "{plain}");
        let refused = run(predict().args(["--context", "a text", "what?"]));
        refused.refused(2, &["--context belongs to a head for answers"]);
    }
}

#[test]
fn an_answer_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let (question, context) = ("Who slept?", "Tom ran home. Anna Grey slept by the fire.");
    let line = json!({ "question": question, "context": context, "answer": "Anna Grey" });
    let data = write(dir.path(), "data.jsonl", &[line]);
    let output = dir.path().join("out");
    run(tune("lora", "answer", &data, &output).args(["--max-steps", "12", "--lr", "1e-2"])).json();
    let mut predict = opt();
    predict.args(["predict", "--quiet", "--json", "--context", context, question, "--adapter"]).arg(&output);
    let found = run(&mut predict).json();
    assert_eq!(found[0]["answers"][0]["text"], "Anna Grey", "{found:?}");
}

#[test]
fn search_shows_recall_before_and_after() {
    let dir = tempfile::tempdir().unwrap();
    let pair = |query: &str, passage: &str| json!({ "query": query, "passage": passage });
    let data = write(
        dir.path(),
        "data.jsonl",
        &[
            pair("where ships lie", "The harbour was full of masts."),
            pair("what is baked at dawn", "A loaf stood on the table."),
            pair("who rules the land", "The king sat upon his throne."),
        ],
    );
    let output = dir.path().join("out");
    let mut command = tune("lora", "search", &data, &output);
    command.arg("--eval-data").arg(&data).args(["--max-steps", "3", "--pooling", "weighted-mean"]);
    let lines = run(&mut command).json();
    let recalls = lines.iter().filter(|line| line["recall_at_1"].is_number()).collect::<Vec<_>>();
    assert_eq!(recalls.iter().map(|line| line["step"].as_u64().unwrap()).collect::<Vec<_>>(), [0, 1, 2, 3]);
}

#[test]
fn what_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let line = json!({ "text": "a", "label": "good" });
    let data = write(dir.path(), "data.jsonl", &[line]);
    let output = dir.path().join("out");
    let fails = |task: &str, flags: &[&str], code, expected: &str| {
        run(tune("lora", task, &data, &output).args(flags)).refused(code, &[expected]);
        assert!(!output.exists());
    };
    fails("classify", &[], 1, "expected at least 2, found 1");
    fails("classify", &["--classes", "bad,fine"], 1, "line 1");
    fails("language", &["--classes", "bad,fine"], 2, "--classes belongs to another --task");
    fails("search", &[], 1, r#"{"query": "...", "passage": "..."}"#);
    fails("answer", &[], 1, "\"question\"");
    run(opt().args(["predict", "--quiet", "a text"])).refused(1, &["expected a model with a head"]);
}
