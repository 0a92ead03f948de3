//! Evaluations that are ended and go on, data that cannot be used, files of all kinds.

mod common;

use common::{fixtures, go, opt};
use opt_core::{CancelToken, ErrorKind, Progress};
use opt_eval::{EvalOptions, Evaluation, Report, Task, TaskOptions, Tasks, evaluate};
use std::{fs, ops::ControlFlow, path::Path};

fn run(tasks: &[&str], data: &Path, options: &EvalOptions) -> opt_core::Result<Evaluation> {
    evaluate(opt("tiny"), &Tasks::builtin().select(tasks)?, data, options, &mut go)
}

fn scores(report: &Report) -> serde_json::Value {
    serde_json::json!({ "results": report.results, "groups": report.groups })
}

#[test]
fn an_evaluation_that_was_ended_goes_on_and_gives_the_same() {
    let data = fixtures().join("data");
    let dir = tempfile::tempdir().unwrap();
    let tasks =
        ["arithmetic_1dc", "arithmetic_2da", "arithmetic_2dm", "arithmetic_2ds", "piqa", "reversed_words"];
    let mut options = EvalOptions::default();
    options.bootstrap_iters = 100;
    options.max_gen_toks = Some(8);
    let whole = run(&tasks, &data, &options).unwrap();

    options.journal = Some(dir.path().join("journal"));
    options.resume = true;
    let selection = Tasks::builtin().select(&tasks).unwrap();
    // Ended again and again, each time a little later; a last line may be cut short.
    let mut ended = 0;
    let resumed = loop {
        let cancel = CancelToken::new();
        options.cancel = cancel.clone();
        let mut reports = 0;
        let mut watch = |_: Progress<'_>| {
            reports += 1;
            if reports == 3 {
                cancel.cancel();
            }
            ControlFlow::Continue(())
        };
        match evaluate(opt("tiny"), &selection, &data, &options, &mut watch) {
            Ok(done) => break done,
            Err(error) => assert_eq!(error.kind(), ErrorKind::Cancelled, "{error}"),
        }
        ended += 1;
        assert!(ended < 100);
        let journal = options.journal.as_ref().unwrap();
        let text = fs::read_to_string(journal).unwrap();
        if ended == 2 {
            fs::write(journal, format!("{text}{{\"task\": \"piqa\", \"do")).unwrap();
        }
    };
    assert!(ended > 1, "{ended}");
    assert_eq!(scores(&resumed.report), scores(&whole.report));

    // Of another run, of other prompts, and of something else.
    let refused = |options: &EvalOptions| run(&tasks, &data, options).unwrap_err().to_string();
    let mut other = options.clone();
    other.cancel = CancelToken::new();
    other.bos = opt_core::tokenizer::Bos::Never;
    assert!(refused(&other).contains("bos differs"), "{}", refused(&other));
    other.bos = options.bos;
    other.task.num_fewshot = Some(1);
    assert!(refused(&other).contains("other prompts"), "{}", refused(&other));
    fs::write(options.journal.as_ref().unwrap(), "a novel\n").unwrap();
    assert!(refused(&other).contains("line 1: expected a line of a journal"), "{}", refused(&other));
}

#[test]
fn rows_may_lie_in_many_places() {
    let data = fixtures().join("data");
    let dir = tempfile::tempdir().unwrap();
    let rows = fs::read(data.join("piqa/validation.jsonl")).unwrap();
    let expected = documents("piqa", &data, 0).unwrap();
    for place in [
        "piqa/validation.jsonl",
        "piqa/data/validation-00000-of-00001.jsonl",
        "piqa/validation/0000.jsonl",
        "baber/piqa/validation.jsonl",
        "piqa_val.jsonl",
        "piqa-validation.jsonl",
        "piqa.valid.jsonl",
        "piqa.jsonl",
        "piqa/rows.jsonl",
    ] {
        let root = dir.path().join(place.replace('/', "+"));
        let file = root.join(place);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(&file, &rows).unwrap();
        assert_eq!(documents("piqa", &root, 0).unwrap(), expected, "{place}");
        assert_eq!(documents("piqa", &file, 0).unwrap(), expected, "{place}, by its name");
    }
    // One file for all splits: no row is an example of its own.
    let root = dir.path().join("piqa.jsonl");
    for document in documents("piqa", &root, 5).unwrap() {
        let (context, _) = &document.arguments[0];
        let own = context.rsplit("\n\n").next().unwrap();
        assert_eq!(context.matches(own).count(), 1, "{context}");
    }
}

