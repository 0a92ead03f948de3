//! Gradients and steps against torch's autograd (and PEFT's adapters): loss, every gradient, twenty steps of AdamW.

mod common;

use common::{backend, fixtures};
use ndarray::{Array2, ArrayView2};
use opt_backend::Op;
use opt_core::{
    Load,
    adapter::{Adapter, LoraConfig, Names},
    checkpoint::Checkpoint,
    quantize::QuantSpec,
    tuning::{Example, Method, StepOptions, Tuner},
};
use serde::Deserialize;
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

#[derive(Deserialize)]
struct Recorded {
    ids: Vec<u32>,
    from: usize,
}

#[derive(Deserialize)]
struct Meta {
    base: String,
    loss: f32,
    smooth: f32,
    losses: Vec<f32>,
    norms: Vec<f32>,
    trained: usize,
    batch: Vec<Recorded>,
    steps: Vec<Vec<Recorded>>,
    activation: Option<String>,
}

struct Case {
    name: String,
    meta: Meta,
    dir: PathBuf,
}

fn examples(recorded: &[Recorded]) -> Vec<Example> {
    recorded.iter().map(|r| Example::completion(r.ids.clone(), r.from)).collect()
}

/// The cases whose names begin so.
fn cases(start: &str) -> Vec<Case> {
    let mut all: Vec<Case> = fs::read_dir(fixtures().join("gradients"))
        .unwrap()
        .map(|entry| entry.unwrap())
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(start))
        .map(|entry| Case {
            name: entry.file_name().into_string().unwrap(),
            meta: serde_json::from_slice(&fs::read(entry.path().join("meta.json")).unwrap()).unwrap(),
            dir: entry.path(),
        })
        .collect();
    all.sort_by(|a, b| a.name.cmp(&b.name));
    all
}

impl Case {
    fn base(&self) -> Checkpoint {
        let dir = fixtures().join("models").join(&self.meta.base);
        match &self.meta.activation {
            None => Checkpoint::open(dir).unwrap(),
            Some(activation) => {
                let config = fs::read_to_string(dir.join("config.json")).unwrap();
                let mut config: serde_json::Value = serde_json::from_str(&config).unwrap();
                config["activation_function"] = activation.as_str().into();
                let weights = fs::read(dir.join("model.safetensors")).unwrap();
                Checkpoint::from_bytes(&config.to_string(), vec![weights]).unwrap()
            }
        }
    }

    fn tuner(&self, load: Load<'_>) -> Tuner {
        let method = if self.name.starts_with("full") {
            Method::full()
        } else {
            Method::further(Adapter::open(&self.dir).unwrap())
        };
        Tuner::from_checkpoint(self.base(), method, load).unwrap()
    }

    fn gradients(&self) -> BTreeMap<String, Array2<f32>> {
        let bytes = fs::read(self.dir.join("gradients.safetensors")).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let array = |tensor: safetensors::tensor::TensorView<'_>| {
            let values: Vec<f32> =
                tensor.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
            let shape = match tensor.shape() {
                [width] => [1, *width],
                [rows, width] => [*rows, *width],
                other => panic!("{other:?}"),
            };
            Array2::from_shape_vec(shape, values).unwrap()
        };
        file.tensors().into_iter().map(|(name, tensor)| (name, array(tensor))).collect()
    }
}

/// Relative to the largest gradient of the tensor.
fn assert_near(found: ArrayView2<'_, f32>, expected: ArrayView2<'_, f32>, what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}: shapes {:?} and {:?}", found.dim(), expected.dim());
    let largest = expected.iter().fold(0.0_f32, |m, v| m.max(v.abs()));
    let off = found.iter().zip(expected.iter()).map(|(f, e)| (f - e).abs()).fold(0.0, f32::max);
    assert!(off <= 2e-5 * largest + 1e-6, "{what}: off by {off} where the largest is {largest}");
}

fn each_gradient(start: &str, options: StepOptions) {
    let cases = cases(start);
    assert!(!cases.is_empty());
    for case in &cases {
        let name = format!("{} on {}", case.name, backend::name());
        let mut tuner = case.tuner(backend::load());
        assert_eq!(tuner.trainable(), case.meta.trained, "{name}: parameters");
        let batch = examples(&case.meta.batch);
        let (loss, found) = tuner.gradients(&batch, options).unwrap();
        let smooth = options.label_smoothing > 0.0;
        let expected = if smooth { case.meta.smooth } else { case.meta.loss };
        assert!((loss - expected).abs() < 1e-5 * expected, "{name}: loss {loss}, expected {expected}");
        assert!(smooth || (tuner.loss(&batch).unwrap() - f64::from(expected)).abs() < 1e-4, "{name}");
        if smooth {
            continue;
        }
        let expected = case.gradients();
        assert!(expected.len() > 1 || case.name.starts_with('p'), "{name}");
        for (tensor, expected) in &expected {
            let found = found.get(tensor).unwrap_or_else(|| panic!("{name}: no gradient of {tensor}"));
            assert_near(found.view(), expected.view(), &format!("{name}: {tensor}"));
        }
        let unexpected: Vec<&String> = found.keys().filter(|name| !expected.contains_key(*name)).collect();
        assert!(unexpected.is_empty(), "{name}: gradients of {unexpected:?}");
    }
}

