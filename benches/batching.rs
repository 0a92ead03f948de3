//! What a changing batch costs and gains: tokens a second of 1 to 32 streams, the part of a step that is not the
//! model's, and the time to the first token when all come at once.
//!
//! ```text
//! cargo run --release -p opt-benches --bin batching [int8|int8-f16|int8-fast|f32] [NEW_TOKENS] [WAY] [STREAMS]
//! ```
//!
//! WAY is how tokens are chosen (greedy, sampling or top-p), STREAMS one number of streams: without them, all ways and 1, 8
//! and 32 streams. `int8-f16` keeps keys and values in f16, `int8-fast` also rounds activations to one byte (`--compute int8`).

use opt_benches::{ids, machine, opt_125m, random};
use opt_core::{
    CacheDType, Load, Opt, Request,
    backends::{Compute, Cpu},
    batching::{Batch, BatchOptions, Event, Task, TaskId},
    generation::GenerationConfig,
    quantize::QuantSpec,
};
use std::{collections::HashMap, error::Error, time::Instant};

/// Tokens of a prompt.
const PROMPT: usize = 64;

/// What came of a run.
struct Run {
    tokens: usize,
    seconds: f64,
    /// Part of the steps' time that the model took.
    model: f64,
    /// Seconds to the first token of each stream, in the order of arrival.
    first: Vec<f64>,
    rows: usize,
}

fn run(
    opt: &Opt,
    streams: usize,
    settings: &GenerationConfig,
    alternatives: usize,
    dtype: CacheDType,
) -> opt_core::Result<Run> {
    let mut batch = Batch::new(opt, BatchOptions::default().share_prefixes(false))?;
    let mut arrived: HashMap<TaskId, usize> = HashMap::new();
    for stream in 0..streams {
        let prompt = ids(PROMPT + stream, opt.config()).split_off(stream);
        let request = Request::new(prompt).config(settings.clone().seed(stream as u64));
        let task = Task::generate(opt, request.top_alternatives(alternatives).cache_dtype(dtype))?;
        arrived.insert(batch.add(task)?, stream);
    }
    let mut first = vec![0.0; streams];
    let mut tokens = 0;
    let started = Instant::now();
    while !batch.is_idle() {
        for event in batch.step()? {
            if let Event::Token { task, .. } = event {
                tokens += 1;
                if let Some(place) = arrived.remove(&task).and_then(|stream| first.get_mut(stream)) {
                    *place = started.elapsed().as_secs_f64();
                }
            }
        }
    }
    let stats = batch.stats();
    let model = stats.model_time.as_secs_f64() / stats.step_time.as_secs_f64();
    let seconds = started.elapsed().as_secs_f64();
    Ok(Run { tokens, seconds, model, first, rows: (streams * PROMPT) })
}

/// Rows a second of one long prompt.
fn prefill(opt: &Opt) -> opt_core::Result<f64> {
    const ROWS: usize = 512;
    let mut batch = Batch::new(opt, BatchOptions::default().share_prefixes(false))?;
    let settings = GenerationConfig::default().max_new_tokens(1);
    batch.add(Task::generate(opt, Request::new(ids(ROWS, opt.config())).config(settings))?)?;
    let started = Instant::now();
    while !batch.is_idle() {
        batch.step()?;
    }
    Ok(ROWS as f64 / started.elapsed().as_secs_f64())
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let format = args.next().unwrap_or_else(|| "int8".to_owned());
    let new: usize = args.next().map_or(Ok(64), |text| text.parse())?;
    let only = args.next();
    let streams: Vec<usize> = match args.next() {
        Some(text) => vec![text.parse()?],
        None => vec![1, 8, 32],
    };
    let load = match &*format {
        "int8" | "int8-f16" => Load::default().quantize(QuantSpec::int8()),
        "int8-fast" => {
            let cpu = Cpu::builder().compute(Compute::Int8).build()?;
            Load::on(cpu).quantize(QuantSpec::int8())
        }
        "f32" => Load::default(),
        other => {
            return Err(format!("format: expected int8, int8-f16, int8-fast or f32, found {other}").into());
        }
    };
    let dtype = if format.contains('-') { CacheDType::F16 } else { CacheDType::F32 };
    let opt = Opt::assemble(&random(&opt_125m()?)?, None, None, load)?;
    println!(
        "{}; OPT-125m's shape, {}, keys and values in {dtype:?}, prompts of {PROMPT} tokens, {new} new ones\n",
        machine(),
        opt.weights()
    );
    let prefill = prefill(&opt)?;
    println!(
        "| way | streams | tokens/s | of one | outside the model | first token of the last, of its ideal |"
    );
    println!("|---|---|---|---|---|---|");
    let greedy = GenerationConfig::default().max_new_tokens(new);
    let sampled = greedy.clone().do_sample(true).top_k(0);
    let filtered = sampled.clone().top_p(0.9).temperature(0.8);
    // Random weights are as hard as can be for top-p: nearly all tokens are about as probable.
    let ways = [("greedy", &greedy, 0), ("sampling", &sampled, 0), ("top-p 0.9, 5 log-probs", &filtered, 5)];
    if let Some(only) = only.as_ref().filter(|only| !ways.iter().any(|way| way.0.starts_with(only.as_str())))
    {
        return Err(format!("way: expected greedy, sampling or top-p, found {only}").into());
    }
    for (name, settings, alternatives) in ways {
        if only.as_ref().is_some_and(|only| !name.starts_with(only.as_str())) {
            continue;
        }
        let mut one = None;
        for &streams in &streams {
            run(&opt, streams, &settings.clone().max_new_tokens(4), alternatives, dtype)?;
            let Run { tokens, seconds, model, first, rows } =
                run(&opt, streams, settings, alternatives, dtype)?;
            let speed = tokens as f64 / seconds;
            let one = *one.get_or_insert(speed);
            // The ideal: all prompts' rows one after the other, as fast as a long prompt runs alone.
            let ideal = rows as f64 / prefill;
            let last = first.iter().copied().fold(0.0, f64::max);
            println!(
                "| {name} | {streams} | {speed:.0} | {:.2} | {:.1} % | {last:.3} s, {:.2} |",
                speed / one,
                100.0 * (1.0 - model),
                last / ideal
            );
        }
    }
    Ok(())
}
