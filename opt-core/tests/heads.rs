//! Heads against transformers' classes and PEFT's adapters beside them: outputs, losses, every gradient, ten steps of
//! AdamW; and the way through files, in which what was trained is found again.

mod common;

use common::{backend, fixtures};
use ndarray::{Array2, ArrayView2};
use opt_core::{
    ErrorKind,
    adapter::{Adapter, LoraConfig, PromptConfig},
    checkpoint::Checkpoint,
    heads::{AnswerOptions, Head, QuestionAnswerer, SequenceClassifier, Task},
    tokenizer::Tokenizer,
    tuning::{
        Example, Goal, Method, StepOptions, TrainOptions, Trainer, Tuner,
        data::{DataOptions, Dataset, Reads, classes},
    },
};
use serde::Deserialize;
use serde_json::Value;
use std::{fs, path::PathBuf};

#[derive(Deserialize)]
struct Recorded {
    ids: Vec<u32>,
    goal: Value,
}

#[derive(Deserialize)]
struct Meta {
    kind: String,
    trained: usize,
    batch: Vec<Recorded>,
    loss: f32,
    /// Of one row for classes, of one a token for answers.
    logits: Vec<Value>,
    steps: Vec<Vec<Recorded>>,
    losses: Vec<f32>,
}

struct Case {
    name: &'static str,
    /// The model below an adapter.
    base: Option<&'static str>,
    dir: PathBuf,
    meta: Meta,
}

const CASES: [(&str, Option<&str>); 8] = [
    ("one_of", None),
    ("any_of", None),
    ("number", None),
    ("numbers", None),
    ("answer", None),
    ("lora_one_of", Some("pre_ln")),
    ("lora_number", Some("proj_pre")),
    ("lora_answer", Some("post_ln")),
];

fn cases() -> impl Iterator<Item = Case> {
    CASES.into_iter().map(|(name, base)| {
        let dir = fixtures().join("heads").join(name);
        let meta = serde_json::from_slice(&fs::read(dir.join("meta.json")).unwrap()).unwrap();
        Case { name, base, dir, meta }
    })
}

fn numbers(value: &Value) -> Vec<f32> {
    value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect()
}

impl Case {
    fn examples(&self, recorded: &[Recorded]) -> Vec<Example> {
        let goal = |value: &Value| match &self.meta.kind[..] {
            "one_of" => Goal::Class(value.as_u64().unwrap() as u32),
            "answer" => Goal::Answer([0, 1].map(|i| value[i].as_u64().unwrap() as usize)),
            _ => Goal::Numbers(numbers(value)),
        };
        recorded.iter().map(|r| Example::with(r.ids.clone(), goal(&r.goal))).collect()
    }

    fn model(&self) -> PathBuf {
        self.base.map_or_else(|| self.dir.clone(), |base| fixtures().join("models").join(base))
    }

    fn head(&self) -> Head {
        let model = Checkpoint::open(self.model()).unwrap();
        match self.base {
            None => Head::of(&model).unwrap().unwrap(),
            Some(_) => Head::beside(&Adapter::open(&self.dir).unwrap(), &self.dir, &model).unwrap(),
        }
    }

    fn tuner(&self) -> Tuner {
        let method = match self.base {
            None => Method::full(),
            Some(_) => Method::further(Adapter::open(&self.dir).unwrap()),
        };
        Tuner::load(self.model(), method, backend::load()).unwrap().head(self.head()).unwrap()
    }
}

fn assert_near(found: ArrayView2<'_, f32>, expected: ArrayView2<'_, f32>, what: &str) {
    assert_eq!(found.dim(), expected.dim(), "{what}");
    let largest = expected.iter().fold(0.0_f32, |m, v| m.max(v.abs()));
    let off = found.iter().zip(expected.iter()).map(|(f, e)| (f - e).abs()).fold(0.0, f32::max);
    assert!(off <= 2e-5 * largest + 1e-6, "{what}: off by {off} where the largest is {largest}");
}

fn matrix(rows: &[Vec<f32>]) -> Array2<f32> {
    Array2::from_shape_vec((rows.len(), rows[0].len()), rows.concat()).unwrap()
}