#[test]
fn gradients_of_all_weights() {
    each_gradient("full", StepOptions::default());
}

#[test]
fn gradients_of_adapters() {
    for method in ["lora", "dora", "prefix", "prompt"] {
        each_gradient(method, StepOptions::default());
    }
}

/// What was read is written again, key for key; PEFT's copies of the model's own tables are left out.
#[test]
fn adapters_come_out_as_they_went_in() {
    let mut count = 0;
    for case in cases("").iter().filter(|case| !case.name.starts_with("full")) {
        let what = format!("{} on {}", case.name, backend::name());
        let given = Adapter::open(&case.dir).unwrap();
        let dir = tempfile::tempdir().unwrap();
        case.tuner(backend::load()).save(dir.path().join("again")).unwrap();
        let again = Adapter::open(dir.path().join("again")).unwrap();
        // With bias "all", PEFT saves what modules_to_save stand for twice.
        let twice = |key: &str| key.contains(".modules_to_save.") || key.contains(".original_module.");
        let own = |(key, _): &(&String, _)| !key.ends_with("base_layer.weight") && !twice(key);
        let expected: BTreeMap<_, _> = given.tensors().iter().filter(own).collect();
        assert_eq!(
            again.tensors().keys().collect::<Vec<_>>(),
            expected.keys().copied().collect::<Vec<_>>(),
            "{what}"
        );
        for (key, expected) in expected {
            assert_eq!(&again.tensors()[key], expected, "{what}: {key}");
        }
        count += 1;
    }
    assert!(count >= 15, "{count}");
}

/// New terms do nothing, and are what PEFT begins with.
#[test]
fn new_terms_beside_the_tables() {
    let case = cases("lora_table").remove(0);
    let tuner = |change: &dyn Fn(&mut LoraConfig)| {
        let mut lora = LoraConfig::default();
        lora.target_modules = Names::list(["embed_tokens", "lm_head"]);
        change(&mut lora);
        Tuner::from_checkpoint(case.base(), Method::adapter(lora, 5), backend::load())
    };
    let adapter = tuner(&|_| ()).unwrap().adapter().unwrap();
    let values = |key: &str| adapter.tensors()[&format!("base_model.model.{key}")].clone();
    let (a, b) = ("lora_embedding_A", "lora_embedding_B");
    let [a, b] = [a, b].map(|part| values(&format!("model.decoder.embed_tokens.{part}")));
    assert_eq!((a.shape(), b.shape()), (&[8, 97][..], &[32, 8][..]));
    assert!(a.iter().all(|v| *v == 0.0));
    let variance = b.iter().map(|v| v * v).sum::<f32>() / b.len() as f32;
    assert!((0.7..1.3).contains(&variance), "a normal distribution, found a variance of {variance}");
    assert!(values("lm_head.lora_B.weight").iter().all(|v| *v == 0.0));
    assert!(values("lm_head.lora_A.weight").iter().any(|v| *v != 0.0));
    let batch = examples(&case.meta.batch);
    let mut plain = Tuner::from_checkpoint(case.base(), Method::full(), backend::load()).unwrap();
    let expected = plain.loss(&batch).unwrap();
    assert!((tuner(&|_| ()).unwrap().loss(&batch).unwrap() - expected).abs() < 1e-5);
    let own_bias = |lora: &mut LoraConfig| {
        (lora.lora_bias, lora.target_modules) = (true, Names::list(["lm_head"]));
    };
    assert!((tuner(&own_bias).unwrap().loss(&batch).unwrap() - expected).abs() < 1e-5);
    let error = tuner(&|lora| lora.use_dora = true).err().unwrap();
    assert!(error.to_string().contains("use_dora beside embed_tokens"), "{error}");
}

#[test]
fn gradients_with_states_computed_again() {
    let mut options = StepOptions::default();
    options.gradient_checkpointing = true;
    each_gradient("full", options);
}

#[test]
fn label_smoothing() {
    let mut options = StepOptions::default();
    options.label_smoothing = 0.1;
    each_gradient("full", options);
}

