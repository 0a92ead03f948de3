//! Distillation against torch's autograd: loss and every gradient; students of a teacher's layers; exact resuming.

mod common;

use common::{backend, fixtures};
use ndarray::{Array2, ArrayView2};
use opt_core::{
    ErrorKind, Opt,
    checkpoint::Checkpoint,
    tuning::{
        DistillOptions, Event, Example, Method, OutputOptions, StepOptions, TeacherOutputs, TrainOptions,
        Trainer, Tuner,
        data::{DataOptions, Dataset},
        new_model, student_layers, student_of,
    },
};
use serde::Deserialize;
use std::{collections::BTreeMap, fs, ops::ControlFlow, path::Path};

#[derive(Deserialize)]
struct Recorded {
    ids: Vec<u32>,
    from: usize,
}

#[derive(Deserialize)]
struct Meta {
    student: String,
    teacher: String,
    options: DistillOptions,
    loss: f32,
    cross_entropy: f64,
    batch: Vec<Recorded>,
}

fn model(name: &str) -> Checkpoint {
    Checkpoint::open(fixtures().join("models").join(name)).unwrap()
}

fn arrays(path: &Path) -> BTreeMap<String, Array2<f32>> {
    let bytes = fs::read(path).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let array = |tensor: safetensors::tensor::TensorView<'_>| {
        let values: Vec<f32> =
            tensor.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
        let width = *tensor.shape().last().unwrap();
        Array2::from_shape_vec((values.len() / width, width), values).unwrap()
    };
    file.tensors().into_iter().map(|(name, tensor)| (name, array(tensor))).collect()
}

/// Relative to the largest gradient of the tensor.
fn assert_near(found: ArrayView2<'_, f32>, expected: ArrayView2<'_, f32>, what: &str) {
    assert_eq!(found.dim(), expected.dim(), "{what}: shapes");
    let largest = expected.iter().fold(0.0_f32, |m, v| m.max(v.abs()));
    let off = found.iter().zip(expected.iter()).map(|(f, e)| (f - e).abs()).fold(0.0, f32::max);
    assert!(off <= 4e-5 * largest + 1e-6, "{what}: off by {off} where the largest is {largest}");
}

#[test]
fn losses_and_gradients_are_those_of_torch() {
    let mut projections = 0;
    for entry in fs::read_dir(fixtures().join("distilling")).unwrap() {
        let dir = entry.unwrap().path();
        let meta: Meta = serde_json::from_slice(&fs::read(dir.join("meta.json")).unwrap()).unwrap();
        let expected = arrays(&dir.join("gradients.safetensors"));
        let batch: Vec<Example> =
            meta.batch.iter().map(|r| Example::completion(r.ids.clone(), r.from)).collect();
        let tuner = Tuner::from_checkpoint(model(&meta.student), Method::full(), backend::load()).unwrap();
        let mut tuner = tuner.distill(model(&meta.teacher), meta.options).unwrap();
        for again in [false, true] {
            let name = format!("{} on {}", dir.file_name().unwrap().display(), backend::name());
            let mut options = StepOptions::default();
            options.gradient_checkpointing = again;
            let (loss, found) = tuner.gradients(&batch, options).unwrap();
            assert!((loss - meta.loss).abs() < 2e-5 * meta.loss, "{name}: loss {loss}, torch {}", meta.loss);
            let names = |all: &BTreeMap<String, Array2<f32>>| all.keys().cloned().collect::<Vec<_>>();
            assert_eq!(names(&found), names(&expected), "{name}");
            for (tensor, expected) in &expected {
                assert_near(found[tensor].view(), expected.view(), &format!("{name}, {tensor}"));
                projections += usize::from(tensor.starts_with("distill."));
            }
        }
        // Evaluation is of the cross-entropy alone.
        assert!((tuner.loss(&batch).unwrap() - meta.cross_entropy).abs() < 1e-4);
    }
    assert!(projections >= 4);
}

#[test]
fn layers_of_students() {
    assert_eq!(student_layers(12, 6).unwrap(), [0, 2, 4, 7, 9, 11]);
    assert_eq!(student_layers(12, 12).unwrap(), (0..12).collect::<Vec<_>>());
    assert_eq!(student_layers(24, 2).unwrap(), [0, 23]);
    assert_eq!(student_layers(5, 1).unwrap(), [0]);
    for wrong in [0, 13] {
        let error = student_layers(12, wrong).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Option);
        assert!(error.to_string().contains(&format!("expected 1 to 12, found {wrong}")), "{error}");
    }
}