#[cfg(feature = "parquet")]
#[test]
fn parquet_gives_what_json_gives() {
    let data = fixtures().join("data");
    let dir = tempfile::tempdir().unwrap();
    let mut compared = 0;
    for task in ["arc_easy", "piqa", "hellaswag", "boolq", "lambada_openai"] {
        let folder = data.join(task);
        let all = fs::read_dir(&folder).unwrap().flatten().map(|entry| entry.path());
        for file in all.filter(|file| file.extension().is_some_and(|e| e == "parquet")) {
            let root = dir.path().join(task);
            fs::create_dir_all(root.join(task)).unwrap();
            fs::copy(&file, root.join(task).join(file.file_name().unwrap())).unwrap();
            let stem = file.file_stem().unwrap().to_str().unwrap();
            let json = dir.path().join(format!("{task}-json"));
            fs::create_dir_all(json.join(task)).unwrap();
            fs::copy(file.with_extension("jsonl"), json.join(task).join(format!("{stem}.jsonl"))).unwrap();
            assert_eq!(
                documents(task, &root, 0).unwrap(),
                documents(task, &json, 0).unwrap(),
                "{}",
                file.display()
            );
            compared += 1;
        }
    }
    assert!(compared >= 2, "{compared}");
}

fn documents(task: &str, root: &Path, shots: usize) -> opt_core::Result<Vec<opt_eval::Document>> {
    let mut options = TaskOptions::default();
    options.num_fewshot = Some(shots);
    Task::load(Tasks::builtin().get(task).unwrap().clone(), root, &options)?.documents()
}

#[test]
fn mmlu_is_read_as_it_was_published_too() {
    let data = fixtures().join("data");
    let by_folder = documents("mmlu_anatomy", &data, 3).unwrap();
    let dir = tempfile::tempdir().unwrap();
    for split in ["dev", "test"] {
        let file = format!("mmlu/{split}/anatomy_{split}.csv");
        fs::create_dir_all(dir.path().join("mmlu").join(split)).unwrap();
        fs::copy(data.join(&file), dir.path().join(&file)).unwrap();
    }
    assert_eq!(documents("mmlu_anatomy", dir.path(), 3).unwrap(), by_folder);
}

#[test]
fn rows_that_cannot_be_used_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let good = r#"{"goal": "To open a jar", "sol1": "turn the lid", "sol2": "sing", "label": 0}"#;
    let cases = [
        ("piqa", "jsonl", format!("{good}\nno json"), "piqa.jsonl, line 2: expected a JSON object"),
        ("piqa", "jsonl", format!("{good}\n[1]"), "line 2: expected a JSON object, found a list"),
        (
            "piqa",
            "jsonl",
            format!("{good}\n\n{{\"goal\": \"x\", \"sol1\": \"a\", \"label\": 0}}"),
            "line 3: expected the column sol2, found goal, label, sol1",
        ),
        ("piqa", "jsonl", good.replace(": 0", ": 2"), "gold: expected a label of 0 to 1"),
        ("piqa", "jsonl", good.replace(": 0", ": -1"), "found -1"),
        ("piqa", "jsonl", good.replace(": 0", ": null"), "gold: expected a label"),
        ("piqa", "jsonl", String::new(), "expected rows, found none"),
        ("piqa", "json", "{}".to_owned(), "expected the column goal, sol1, sol2, label"),
        (
            "arc_easy",
            "jsonl",
            r#"{"query": "Why?", "choices": [], "gold": 0}"#.to_owned(),
            "choices: expected at least one, found none",
        ),
        (
            "arc_easy",
            "jsonl",
            r#"{"question": "Why?", "choices": {"text": ["a"], "label": ["A"]}, "answerKey": "C"}"#
                .to_owned(),
            "is not one of",
        ),
        ("mmlu_anatomy", "csv", "Why?,a,b,c,d,E\n".to_owned(), "is not one of"),
        ("mmlu_anatomy", "csv", "Why?,a,b,c,d,A\nWho?,a,b,c\n".to_owned(), "row 2: expected 6 columns"),
        (
            "winogrande",
            "jsonl",
            r#"{"sentence": "no blank", "option1": "a", "option2": "b", "answer": "1"}"#.to_owned(),
            "before",
        ),
    ];
    for (task, ending, text, expected) in cases {
        let root = dir.path().join("case");
        let _ = fs::remove_dir_all(&root);
        fs::create_dir_all(&root).unwrap();
        fs::write(root.join(format!("{task}.{ending}")), &text).unwrap();
        let error = documents(task, &root, 0).unwrap_err().to_string();
        assert!(error.contains(expected), "{text}: {error}");
        assert!(error.contains(task) && !error.contains('\n'), "{error}");
    }
    let error = documents("piqa", Path::new("/nowhere"), 0).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    fs::write(dir.path().join("piqa.jsonl"), b"\xff\xfe").unwrap();
    let error = documents("piqa", dir.path(), 0).unwrap_err().to_string();
    assert!(error.contains("byte 0: expected UTF-8"), "{error}");
    fs::write(dir.path().join("piqa.jsonl"), good).unwrap();
    let error = documents("piqa", dir.path(), 1).unwrap_err().to_string();
    assert!(error.contains("expected 1 examples, found 1 rows"), "{error}");
}

