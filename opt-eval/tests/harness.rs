//! Prompts, log-likelihoods, metrics and standard errors are those of lm-evaluation-harness 0.4.13, which made the
//! fixtures (`fixtures/make_harness.py`).

mod common;

use common::{data, fixtures, go, opt};
use opt_core::tokenizer::Bos;
use opt_eval::{EvalOptions, Evaluation, Tasks, evaluate, samples::Sample};
use serde::Deserialize;
use serde_json::{Map, Value};
use std::{collections::BTreeMap, fs, path::Path};

/// One run of the harness.
#[derive(Deserialize)]
struct Run {
    task: String,
    model: String,
    data: String,
    num_fewshot: usize,
    bos: bool,
    limit: Option<usize>,
    bootstrap_iters: usize,
    #[serde(default)]
    gen_kwargs: Option<Map<String, Value>>,
    results: BTreeMap<String, Map<String, Value>>,
    #[serde(default)]
    groups: Option<BTreeMap<String, Map<String, Value>>>,
    #[serde(default)]
    samples: Option<Samples>,
    /// By how much each choice that was taken was better than the next, least over all rows.
    #[serde(default)]
    margins: Option<BTreeMap<String, f64>>,
    #[serde(default)]
    file: Option<String>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Samples {
    One(Vec<Row>),
    Each(BTreeMap<String, Vec<Row>>),
}

#[derive(Deserialize)]
struct Row {
    doc_id: u64,
    #[serde(default)]
    context: Option<String>,
    #[serde(default)]
    continuations: Option<Vec<String>>,
    #[serde(default)]
    arguments: Option<Vec<Vec<Value>>>,
    #[serde(default)]
    text: Option<String>,
    #[serde(default)]
    digests: Option<Vec<u32>>,
    #[serde(default)]
    resps: Option<Value>,
}

impl Run {
    fn title(&self) -> String {
        format!(
            "{} on {} with {}, {} shots, bos {}, limit {:?}",
            self.task, self.data, self.model, self.num_fewshot, self.bos, self.limit
        )
    }

