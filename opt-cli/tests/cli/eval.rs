//! `opt eval`: tasks and texts, what is written, how it ends.

use super::*;
use serde_json::json;

fn data() -> PathBuf {
    root().join("opt-eval/tests/fixtures/data")
}

fn eval(more: &[&str]) -> Command {
    let mut command = opt();
    command.args(["eval", "--model", "models/opt-novels", "--bootstrap-iters", "100"]).args(more);
    command
}

fn on_tasks(tasks: &str, more: &[&str]) -> Command {
    let mut command = eval(&["--tasks", tasks]);
    command.arg("--data").arg(data()).args(more);
    command
}

/// What lm-evaluation-harness found, zero-shot with BOS.
fn expected(task: &str) -> Value {
    let path = root().join(format!("opt-eval/tests/fixtures/expected/{task}.json"));
    let runs: Vec<Value> = serde_json::from_slice(&std::fs::read(path).expect(task)).expect(task);
    let wanted = |run: &&Value| run["model"] == "opt-novels" && run["num_fewshot"] == 0 && run["bos"] == true;
    runs.iter().find(wanted).expect(task)["results"][task].clone()
}

#[test]
fn scores_are_the_harness_and_lie_where_it_has_them() {
    let dir = tempfile::tempdir().expect("a folder");
    let output = dir.path().join("deep/one.json");
    let ran = run(on_tasks("piqa,winogrande", &["--log-samples", "--json", "--output"]).arg(&output));
    let printed = ran.json();
    let written: Value = serde_json::from_slice(&std::fs::read(&output).expect("a report")).expect("JSON");
    assert_eq!(printed, std::slice::from_ref(&written));
    for task in ["piqa", "winogrande"] {
        let expected = expected(task);
        for key in ["acc,none", "acc_stderr,none"] {
            let found = written["results"][task][key].as_f64().expect(key);
            assert!((found - expected[key].as_f64().expect(key)).abs() < 1e-12, "{task} {key}");
        }
        assert_eq!(written["n-samples"][task], json!({ "original": 20, "effective": 20 }));
        let samples = std::fs::read_to_string(dir.path().join(format!("deep/samples_{task}_one.jsonl")))
            .expect("samples");
        assert_eq!(samples.lines().count(), 20);
    }
    assert_eq!(written["opt_eval"]["bos"], "with");
    // No journal is left behind.
    assert_eq!(std::fs::read_dir(dir.path().join("deep")).expect("a folder").count(), 3);

    // Compared with itself nothing differs; with other weights it is told how sure that is.
    let output = output.to_str().expect("UTF-8");
    let ran = run(&mut on_tasks("piqa,winogrande", &["--json", "--compare", output]));
    let lines = ran.json();
    let rows = lines[1]["rows"].as_array().expect("rows");
    assert!(
        rows.len() >= 3 && rows.iter().all(|row| row["difference"] == 0.0 && row["pairs"] == 20),
        "{rows:?}"
    );
    let plot = dir.path().join("scores.svg");
    let ran =
        run(on_tasks("piqa,winogrande", &["--quantize", "int4", "--compare", output, "--plot"]).arg(&plot));
    assert!(ran.stdout.contains("piqa"), "{}", ran.stdout);
    assert_eq!(ran.code, Some(0));
    assert!(std::fs::read_to_string(plot).expect("a drawing").contains("</svg>"));
}

#[test]
fn variants_of_one_task_tell_their_spread() {
    let dir = tempfile::tempdir().expect("a folder");
    let file = dir.path().join("mine.toml");
    std::fs::write(&file, "[[task]]\nname = \"piqa_plain\"\nlike = \"piqa\"\ntext = \"{{question}}\\n\"\n")
        .expect("a file");
    let tasks = [
        "--phrasings",
        "--vary-shots",
        "0,2",
        "--vary-seeds",
        "1,2",
        "--limit",
        "5",
        "--json",
        "--tasks-file",
    ];
    let ran = run(on_tasks("piqa,piqa_plain", &tasks).arg(&file));
    let found = &ran.json()[0];
    assert_eq!(found["variants"].as_object().expect("variants").len(), 8);
    assert!(
        found["variants"]["piqa_plain, 2-shot, seed 2"]["results"]["piqa_plain"]["acc,none"].is_number(),
        "{found}"
    );
    let rows = found["spread"]["rows"].as_array().expect("rows");
    assert!(rows.iter().any(|row| row["metric"] == "acc"), "{rows:?}");
}

