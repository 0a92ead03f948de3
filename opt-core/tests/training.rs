//! The trainer: resuming, what it leaves on disk, early stopping, bad settings.

mod common;

use common::{backend, fixtures};
use opt_core::{
    ErrorKind, Opt,
    adapter::{AdapterConfig, AdapterMethod, Bias, LoraConfig, Names, PrefixConfig, PromptConfig},
    checkpoint::Checkpoint,
    tuning::{
        Event, Example, Method, Optimizer, Schedule, TrainOptions, TrainReport, Trainer, Tuner,
        data::{DataOptions, Dataset},
    },
};
use std::{collections::BTreeMap, fs, ops::ControlFlow, path::Path};

/// Sequences with a pattern that can be learned.
fn data(count: u32) -> Dataset {
    data_for("pre_ln", count)
}

fn data_for(model: &str, count: u32) -> Dataset {
    let config = Checkpoint::open(fixtures().join("models").join(model)).unwrap().config().clone();
    Dataset::new(examples(count, config.vocab_size as u32), &DataOptions::new(&config, None)).unwrap()
}

fn examples(count: u32, vocab: u32) -> Vec<Example> {
    (0..count)
        .map(|i| Example::new((0..9).map(|j| 3 + (i % 5 * 7 + j * (1 + i % 3)) % (vocab - 7)).collect()))
        .collect()
}

fn options() -> TrainOptions {
    let schedule = Schedule::Linear;
    TrainOptions::default()
        .lr(3e-3)
        .max_steps(7)
        .batch_size(2)
        .grad_accum(2)
        .warmup_steps(2)
        .schedule(schedule)
        .seed(5)
}

fn tuner(method: Method) -> Tuner {
    tuner_of("pre_ln", method)
}

fn tuner_of(model: &str, method: Method) -> Tuner {
    Tuner::load(fixtures().join("models").join(model), method, backend::load()).unwrap()
}

fn trainer(options: TrainOptions) -> Trainer<'static> {
    Trainer::new(tuner(Method::full()), data(12), options)
}

/// The files of a directory that hold numbers, and the log without times.
fn contents(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut all = BTreeMap::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        if path.is_dir() {
            all.extend(contents(&path).into_iter().map(|(file, bytes)| (format!("{name}/{file}"), bytes)));
        } else if name == "log.jsonl" {
            let text = fs::read_to_string(&path).unwrap();
            let line = |line: &str| {
                let mut line: serde_json::Value = serde_json::from_str(line).unwrap();
                line.as_object_mut().unwrap().remove("tokens_per_second");
                line.to_string()
            };
            all.insert(name, text.lines().map(line).collect::<Vec<_>>().join("\n").into_bytes());
        } else {
            all.insert(name, fs::read(&path).unwrap());
        }
    }
    all
}

fn assert_same(found: &Path, expected: &Path, what: &str) {
    let (found, expected) = (contents(found), contents(expected));
    let names = |of: &BTreeMap<String, Vec<u8>>| of.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&found), names(&expected), "{what}");
    for (name, bytes) in &found {
        assert!(*bytes == expected[name], "{what}: {name} differs");
    }
}