    fn samples_of(&self, task: &str) -> &[Row] {
        match &self.samples {
            Some(Samples::One(rows)) => rows,
            Some(Samples::Each(each)) => each.get(task).map_or(&[], Vec::as_slice),
            None => &[],
        }
    }
}

fn run(run: &Run, root: &Path) -> Evaluation {
    let mut options = EvalOptions::default();
    options.task.num_fewshot = Some(run.num_fewshot);
    options.task.limit = run.limit;
    options.bos = if run.bos { Bos::Model } else { Bos::Never };
    options.bootstrap_iters = run.bootstrap_iters;
    options.keep_samples = true;
    options.max_gen_toks =
        run.gen_kwargs.as_ref().and_then(|all| all.get("max_gen_toks")?.as_u64()).map(|most| most as usize);
    let mut selection = Tasks::builtin().select(&[&run.task]).unwrap();
    // Of mmlu only some subjects have rows.
    selection.tasks.retain(|task| run.results.contains_key(&task.name));
    for group in &mut selection.groups {
        group.tasks.retain(|task| run.results.contains_key(task));
    }
    evaluate(opt(&run.model), &selection, root, &options, &mut go)
        .unwrap_or_else(|e| panic!("{}: {e}", run.title()))
}

/// Arguments of a sample, as context and continuation.
fn arguments(sample: &Sample) -> Vec<Vec<String>> {
    let each = |value: &Value| {
        let parts = value.as_object().unwrap().values();
        parts.filter_map(|part| part.as_str().map(str::to_owned)).collect()
    };
    (0..sample.arguments.len()).map(|i| each(&sample.arguments[&format!("gen_args_{i}")])).collect()
}

fn numbers(value: &Value) -> Vec<f64> {
    match value {
        Value::Array(items) => items.iter().flat_map(numbers).collect(),
        Value::Bool(is) => vec![f64::from(u8::from(*is))],
        Value::String(text) => match &text[..] {
            "True" => vec![1.0],
            "False" => vec![0.0],
            text => text.parse().into_iter().collect(),
        },
        other => other.as_f64().into_iter().collect(),
    }
}

fn compare_samples(run: &Run, task: &str, ours: &[Sample]) -> usize {
    let mut compared = 0;
    for row in run.samples_of(task) {
        let title = format!("{}: {task} row {}", run.title(), row.doc_id);
        let sample =
            ours.iter().find(|sample| sample.doc_id == row.doc_id).unwrap_or_else(|| panic!("{title}"));
        let found = arguments(sample);
        if let (Some(context), Some(continuations)) = (&row.context, &row.continuations) {
            let expected: Vec<Vec<String>> =
                continuations.iter().map(|after| vec![context.clone(), after.clone()]).collect();
            assert_eq!(found, expected, "{title}");
        } else if let Some(context) = &row.context {
            assert_eq!(found[0][0], *context, "{title}");
        }
        if let Some(text) = &row.text {
            assert_eq!(found, [[text.clone()]], "{title}");
        }
        if let Some(expected) = &row.arguments {
            let expected: Vec<Vec<String>> = expected
                .iter()
                .map(|one| one.iter().map(|part| part.as_str().unwrap().to_owned()).collect())
                .collect();
            assert_eq!(found, expected, "{title}");
        }
        if let Some(digests) = &row.digests {
            let found: Vec<u32> =
                found.iter().map(|one| crc32fast::hash(one.join("\0").as_bytes())).collect();
            assert_eq!(&found, digests, "{title}: {:?}", arguments(sample));
        }
        if let Some(resps) = &row.resps {
            if let Some(text) = resps.as_str().or_else(|| resps.get(0).and_then(Value::as_str)) {
                assert_eq!(sample.resps[0][0].as_str(), Some(text), "{title}");
            } else {
                let (found, expected) = (numbers(&sample.resps), numbers(resps));
                assert_eq!(found.len(), expected.len(), "{title}");
                for (found, expected) in found.iter().zip(&expected) {
                    // Sums of many log-probabilities in f32, theirs added up in f32 as well.
                    let near = (found - expected).abs() <= 1e-4 + 2e-6 * expected.abs();
                    assert!(near, "{title}: {found} and {expected}");
                }
            }
        }
        compared += 1;
    }
    compared
}

fn compare_scores(run: &Run, ours: &Evaluation, expected: &BTreeMap<String, Map<String, Value>>) -> usize {
    let mut compared = 0;
    for (task, scores) in expected {
        for (key, expected) in scores {
            let Some((metric, filter)) = key.split_once(',') else { continue };
            let (metric, stderr) = match metric.strip_suffix("_stderr") {
                Some(metric) => (metric, true),
                None => (metric, false),
            };
            // A choice that rounding could turn round.
            if run.margins.as_ref().and_then(|all| all.get(metric)).is_some_and(|margin| *margin < 1e-5) {
                continue;
            }
            let title = format!("{}: {task} {key}", run.title());
            let score = ours.report.score(task, metric, filter).unwrap_or_else(|| panic!("{title}"));
            let found = if stderr { score.stderr } else { Some(score.value) };
            match (found, expected.as_f64()) {
                (Some(found), Some(expected)) => {
                    // Accuracies are equal to the digit; perplexities follow the log-likelihoods.
                    let tolerance =
                        if metric.starts_with("acc") || metric == "exact_match" { 1e-12 } else { 1e-4 };
                    let near = (found - expected).abs() <= tolerance * expected.abs().max(1.0);
                    assert!(near, "{title}: {found} and {expected}");
                }
                (None, None) => {}
                (found, _) => panic!("{title}: {found:?} and {expected}"),
            }
            compared += 1;
        }
    }
    compared
}

fn check(file: &str, kinds: &[&str]) {
    let runs: Vec<Run> =
        serde_json::from_slice(&fs::read(fixtures().join("expected").join(file)).unwrap()).unwrap();
    let (mut rows, mut scores) = (0, 0);
    let shared = common::laid_out();
    let wanted =
        |run: &&Run| kinds.contains(&&run.data[..]) && (!common::other_backend() || run.model == "tiny");
    for one in runs.iter().filter(wanted) {
        let root = match (&one.data[..], &shared) {
            ("invented", _) => fixtures().join("data"),
            (_, Some(shared)) => shared.path().join(if one.file.is_some() { "unk" } else { "all" }),
            (_, None) => continue,
        };
        let ours = run(one, &root);
        for (task, samples) in &ours.samples {
            rows += compare_samples(one, task, samples);
        }
        scores += compare_scores(one, &ours, &one.results);
        if let Some(groups) = &one.groups {
            scores += compare_scores(one, &ours, groups);
        }
    }
    if kinds == ["shared"] && shared.is_none() {
        println!("skipped: {file} needs the test data (OPT_TEST_DATA)");
        return;
    }
    assert!(scores > 0, "{file}");
    println!("{file}: {rows} rows, {scores} scores");
}

macro_rules! tasks {
    ($($name:ident),* $(,)?) => {
        $(
            #[test]
            fn $name() {
                check(concat!(stringify!($name), ".json"), &["invented"]);
            }
        )*
        mod on_test_data {
            #[test]
            fn all() {
                // Other backends are held to it on the rows of the repository, with the small model.
                if super::data().is_none() || super::common::other_backend() {
                    println!("skipped: the harness' tasks on the test data (OPT_TEST_DATA; on the CPU)");
                    return;
                }
                for file in ["arc_easy", "piqa", "hellaswag", "lambada_openai", "wikitext", "wikitext_unk", "mmlu"] {
                    super::check(&format!("shared_{file}.json"), &["shared"]);
                }
            }
        }
    };
}

tasks!(
    arc_challenge,
    arc_easy,
    arithmetic,
    boolq,
    copa,
    hellaswag,
    lambada_openai,
    logiqa,
    mmlu,
    openbookqa,
    piqa,
    sciq,
    unscramble,
    wikitext,
    winogrande,
    wsc,
);
