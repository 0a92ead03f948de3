//! Adapters compute what PEFT 0.21.2 computes with them (`fixtures/adapters`, made by make_adapters.py).

#[path = "../common/mod.rs"]
mod common;
mod refusals;

use common::{Arrays, assert_close, backend, fixtures};
use ndarray::{Array2, ArrayD, s};
use opt_core::{
    CacheDType, DType, ErrorKind, Load, Opt, Request, ScoreInput, Session,
    adapter::{Adapter, Combination, MergeOptions, combine, merge},
    checkpoint::Checkpoint,
    config::OptConfig,
    engine::{Forward, Sequence, Want},
    generation::GenerationConfig,
    quantize::QuantSpec,
};
use serde::Deserialize;
use std::{collections::BTreeMap, fs, path::PathBuf};

#[derive(Deserialize)]
struct Expected {
    model: String,
    sequences: Vec<Vec<u32>>,
    #[serde(default)]
    merged: bool,
    greedy: Option<Greedy>,
    /// Of each sequence, in a mixed batch.
    #[serde(default)]
    adapters: Vec<String>,
}

#[derive(Deserialize)]
struct Greedy {
    prompt: Vec<u32>,
    output: Vec<u32>,
    /// Between the two largest logits, at the least.
    gap: f32,
}

fn folder(name: &str) -> PathBuf {
    fixtures().join("adapters").join(name)
}