#[test]
fn students_hold_their_teachers_weights() {
    for name in ["shape_350m", "untied"] {
        let teacher = model(name);
        let (student, files) = student_of(&teacher, 2).unwrap();
        assert!(student.validate().unwrap().is_empty());
        let layers = teacher.config().num_hidden_layers;
        for (own, shape) in student.config().tensor_shapes() {
            let theirs = own.replace("layers.1.", &format!("layers.{}.", layers - 1));
            let values = |of: &Checkpoint, tensor: &str| {
                let tensor = of.tensor(tensor, &shape).unwrap();
                match shape[..] {
                    [_] => tensor.vector().unwrap().to_f32().to_vec(),
                    _ => tensor.matrix().unwrap().to_f32().iter().copied().collect(),
                }
            };
            assert_eq!(values(&student, &own), values(&teacher, &theirs), "{name}: {own}");
        }
        let (_, config) = files.iter().find(|(file, _)| file == "config.json").unwrap();
        let config: serde_json::Value = serde_json::from_slice(config).unwrap();
        assert_eq!(config["num_hidden_layers"], 2);
    }
}

fn examples(count: u32) -> Vec<Example> {
    (0..count)
        .map(|i| Example::new((0..9).map(|j| 3 + (i % 5 * 7 + j * (1 + i % 3)) % 70).collect()))
        .collect()
}

fn data(count: u32) -> Dataset {
    Dataset::new(examples(count), &DataOptions::new(model("shape_125m").config(), None)).unwrap()
}

fn trainer(distill: DistillOptions) -> Trainer<'static> {
    let tuner = Tuner::from_checkpoint(model("shape_125m"), Method::full(), backend::load()).unwrap();
    let tuner = tuner.distill(model("shape_350m"), distill).unwrap();
    let options = TrainOptions::default().lr(3e-3).max_steps(6).batch_size(2).grad_accum(2).save_steps(2);
    Trainer::new(tuner, data(12), options.save_limit(9).seed(5)).eval(data(5))
}

#[test]
fn resuming_gives_what_never_stopping_gives() {
    if !backend::deterministic() {
        backend::skipped(format_args!("exact resuming ({} does not promise equal bits)", backend::name()));
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let [through, resumed] = ["through", "resumed"].map(|name| dir.path().join(name));
    // With a projection, which is no part of the student and must be found again all the same.
    let distill = DistillOptions::default().alpha_hidden(0.3);
    trainer(distill).run(&through).unwrap();
    let ending = |event: &Event| match event {
        Event::Step(report) if report.step == 3 => ControlFlow::Break(()),
        _ => ControlFlow::Continue(()),
    };
    let error = trainer(distill).callback(ending).run(&resumed).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Cancelled, "{error}");
    let error = trainer(distill.temperature(1.5)).resume(true).run(&resumed).unwrap_err().to_string();
    assert!(error.contains("method.distill.options.temperature: expected 2.0, found 1.5"), "{error}");
    trainer(distill).resume(true).run(&resumed).unwrap();
    for file in ["model.safetensors", "checkpoint-6/model.safetensors", "checkpoint-6/optimizer.safetensors"]
    {
        assert!(fs::read(through.join(file)).unwrap() == fs::read(resumed.join(file)).unwrap(), "{file}");
    }
    let kept = arrays(&through.join("checkpoint-6/optimizer.safetensors"));
    assert!(kept.contains_key("distill.hidden.value") && kept.contains_key("distill.hidden.exp_avg"));
    // What comes out is a student like any.
    let opt = Opt::load(&through, backend::load()).unwrap();
    assert!(opt.warnings().is_empty(), "{:?}", opt.warnings());
}

/// A teacher of the same shape with other numbers would teach something else from the next step on.
#[test]
fn resuming_asks_for_the_same_teacher() {
    let dir = tempfile::tempdir().unwrap();
    let output = dir.path().join("student");
    let run = |teacher: Checkpoint, resume: bool| {
        let tuner = Tuner::from_checkpoint(model("shape_125m"), Method::full(), backend::load()).unwrap();
        let tuner = tuner.distill(teacher, DistillOptions::default()).unwrap();
        let options = TrainOptions::default().max_steps(2).batch_size(2);
        Trainer::new(tuner, data(4), options).resume(resume).run(&output)
    };
    let teacher = || new_model(model("shape_350m").config(), 1).unwrap();
    run(teacher(), false).unwrap();
    let error = run(new_model(teacher().config(), 2).unwrap(), true).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Option, "{error}");
    let text = error.to_string();
    assert!(text.contains("resumed with other settings: method.distill.teacher_weights: expected"), "{text}");
    assert_eq!(text.lines().count(), 1, "{text}");
    run(teacher(), true).unwrap();
}