#[test]
fn twenty_steps() {
    // No start is the start of all names.
    for case in cases("") {
        let name = format!("{} on {}", case.name, backend::name());
        let mut tuner = case.tuner(backend::load());
        for (i, step) in case.meta.steps.iter().enumerate() {
            let (first, second) = step.split_at(3);
            let (first, second) = (examples(first), examples(second));
            let mut options = StepOptions::default();
            options.step = i as u64 + 1;
            options.weight_decay = 0.1;
            // Linear, with four steps of warm-up.
            options.lr = 3e-3 * if i < 4 { i as f32 / 4.0 } else { (20 - i) as f32 / 16.0 };
            let result = tuner.step(&[&first, &second], options).unwrap();
            let (loss, norm) = (case.meta.losses[i], case.meta.norms[i]);
            assert!(
                (result.loss - loss).abs() < 1e-4,
                "{name}, step {i}: loss {}, torch {loss}",
                result.loss
            );
            let off = (result.grad_norm - norm).abs() / norm;
            assert!(off < 1e-3, "{name}, step {i}: norm {}, torch {norm}", result.grad_norm);
        }
    }
}

#[test]
fn only_chosen_layers_have_gradients() {
    let case = cases("full_pre_ln").remove(0);
    let mut tuner = Tuner::from_checkpoint(case.base(), Method::layers([1]), backend::load()).unwrap();
    let (_, found) = tuner.gradients(&examples(&case.meta.batch), StepOptions::default()).unwrap();
    assert!(found.keys().all(|name| name.starts_with("layers.1.")));
    let expected = case.gradients();
    let layer = expected.iter().filter(|(name, _)| name.starts_with("layers.1."));
    assert_eq!(found.len(), layer.clone().count());
    for (name, expected) in layer {
        assert_near(found[name].view(), expected.view(), name);
    }
    assert!(Tuner::from_checkpoint(case.base(), Method::layers([2]), backend::load()).is_err());
}

#[test]
fn dropout_is_of_the_seed() {
    let case = cases("full_pre_ln").remove(0);
    let dir = fixtures().join("models").join(&case.meta.base);
    let config = fs::read_to_string(dir.join("config.json")).unwrap();
    let mut config: serde_json::Value = serde_json::from_str(&config).unwrap();
    config["dropout"] = 0.2.into();
    let weights = fs::read(dir.join("model.safetensors")).unwrap();
    let config = config.to_string();
    let base = || Checkpoint::from_bytes(&config, vec![weights.clone()]).unwrap();
    let batch = examples(&case.meta.batch);
    let run = |seed: Option<u64>, again: bool| {
        let mut tuner = Tuner::from_checkpoint(base(), Method::full(), backend::load()).unwrap();
        let mut options = StepOptions::default();
        (options.seed, options.gradient_checkpointing) = (seed, again);
        tuner.gradients(&batch, options).unwrap()
    };
    let (first, gradients) = run(Some(3), false);
    let (same, again) = run(Some(3), true);
    assert_eq!(first, same);
    // What is computed again has the masks it had.
    for (name, gradient) in &gradients {
        assert_near(again[name].view(), gradient.view(), name);
    }
    assert_ne!(first, run(Some(4), false).0);
    let plain = run(None, false).0;
    assert!((plain - case.meta.loss).abs() < 1e-4, "nothing is dropped without a seed");
    assert!((first - plain).abs() < 2.0 && first != plain);
}

/// What a step moves between host and device, and which ops go through the host.
#[test]
fn a_step_reads_once() {
    for start in ["full_pre_ln", "lora", "prompt"] {
        let case = cases(start).remove(0);
        let mut tuner = case.tuner(backend::load());
        let batch = examples(&case.meta.batch);
        tuner.step(&[&batch], StepOptions::default()).unwrap();
        let before = tuner.counts();
        tuner.step(&[&batch, &batch], StepOptions::default()).unwrap();
        let counts = tuner.counts().since(&before);
        if backend::name() == "reference" {
            assert!(counts.default_bodies(Op::CrossEntropy) > 0);
            continue;
        }
        let name = format!("{} on {}: {counts}", case.name, backend::name());
        let called: Vec<Op> = Op::ALL.into_iter().filter(|op| counts.default_bodies(*op) > 0).collect();
        assert!(called.is_empty(), "{name}: default bodies of {called:?}");
        assert_eq!(counts.reads, 1, "{name}");
        // LibTorch counts lists of rows as uploads, since they are tensors there.
        assert!(counts.uploads == 0 || backend::name() == "tch" && counts.bytes < 4000, "{name}");
    }
}