#[test]
fn resuming_gives_what_never_stopping_gives() {
    if !backend::deterministic() {
        backend::skipped(format_args!("exact resuming ({} does not promise equal bits)", backend::name()));
        return;
    }
    let lora = |change: &dyn Fn(&mut LoraConfig)| {
        let mut lora = LoraConfig::default();
        lora.lora_dropout = 0.1;
        change(&mut lora);
        Method::adapter(AdapterConfig::new(AdapterMethod::Lora(lora)), 7)
    };
    let prefix = |projection: bool| {
        let mut prefix = PrefixConfig::default();
        (prefix.sizes.num_virtual_tokens, prefix.prefix_projection) = (3, projection);
        Method::adapter(AdapterConfig::new(AdapterMethod::Prefix(prefix)), 7)
    };
    let momentum = Optimizer::Sgd { momentum: 0.9 };
    // A term beside the table that is also the head, and the head apart from it.
    let mut table = LoraConfig::default();
    table.target_modules = Names::list(["embed_tokens", "q_proj"]);
    let table = AdapterConfig::new(AdapterMethod::Lora(table)).save(["lm_head"]);
    let table = Method::adapter(table, 7);
    for (method, optimizer) in [
        (Method::full(), Optimizer::default()),
        (Method::layers([0]), momentum),
        (lora(&|_| ()), Optimizer::default()),
        (lora(&|lora| (lora.use_dora, lora.bias) = (true, Bias::All)), Optimizer::default()),
        (
            lora(&|lora| (lora.lora_bias, lora.target_modules) = (true, Names::list(["lm_head", "fc1"]))),
            momentum,
        ),
        (table, Optimizer::default()),
        (prefix(false), Optimizer::Sgd { momentum: 0.0 }),
        (prefix(true), Optimizer::default()),
        // Of 4096 elements.
        (prefix(true), Optimizer::adamw_8bit()),
        (Method::adapter(AdapterConfig::new(AdapterMethod::Prompt(PromptConfig::default())), 7), momentum),
        // With matrices that are large enough for it, beside some that are not.
        (Method::full(), Optimizer::adamw_8bit()),
    ] {
        let eighth = optimizer == Optimizer::adamw_8bit() && matches!(method, Method::Full(_));
        let model = if eighth { WIDE } else { "pre_ln" };
        let data = |count| data_for(model, count);
        let trainer =
            |options: TrainOptions| Trainer::new(tuner_of(model, method.clone()), data(12), options);
        let dir = tempfile::tempdir().unwrap();
        let options = options().optimizer(optimizer).save_steps(2).save_limit(9).eval_steps(3);
        let through = dir.path().join("through");
        let eval = || data(5);
        trainer(options.clone()).eval(eval()).run(&through).unwrap();
        for stop in [1, 4, 6] {
            let resumed = dir.path().join(format!("stopped-{stop}"));
            let ending = move |event: &Event| match event {
                Event::Step(report) if report.step == stop => ControlFlow::Break(()),
                _ => ControlFlow::Continue(()),
            };
            let error = trainer(options.clone()).eval(eval()).callback(ending).run(&resumed).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Cancelled, "{error}");
            let extra = resumed.join(format!("checkpoint-{stop}"));
            let whole = matches!(method, Method::Full(_));
            let file = if whole { "model.safetensors" } else { "adapter_model.safetensors" };
            assert!(extra.join(file).exists());
            trainer(options.clone()).eval(eval()).resume(true).run(&resumed).unwrap();
            if !through.join(format!("checkpoint-{stop}")).exists() {
                fs::remove_dir_all(extra).unwrap();
            }
            assert_same(&resumed, &through, &format!("{method:?} stopped after {stop}"));
        }
    }
}

/// A model with matrices of more than 4096 elements, fc1 and fc2, and of fewer.
const WIDE: &str = "shape_13b";

/// Moments in eight bits are kept as they are, in a third of the room, where tensors are large and no embeddings; and
/// the model learns as with moments in f32.
#[test]
fn moments_in_eight_bits() {
    let dir = tempfile::tempdir().unwrap();
    let train = |name: &str, optimizer: Optimizer, resume: bool| {
        let options = options().lr(1e-3).optimizer(optimizer).max_steps(30).save_steps(15);
        let trainer = Trainer::new(tuner_of(WIDE, Method::full()), data_for(WIDE, 12), options);
        trainer.resume(resume).run(dir.path().join(name))
    };
    let f32s = train("f32", Optimizer::default(), false).unwrap().loss.unwrap();
    let coded = train("coded", Optimizer::adamw_8bit(), false).unwrap().loss.unwrap();
    assert!((coded - f32s).abs() < 0.05 * f32s, "{coded} with 8 bits, {f32s} with f32");

    let file = dir.path().join("coded/checkpoint-15/optimizer.safetensors");
    let memory = common::Arrays::read(&file);
    let [codes, scales] =
        ["exp_avg_sq_codes", "absmax"].map(|part| memory.get(&format!("layers.0.fc1.weight.{part}")));
    assert_eq!((codes.shape(), scales.shape()), (&[25, 86][..], &[25, 2][..]));
    assert!(codes.iter().all(|v| v.fract() == 0.0 && (0.0..16_777_216.0).contains(v)));
    for small in ["embed_tokens.weight", "layers.0.self_attn.q_proj.weight", "layers.0.fc1.bias"] {
        memory.get(&format!("{small}.exp_avg_sq"));
    }

    // What does not fit is refused.
    let bytes = fs::read(&file).unwrap();
    let text = b"[25,86]";
    let at = bytes.windows(text.len()).position(|window| window == text).unwrap();
    let mut other = bytes.clone();
    other[at..at + text.len()].copy_from_slice(b"[86,25]");
    fs::write(&file, other).unwrap();
    fs::remove_dir_all(dir.path().join("coded/checkpoint-30")).unwrap();
    let error = train("coded", Optimizer::adamw_8bit(), true).unwrap_err();
    assert!(error.to_string().contains("expected shape [25, 86], found [86, 25]"), "{error}");
    fs::write(&file, bytes).unwrap();
    assert_eq!(train("coded", Optimizer::adamw_8bit(), true).unwrap().steps, 30);
}