#[test]
fn what_a_config_says() {
    let tasks: Vec<(&str, Task)> = cases().map(|case| (case.name, case.head().task().clone())).collect();
    let of = |name: &str| tasks.iter().find(|(known, _)| *known == name).unwrap().1.clone();
    assert_eq!(of("one_of"), Task::one_of(["sea", "land", "sky"]).unwrap());
    assert_eq!(of("any_of"), Task::any_of((0..4).map(|i| format!("LABEL_{i}"))).unwrap());
    assert_eq!(of("number"), Task::numbers(["LABEL_0"]).unwrap());
    assert_eq!(of("numbers"), Task::numbers(["LABEL_0", "LABEL_1"]).unwrap());
    // PEFT says nothing of classes: their number is that of the head's rows.
    assert_eq!(of("lora_one_of"), Task::one_of((0..3).map(|i| format!("LABEL_{i}"))).unwrap());
    assert_eq!(of("lora_number"), Task::numbers(["LABEL_0"]).unwrap());
    assert_eq!([of("answer"), of("lora_answer")], [Task::Answer, Task::Answer]);
}

#[test]
fn outputs_are_transformers_own() {
    for case in cases() {
        let name = format!("{} on {}", case.name, backend::name());
        let ids: Vec<&[u32]> = case.meta.batch.iter().map(|r| &r.ids[..]).collect();
        if case.meta.kind == "answer" {
            let model = match case.base {
                None => QuestionAnswerer::load(case.model(), backend::load()),
                Some(_) => QuestionAnswerer::adapted(case.model(), &case.dir, backend::load()),
            };
            let found = model.unwrap().logits(&ids).unwrap();
            for (found, expected) in found.iter().zip(&case.meta.logits) {
                let expected: Vec<Vec<f32>> = expected.as_array().unwrap().iter().map(numbers).collect();
                assert_near(found.view(), matrix(&expected).view(), &name);
            }
            continue;
        }
        let model = match case.base {
            None => SequenceClassifier::load(case.model(), backend::load()),
            Some(_) => SequenceClassifier::adapted(case.model(), &case.dir, backend::load()),
        };
        let model = model.unwrap();
        let expected = matrix(&case.meta.logits.iter().map(numbers).collect::<Vec<_>>());
        assert_near(model.logits(&ids).unwrap().view(), expected.view(), &name);
        // Padding behind a sequence makes no difference, nor does it alone.
        let padded = [ids[0], &[1, 1]].concat();
        let found = model.logits(&[&padded]).unwrap();
        assert_near(found.view(), expected.slice(ndarray::s![..1, ..]), &name);
    }
}

#[test]
fn losses_and_gradients_are_torch_s() {
    for case in cases() {
        let name = format!("{} on {}", case.name, backend::name());
        let mut tuner = case.tuner();
        assert_eq!(tuner.trainable(), case.meta.trained, "{name}");
        let batch = case.examples(&case.meta.batch);
        let (loss, found) = tuner.gradients(&batch, StepOptions::default()).unwrap();
        assert!((loss - case.meta.loss).abs() < 2e-5 * case.meta.loss.max(1.0), "{name}: {loss}");
        let evaluated = tuner.loss(&batch).unwrap() as f32;
        assert!((evaluated - case.meta.loss).abs() < 2e-5 * case.meta.loss.max(1.0), "{name}: {evaluated}");
        let bytes = fs::read(case.dir.join("gradients.safetensors")).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        for (tensor, expected) in file.tensors() {
            let found = found.get(&tensor).unwrap_or_else(|| panic!("{name}: no gradient of {tensor}"));
            let values = expected.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()));
            let expected = Array2::from_shape_vec(found.dim(), values.collect()).unwrap();
            assert_near(found.view(), expected.view(), &format!("{name}: {tensor}"));
        }
        let unexpected: Vec<&String> = found.keys().filter(|name| file.tensor(name).is_err()).collect();
        assert!(unexpected.is_empty(), "{name}: gradients of {unexpected:?}");
    }
}

#[test]
fn ten_steps_are_torch_s_in_one_piece_and_in_two() {
    for case in cases() {
        let name = format!("{} on {}", case.name, backend::name());
        for pieces in [4, 2] {
            let mut tuner = case.tuner();
            for (step, (recorded, expected)) in (1..).zip(case.meta.steps.iter().zip(&case.meta.losses)) {
                let examples = case.examples(recorded);
                let micros: Vec<&[Example]> = examples.chunks(pieces).collect();
                let mut options = StepOptions::default();
                (options.lr, options.weight_decay, options.step) = (2e-3, 0.1, step);
                let found = tuner.step(&micros, options).unwrap().loss;
                assert!((found - expected).abs() < 1e-4 * expected.max(1.0), "{name}, step {step}: {found}");
            }
        }
    }
}

