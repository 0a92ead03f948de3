//! What a training is said to take in memory, beside what this process takes while it makes steps.

mod common;

use common::backend;
use opt_core::{
    DType,
    adapter::{AdapterConfig, AdapterMethod, LoraConfig, Names, PrefixConfig, PromptConfig},
    config::OptConfig,
    tuning::{
        DistillOptions, Example, Method, Optimizer, StepOptions, TrainOptions, TrainingMemory, Tuner,
        new_model,
    },
};
use std::{
    alloc::{GlobalAlloc, Layout, System},
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

/// The system's allocator, which counts.
struct Counting;

static HELD: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

fn more(bytes: usize) {
    let held = HELD.fetch_add(bytes, Ordering::Relaxed) + bytes;
    PEAK.fetch_max(held, Ordering::Relaxed);
}

// SAFETY: all is handed on to the system's allocator; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        more(layout.size());
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        HELD.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(place, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// Tests come one after the other, so that what is measured is one training's.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

// Few rows of small matrices in many layers: the `cpu` backend keeps buffers of 64 KiB and more for the next step, and
// what is kept could not be told from what is held.
const BATCH: usize = 4;
const LENGTH: usize = 16;
const VOCABULARY: usize = 200;

fn config(layers: usize, projections: bool) -> OptConfig {
    let embed = if projections { 32 } else { 64 };
    let text = format!(
        r#"{{"model_type": "opt", "vocab_size": {VOCABULARY}, "hidden_size": 64, "num_hidden_layers": {layers},
             "num_attention_heads": 4, "ffn_dim": 192, "max_position_embeddings": 96,
             "word_embed_proj_dim": {embed}, "do_layer_norm_before": {}, "dropout": 0.1}}"#,
        !projections
    );
    OptConfig::from_json(&text).unwrap()
}

fn lora(change: impl FnOnce(&mut LoraConfig)) -> Method {
    let mut lora = LoraConfig::default();
    lora.target_modules = Names::Pattern(Names::ALL_LINEAR.to_owned());
    change(&mut lora);
    Method::adapter(lora, 3)
}

/// A module that is trained whole, beside terms.
fn saving(module: &str) -> Method {
    Method::adapter(AdapterConfig::new(AdapterMethod::Lora(LoraConfig::default())).save([module]), 1)
}

fn prefix(projection: bool) -> Method {
    let mut prefix = PrefixConfig::default();
    (prefix.sizes.num_virtual_tokens, prefix.prefix_projection) = (12, projection);
    Method::adapter(prefix, 3)
}

fn prompt() -> Method {
    let mut prompt = PromptConfig::default();
    prompt.sizes.num_virtual_tokens = 4;
    Method::adapter(AdapterConfig::new(AdapterMethod::Prompt(prompt)), 3)
}

/// What is held after a step, and the most that was held in one, less what was there before the model was loaded.
fn measured(config: &OptConfig, method: &Method, dtype: DType, options: &TrainOptions) -> [usize; 2] {
    let before = HELD.load(Ordering::Relaxed);
    let checkpoint = new_model(config, 1).unwrap();
    // What a whole model is made from stays, for what is written in the end; from disk it would be a mapped file.
    let stays = matches!(method, Method::Full(_));
    let before = if stays { HELD.load(Ordering::Relaxed) } else { before };
    // More threads have more scratch memory.
    let load = backend::load_with_threads(Some(1)).dtype(dtype);
    let mut tuner = Tuner::from_checkpoint(checkpoint, method.clone(), load).unwrap();
    let batch: Vec<Example> = (0..BATCH as u32)
        .map(|i| Example::new((0..LENGTH as u32).map(|j| 4 + (i * 31 + j * 7) % 190).collect()))
        .collect();
    let mut step = StepOptions::default();
    (step.optimizer, step.seed) = (options.optimizer, Some(1));
    step.gradient_checkpointing = options.gradient_checkpointing;
    // The first makes what the optimizer remembers; of the second, the last micro-batch runs beside all gradients.
    tuner.step(&[&batch], step).unwrap();
    step.step = 2;
    PEAK.store(HELD.load(Ordering::Relaxed), Ordering::Relaxed);
    tuner.step(&[&batch, &batch], step).unwrap();
    [HELD.load(Ordering::Relaxed), PEAK.load(Ordering::Relaxed)].map(|bytes| bytes - before)
}

/// A part of what was told, over what was found.
#[track_caller]
fn within(told: u64, found: usize, factor: f64, what: &str) {
    let ratio = told as f64 / found as f64;
    assert!((factor.recip()..factor).contains(&ratio), "{what}: told {told} bytes, found {found}");
}

