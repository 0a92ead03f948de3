//! Decode steps of a random model: how long the host records, and how long a step takes.
//!
//! ```text
//! cargo run --release -p opt-backend-wgpu --example step -- [--shape 125m|1.3b|novels] [--dtype f32|f16|bf16|int8|int4]
//!     [--batch N] [--steps N] [--past N] [--device NAME] [--submit-every N]
//!     [--plain] [--gpu-kernels]
//! ```
//!
//! `--plain` keeps to WebGPU's default limits, without subgroups and f16; `--gpu-kernels` takes a software adapter for a
//! GPU. The time to record is that of all calls of a
//! step up to the one that waits; on a GPU it overlaps with the work of earlier submissions.

#[allow(dead_code, missing_docs, unreachable_pub)]
#[path = "../tests/common/model.rs"]
mod model;

use model::{Model, Shape, Weights};
use opt_backend::{Backend, DType};
use opt_backend_wgpu::Wgpu;
use std::time::Instant;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let (mut shape, mut dtype, mut batch, mut steps, mut past) =
        ("125m".to_owned(), DType::F16.into(), 1, 100, 32);
    let mut builder = Wgpu::builder();
    while let Some(flag) = arguments.next() {
        let mut value = || arguments.next().ok_or(format!("{flag}: expected a value"));
        match flag.as_str() {
            "--shape" => shape = value()?,
            "--dtype" => {
                dtype = match value()?.as_str() {
                    "int8" => Weights::Integers(8),
                    "int4" => Weights::Integers(4),
                    name => Weights::Plain(name.parse()?),
                };
            }
            "--batch" => batch = value()?.parse()?,
            "--steps" => steps = value()?.parse()?,
            "--past" => past = value()?.parse()?,
            "--device" => builder = builder.device(value()?),
            "--submit-every" => builder = builder.submit_every(value()?.parse()?),
            "--gpu-kernels" => builder = builder.software(false),
            "--plain" => builder = builder.default_limits().features(false, false),
            _ => return Err(format!("unknown flag {flag}").into()),
        }
    }
    let positions = past + steps + 1;
    let shape = match shape.as_str() {
        "125m" => Shape { layers: 12, heads: 12, head_dim: 64, ffn: 3072, vocabulary: 50272, positions },
        "1.3b" => Shape { layers: 24, heads: 32, head_dim: 64, ffn: 8192, vocabulary: 50272, positions },
        "novels" => Shape { layers: 6, heads: 4, head_dim: 64, ffn: 1024, vocabulary: 8192, positions },
        other => return Err(format!("unknown shape {other}").into()),
    };
    let b = builder.build()?;
    println!("{:?}", b.info());
    let model = Model::new(&b, shape, dtype)?;
    let mut caches = (0..batch).map(|_| model.new_cache(&b)).collect::<Result<Vec<_>, _>>()?;
    let mut borrowed: Vec<_> = caches.iter_mut().collect();
    let prompt = vec![5; past];
    let before = Instant::now();
    model.step(&b, &vec![(&prompt[..], 0); batch], &mut borrowed, 1)?;
    println!("prefill of {batch} x {past}, compiling kernels: {:?}", before.elapsed());
    let mut others = (0..batch).map(|_| model.new_cache(&b)).collect::<Result<Vec<_>, _>>()?;
    let mut others: Vec<_> = others.iter_mut().collect();
    let before = Instant::now();
    model.step(&b, &vec![(&prompt[..], 0); batch], &mut others, 1)?;
    println!("prefill of {batch} x {past}: {:?}", before.elapsed());
    drop(others);

    let (mut record, mut total) = (Vec::new(), Vec::new());
    let mut token = [7];
    let counts = b.counters().counts();
    for i in 0..steps {
        let start = Instant::now();
        let logits = model.logits(&b, &vec![(&token[..], past + i); batch], &mut borrowed)?;
        // Reading submits.
        let readback = b.top_k(&logits, 1);
        record.push(start.elapsed());
        token[0] = b.block_on(readback)?[0].ids[0];
        total.push(start.elapsed());
    }
    let counts = b.counters().counts().since(&counts);
    record.sort();
    total.sort();
    println!("recording and submitting: {:?} at best, {:?} in the median", record[0], record[steps / 2]);
    println!("a step of batch {batch}: {:?} at best, {:?} in the median", total[0], total[steps / 2]);
    let total = total[steps / 2];
    println!("{:.1} tokens/s; {counts}", batch as f64 / total.as_secs_f64());
    println!(
        "{:.1} dispatches a step, {} MiB held",
        counts.dispatches as f64 / steps as f64,
        counts.device_bytes >> 20
    );
    Ok(())
}