#[test]
fn what_was_trained_is_found_again() {
    for case in cases() {
        let mut tuner = case.tuner();
        let examples = case.examples(&case.meta.steps[0]);
        let mut options = StepOptions::default();
        options.lr = 1e-2;
        tuner.step(&[&examples], options).unwrap();
        let expected = tuner.loss(&examples).unwrap();
        let dir = tempfile::tempdir().unwrap();
        tuner.save(dir.path()).unwrap();
        let saved = Case { dir: dir.path().to_owned(), ..case };
        let found = saved.tuner().loss(&examples).unwrap();
        assert!((found - expected).abs() < 1e-6 * expected.max(1.0), "{}: {found}, {expected}", saved.name);
        if saved.base.is_none() {
            let config = fs::read_to_string(dir.path().join("config.json")).unwrap();
            let config: Value = serde_json::from_str(&config).unwrap();
            let class =
                if saved.meta.kind == "answer" { "QuestionAnswering" } else { "SequenceClassification" };
            assert_eq!(config["architectures"][0], format!("OPTFor{class}"));
        } else {
            let config = fs::read_to_string(dir.path().join("adapter_config.json")).unwrap();
            let config: Value = serde_json::from_str(&config).unwrap();
            let [theirs, ours] = [&saved.dir.join("adapter_config.json"), &saved.model()].map(|p| p.exists());
            assert!(theirs && ours);
            let expected = if saved.meta.kind == "answer" { "QUESTION_ANS" } else { "SEQ_CLS" };
            assert_eq!(config["task_type"], expected);
            assert!(dir.path().join("head_config.json").is_file());
        }
    }
}

#[test]
fn a_head_takes_the_place_of_another() {
    let base = fixtures().join("heads/one_of");
    for task in [Task::one_of(["a", "b"]).unwrap(), Task::Answer] {
        let tuner = Tuner::load(&base, Method::full(), backend::load()).unwrap();
        let head = Head::new(task.clone(), tuner.config(), 1);
        let tuner = tuner.head(head.clone()).unwrap();
        let dir = tempfile::tempdir().unwrap();
        tuner.save(dir.path()).unwrap();
        let saved = Checkpoint::open(dir.path()).unwrap();
        assert_eq!(Head::of(&saved).unwrap(), Some(head));
        let heads =
            saved.tensors().filter(|t| t.name.starts_with("score") || t.name.starts_with("qa_outputs"));
        assert_eq!(heads.count(), if task == Task::Answer { 2 } else { 1 });
    }
}

/// A model of a few sentences that learns to tell them apart: from JSONL to names of classes, with a stop on the way.
#[test]
fn a_classifier_from_data_to_use() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data.jsonl");
    let lines = [
        ("the ship sailed over the sea", "sea"),
        ("a wave and a sail", "sea"),
        ("the sailor at the ship", "sea"),
        ("the horse ran along the road", "land"),
        ("a hill and a house", "land"),
        ("the farmer on his horse", "land"),
    ];
    let line = |(text, label): &(&str, &str)| serde_json::json!({ "text": text, "label": label }).to_string();
    fs::write(&data, lines.iter().map(line).collect::<Vec<_>>().join("\n")).unwrap();
    let task = Task::one_of(classes(&[&data]).unwrap()).unwrap();
    assert_eq!(task.labels(), ["land", "sea"]);
    let model = opt_core::checkpoint::Checkpoint::open("../models/opt-novels").unwrap();
    let tokenizer = Tokenizer::from_dir("../models/opt-novels").unwrap();
    let reads = DataOptions::new(model.config(), Some(tokenizer)).reads(Reads::Head(task.clone()));
    let data = Dataset::open(&data, &reads).unwrap();
    let run = |output: &str, steps, resume| {
        let tuner =
            Tuner::load("../models/opt-novels", Method::adapter(LoraConfig::default(), 7), backend::load());
        let tuner = tuner.unwrap();
        let head = Head::new(task.clone(), tuner.config(), 7);
        let options = TrainOptions::default().lr(5e-3).batch_size(3).max_steps(12);
        let mut made = 0;
        let stop = move |event: &opt_core::tuning::Event| {
            made += u64::from(matches!(event, opt_core::tuning::Event::Step(_)));
            if made == steps { std::ops::ControlFlow::Break(()) } else { std::ops::ControlFlow::Continue(()) }
        };
        let trainer = Trainer::new(tuner.head(head).unwrap(), data.clone(), options).callback(stop);
        trainer.resume(resume).run(dir.path().join(output))
    };
    run("whole", 100, false).unwrap();
    assert_eq!(run("parts", 5, false).unwrap_err().kind(), ErrorKind::Cancelled);
    run("parts", 100, true).unwrap();
    let file = |output: &str| fs::read(dir.path().join(output).join("adapter_model.safetensors")).unwrap();
    assert_eq!(file("whole"), file("parts"));
    let classifier =
        SequenceClassifier::adapted("../models/opt-novels", dir.path().join("whole"), backend::load())
            .unwrap();
    let texts: Vec<&str> = lines.iter().map(|(text, _)| *text).collect();
    for (found, (text, label)) in classifier.classify_batch(&texts).unwrap().iter().zip(lines) {
        assert_eq!(found[0].label, label, "{text}: {found:?}");
        assert!((found.iter().map(|p| p.score).sum::<f32>() - 1.0).abs() < 1e-5);
    }
}