/// Of a whole vocabulary outputs that were written teach what the teacher does; of a part, nearly that.
#[test]
fn outputs_teach_what_the_teacher_does() {
    let dir = tempfile::tempdir().unwrap();
    let teacher = || model("shape_350m");
    let options = DistillOptions::default().temperature(1.5);
    let student = || Tuner::from_checkpoint(model("shape_125m"), Method::full(), backend::load()).unwrap();
    let batch = examples(4);
    let write = |k: usize| {
        let keep = OutputOptions::default().k(k).temperature(1.5);
        let path = dir.path().join(k.to_string());
        TeacherOutputs::write(&path, &teacher(), backend::load(), &data(12), keep, None)
    };
    let step = StepOptions::default();
    let (loss, expected) = student().distill(teacher(), options).unwrap().gradients(&batch, step).unwrap();
    let vocabulary = teacher().config().vocab_size;
    let mut gaps = Vec::new();
    for k in [vocabulary, vocabulary / 2, 2] {
        let outputs = write(k).unwrap();
        assert_eq!((outputs.k(), outputs.temperature()), (k, 1.5));
        assert!(outputs.are_of(&teacher()).unwrap() && !outputs.are_of(&model("shape_125m")).unwrap());
        let mut tuner = student().distill_from(outputs, options).unwrap();
        let (own, found) = tuner.gradients(&batch, step).unwrap();
        // Twice the same, whatever the order.
        let back: Vec<Example> = batch.iter().rev().cloned().collect();
        assert!((tuner.gradients(&back, step).unwrap().0 - own).abs() < 1e-5);
        if k == vocabulary {
            assert!((own - loss).abs() < 1e-5 * loss, "{own}, {loss}");
            for (name, expected) in &expected {
                assert_near(found[name].view(), expected.view(), name);
            }
        }
        let off = |name: &String| (&found[name] - &expected[name]).mapv(|v| v * v).sum();
        gaps.push(expected.keys().map(off).sum::<f32>());
    }
    assert!(gaps.is_sorted() && gaps[1] > 0.0, "{gaps:?}");
    // Other data, and what is out of range.
    let mut tuner = student().distill_from(write(2).unwrap(), options).unwrap();
    let error = tuner.gradients(&[Example::new(vec![9, 9, 9])], step).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Prompt, "{error}");
    assert!(error.to_string().contains("it was written for other data"), "{error}");
    for k in [0, vocabulary + 1] {
        assert_eq!(write(k).unwrap_err().kind(), ErrorKind::Option);
    }
    for wrong in [options.temperature(2.0), options.alpha_hidden(0.1), options.alpha_cos(0.1)] {
        let error = student().distill_from(TeacherOutputs::open(dir.path().join("2")).unwrap(), wrong);
        assert!(error.is_err_and(|error| error.kind() == ErrorKind::Option));
    }
}

#[test]
fn a_file_that_holds_no_outputs() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("outputs");
    let keep = OutputOptions::default().k(3);
    TeacherOutputs::write(&path, &model("shape_350m"), backend::load(), &data(3), keep, None).unwrap();
    let whole = fs::read(&path).unwrap();
    let refused = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        let error = TeacherOutputs::open(&path).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Checkpoint, "{error}");
    };
    for end in [0, 10, whole.len() / 2, whole.len() - 1] {
        refused(&whole[..end]);
    }
    refused(&[&whole[..], b"!"].concat());
    let text = String::from_utf8_lossy(&whole).replacen("\"version\":1", "\"version\":2", 1);
    refused(&text.into_bytes());
    assert_eq!(TeacherOutputs::open(dir.path().join("none")).unwrap_err().kind(), ErrorKind::NotFound);
}

#[test]
fn a_student_comes_nearer_to_its_teacher() {
    let teacher = model("shape_1.3b");
    let (student, files) = student_of(&teacher, 2).unwrap();
    let tuner = Tuner::from_checkpoint(student, Method::full(), backend::load()).unwrap().files(files);
    let options = DistillOptions::default().alpha_ce(0.0).alpha_kd(1.0).alpha_hidden(0.1).alpha_cos(0.1);
    let mut tuner = tuner.distill(teacher, options).unwrap();
    let batch = examples(6);
    let mut step = StepOptions::default();
    step.lr = 3e-3;
    let losses: Vec<f32> = (1..=20)
        .map(|number| {
            step.step = number;
            tuner.step(&[&batch[..3], &batch[3..]], step).unwrap().loss
        })
        .collect();
    assert!(losses[19] < 0.5 * losses[0], "{losses:?}");
}

#[test]
fn wrong_teachers_and_options() {
    let tuner = || Tuner::from_checkpoint(model("shape_125m"), Method::full(), backend::load()).unwrap();
    let refused = |teacher: &str, options: DistillOptions| match tuner().distill(model(teacher), options) {
        Ok(_) => panic!("{teacher}, {options:?}: not refused"),
        Err(error) => error.to_string(),
    };
    let options = DistillOptions::default();
    let error = refused("pre_ln", options);
    assert!(error.contains("expected the student's vocabulary of 80 tokens, found 97"), "{error}");
    for (wrong, message) in [
        (options.temperature(0.0), "temperature: expected a number above 0, found 0"),
        (options.alpha_kd(-1.0), "alpha_kd: expected a number of at least 0, found -1"),
        (options.alpha_hidden(f32::NAN), "alpha_hidden: expected"),
        (options.alpha_ce(0.0).alpha_kd(0.0), "expected one above 0"),
    ] {
        let error = refused("shape_350m", wrong);
        assert!(error.contains(message), "{error}");
    }
    let twice = tuner().distill(model("shape_350m"), options).unwrap().distill(model("shape_350m"), options);
    assert!(twice.is_err());
}