#[test]
fn examples_that_a_task_gives_are_all_used() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("sums.jsonl"), "{\"q\": \"1 + 1 =\", \"a\": \"2\"}\n").unwrap();
    let mut tasks = Tasks::builtin();
    tasks
        .add(
            r#"
            [[task]]
            name = "sums"
            kind = "loglikelihood"
            text = "{{q}}"
            target = "{{a}}"
            metrics = ["acc"]
            fewshot = { samples = [{ q = "2 + 2 =", a = "4" }, { q = "3 + 3 =", a = "6" }], sampler = "first_n" }
            "#,
        )
        .unwrap();
    let mut options = TaskOptions::default();
    options.num_fewshot = Some(2);
    let task = Task::load(tasks.get("sums").unwrap().clone(), dir.path(), &options).unwrap();
    let expected = "2 + 2 = 4\n\n3 + 3 = 6\n\n1 + 1 =".to_owned();
    assert_eq!(task.documents().unwrap()[0].arguments, [(expected, "2".to_owned())]);
}

#[test]
fn rows_that_cannot_be_examples_are_named() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir_all(dir.path().join("piqa")).unwrap();
    let good = r#"{"goal": "To open a jar", "sol1": "turn the lid", "sol2": "sing", "label": 0}"#;
    fs::write(dir.path().join("piqa/validation.jsonl"), good).unwrap();
    fs::write(dir.path().join("piqa/train.jsonl"), format!("{good}\n{{\"goal\": \"x\"}}\n")).unwrap();
    let error = documents("piqa", dir.path(), 1).unwrap_err().to_string();
    assert!(error.contains("train.jsonl, line 2: expected the column sol1"), "{error}");
}

#[test]
fn prompts_that_are_too_long_lose_their_beginning_and_are_counted() {
    let dir = tempfile::tempdir().unwrap();
    let long = "the sea was grey and ".repeat(200);
    let row = serde_json::json!({ "goal": long, "sol1": "one", "sol2": "two", "label": 1 });
    let short = serde_json::json!({ "goal": "short", "sol1": "one", "sol2": "two", "label": 1 });
    fs::write(dir.path().join("piqa.jsonl"), format!("{row}\n{short}\n")).unwrap();
    let found = run(&["piqa"], dir.path(), &EvalOptions::default()).unwrap();
    assert_eq!(found.report.opt_eval.as_ref().unwrap().truncated["piqa"], 2);
}

#[test]
fn texts_are_measured_by_every_metric() {
    let dir = tempfile::tempdir().unwrap();
    let rows: String = (0..6)
        .map(|i| {
            format!("{}\n", serde_json::json!({ "prompt": format!("The sea {i}"), "reference": "was grey" }))
        })
        .collect();
    fs::write(dir.path().join("sea.jsonl"), rows).unwrap();
    let mut tasks = Tasks::builtin();
    tasks
        .add(
            r#"
            [[task]]
            name = "sea"
            kind = "generate_until"
            text = "{{prompt}}"
            target = "{{reference}}"
            metrics = ["exact_match", "bleu", "chrf", "chrf++", "ter", "rouge1", "rouge2", "rougeL", "rougeLsum",
                "token_f1", "distinct_1", "distinct_2", "repetition"]
            generation = { max_gen_toks = 6 }
            filters = [
                { name = "plain", steps = [] },
                { name = "constant", steps = [{ function = "regex", pattern = "no such text", fallback = "was grey" }] },
            ]
            "#,
        )
        .unwrap();
    let mut options = EvalOptions::default();
    options.bootstrap_iters = 100;
    options.keep_samples = true;
    let found =
        evaluate(opt("opt-novels"), &tasks.select(&["sea"]).unwrap(), dir.path(), &options, &mut go).unwrap();
    let score = |metric: &str, filter: &str| found.report.score("sea", metric, filter).unwrap();
    for (metric, expected) in [
        ("exact_match", 1.0),
        ("chrf", 100.0),
        ("ter", 0.0),
        ("rouge1", 1.0),
        ("rougeLsum", 1.0),
        ("token_f1", 1.0),
        ("repetition", 0.0),
    ] {
        assert!(
            (score(metric, "constant").value - expected).abs() < 1e-9,
            "{metric}: {}",
            score(metric, "constant").value
        );
    }
    // Six times the same two words.
    assert!((score("distinct_1", "constant").value - 2.0 / 12.0).abs() < 1e-12);
    assert!(score("exact_match", "plain").value < 1.0);
    assert!(score("bleu", "plain").stderr.is_some());
    assert_eq!(found.samples["sea"].len(), 12);
}