#[test]
fn the_perplexity_of_a_text() {
    let dir = tempfile::tempdir().expect("a folder");
    let text = dir.path().join("text.txt");
    std::fs::write(&text, "The old house stood on the hill. ".repeat(60)).expect("a file");
    let path = text.to_str().expect("UTF-8");
    let whole = run(&mut eval(&["--perplexity", path, "--json"])).json();
    assert_eq!(whole[0]["window"], 512);
    assert!(whole[0]["perplexity"].as_f64().expect("a number") > 1.0);
    let small =
        run(&mut eval(&["--perplexity", path, "--window", "64", "--stride", "32", "--no-bos", "--json"]))
            .json();
    assert_eq!((&small[0]["stride"], &small[0]["bos"]), (&json!(32), &json!(false)));
    let ran = run(&mut eval(&["--perplexity", path, "--window", "64"]));
    assert!(ran.stdout.starts_with("perplexity "), "{}", ran.stdout);
    std::fs::write(&text, "").expect("a file");
    let ran = run(&mut eval(&["--perplexity", path]));
    assert_eq!(ran.code, Some(1));
    assert!(ran.stderr.contains("text.txt: expected a text of at least 2 tokens, found 1"), "{}", ran.stderr);
}

#[test]
fn tasks_are_listed() {
    let ran = run(opt().args(["eval", "--list"]));
    for name in ["hellaswag", "mmlu_anatomy", "mmlu ", "lambada_openai", "wikitext", "arithmetic_5ds"] {
        assert!(ran.stdout.contains(name), "{name}");
    }
    let lines = run(opt().args(["eval", "--list", "--json"])).json();
    assert!(lines.iter().any(|line| line["group"] == "mmlu"));
}

#[test]
fn what_cannot_be_evaluated_is_one_line() {
    let dir = tempfile::tempdir().expect("a folder");
    let no_report = dir.path().join("no.json");
    std::fs::write(&no_report, "{\"a\": 1}").expect("a file");
    let no_report = no_report.to_str().expect("UTF-8");
    for (tasks, more, code, expected) in [
        ("helaswag", &[][..], 2, "near it: hellaswag"),
        ("ptb", &[][..], 1, "expected its rows in one of"),
        ("piqa", &["--num-fewshot", "1000"], 2, "expected 1000 examples"),
        ("piqa", &["--compare", "nowhere.json"], 1, "nowhere.json"),
        ("piqa", &["--compare", no_report], 1, "no.json"),
        ("piqa", &["--compare", "published"], 1, "expected a model of a published size"),
        ("piqa", &["--tasks-file", "Cargo.toml"], 1, "Cargo.toml"),
        ("anagrams1", &["--max-gen-toks", "512"], 2, "max_gen_toks: expected less than 512"),
        ("piqa", &["--phrasings"], 2, "expected at least two tasks"),
        ("piqa", &["--vary-seeds", "1,2"], 2, "expected --num-fewshot"),
        ("piqa", &["--vary-shots", "1,1"], 2, "a variant twice: 1-shot"),
        ("piqa", &["--plot", "x.png"], 2, "expected a name that ends in .svg"),
        ("piqa", &["--output", "opt-cli"], 2, "expected a file, found the folder opt-cli"),
        ("piqa", &["--vary-shots", "0,1", "--compare", "published"], 2, "not for variants"),
        ("piqa", &["--output", "Cargo.toml/x.json"], 1, "x.json.journal: cannot"),
    ] {
        let ran = run(&mut on_tasks(tasks, more));
        assert_eq!(ran.code, Some(code), "{tasks} {more:?}: {}", ran.stderr);
        assert!(ran.stderr.contains(expected), "{tasks} {more:?}: {}", ran.stderr);
        assert_eq!(ran.stderr.trim_end().lines().count(), 1, "{}", ran.stderr);
    }
    assert_eq!(run(opt().args(["eval", "--tasks", "piqa"])).code, Some(2));
    assert_eq!(run(opt().args(["eval"])).code, Some(2));
}