#[test]
fn parameters_are_those_that_are_trained() {
    let _alone = alone();
    let modules =
        |lora: LoraConfig| AdapterConfig::new(AdapterMethod::Lora(lora)).save(["fc2", "final_layer_norm"]);
    let mut some = LoraConfig::default();
    (some.use_dora, some.bias) = (true, opt_core::adapter::Bias::All);
    for projections in [false, true] {
        let config = config(3, projections);
        for method in [
            Method::full(),
            Method::layers([2, 1]),
            lora(|_| ()),
            Method::adapter(some.clone(), 1),
            Method::adapter(modules(LoraConfig::default()), 1),
            lora(|lora| {
                (lora.lora_bias, lora.target_modules) = (true, Names::list(["lm_head", "fc1"]));
            }),
            lora(|lora| lora.target_modules = Names::list(["embed_tokens", "v_proj"])),
            saving("lm_head"),
            saving("embed_tokens"),
            prefix(false),
            prefix(true),
            prompt(),
        ] {
            for (optimizer, remembered) in [
                (Optimizer::default(), 8),
                (Optimizer::Sgd { momentum: 0.9 }, 4),
                (Optimizer::Sgd { momentum: 0.0 }, 0),
            ] {
                let options = TrainOptions::default().optimizer(optimizer);
                let checkpoint = new_model(&config, 1).unwrap();
                let tuner = Tuner::from_checkpoint(checkpoint, method.clone(), backend::load()).unwrap();
                let told = tuner.memory(&options, LENGTH).unwrap();
                let of_config =
                    TrainingMemory::of(&config, &method, DType::F32, None, &options, LENGTH).unwrap();
                assert_eq!(told, of_config, "{method:?}");
                let trained = tuner.trainable() as u64;
                assert_eq!(
                    (told.gradients, told.optimizer),
                    (4 * trained, remembered * trained),
                    "{method:?}"
                );
            }
        }
    }
}

#[test]
fn a_teacher_is_part_of_it() {
    let _alone = alone();
    let [student, teacher] = [config(2, false), config(3, true)];
    let tuner = || {
        let checkpoint = new_model(&student, 1).unwrap();
        Tuner::from_checkpoint(checkpoint, Method::full(), backend::load()).unwrap()
    };
    let options = TrainOptions::default();
    let alone = tuner().memory(&options, LENGTH).unwrap();
    let distill = DistillOptions::default().alpha_cos(0.1);
    let taught = tuner().distill(new_model(&teacher, 2).unwrap(), distill).unwrap();
    let told = taught.memory(&options, LENGTH).unwrap();
    // From 64 to 32 numbers, as the cosine compares what both heads see.
    let between = 4 * 64 * 32;
    assert_eq!(told.weights, alone.weights + 4 * teacher.parameters() + between);
    assert_eq!(told.gradients, 4 * taught.trainable() as u64);
    assert!(told.activations > alone.activations + 2 * 4 * (8 * LENGTH * VOCABULARY) as u64);
}

/// What stays between two steps: weights and what the optimizer remembers.
#[test]
fn what_stays_is_what_was_told() {
    let _alone = alone();
    if !["cpu", "reference"].contains(&backend::name()) {
        backend::skipped(format_args!("memory that {} holds elsewhere", backend::name()));
        return;
    }
    for optimizer in [Optimizer::default(), Optimizer::Sgd { momentum: 0.0 }] {
        for method in [Method::full(), lora(|_| ()), prefix(false)] {
            let config = config(4, false);
            let options = TrainOptions::default().optimizer(optimizer).batch_size(BATCH);
            let [stays, _] = measured(&config, &method, DType::F32, &options);
            let told = TrainingMemory::of(&config, &method, DType::F32, None, &options, LENGTH).unwrap();
            // Kernels round the rows of frozen weights up.
            within(told.weights + told.optimizer, stays, 1.3, &format!("{method:?} with {optimizer:?}"));
        }
    }
}

/// The most that is held in a step, and the part of it that activations are.
#[test]
fn the_peak_is_what_was_told() {
    let _alone = alone();
    if backend::name() != "cpu" {
        backend::skipped(format_args!("memory that {} holds elsewhere, or copies", backend::name()));
        return;
    }
    for (projections, method, dtype) in [
        (false, Method::full(), DType::F32),
        (false, Method::full(), DType::BF16),
        (true, Method::full(), DType::F32),
        (false, Method::layers([6, 7, 8, 9, 10, 11]), DType::F32),
        (false, lora(|_| ()), DType::F32),
        (false, lora(|lora| lora.lora_dropout = 0.1), DType::BF16),
        (false, lora(|lora| lora.use_dora = true), DType::F32),
        (false, lora(|lora| lora.target_modules = Names::list(["lm_head"])), DType::F32),
        (
            false,
            lora(|lora| (lora.use_dora, lora.target_modules) = (true, Names::list(["lm_head"]))),
            DType::F32,
        ),
        (false, lora(|lora| lora.target_modules = Names::list(["embed_tokens", "fc1"])), DType::F32),
        (false, saving("lm_head"), DType::F32),
        (false, saving("embed_tokens"), DType::BF16),
        (false, prefix(false), DType::F32),
        (false, prompt(), DType::F32),
    ] {
        let config = config(12, projections);
        for checkpointing in [false, true] {
            let options = TrainOptions::default().batch_size(BATCH).gradient_checkpointing(checkpointing);
            let [stays, peak] = measured(&config, &method, dtype, &options);
            let told = TrainingMemory::of(&config, &method, dtype, None, &options, LENGTH).unwrap();
            let what = format!("{method:?} in {dtype}, checkpointing {checkpointing}");
            within(told.total(), peak, 1.3, &what);
            let activations = peak - stays - told.gradients as usize;
            within(told.activations, activations, 1.3, &what);
        }
    }
}