#[test]
fn the_best_model_is_the_result_and_can_be_loaded() {
    let dir = tempfile::tempdir().unwrap();
    let output = dir.path().join("tuned");
    let mut losses = Vec::new();
    let watch = |event: &Event| {
        if let Event::Evaluated { loss, .. } = event {
            losses.push(*loss);
        }
        ControlFlow::Continue(())
    };
    let options = options().max_steps(30).eval_steps(5).save_steps(10).save_limit(1);
    let report: TrainReport = trainer(options).eval(data(5)).callback(watch).run(&output).unwrap();
    let (best, step) = report.best.unwrap();
    assert!(losses.len() == 6 && losses.iter().all(|loss| *loss >= best) && best < losses[0]);
    let steps: Vec<String> = fs::read_dir(&output)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.starts_with("checkpoint-"))
        .collect();
    assert!(steps.len() <= 2 && steps.contains(&format!("checkpoint-{step}")), "{steps:?}");
    assert_eq!(
        fs::read(output.join("model.safetensors")).unwrap(),
        fs::read(output.join(format!("checkpoint-{step}/model.safetensors"))).unwrap()
    );
    let opt = Opt::load(&output, backend::load()).unwrap();
    assert!(opt.warnings().is_empty(), "{:?}", opt.warnings());
    // What was written is what was evaluated.
    let mut tuned = Tuner::load(&output, Method::full(), backend::load()).unwrap();
    assert!((tuned.loss(&examples(5, 97)).unwrap() - best).abs() < 1e-4);
    let lines = fs::read_to_string(output.join("log.jsonl")).unwrap();
    assert_eq!(lines.lines().count(), 36);
}

#[test]
fn it_stops_when_it_gets_no_better() {
    let dir = tempfile::tempdir().unwrap();
    let options = options().lr(1e-30).max_steps(50).eval_steps(1).patience(3);
    let report = trainer(options).eval(data(3)).run(dir.path().join("out")).unwrap();
    assert!(report.stopped_early);
    assert_eq!(report.steps, 4);
    assert_eq!(report.best.unwrap().1, 1);
}

#[test]
fn a_loss_that_is_no_number_ends_it() {
    let dir = tempfile::tempdir().unwrap();
    let output = dir.path().join("out");
    let options = options()
        .lr(1e30)
        .clip(None)
        .warmup_steps(0)
        .max_steps(50)
        .save_steps(1)
        .schedule(Schedule::Constant);
    let error = trainer(options).run(&output).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Diverged, "{error}");
    let text = error.to_string();
    assert!(
        text.contains("step ")
            && text.contains("the last good checkpoint is")
            && text.contains("checkpoint-"),
        "{text}"
    );
}

#[test]
fn output_directories() {
    let dir = tempfile::tempdir().unwrap();
    let output = dir.path().join("out");
    fs::create_dir(&output).unwrap();
    fs::write(output.join("thesis.txt"), "mine").unwrap();
    let run = |options: TrainOptions, resume: bool| trainer(options).resume(resume).run(&output);
    let short = options().max_steps(2);
    let error = run(short.clone(), false).unwrap_err().to_string();
    assert!(error.contains("holds something else"), "{error}");
    assert!(run(short.clone(), true).is_err());
    fs::remove_file(output.join("thesis.txt")).unwrap();
    run(short.clone(), false).unwrap();
    let error = run(short.clone(), false).unwrap_err().to_string();
    assert!(error.contains("resume"), "{error}");
    let error = run(short.clone().lr(1e-4), true).unwrap_err().to_string();
    assert!(error.contains("options.lr: expected 0.003, found 0.0001"), "{error}");
    // Nothing is left to do, and that is fine.
    assert_eq!(run(short, true).unwrap().steps, 2);
}

#[test]
fn options_out_of_range() {
    let dir = tempfile::tempdir().unwrap();
    for (options, name) in [
        (options().batch_size(0), "batch_size"),
        (options().lr(f64::NAN), "lr"),
        (options().clip(0.0), "clip"),
        (options().label_smoothing(1.0), "label_smoothing"),
        (options().max_steps(0), "max_steps"),
        (options().weight_decay(-1.0), "weight_decay"),
    ] {
        let error = trainer(options).run(dir.path().join("out")).unwrap_err();
        assert!(error.kind() == ErrorKind::Option && error.to_string().starts_with(name), "{error}");
    }
}
