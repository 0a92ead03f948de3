//! Comparisons of reports of lm-evaluation-harness; what is expected is SciPy's (fixtures/report/make_report.py).

use opt_eval::{
    ErrorKind,
    compare::{self, Options, Test, Verdict},
    published::Size,
    report::{Bos, MetricResult, Report, RunInfo, TaskResult},
    samples::SampleValues,
    sensitivity,
};
use serde_json::Value;
use std::path::PathBuf;

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/report")
}

fn run(model: &str) -> (Report, SampleValues) {
    let path = folder().join(format!("harness/{model}/results_2025-01-02T03-04-05.678901.json"));
    let report = Report::from_file(&path).expect("the harness' report");
    let samples =
        SampleValues::beside(&path, report.results.keys().map(String::as_str)).expect("its samples");
    assert!(!samples.is_empty());
    (report, samples)
}

#[test]
fn runs_are_paired_document_by_document() {
    let ((first, of_first), (second, of_second)) = (run("first"), run("second"));
    let mut options = Options::default();
    options.bootstrap = Some(1000);
    let found =
        compare::runs(&first, &second, Some((&of_first, &of_second)), &options).expect("they compare");
    let expected: Value =
        serde_json::from_str(&std::fs::read_to_string(folder().join("expected.json")).expect("the fixture"))
            .expect("JSON");
    let expected = expected.as_object().expect("an object");
    let near = |a: Option<f64>, b: &Value, what: &str| {
        let (Some(a), Some(b)) = (a, b.as_f64()) else { panic!("{what}: {a:?} and {b}") };
        assert!((a - b).abs() < 1e-9, "{what}: {a} and {b}");
    };
    for (key, expected) in expected {
        let row =
            found.rows.iter().find(|row| *key == format!("{}/{}", row.task, row.metric)).expect("the row");
        near(row.p, &expected["p"], key);
        assert_eq!(row.group, key.starts_with("invented"));
        match expected.get("p_holm") {
            Some(p) => near(row.p_holm, p, key),
            None => assert_eq!(row.p_holm, None),
        }
        if let Some(discordant) = expected.get("discordant") {
            let (a, b) = row.discordant.expect("counts");
            assert_eq!(serde_json::json!([a, b]), *discordant, "{key}");
            assert_eq!(row.test, Test::Mcnemar);
            let (low, high) = row.interval.expect("an interval");
            assert!(low <= row.difference && row.difference <= high);
        } else {
            near(row.statistic, &expected["statistic"], key);
            assert_eq!(row.test, Test::Paired);
            assert!(row.statistic.expect("one") * row.difference > 0.0);
        }
    }
    // The mean over tasks is no mean over documents.
    let macro_mean =
        found.rows.iter().find(|r| r.task == "invented" && r.metric == "acc_norm").expect("the row");
    assert_eq!(macro_mean.test, Test::Unpaired);
    assert_eq!(found.rows.len(), expected.len() + 1);
    let text = found.markdown();
    assert!(
        text.contains("McNemar") && text.contains("invented (group)") && text.contains("paired t"),
        "{text}"
    );
    let json: Value = serde_json::from_str(&found.to_json()).expect("JSON");
    assert_eq!(json["rows"].as_array().map(Vec::len), Some(found.rows.len()));
}

#[test]
fn without_samples_errors_count_as_independent() {
    let ((first, of_first), (second, _)) = (run("first"), run("second"));
    let found = compare::runs(&first, &second, None, &Options::default()).expect("they compare");
    let row = found.rows.iter().find(|row| row.task == "numbers" && row.metric == "acc").expect("the row");
    let error =
        |report: &Report| report.score("numbers", "acc", "none").and_then(|s| s.stderr).expect("an error");
    let z = row.difference / error(&first).hypot(error(&second));
    assert_eq!((row.test, row.statistic), (Test::Unpaired, Some(z)));
    let lines = found.rows.iter().find(|row| row.task == "lines").expect("the row");
    assert_eq!((lines.test, lines.p), (Test::None, None));
    assert!(found.markdown().contains("Unpaired: the two errors are taken as independent"));

    // Samples of other documents are not paired.
    let mut other = SampleValues::new();
    let sample = opt_eval::samples::Sample::new(0, Value::Null);
    let mut wrong = sample.clone();
    wrong.values.insert("acc".to_owned(), 1.into());
    other.add("numbers", &wrong);
    let found =
        compare::runs(&first, &second, Some((&of_first, &other)), &Options::default()).expect("they compare");
    let row = found.rows.iter().find(|row| row.task == "numbers" && row.metric == "acc").expect("the row");
    assert_eq!(row.test, Test::Unpaired);
    assert!(row.notes.iter().any(|note| note.contains("other documents")), "{:?}", row.notes);
}

#[test]
fn what_cannot_be_compared_is_told_in_one_line() {
    let (first, of_first) = run("first");
    let other = report("piqa", "acc", 0.5, 0.01);
    let e = compare::runs(&first, &other, None, &Options::default()).expect_err("nothing in common");
    assert_eq!(e.kind(), ErrorKind::NotFound);
    assert!(e.to_string().starts_with("no score in common: colours, "), "{e}");
    let mut options = Options::default();
    options.bootstrap = Some(1);
    let e = compare::runs(&first, &first, Some((&of_first, &of_first)), &options).expect_err("one resample");
    assert_eq!(e.kind(), ErrorKind::Option);
    let size = Size::from_name("opt-125m").expect("a size");
    let e = compare::with_published(&first, size).expect_err("nothing published");
    assert!(
        e.to_string().contains("nothing was published of opt-125m on the report's tasks: colours"),
        "{e}"
    );
}

