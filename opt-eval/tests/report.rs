//! Reports of lm-evaluation-harness 0.4.13 (fixtures/report/make_report.py), and what can be wrong with a file.

use opt_eval::{
    ErrorKind,
    report::{Bos, GroupMetric, GroupResult, MetricResult, Report, RunInfo, TaskResult},
    samples::{SampleReader, SampleWriter, document_hash, hash},
};
use serde_json::Value;
use std::path::PathBuf;

const DATE: &str = "2025-01-02T03-04-05.678901";

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/report").join(name)
}

fn harness(model: &str) -> Report {
    let path = fixture(&format!("harness/{model}/results_{DATE}.json"));
    Report::from_file(path).expect("the harness' report")
}

#[test]
fn what_the_harness_wrote_is_read_and_written_alike() {
    for model in ["first", "second"] {
        let report = harness(model);
        let path = fixture(&format!("harness/{model}/results_{DATE}.json"));
        let theirs: Value =
            serde_json::from_str(&std::fs::read_to_string(path).expect("the file")).expect("JSON");
        assert_eq!(serde_json::to_value(&report).expect("it serializes"), theirs);
        let table =
            std::fs::read_to_string(fixture(&format!("harness/{model}/table.md"))).expect("the table");
        assert_eq!(report.markdown(), table);
        assert_eq!(report.model_name, Some(format!("invented/{model}")));
    }
}

/// A report with the tasks of the harness' first one, by the calls a run makes.
fn rebuilt(theirs: &Report) -> Report {
    let mut report = Report::new(RunInfo::new("invented/first"));
    for name in ["colours", "numbers", "lines"] {
        let scores = theirs.results.get(name).expect("the task");
        let mut task = TaskResult::new(name, scores.sample_len.expect("a size"));
        task.version = theirs.versions.get(name).cloned().expect("a version");
        for score in &scores.metrics {
            let mut metric = MetricResult::new(&score.metric, score.value).filter(&score.filter);
            metric.stderr = score.stderr;
            metric.higher_is_better = theirs.higher_is_better(name, &score.metric);
            task.metrics.push(metric);
        }
        report.add_task(task);
    }
    report
}

#[test]
fn groups_are_aggregated_as_the_harness_does() {
    let theirs = harness("first");
    let mut report = rebuilt(&theirs);
    let mut group = GroupResult::new("invented", ["colours", "numbers"]).mean_of("acc").mean_of("acc_norm");
    group.alias = Some("all invented".to_owned());
    group.version = Some("3".to_owned());
    group.metrics.get_mut(1).expect("the second").weight_by_size = false;
    report.add_group(group);
    for metric in ["acc", "acc_norm"] {
        let ours = report.score("invented", metric, "none").expect("the group's score");
        let theirs = theirs.score("invented", metric, "none").expect("the group's score");
        assert!((ours.value - theirs.value).abs() < 1e-12);
        let (a, b) = (ours.stderr.expect("an error"), theirs.stderr.expect("an error"));
        assert!((a - b).abs() < 1e-12, "{metric}: {a} and {b}");
    }
    assert_eq!(report.markdown(), theirs.markdown());
    assert_eq!(report.n_shot, theirs.n_shot);
    assert_eq!(report.higher_is_better, theirs.higher_is_better);
    assert_eq!(report.group_subtasks, theirs.group_subtasks);
    assert_eq!(
        report.groups.get("invented").map(|g| &g.sample_count),
        theirs.groups.get("invented").map(|g| &g.sample_count)
    );

    // All keys that the harness' own report has are there, but for what it says of its environment.
    let keys = |report: &Report| {
        serde_json::to_value(report).expect("JSON").as_object().cloned().expect("an object")
    };
    let ours = keys(&report);
    for key in [
        "results",
        "groups",
        "group_subtasks",
        "configs",
        "versions",
        "n-shot",
        "higher_is_better",
        "n-samples",
        "config",
        "date",
        "model_name",
        "model_name_sanitized",
        "model_source",
    ] {
        assert!(ours.contains_key(key) && keys(&theirs).contains_key(key), "{key}");
    }
    let config = |report: &Report| report.config.keys().cloned().collect::<Vec<_>>();
    assert_eq!(config(&report), config(&theirs));
}

#[test]
fn a_group_of_which_a_part_is_missing_says_so() {
    let mut report = rebuilt(&harness("first"));
    let mut group = GroupResult::new("all", ["colours", "lines", "absent"]).mean_of("acc").mean_of("f1");
    group.metrics.push(GroupMetric::clone(group.metrics.first().expect("one")));
    report.add_group(group);
    let colours = report.score("colours", "acc", "none").map(|s| s.value);
    assert_eq!(report.score("all", "acc", "none").map(|s| s.value), colours);
    let notes = report.opt_eval.map(|own| own.notes).unwrap_or_default();
    assert!(notes.iter().any(|note| note == "group all: 2 of 3 tasks lack acc,none"), "{notes:?}");
    assert!(notes.iter().any(|note| note == "group all: none of its tasks has the metric f1"), "{notes:?}");
}