/// Weights that stay packed can have side paths.
#[test]
fn quantized_bases() {
    for spec in
        [QuantSpec::int8().group_size(16), QuantSpec::int4().group_size(16), QuantSpec::nf4().group_size(16)]
    {
        let case = cases("lora").remove(0);
        let name = format!("{spec:?} on {}", backend::name());
        let mut tuner = case.tuner(backend::load_exact().quantize(spec));
        let batch = examples(&case.meta.batch);
        // The same model with its weights unpacked.
        let base = case.base();
        let dir = tempfile::tempdir().unwrap();
        let plain = dir.path().join("plain");
        unpacked(&base, &spec, &plain);
        let method = Method::further(Adapter::open(&case.dir).unwrap());
        let mut expected = Tuner::load(&plain, method, backend::load_exact()).unwrap();
        let (loss, found) = tuner.gradients(&batch, StepOptions::default()).unwrap();
        let (expected_loss, expected) = expected.gradients(&batch, StepOptions::default()).unwrap();
        assert!((loss - expected_loss).abs() < 1e-3 * expected_loss, "{name}: {loss} and {expected_loss}");
        for (tensor, expected) in &expected {
            let largest = expected.iter().fold(0.0_f32, |m, v| m.max(v.abs()));
            let off = (&found[tensor] - expected).iter().fold(0.0_f32, |m, v| m.max(v.abs()));
            assert!(off < 5e-3 * largest, "{name}: {tensor} off by {off} where the largest is {largest}");
        }
        // Tables are packed too where codes are integers: terms beside them, and one that is trained whole.
        for name in ["lora_table", "lora_head", "dora_head", "lora_saved_head", "lora_saved_both"] {
            let case = cases(name).remove(0);
            let method = || Method::further(Adapter::open(&case.dir).unwrap());
            let mut tuner = case.tuner(backend::load_exact().quantize(spec));
            let plain = dir.path().join(name);
            unpacked(&case.base(), &spec, &plain);
            let mut expected = Tuner::load(&plain, method(), backend::load_exact()).unwrap();
            let batch = examples(&case.meta.batch);
            let (found, expected) = (tuner.loss(&batch).unwrap(), expected.loss(&batch).unwrap());
            assert!((found - expected).abs() < 1e-3 * expected, "{name}, {spec:?}: {found} and {expected}");
        }
        let error = Tuner::from_checkpoint(case.base(), Method::full(), backend::load().quantize(spec));
        assert!(error.err().unwrap().to_string().contains("quantized"), "{name}");
    }
}

/// Writes a model whose weights are what quantizing makes of them, in f32.
fn unpacked(base: &Checkpoint, spec: &QuantSpec, output: &Path) {
    fs::create_dir(output).unwrap();
    let mut tensors = Vec::new();
    for (name, shape) in base.config().tensor_shapes() {
        let values: Vec<f32> = match (spec.of_tensor(&name), &shape[..]) {
            (Some(spec), &[rows, width]) => {
                let tensor = base.tensor(&name, &[rows, width]).unwrap();
                spec.quantize(&name, tensor.matrix().unwrap()).unwrap().dequantize().iter().copied().collect()
            }
            (None, &[rows, width]) => base
                .tensor(&name, &[rows, width])
                .unwrap()
                .matrix()
                .unwrap()
                .to_f32()
                .iter()
                .copied()
                .collect(),
            _ => base.tensor(&name, &shape).unwrap().vector().unwrap().to_f32().to_vec(),
        };
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let full = if name.starts_with("lm_head") { name } else { format!("model.decoder.{name}") };
        tensors.push((full, shape, bytes));
    }
    let views = tensors.iter().map(|(name, shape, bytes)| {
        (name, safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.clone(), bytes).unwrap())
    });
    fs::write(output.join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
    let config = fs::read(base.directory().unwrap().join("config.json")).unwrap();
    fs::write(output.join("config.json"), config).unwrap();
}

#[test]
fn a_step_that_failed_leaves_nothing_behind() {
    let case = cases("full_pre_ln").remove(0);
    let batch = examples(&case.meta.batch);
    let context = case.base().config().max_position_embeddings;
    let too_long = [Example::new(vec![5; context + 1])];
    let mut tuner = case.tuner(backend::load());
    let error = tuner.step(&[&batch, &too_long], StepOptions::default()).unwrap_err();
    assert!(error.to_string().contains(&format!("at most {context} positions")), "{error}");
    let (_, found) = tuner.gradients(&batch, StepOptions::default()).unwrap();
    for (tensor, expected) in &case.gradients() {
        assert_near(found[tensor].view(), expected.view(), tensor);
    }
    let nothing = tuner.step(&[&[Example::completion(vec![5, 6], 2)]], StepOptions::default()).unwrap_err();
    assert!(nothing.to_string().contains("at least one target"), "{nothing}");
}