#[test]
fn an_evaluation_that_was_killed_goes_on() {
    let dir = tempfile::tempdir().expect("a folder");
    let output = dir.path().join("out.json");
    let journal = dir.path().join("out.json.journal");
    let tasks = "anagrams1,anagrams2,cycle_letters";
    let whole = run(&mut on_tasks(tasks, &["--json", "--max-gen-toks", "48"])).json();
    let mut child = on_tasks(tasks, &["--max-gen-toks", "48", "--output"])
        .arg(&output)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("the command starts");
    // Killed after the first answers; a fast machine may be done by then.
    let answered = || std::fs::read_to_string(&journal).is_ok_and(|text| text.lines().count() > 5);
    while !answered() && child.try_wait().expect("a process").is_none() {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let _ = child.kill();
    let _ = child.wait();
    assert!(journal.exists() != output.exists());
    let resumed =
        run(on_tasks(tasks, &["--json", "--max-gen-toks", "48", "--resume", "--output"]).arg(&output)).json();
    assert_eq!(resumed[0]["results"], whole[0]["results"]);
    assert!(!journal.exists());
}

/// What is shared, and what an adapter puts before it, changes no answer.
#[test]
fn adapters_and_quantized_weights_are_evaluated() {
    let dir = tempfile::tempdir().expect("a folder");
    let text = dir.path().join("text.txt");
    std::fs::write(&text, "The ship sailed over the grey sea, and the men sang. ".repeat(40))
        .expect("a file");
    let mut found = Vec::new();
    for method in ["lora", "prefix", "prompt"] {
        let adapter = dir.path().join(method);
        let mut tune = opt();
        tune.args([
            "tune",
            method,
            "--quiet",
            "--max-steps",
            "2",
            "--batch-size",
            "2",
            "--seq-len",
            "32",
            "--lr",
            "0.05",
        ]);
        let ran = run(tune.arg("--data").arg(&text).arg("--output").arg(&adapter));
        assert_eq!(ran.code, Some(0), "{}", ran.stderr);
        let evaluated = |more: &[&str]| {
            let mut command = on_tasks("piqa,lambada_openai", &["--json", "--limit", "6"]);
            run(command.args(more).arg("--adapter").arg(&adapter)).json().remove(0)
        };
        let (shared, alone) = (evaluated(&[]), evaluated(&["--no-share"]));
        let perplexity = |report: &Value| {
            report["results"]["lambada_openai"]["perplexity,none"].as_f64().expect("a number")
        };
        assert!((perplexity(&shared) / perplexity(&alone) - 1.0).abs() < 1e-4, "{method}");
        assert_eq!(shared["results"]["piqa"]["acc,none"], alone["results"]["piqa"]["acc,none"]);
        assert_eq!(shared["opt_eval"]["adapter"], *method);
        found.push(perplexity(&shared));
    }
    for format in ["int8", "int4", "nf4"] {
        let report = run(&mut on_tasks("lambada_openai", &["--json", "--limit", "6", "--quantize", format]))
            .json()
            .remove(0);
        assert!(report["opt_eval"]["weights"].as_str().expect("a text").contains(format), "{report}");
        found.push(report["results"]["lambada_openai"]["perplexity,none"].as_f64().expect("a number"));
    }
    found.sort_by(f64::total_cmp);
    found.dedup();
    assert_eq!(found.len(), 6, "each is a model of its own: {found:?}");
}
