//! The candle backend beside `candle_transformers::models::bigcode`, the model of candle-transformers that is nearest
//! to OPT: GPT-BigCode of the shape of OPT-125m on the CPU, with random f32 weights.
//!
//!     cargo bench -p opt-benches --features candle --bench candle_bigcode [-- ROUNDS]
//!
//! With `multi_query` off, which would be OPT's attention, BigCode of candle-transformers 0.11.1 fails at its first
//! reshape. With it on, keys and values have one head; its feed-forward block is made wider by as much, so that both
//! have the same number of weights and multiplications. What differs besides: BigCode has a tanh GELU where OPT has a
//! ReLU, and concatenates its cache (a twelfth of OPT's) at each step. "By candle's ops" is opt-rs computing as it
//! does on GPUs: OPT as a candle user would write it, with a cache that is written in place.
//!
//! Each gives the logits of the last row, of which the best id is taken. All contestants take turns within each round,
//! and the ratio is the median of the rounds' ratios; a shared machine moves too much for anything else.

use candle_core::{D, DType as CandleDType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::bigcode::{Config, GPTBigCode};
use opt_backend_candle::Candle;
use opt_benches::{ids, load, median, opt_125m, random};
use opt_core::{
    CacheDType, DType, Load, Opt,
    config::OptConfig,
    engine::{Forward, KvCache, Sequence, Want},
};
use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

/// Tokens before decoding is measured, and steps that are.
const PROMPT: usize = 32;
const STEPS: usize = 48;

/// What is measured.
#[derive(Clone, Copy, PartialEq)]
enum Work {
    /// Steps of one token.
    Decode,
    /// One prompt of this many tokens.
    Prefill(usize),
}

/// Who is measured: does the work once, on a fresh cache, and says how long it took.
type Contestant<'a> = (String, Box<dyn FnMut(Work) -> Duration + 'a>);

fn main() {
    // Cargo passes `--bench`.
    let rounds = std::env::args().skip(1).find_map(|arg| arg.parse().ok()).unwrap_or(7);
    let config = opt_125m().expect("config");
    let models: Vec<(String, Opt)> = {
        let checkpoint = random(&config).expect("checkpoint");
        let dtypes = [DType::F32, DType::F16, DType::BF16];
        let mut models: Vec<_> = dtypes
            .map(|dtype| (format!("opt-rs {dtype}"), load(&checkpoint, "candle", dtype).expect("model")))
            .into();
        let plain = Candle::builder().plain(true).build().expect("the CPU");
        let plain = Opt::assemble(&checkpoint, None, None, Load::on(plain)).expect("model");
        models.push(("opt-rs f32 by candle's ops".to_owned(), plain));
        models
    };
    let weights = bigcode_weights(&config).expect("weights");

    let mut contestants: Vec<Contestant<'_>> = Vec::new();
    for (name, opt) in &models {
        let config = &config;
        contestants.push((name.clone(), Box::new(move |work| ours(opt, config, work))));
    }
    for pooled in [false, true] {
        let name = if pooled { "bigcode f32, in candle's pool" } else { "bigcode f32" };
        let (weights, config) = (&weights, &config);
        contestants.push((name.to_owned(), Box::new(move |work| theirs(weights, config, work, pooled))));
    }

    println!(
        "{rounds} rounds; milliseconds are medians, ratios are of the other's time to that of opt-rs f32"
    );
    for work in [Work::Decode, Work::Prefill(128), Work::Prefill(512)] {
        match work {
            Work::Decode => {
                println!("\ndecode, batch 1, a token at {PROMPT} to {} positions", PROMPT + STEPS)
            }
            Work::Prefill(tokens) => println!("\nprefill of {tokens} tokens"),
        }
        let mut times = vec![Vec::new(); contestants.len()];
        for round in 0..=rounds {
            for ((_, run), times) in contestants.iter_mut().zip(&mut times) {
                let time = run(work).as_secs_f64() * 1e3;
                // The first round warms up.
                if round > 0 {
                    times.push(if work == Work::Decode { time / STEPS as f64 } else { time });
                }
            }
        }
        for ((name, _), own) in contestants.iter().zip(&times) {
            let ratios = own.iter().zip(&times[0]).map(|(theirs, ours)| theirs / ours).collect();
            println!("  {name:32} {:8.2} ms   ratio {:.2}", median(own.clone()), median(ratios));
        }
    }
}

