//! Training for search: losses, vectors and gradients against torch's autograd, and passages that are found better.

mod common;

use common::{backend, fixtures};
use ndarray::{Array2, ArrayView2};
use opt_core::{
    ErrorKind,
    tokenizer::Tokenizer,
    tuning::{
        ContrastOptions, Event, Example, Goal, Method, StepOptions, TrainOptions, Trainer, Tuner,
        data::{DataOptions, Dataset, Reads},
        recall,
    },
};
use serde::Deserialize;
use std::{fs, ops::ControlFlow};

#[derive(Deserialize)]
struct Pair {
    query: Vec<u32>,
    passage: Vec<u32>,
}

#[derive(Deserialize)]
struct Meta {
    base: String,
    options: ContrastOptions,
    batch: Vec<Pair>,
    loss: f32,
    queries: Vec<Vec<f32>>,
}

fn assert_near(found: ArrayView2<'_, f32>, expected: ArrayView2<'_, f32>, what: &str) {
    assert_eq!(found.dim(), expected.dim(), "{what}");
    let largest = expected.iter().fold(0.0_f32, |m, v| m.max(v.abs()));
    let off = found.iter().zip(expected.iter()).map(|(f, e)| (f - e).abs()).fold(0.0, f32::max);
    assert!(off <= 5e-5 * largest + 1e-6, "{what}: off by {off} where the largest is {largest}");
}

#[test]
fn losses_vectors_and_gradients_are_torch_s() {
    for case in ["mean", "weighted", "last"] {
        let name = format!("{case} on {}", backend::name());
        let dir = fixtures().join("pairs").join(case);
        let meta: Meta = serde_json::from_slice(&fs::read(dir.join("meta.json")).unwrap()).unwrap();
        let model = fixtures().join("models").join(&meta.base);
        let tuner = Tuner::load(model, Method::full(), backend::load()).unwrap();
        let mut tuner = tuner.contrast(meta.options).unwrap();
        let pair = |pair: &Pair| Example::with(pair.query.clone(), Goal::Passage(pair.passage.clone()));
        let batch: Vec<Example> = meta.batch.iter().map(pair).collect();
        let queries: Vec<&[u32]> = meta.batch.iter().map(|pair| &pair.query[..]).collect();
        let width = meta.queries[0].len();
        let expected = Array2::from_shape_vec((queries.len(), width), meta.queries.concat()).unwrap();
        let found = tuner.embed(&queries, meta.options.pooling).unwrap();
        assert_near(found.view(), expected.view(), &name);
        let (loss, found) = tuner.gradients(&batch, StepOptions::default()).unwrap();
        assert!((loss - meta.loss).abs() < 2e-5 * meta.loss.max(1.0), "{name}: {loss} for {}", meta.loss);
        let evaluated = tuner.loss(&batch).unwrap() as f32;
        assert!((evaluated - meta.loss).abs() < 2e-5 * meta.loss.max(1.0), "{name}: {evaluated}");
        let bytes = fs::read(dir.join("gradients.safetensors")).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        for (tensor, expected) in file.tensors() {
            let found = found.get(&tensor).unwrap_or_else(|| panic!("{name}: no gradient of {tensor}"));
            let values = expected.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()));
            let expected = Array2::from_shape_vec(found.dim(), values.collect()).unwrap();
            assert_near(found.view(), expected.view(), &format!("{name}: {tensor}"));
        }
    }
}

/// Questions and sentences that have no word in common but belong together.
#[test]
fn what_belongs_together_is_found_after_training() {
    let pairs = [
        ("where ships lie", "The harbour was full of masts."),
        ("what is baked at dawn", "A loaf stood on the table."),
        ("who rules the land", "The king sat upon his throne."),
        ("how a horse is steered", "She took the reins in her hands."),
    ];
    let dir = tempfile::tempdir().unwrap();
    let line = |(query, passage): (&str, &str)| {
        serde_json::json!({ "query": query, "passage": passage }).to_string()
    };
    let file = dir.path().join("pairs.jsonl");
    fs::write(&file, pairs.map(line).join("\n")).unwrap();
    let tuner = Tuner::load("../models/opt-novels", Method::full(), backend::load()).unwrap();
    let tokenizer = Tokenizer::from_dir("../models/opt-novels").unwrap();
    let options = DataOptions::new(tuner.config(), Some(tokenizer)).reads(Reads::Pairs);
    let data = Dataset::open(&file, &options).unwrap();
    let tuner = tuner.contrast(ContrastOptions::default()).unwrap();
    let train = TrainOptions::default().lr(5e-4).batch_size(4).max_steps(5).eval_steps(5).save_limit(1);
    let mut found = Vec::new();
    let report = Trainer::new(tuner, data.clone(), train)
        .eval(data.clone())
        .callback(|event| {
            if let Event::Evaluated { step, recall, .. } = event {
                found.push((*step, recall.unwrap()));
            }
            ControlFlow::Continue(())
        })
        .run(dir.path().join("out"))
        .unwrap();
    let [(0, before), (5, after)] = found[..] else { panic!("{found:?}") };
    assert!(before.at_1 < after.at_1 && after.at_1 == 1.0, "{before:?}, {after:?}");
    assert_eq!(report.log.iter().filter(|line| line.get("eval_recall_at_1").is_some()).count(), 2);
    // What was saved is what was measured.
    let tuner = Tuner::load(dir.path().join("out"), Method::full(), backend::load()).unwrap();
    let mut tuner = tuner.contrast(ContrastOptions::default()).unwrap();
    assert_eq!(tuner.recall(&data, 4).unwrap(), after);
}

#[test]
fn pairs_that_cannot_be_learned() {
    let load = || Tuner::load(fixtures().join("models/pre_ln"), Method::full(), backend::load()).unwrap();
    let fails = |example: Example, expected: &str| {
        let error = load().contrast(ContrastOptions::default()).unwrap().loss(&[example]).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
    };
    fails(Example::new(vec![2, 5]), "found no passage");
    fails(Example::with(vec![2, 5], Goal::Passage(vec![])), "found nothing for one of them");
    fails(Example::with(vec![2, 5], Goal::Passage(vec![2, 9999])), "9999");
    let cold = ContrastOptions::default().temperature(0.0);
    assert_eq!(load().contrast(cold).err().unwrap().kind(), ErrorKind::Option);
    let options = DataOptions::new(load().config(), None).reads(Reads::Pairs);
    let pairs = Dataset::new([Example::with(vec![2, 5], Goal::Passage(vec![2, 6]))], &options).unwrap();
    assert!(load().recall(&pairs, 1).unwrap_err().to_string().contains("trained for search"));
    assert!(Dataset::new([Example::new(vec![2, 5])], &options).is_err());
    let none = Array2::<f32>::zeros((0, 4));
    assert_eq!(recall(none.view(), none.view(), 1), 0.0);
}