#[test]
fn a_report_survives_its_file() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut info = RunInfo::new("models/opt-novels");
    info.bos = Some(Bos::With);
    info.limit = Some(10.0);
    info.weights = Some("int8".to_owned());
    info.backend = Some("cpu".to_owned());
    let mut report = Report::new(info);
    let mut task = TaskResult::new("piqa", 1838);
    (task.effective, task.truncated, task.groups) = (10, 2, vec!["qa".to_owned()]);
    task.metrics.push(MetricResult::new("acc", 0.7).higher_is_better(true));
    report.add_task(task);
    report.note("a line");
    let path = folder.path().join("deeper/results.json");
    report.write(&path).expect("it is written");
    report.write(&path).expect("it is replaced");
    let back = Report::from_file(&path).expect("it is read");
    assert_eq!(back, report);
    assert!(back.limited("piqa") && back.bos() == Some(Bos::With));
    assert_eq!(back.title(), "models/opt-novels (int8, cpu)");
    assert_eq!(back.group_subtasks.get("qa"), Some(&vec!["piqa".to_owned()]));
    assert_eq!(
        std::fs::read_dir(path.parent().expect("a folder")).expect("listed").count(),
        1,
        "no file is left"
    );
    let text = report.document();
    for part in [
        "# models/opt-novels",
        "texts with BOS",
        "only 10 documents",
        "2 prompts were longer",
        "a line",
        " - piqa|",
    ] {
        assert!(text.contains(part), "{part} in {text}");
    }
}