fn ours(opt: &Opt, config: &OptConfig, work: Work) -> Duration {
    let mut cache = opt.engine().new_cache(CacheDType::F32).expect("cache");
    let step = |cache: &mut KvCache, tokens: &[u32]| {
        let sequence =
            Sequence { cache: Some(cache), ..Sequence::new(tokens).want(Want::TopK { rows: 1, k: 1 }) };
        let forward = Forward { sequences: vec![sequence], ..Forward::default() };
        let outputs = opt.engine().forward_blocking(forward).expect("forward");
        outputs[0].top_k[0].ids[0]
    };
    measure(work, config, |tokens, _| step(&mut cache, tokens))
}

fn theirs(weights: &HashMap<String, Tensor>, config: &OptConfig, work: Work, pooled: bool) -> Duration {
    // Its cache cannot be emptied, so each run has a model of its own over the same weights.
    let vb = VarBuilder::from_tensors(weights.clone(), CandleDType::F32, &Device::Cpu);
    let mut model = GPTBigCode::load(vb, bigcode_config(config)).expect("model");
    let mut step = |tokens: &[u32], past: usize| {
        let mut run = || {
            let input = Tensor::new(tokens, &Device::Cpu)?.unsqueeze(0)?;
            model.forward(&input, past)?.argmax(D::Minus1)?.squeeze(0)?.to_scalar::<u32>()
        };
        if pooled { Device::Cpu.with_context(run) } else { run() }.expect("forward")
    };
    measure(work, config, &mut step)
}

/// Times `step(tokens, tokens before)`, which gives the next token.
fn measure(work: Work, config: &OptConfig, mut step: impl FnMut(&[u32], usize) -> u32) -> Duration {
    match work {
        Work::Prefill(tokens) => {
            let prompt = ids(tokens, config);
            let start = Instant::now();
            step(&prompt, 0);
            start.elapsed()
        }
        Work::Decode => {
            let mut token = step(&ids(PROMPT, config), 0);
            let start = Instant::now();
            for i in 0..STEPS {
                token = step(&[token], PROMPT + i);
            }
            start.elapsed()
        }
    }
}

fn bigcode_config(config: &OptConfig) -> Config {
    Config {
        vocab_size: config.vocab_size,
        max_position_embeddings: config.max_position_embeddings,
        num_hidden_layers: config.num_hidden_layers,
        hidden_size: config.hidden_size,
        layer_norm_epsilon: 1e-5,
        n_inner: Some(bigcode_ffn(config)),
        num_attention_heads: config.num_attention_heads,
        multi_query: true,
        use_cache: true,
    }
}

/// The width of its feed-forward block that makes up for the keys and values it lacks.
fn bigcode_ffn(config: &OptConfig) -> usize {
    config.ffn_dim + config.hidden_size - config.head_dim()
}

/// Random weights by BigCode's names. (Zeros would all be one page of memory.)
fn bigcode_weights(config: &OptConfig) -> candle_core::Result<HashMap<String, Tensor>> {
    let (hidden, ffn) = (config.hidden_size, bigcode_ffn(config));
    let mut weights = HashMap::new();
    let mut add = |name: String, shape: &[usize]| -> candle_core::Result<()> {
        weights.insert(format!("transformer.{name}"), Tensor::randn(0f32, 0.02, shape, &Device::Cpu)?);
        Ok(())
    };
    add("wte.weight".to_owned(), &[config.vocab_size, hidden])?;
    add("wpe.weight".to_owned(), &[config.max_position_embeddings, hidden])?;
    let mut layers: Vec<(String, Vec<usize>)> = vec![("ln_f".to_owned(), vec![hidden])];
    for i in 0..config.num_hidden_layers {
        for (name, shape) in [
            ("ln_1", vec![hidden]),
            ("ln_2", vec![hidden]),
            ("attn.c_attn", vec![hidden + 2 * config.head_dim(), hidden]),
            ("attn.c_proj", vec![hidden, hidden]),
            ("mlp.c_fc", vec![ffn, hidden]),
            ("mlp.c_proj", vec![hidden, ffn]),
        ] {
            layers.push((format!("h.{i}.{name}"), shape));
        }
    }
    for (name, shape) in layers {
        add(format!("{name}.weight"), &shape)?;
        add(format!("{name}.bias"), &shape[..1])?;
    }
    Ok(weights)
}