fn read<T: serde::de::DeserializeOwned>(path: PathBuf) -> T {
    let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn expected(name: &str) -> (Expected, Arrays) {
    (read(folder(name).join("expected.json")), Arrays::read(folder(name).join("expected.safetensors")))
}

fn adapter(name: &str) -> Adapter {
    Adapter::open(folder(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
}

fn model(name: &str) -> PathBuf {
    fixtures().join("models").join(name)
}

fn checkpoint(name: &str) -> Checkpoint {
    Checkpoint::open(model(name)).unwrap()
}

/// All that PEFT saved by itself.
fn names() -> Vec<String> {
    let entries = fs::read_dir(fixtures().join("adapters")).unwrap().map(|entry| entry.unwrap());
    let mut names: Vec<String> = entries
        .filter(|entry| entry.path().join("adapter_config.json").exists())
        .map(|entry| entry.file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert!(names.len() > 20);
    names
}

fn load(base: &str, names: &[&str]) -> Opt {
    let load = names.iter().fold(backend::load(), |load, name| load.adapter(adapter(name)));
    Opt::load(model(base), load).unwrap_or_else(|e| panic!("{names:?}: {e}"))
}

#[test]
fn logits_are_pefts() {
    for name in names() {
        let (meta, arrays) = expected(&name);
        let opt = load(&meta.model, &[&name]);
        let adapted = opt.adapted(&name).unwrap();
        let plain = Opt::load(model(&meta.model), backend::load()).unwrap();
        for (index, ids) in meta.sequences.iter().enumerate() {
            let logits = adapted.logits(ids).unwrap();
            assert_close(logits.view(), arrays.matrix(&format!("seq{index}.logits")).view(), &name);
            // Without the adapter it is the model.
            backend::assert_same_array(opt.logits(ids).unwrap().view(), plain.logits(ids).unwrap().view());
        }
    }
}

#[test]
fn generating_scoring_and_sessions_wear_it() {
    for name in names() {
        let (meta, arrays) = expected(&name);
        let opt = load(&meta.model, &[&name]);
        let adapted = opt.adapted(&name).unwrap();
        let greedy = meta.greedy.unwrap();
        if greedy.gap > 1e-3 {
            let config = GenerationConfig::default().max_new_tokens(8).min_new_tokens(8);
            let by_name = Request::new(greedy.prompt.clone()).config(config.clone()).adapter(&name);
            assert_eq!(opt.generate_batch([by_name]).unwrap()[0].ids(), greedy.output, "{name}");
            let mut session = adapted.session();
            session.append(&greedy.prompt[..4]).unwrap();
            let mut other = session.fork().unwrap();
            let found = session.generate(&greedy.prompt[4..], &config).unwrap();
            assert_eq!(found.ids(), greedy.output, "{name}, in a session");
            let bytes = opt_backend::block_on(other.to_bytes_async()).unwrap();
            let restore = |opt: &Opt| opt_backend::block_on(Session::from_bytes_async(opt, &bytes));
            restore(&opt).err().expect("kept with an adapter, restored without");
            other = restore(&adapted).unwrap();
            let found = other.generate(&greedy.prompt[4..], &config).unwrap();
            assert_eq!(found.ids(), greedy.output, "{name}, in a session that was kept");
        }
        let ids = &meta.sequences[0];
        let logits = arrays.matrix("seq0.logits");
        let scored = adapted.score(&[ScoreInput::all(ids.clone()), ScoreInput::all(ids.clone())]).unwrap();
        for (row, log_prob) in scored[1].log_probs.iter().enumerate() {
            let row_logits = logits.row(row).mapv(f64::from);
            let sum = row_logits.mapv(f64::exp).sum().ln();
            let expected = row_logits[ids[row + 1] as usize] - sum;
            assert!((f64::from(*log_prob) - expected).abs() < 1e-4, "{name}: {log_prob} is not {expected}");
        }
        // Hidden states are those of the tokens, not of what stands before them.
        let hidden = adapted.hidden_states(ids).unwrap();
        assert!(hidden.iter().all(|states| states.nrows() == ids.len()), "{name}");
        let attentions = adapted.attentions(ids).unwrap();
        let front = adapter(&name).config().virtual_tokens();
        assert_eq!(attentions[0].dim().1, ids.len(), "{name}");
        assert_eq!(attentions[0].dim().2, ids.len() + front, "{name}");
    }
}

#[test]
fn merged_models_are_the_adapted_ones() {
    let folder = tempfile::tempdir().unwrap();
    for name in names() {
        let (meta, arrays) = expected(&name);
        let (base, adapter) = (checkpoint(&meta.model), adapter(&name));
        let output = folder.path().join(&name);
        let merged = merge(&base, &adapter, &output, MergeOptions::default());
        if adapter.config().lora().is_none() {
            let error = merged.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Unsupported);
            assert!(error.to_string().contains("cannot be merged"), "{error}");
            continue;
        }
        merged.unwrap_or_else(|e| panic!("{name}: {e}"));
        let opt = Opt::load(&output, backend::load()).unwrap();
        assert!(opt.warnings().is_empty(), "{name}: {:?}", opt.warnings());
        let half = meta.model != "untied";
        for (index, ids) in meta.sequences.iter().enumerate() {
            let logits = opt.logits(ids).unwrap();
            // Rounded to the f16 of the base.
            let key = if meta.merged { "merged" } else { "logits" };
            let expected = arrays.matrix(&format!("seq{index}.{key}"));
            let off = (&logits - &expected).mapv(f32::abs).fold(0.0f32, |most, v| most.max(*v));
            let most = if half { 2e-2 } else { 1e-4 };
            assert!(off < most, "{name}: off by {off}");
        }
    }
}

/// In f32, merging is exact: the base is written in f32 first.
#[test]
fn merging_in_f32_and_back() {
    let folder = tempfile::tempdir().unwrap();
    let options = || opt_core::checkpoint::ConvertOptions::default().dtype(DType::F32);
    for name in [
        "plain",
        "patterns",
        "dora",
        "dora_post",
        "bias_all",
        "embedding",
        "embedding_dora",
        "saved_tables",
        "head",
    ] {
        let (meta, arrays) = expected(name);
        let base = folder.path().join(format!("{name}-base"));
        opt_core::checkpoint::convert(model(&meta.model), &base, options()).unwrap();
        let output = folder.path().join(name);
        let base = Checkpoint::open(&base).unwrap();
        merge(&base, &adapter(name), &output, MergeOptions::default()).unwrap();
        let opt = Opt::load(&output, backend::load()).unwrap();
        for (index, ids) in meta.sequences.iter().enumerate() {
            let key = if meta.merged { "merged" } else { "logits" };
            let expected = arrays.matrix(&format!("seq{index}.{key}"));
            assert_close(opt.logits(ids).unwrap().view(), expected.view(), name);
        }

        let adapter = adapter(name);
        for target in adapter.config().lora().unwrap().targets(base.config(), &[]).unwrap() {
            let shapes = base.config().tensor_shapes();
            let weight = format!("{}.weight", target.module);
            let Some((_, shape)) = shapes.iter().find(|(name, _)| *name == weight) else { continue };
            let before = base.tensor(&weight, shape).unwrap().matrix().unwrap().to_f32();
            let mut weight = before.clone();
            let merged = adapter.merge_weight(base.config(), &target.module, &mut weight).unwrap();
            assert!((&weight - &before).iter().any(|v| v.abs() > 1e-2), "{name}");
            adapter.unmerge_weight(base.config(), &target.module, &mut weight, &merged).unwrap();
            assert_close(weight.view(), before.view(), "unmerged");
        }
    }
    let error =
        merge(&checkpoint("pre_ln"), &adapter("plain"), folder.path(), MergeOptions::default()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Option);
    let config =
        OptConfig::from_json(&fs::read_to_string(model("pre_ln").join("config.json")).unwrap()).unwrap();
    adapter("plain")
        .merge_weight(&config, "layers.0.self_attn.q_proj", &mut Array2::zeros((2, 2)))
        .unwrap_err();
}

#[test]
fn files_are_pefts_key_for_key() {
    let folder = tempfile::tempdir().unwrap();
    for name in names() {
        let adapter = adapter(&name);
        let config = checkpoint(&expected(&name).0.model).config().clone();
        let slots = adapter.config().slots(&config).unwrap();
        let slots: BTreeMap<String, Vec<usize>> =
            slots.into_iter().map(|slot| (slot.key, slot.shape)).collect();
        let found: BTreeMap<String, Vec<usize>> =
            adapter.tensors().iter().map(|(key, tensor)| (key.clone(), tensor.shape().to_vec())).collect();
        assert_eq!(slots, found, "{name}");

        let output = folder.path().join(&name);
        adapter.save(&output).unwrap();
        adapter.save(&output).unwrap();
        let again = Adapter::open(&output).unwrap();
        assert_eq!(again, adapter, "{name}");
        let theirs: serde_json::Value = read(self::folder(&name).join("adapter_config.json"));
        let mut ours: serde_json::Value = read(output.join("adapter_config.json"));
        if name == "p_tuning" {
            assert_eq!(ours["peft_type"], "PROMPT_TUNING");
            continue;
        }
        // No key is left out, and each has the value it had; init_weights is newer than what PEFT needs.
        for (key, value) in theirs.as_object().unwrap() {
            let ours = ours[key].take();
            if key == "init_weights" {
                continue;
            }
            assert_eq!(&ours, value, "{name}: {key}");
        }
        let mut files: Vec<_> = fs::read_dir(&output)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        files.sort();
        assert_eq!(files, ["adapter_config.json", "adapter_model.safetensors"]);
    }
}

#[test]
fn peft_reads_what_is_written() {
    let Some(python) = std::env::var_os("OPT_PEFT_PYTHON") else {
        return backend::skipped("no PEFT: OPT_PEFT_PYTHON names no Python that has it");
    };
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("merged")).unwrap();
    for name in names() {
        let adapter = adapter(&name);
        adapter.save(folder.path().join(&name)).unwrap();
        if adapter.config().lora().is_some() {
            let base = checkpoint(&expected(&name).0.model);
            merge(&base, &adapter, &folder.path().join("merged").join(&name), MergeOptions::default())
                .unwrap();
        }
    }
    let script = fixtures().join("load_adapters.py");
    let ran = std::process::Command::new(python).arg(script).arg(folder.path()).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(ran.status.success(), "{}", text(&ran.stderr));
    eprintln!("{}", text(&ran.stdout));
}

#[test]
fn a_batch_may_wear_several() {
    let (meta, arrays) = expected("mixed");
    let opt = load(
        &meta.model,
        &["plain", "other", "prefix", "prompt", "dora", "bias_all", "saved", "saved_tables"],
    );
    let ids = |name: &String| if name == "__base__" { None } else { Some(name.clone()) };
    let worn: Vec<Option<String>> = meta.adapters.iter().map(ids).collect();
    let each = meta.sequences.iter().zip(&worn);
    let sequences = each.map(|(ids, name)| {
        Sequence::new(&ids[..]).want(Want::Logits { rows: ids.len() }).adapter(name.as_deref())
    });
    let outputs =
        opt.engine().forward_blocking(Forward { sequences: sequences.collect(), ..Forward::default() });
    for (index, output) in outputs.unwrap().into_iter().enumerate() {
        let logits = output.logits.unwrap();
        assert_close(logits.view(), arrays.matrix(&format!("seq{index}.logits")).view(), "mixed");
    }

    // All kinds at once say the same as each alone; with caches as well.
    let all =
        ["plain", "", "prefix", "dora", "prompt", "bias_all", "other", "saved", "saved_tables", "saved", ""];
    let (meta, _) = expected("plain");
    let rows: Vec<&[u32]> = (0..all.len()).map(|i| &meta.sequences[0][i % 2..5 + i % 4]).collect();
    let name = |name: &'static str| Some(name).filter(|name| !name.is_empty());
    let sequences: Vec<Sequence<'_>> = all
        .iter()
        .zip(&rows)
        .map(|(worn, ids)| Sequence::new(*ids).want(Want::Logits { rows: ids.len() }).adapter(name(worn)))
        .collect();
    let outputs = opt.engine().forward_blocking(Forward { sequences, ..Forward::default() }).unwrap();
    let mut caches: Vec<_> = all.iter().map(|_| opt.engine().new_cache(CacheDType::F32).unwrap()).collect();
    let mut stepped = vec![Vec::new(); all.len()];
    for (from, to) in [(0, 2), (2, 3), (3, 4)] {
        let sequences = all.iter().zip(&rows).zip(&mut caches).map(|((worn, ids), cache)| {
            let ids = &ids[from..to];
            let mut sequence = Sequence::new(ids).want(Want::Logits { rows: ids.len() }).adapter(name(worn));
            sequence.cache = Some(cache);
            sequence
        });
        let batch = Forward { sequences: sequences.collect(), ..Forward::default() };
        for (logits, output) in stepped.iter_mut().zip(opt.engine().forward_blocking(batch).unwrap()) {
            logits.push(output.logits.unwrap());
        }
    }
    for (index, output) in outputs.into_iter().enumerate() {
        let alone = match name(all[index]) {
            Some(name) => opt.adapted(name).unwrap().logits(rows[index]).unwrap(),
            None => opt.logits(rows[index]).unwrap(),
        };
        let logits = output.logits.unwrap();
        assert_close(logits.view(), alone.view(), all[index]);
        let views: Vec<_> = stepped[index].iter().map(|rows| rows.view()).collect();
        let stepped = ndarray::concatenate(ndarray::Axis(0), &views).unwrap();
        assert_close(stepped.view(), alone.slice(s![..4, ..]), all[index]);
        assert_eq!(caches[index].len(), 4);
    }

    // What a cache holds belongs to its adapter.
    let error = |worn, cache: &mut opt_core::engine::KvCache| {
        let mut sequence = Sequence::new(&[3, 4][..]).adapter(worn);
        sequence.cache = Some(cache);
        opt.engine().forward_blocking(Forward { sequences: vec![sequence], ..Forward::default() })
    };
    let found = error(Some("other"), &mut caches[2]).unwrap_err();
    assert_eq!(
        found.to_string(),
        r#"expected adapter "prefix" as in what the cache holds, found adapter "other""#
    );
    caches[2].truncate(0).unwrap();
    error(Some("prefix"), &mut caches[2]).unwrap();
    caches[2].truncate(0).unwrap();
    error(None, &mut caches[2]).unwrap();
    assert_eq!(caches[2].len(), 2);
    let found = error(Some("nobody"), &mut caches[2]).unwrap_err();
    assert!(
        found.to_string().starts_with(r#"no adapter "nobody": loaded are "plain", "other", "#),
        "{found}"
    );

    // And so do requests.
    let config = GenerationConfig::default().max_new_tokens(5).min_new_tokens(5);
    let request = |worn| {
        let request = Request::new(&meta.sequences[0][..]).config(config.clone());
        if let Some(name) = name(worn) { request.adapter(name) } else { request }
    };
    let together = opt.generate_batch(all.map(request)).unwrap();
    for (together, worn) in together.iter().zip(all) {
        assert_eq!(together.ids(), opt.generate_batch([request(worn)]).unwrap()[0].ids(), "{worn}");
    }
    opt.generate_batch([Request::new(vec![3]).adapter("nobody")]).unwrap_err();
}

#[test]
fn beside_weights_in_fewer_bits() {
    for spec in [QuantSpec::int8(), QuantSpec::int4()] {
        for name in ["plain", "dora", "embedding_tied"] {
            let (meta, _) = expected(name);
            let base = backend::load_exact().quantize(spec);
            let opt = Opt::load(model(&meta.model), base.adapter(adapter(name))).unwrap();
            // The same numbers, plain.
            let folder = tempfile::tempdir().unwrap();
            let base = dequantized(&meta.model, &spec, folder.path());
            let reference =
                Opt::load(&base, Load::on(opt_backend::Reference::new()).adapter(adapter(name))).unwrap();
            for ids in &meta.sequences {
                let found = opt.adapted(name).unwrap().logits(ids).unwrap();
                let expected = reference.adapted(name).unwrap().logits(ids).unwrap();
                assert_close(found.view(), expected.view(), name);
            }
        }
    }
    let (meta, arrays) = expected("plain");
    for dtype in [DType::BF16, DType::F16] {
        let opt = Opt::load(model(&meta.model), backend::load_exact().dtype(dtype).adapter(adapter("plain")));
        let Ok(opt) = opt else { continue };
        let logits = opt.adapted("plain").unwrap().logits(&meta.sequences[0]).unwrap();
        let off =
            (&logits - &arrays.matrix("seq0.logits")).mapv(f32::abs).fold(0.0f32, |most, v| most.max(*v));
        assert!(off < 0.1, "{dtype}: off by {off}");
    }
}

/// A model with the numbers that the quantized one has.
fn dequantized(name: &str, spec: &QuantSpec, folder: &std::path::Path) -> PathBuf {
    let base = checkpoint(name);
    let weights =
        opt_core::quantize::quantize_weights(&base, spec, opt_core::quantize::QuantizeOptions::default())
            .unwrap();
    let mut tensors: Vec<(String, Vec<usize>, Vec<f32>)> = Vec::new();
    for (name, shape) in base.config().tensor_shapes() {
        let values = match (weights.get(&name), shape.len()) {
            (Some(weight), _) => weight.dequantize().iter().copied().collect(),
            (None, 2) => {
                base.tensor(&name, &shape).unwrap().matrix().unwrap().to_f32().iter().copied().collect()
            }
            _ => base.tensor(&name, &shape).unwrap().vector().unwrap().to_f32().to_vec(),
        };
        tensors.push((format!("model.decoder.{name}"), shape, values));
    }
    let views = tensors.iter().map(|(name, shape, values)| {
        let data = bytemuck::cast_slice(values);
        (name, safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.clone(), data).unwrap())
    });
    fs::write(folder.join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
    fs::copy(model(name).join("config.json"), folder.join("config.json")).unwrap();
    folder.to_owned()
}

#[test]
fn weighted_combinations_are_pefts() {
    #[derive(Deserialize)]
    struct Weighted {
        sources: Vec<String>,
        weights: Vec<f32>,
    }
    let config = checkpoint("pre_ln").config().clone();
    for (kind, combination) in [("cat", Combination::Cat), ("linear", Combination::Linear)] {
        let meta: Weighted = read(folder("weighted").join(kind).join("expected.json"));
        let sources: Vec<Adapter> =
            meta.sources.iter().map(|name| adapter(&format!("weighted/{name}"))).collect();
        let weighted: Vec<(&Adapter, f32)> = sources.iter().zip(meta.weights).collect();
        let found = combine(kind, &weighted, combination, &config).unwrap();
        let expected = adapter(&format!("weighted/{kind}"));
        assert_eq!(found.config().lora(), expected.config().lora());
        assert!(found.tensors().keys().eq(expected.tensors().keys()));
        for (key, tensor) in found.tensors() {
            assert_close(tensor.view(), expected.tensors()[key].view(), key);
        }
        found.check(&config).unwrap();
    }
    let (plain, other) = (adapter("plain"), adapter("other"));
    let error = combine("x", &[(&plain, 1.0), (&other, 1.0)], Combination::Linear, &config).unwrap_err();
    assert_eq!(error.to_string(), "linear combination: expected adapters of one rank, found 4 and 2");
    combine("x", &[], Combination::Cat, &config).unwrap_err();
    combine("x", &[(&plain, f32::NAN)], Combination::Cat, &config).unwrap_err();
    for name in ["dora", "bias_all", "saved", "prefix"] {
        let error = combine("x", &[(&adapter(name), 1.0)], Combination::Cat, &config).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
    }
    // Of an expression and of layers, the combination is the sum of both as well.
    let (regex, layers) = (adapter("regex"), adapter("layers"));
    let both = combine("both", &[(&regex, 0.5), (&layers, 2.0)], Combination::Cat, &config).unwrap();
    for module in ["layers.1.self_attn.q_proj", "layers.1.fc1", "layers.1.fc2", "layers.0.fc1"] {
        let shape = config
            .tensor_shapes()
            .into_iter()
            .find(|(name, _)| *name == format!("{module}.weight"))
            .unwrap()
            .1;
        let delta = |adapter: &Adapter| {
            let mut delta = Array2::zeros((shape[0], shape[1]));
            adapter.merge_weight(&config, module, &mut delta).unwrap();
            delta
        };
        let expected = delta(&regex) * 0.5 + delta(&layers) * 2.0;
        assert_close(delta(&both).view(), expected.view(), module);
    }
}

/// What eight adapters in a batch of eight cost beside one: at most 1.3 times as much. Run alone, in a release build.
#[test]
#[ignore = "measures time"]
fn eight_adapters_cost_little_more_than_one() {
    let tiny = common::tiny::Tiny {
        hidden: 768,
        embed: 768,
        layers: 4,
        heads: 12,
        vocab: 2000,
        context: 256,
        ..common::tiny::Tiny::default()
    };
    let model = OptConfig::from_json(&tiny.config()).unwrap();
    let config = opt_core::adapter::AdapterConfig::from_json(
        r#"{"peft_type": "LORA", "target_modules": "all-linear"}"#,
    );
    let config = config.unwrap();
    let slots = config.slots(&model).unwrap();
    let adapter = |index: usize| {
        let numbers = |shape: &[usize]| {
            ArrayD::from_shape_fn(shape, |i| ((i[0] * 7 + i[1] * 3 + index) % 11) as f32 * 0.01 - 0.05)
        };
        let tensors = slots.iter().map(|slot| (slot.key.clone(), numbers(&slot.shape)));
        Adapter::new(format!("a{index}"), config.clone(), tensors)
    };
    let load =
        |count| tiny.load((0..count).fold(backend::load(), |load, index| load.adapter(adapter(index))));
    let names: Vec<String> = (0..8).map(|index| format!("a{index}")).collect();
    // With so many loaded, what each row wears. The three take turns, so that whatever else the machine does hits all.
    type Worn = fn(usize) -> Option<usize>;
    let worn: [(Opt, Worn); 3] = [(load(1), |_| None), (load(1), |_| Some(0)), (load(8), Some)];
    let mut times = [const { Vec::new() }; 3];
    let caches =
        |opt: &Opt| -> Vec<_> { (0..8).map(|_| opt.engine().new_cache(CacheDType::F32).unwrap()).collect() };
    let mut caches: Vec<_> = worn.iter().map(|(opt, _)| caches(opt)).collect();
    for _ in 0..150 {
        for (((opt, worn), caches), times) in worn.iter().zip(&mut caches).zip(&mut times) {
            let sequences = caches.iter_mut().enumerate().map(|(row, cache)| {
                let name = worn(row).map(|adapter| &names[adapter][..]);
                let mut sequence = Sequence::new(&[5][..]).want(Want::TopK { rows: 1, k: 1 }).adapter(name);
                sequence.cache = Some(cache);
                sequence
            });
            let batch = Forward { sequences: sequences.collect(), ..Forward::default() };
            let started = std::time::Instant::now();
            opt.engine().forward_blocking(batch).unwrap();
            times.push(started.elapsed().as_secs_f64() * 1e3);
        }
    }
    let [none, one, eight] = times.map(|mut times| {
        times.sort_by(f64::total_cmp);
        times[times.len() / 4]
    });
    eprintln!("a step of eight rows: {none:.2} ms without adapter, {one:.2} with one, {eight:.2} with eight");
    assert!(eight <= 1.3 * one, "{eight:.2} ms beside {one:.2}");
}