#[test]
fn what_is_no_report_is_told_in_one_line() {
    let told = |text: &str| {
        let e = Report::from_json(text).expect_err(text);
        assert_eq!(e.kind(), ErrorKind::Config);
        let line = e.to_string();
        assert!(!line.contains('\n'), "{line}");
        line
    };
    let whole = harness("first").to_json();
    assert!(told(&whole[..whole.len() / 2]).contains("unfinished"));
    assert!(told("").contains("unfinished"));
    assert!(told("# a heading").contains("not JSON"));
    assert!(told("[1]").contains("no object"));
    assert!(told(r#"{"model_type": "opt"}"#).contains("has no \"results\""));
    assert!(told(r#"{"results": [1]}"#).contains("no object of objects"));
    assert!(told(r#"{"results": {"a": 1}}"#).contains("no object of objects"));
    assert!(told(r#"{"results": {}}"#).contains("no task was finished"));
    assert!(told(r#"{"results": {"a": {"alias": "a"}}}"#).contains("without scores"));
    assert!(told(r#"{"results": {"a": {"acc,none": 1}}, "n-samples": 3}"#).contains("no results file"));
    let absent = Report::from_file(fixture("absent.json")).expect_err("no file");
    assert_eq!(absent.kind(), ErrorKind::NotFound);
    // Any beginning of a report is an error, and none a panic.
    for end in (0..whole.len()).filter(|end| whole.is_char_boundary(*end)).step_by(37) {
        assert!(Report::from_json(&whole[..end]).is_err());
    }
}

#[test]
fn reports_say_what_they_know_of_bos() {
    let bos = |text: &str| Report::from_json(text).expect("it reads").bos();
    let with =
        |rest: &str| bos(&format!(r#"{{"results": {{"t": {{"acc,none": 1}}}}, "n-shot": {{}}, {rest}}}"#));
    assert_eq!(with(r#""lm_eval_version": "0.4.13", "config": {"model": "hf"}"#), Some(Bos::With));
    assert_eq!(with(r#""lm_eval_version": "0.4.2", "config": {"model": "hf"}"#), None);
    assert_eq!(with(r#""lm_eval_version": "0.4.13", "config": {"model": "openai"}"#), None);
    let told = r#""lm_eval_version": "0.4.13", "config": {"model": "hf", "model_args": "pretrained=x,add_bos_token=False"}"#;
    assert_eq!(with(told), Some(Bos::Without));
    assert_eq!(with(r#""config": {"model_args": {"add_bos_token": true}}"#), Some(Bos::With));
    let old = r#"{"results": {"t": {"acc": 1, "ppl": 26.5, "ppl_stderr": 0.9}}, "versions": {"t": 0}, "config": {"model": "gpt2", "num_fewshot": 3}}"#;
    let old = Report::from_json(old).expect("it reads");
    assert_eq!((old.bos(), old.shots("t")), (Some(Bos::Without), Some(3)));
    assert_eq!(old.score("t", "perplexity", "none").map(|s| (s.value, s.stderr)), Some((26.5, Some(0.9))));
}

#[test]
fn samples_are_read_and_written_as_the_harness_has_them() {
    let folder = tempfile::tempdir().expect("a folder");
    let report = harness("first");
    for task in ["colours", "numbers", "lines"] {
        let theirs = fixture(&format!("harness/first/samples_{task}_{DATE}.jsonl"));
        let ours = folder.path().join("samples.jsonl");
        let mut writer = SampleWriter::create(&ours).expect("a file");
        for sample in SampleReader::open(&theirs).expect("the harness' file") {
            let sample = sample.expect("a sample");
            // The documents have one key each, so that the value's order of keys is theirs.
            assert_eq!(document_hash(&sample.doc.to_string()), sample.doc_hash);
            let text = sample.target.as_str().expect("a text");
            assert_eq!(hash(text), sample.target_hash);
            writer.write(&sample).expect("it is written");
        }
        assert!(!ours.exists() || task != "colours", "nothing stands there before the end");
        let hash = writer.finish().expect("it is renamed");
        let hashes = report.other.get("task_hashes").expect("hashes");
        assert_eq!(hashes.get(task).and_then(Value::as_str), Some(hash.as_str()));
        let values = |path: &PathBuf| -> Vec<Value> {
            let text = std::fs::read_to_string(path).expect("the file");
            text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
        };
        assert_eq!(values(&ours), values(&theirs));
    }
}

#[test]
fn broken_samples_are_told_with_their_line() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("samples_t.jsonl");
    std::fs::write(&path, "{\"doc_id\": 0, \"acc\": NaN}\n\n{\"doc_id\": 1, \"ac").expect("it is written");
    let found: Vec<_> = SampleReader::open(&path).expect("a file").collect();
    let [Ok(first), Err(e)] = &found[..] else { panic!("{found:?}") };
    assert_eq!(first.values.get("acc"), Some(&Value::Null));
    assert!(e.to_string().contains("line 3: a line that ends in the middle"), "{e}");
    assert_eq!(SampleReader::open(folder.path().join("none")).expect_err("none").kind(), ErrorKind::NotFound);
}

/// A run of the harness on a small model: groups in a group, and limited tasks (fixtures/make_report.py).
#[test]
fn a_run_of_the_harness_is_understood() {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/harness_report");
    let stamp = "2000-01-01T00-00-00.000000";
    let path = folder.join(format!("results_{stamp}.json"));
    let theirs = Report::from_file(&path).expect("the harness' report");
    let value: Value =
        serde_json::from_str(&std::fs::read_to_string(&path).expect("the file")).expect("JSON");
    assert_eq!(serde_json::to_value(&theirs).expect("it serializes"), value);
    assert_eq!(
        (theirs.bos(), theirs.shots("arc_easy"), theirs.limited("arc_easy")),
        (Some(Bos::With), Some(1), true)
    );

    // Its groups once more, from its tasks.
    let mut ours = theirs.clone();
    for name in ["mmlu_stem", "mmlu_other", "mmlu_social_sciences", "mmlu_humanities", "mmlu"] {
        ours.results.remove(name);
        ours.groups.remove(name);
        let (alias, version) = (theirs.results.get(name).map(|s| s.alias.clone()), theirs.versions.get(name));
        let mut group = GroupResult::new(name, Vec::<String>::new()).mean_of("acc");
        (group.alias, group.version) = (alias, version.and_then(Value::as_str).map(str::to_owned));
        ours.add_group(group);
        let score = |report: &Report| report.score(name, "acc", "none").cloned().expect("a score");
        let (a, b) = (score(&ours), score(&theirs));
        assert!((a.value - b.value).abs() < 1e-12, "{name}");
        assert!((a.stderr.expect("one") - b.stderr.expect("one")).abs() < 1e-12, "{name}");
    }
    // The harness leaves mmlu without them, whose groups it visits after it.
    assert_eq!(ours.n_shot.remove("mmlu"), Some(1.into()));
    assert!(ours.higher_is_better.remove("mmlu").is_some());
    assert_eq!(ours.markdown(), theirs.markdown());

    // Documents are hashed in the order of their keys, which is that of the file's text.
    let mut lines = 0;
    for task in theirs.n_samples.keys() {
        let file = folder.join(format!("samples_{task}_{stamp}.jsonl"));
        let text = std::fs::read_to_string(&file).expect("the file");
        for (line, sample) in text.lines().zip(SampleReader::open(&file).expect("the file")) {
            let sample = sample.expect("a sample");
            let doc = line.split_once("\"doc\": ").and_then(|(_, rest)| rest.split_once(", \"target\": "));
            assert_eq!(document_hash(doc.expect("a document").0), sample.doc_hash);
            let prompt = sample.arguments["gen_args_0"]["arg_0"].as_str().expect("a prompt");
            assert_eq!(hash(prompt), sample.prompt_hash);
            lines += 1;
        }
    }
    assert_eq!(lines, 4 + 4 + 33);
}