#[test]
fn an_answer_is_a_part_of_its_context() {
    let tuner =
        Tuner::load("../models/opt-novels", Method::adapter(LoraConfig::default(), 3), backend::load())
            .unwrap();
    let head = Head::new(Task::Answer, tuner.config(), 3);
    let tokenizer = Tokenizer::from_dir("../models/opt-novels").unwrap();
    let options = DataOptions::new(tuner.config(), Some(tokenizer)).reads(Reads::Head(Task::Answer));
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("data.jsonl");
    let (question, context) = ("Who slept?", "Tom ran home. Anna Grey slept by the fire.");
    let line = serde_json::json!({ "question": question, "context": context, "answer": "Anna Grey" });
    fs::write(&file, line.to_string()).unwrap();
    let data = Dataset::open(&file, &options).unwrap();
    let train = TrainOptions::default().lr(1e-2).batch_size(1).max_steps(12);
    Trainer::new(tuner.head(head).unwrap(), data, train).run(dir.path().join("out")).unwrap();
    let model =
        QuestionAnswerer::adapted("../models/opt-novels", dir.path().join("out"), backend::load()).unwrap();
    let found = model.answer(question, context, AnswerOptions::default().top_k(3)).unwrap();
    assert_eq!(found[0].text, "Anna Grey", "{found:?}");
    assert_eq!(&context[found[0].bytes.clone()], "Anna Grey");
    assert!(found.len() == 3 && found.windows(2).all(|pair| pair[0].score >= pair[1].score), "{found:?}");
    assert!(model.answer(question, "", AnswerOptions::default()).is_err());
}

#[test]
fn heads_that_cannot_be_used() {
    let novels = "../models/opt-novels";
    let tuner = |method| Tuner::load(novels, method, backend::load()).unwrap();
    let task = || Task::one_of(["a", "b"]).unwrap();
    let narrow = Checkpoint::open(fixtures().join("models/pre_ln")).unwrap();
    let expect = |error: opt_core::Error, expected: &str| {
        assert!(error.to_string().contains(expected), "{error}");
    };
    let head = Head::new(task(), narrow.config(), 1);
    expect(tuner(Method::full()).head(head).err().unwrap(), "expected a width of 256, found 32");
    let plain = tuner(Method::full());
    let head = Head::new(task(), plain.config(), 1);
    let mut headed = plain.head(head.clone()).unwrap();
    for (goal, expected) in [
        (Goal::Class(2), "expected a number below 2, found 2"),
        (Goal::Tokens(1), "one of some classes, found tokens to predict"),
        (Goal::Numbers(vec![0.5]), "one of some classes, found numbers"),
    ] {
        expect(headed.loss(&[Example::with(vec![2, 7], goal)]).unwrap_err(), expected);
    }
    expect(headed.head(head.clone()).err().unwrap(), "found one that has a head");
    let mut plain = tuner(Method::full());
    expect(plain.loss(&[Example::with(vec![2, 7], Goal::Class(0))]).unwrap_err(), "tokens to predict");
    let mut prompt = PromptConfig::default();
    prompt.sizes.num_virtual_tokens = 2;
    expect(tuner(Method::adapter(prompt, 1)).head(head).err().unwrap(), "found another adapter");
    expect(SequenceClassifier::load(novels, backend::load()).err().unwrap(), "found one without");
    let answers = fixtures().join("heads/answer");
    expect(SequenceClassifier::load(answers, backend::load()).err().unwrap(), "found one for answers");
    let classes = fixtures().join("heads/one_of");
    expect(
        QuestionAnswerer::load(classes, backend::load()).err().unwrap(),
        "found one for one of some classes",
    );
    // An adapter of a language model has no head.
    let adapter = fixtures().join("gradients/lora");
    let base = fixtures().join("models/pre_ln");
    expect(
        SequenceClassifier::adapted(base, adapter, backend::load()).err().unwrap(),
        "expected a head (score.weight), found none",
    );
}