fn report(task: &str, metric: &str, value: f64, stderr: f64) -> Report {
    let mut info = RunInfo::new("facebook/opt-125m");
    info.bos = Some(Bos::Without);
    let mut report = Report::new(info);
    add(&mut report, task, metric, value, stderr, 0);
    report
}

fn add(report: &mut Report, task: &str, metric: &str, value: f64, stderr: f64, shots: usize) {
    let mut result = TaskResult::new(task, 1000);
    result.num_fewshot = shots;
    result.metrics.push(MetricResult::new(metric, value).stderr(stderr).higher_is_better(true));
    report.add_task(result);
}

#[test]
fn a_run_is_held_against_what_was_published() {
    let mut report = report("piqa", "acc", 0.630033, 0.0112643);
    add(&mut report, "sciq", "acc", 0.60, 0.0137, 0);
    add(&mut report, "lambada_openai", "perplexity", 40.0, 0.94, 0);
    add(&mut report, "winogrande", "acc", 0.5162, 0.014, 5);
    add(&mut report, "mmlu_anatomy", "acc", 0.25, 0.03, 0);
    let size = Size::of(&report).expect("a published size");
    let found = compare::with_published(&report, size).expect("they compare");
    let row = |task: &str, shots: u64| {
        found.rows.iter().find(|row| row.task == task && row.theirs.shots == shots).expect("the row")
    };
    assert_eq!(row("piqa", 0).verdict, Verdict::Within);
    assert!(row("piqa", 0).difference.abs() < 1e-12);
    assert_eq!(row("sciq", 0).verdict, Verdict::Below);
    // 0.751 ± 0.0136816 was published.
    let z = (0.60 - 0.751) / 0.0137_f64.hypot(0.0136816);
    assert!(row("sciq", 0).z.is_some_and(|found| (found - z).abs() < 1e-9));
    assert_eq!(row("lambada_openai", 0).verdict, Verdict::Above);
    assert_eq!(row("winogrande", 5).verdict, Verdict::Within);
    assert_eq!(row("winogrande", 5).notes, ["theirs has no standard error: ours alone"]);
    assert_eq!(row("winogrande", 0).reasons, ["5 shots, theirs 0"]);
    assert_eq!(row("winogrande", 0).verdict, Verdict::NotComparable);
    assert!(row("mmlu_anatomy", 0).reasons.iter().any(|reason| reason.contains("an older prompt")));
    assert!(!found.agrees());
    let text = found.markdown();
    assert!(text.contains("- winogrande: 5 shots, theirs 0"), "{text}");

    // A run with BOS, or of a part of the documents, does not measure what was published.
    report.opt_eval.as_mut().expect("ours").bos = Some(Bos::With);
    report.n_samples.get_mut("piqa").expect("counts").effective = 10;
    let found = compare::with_published(&report, size).expect("they compare");
    let piqa = found.rows.iter().find(|row| row.task == "piqa").expect("the row");
    assert_eq!(piqa.reasons, ["texts with BOS, theirs without BOS", "only some of the documents"]);
    assert!(found.agrees(), "nothing is comparable");
}

#[test]
fn spread_over_phrasings() {
    let runs: Vec<(String, Report)> = [0.60, 0.66, 0.63]
        .into_iter()
        .enumerate()
        .map(|(i, value)| (format!("phrasing {i}"), report(&format!("piqa_{i}"), "acc", value, 0.015)))
        .collect();
    let runs: Vec<(&str, &Report)> = runs.iter().map(|(label, report)| (label.as_str(), report)).collect();
    let found = sensitivity::spread(&runs, None).expect("a spread");
    let [row] = &found.rows[..] else { panic!("{:?}", found.rows) };
    assert_eq!(
        (row.min, row.max, row.best.as_deref(), row.worst.as_deref()),
        (0.60, 0.66, Some("phrasing 1"), Some("phrasing 0"))
    );
    assert!((row.mean - 0.63).abs() < 1e-12 && (row.deviation - 0.03).abs() < 1e-12);
    assert!(row.range_in_stderr.is_some_and(|range| (range - 4.0).abs() < 1e-9));
    let text = found.markdown();
    assert!(text.contains("Range/SE") && text.contains("|phrasing 2|"), "{text}");
    assert!(serde_json::from_str::<Value>(&found.to_json()).is_ok());

    let kind = |runs: &[(&str, &Report)], task| sensitivity::spread(runs, task).expect_err("an error").kind();
    assert_eq!(kind(&runs[..1], None), ErrorKind::Option);
    assert_eq!(kind(&[runs[0], runs[0]], None), ErrorKind::Option);
    assert_eq!(kind(&runs, Some("piqa")), ErrorKind::NotFound);
}

#[cfg(feature = "plot")]
#[test]
fn a_drawing_has_a_panel_for_each_metric() {
    let ((first, _), (second, _)) = (run("first"), run("second"));
    let text = opt_eval::plot::svg(&[("one", &first), ("two <&>", &second)]).expect("a drawing");
    for part in ["acc, ± one", "acc_norm, ± one", "word_perplexity", "colours", "one\n", "two &lt;&amp;&gt;"]
    {
        assert!(text.contains(part), "{part} in {text}");
    }
    // A circle for each score of each report, and for each label.
    assert_eq!(text.matches("<circle").count(), 2 * 8 + 2);
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("scores.svg");
    opt_eval::plot::scores(&path, &[("one", &first)]).expect("it is written");
    assert!(path.exists());
    let none: [(&str, &Report); 0] = [];
    assert_eq!(opt_eval::plot::svg(&none).expect_err("nothing").kind(), ErrorKind::NotFound);
    // One value without spread still has a scale.
    assert!(opt_eval::plot::svg(&[("flat", &report("piqa", "acc", 0.0, 0.0))]).is_ok());
}
