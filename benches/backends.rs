//! Load, first token, prefill and decode of the OPT-125m shape: every backend of the build beside every other, in one
//! process.
//!
//!     cargo bench -p opt-benches --features tch,candle,wgpu
//!
//! Criterion's report is target/criterion/report/index.html. A word behind `--` picks some: `-- cpu`, `-- decode`.

use criterion::{
    BatchSize, BenchmarkId, Criterion, SamplingMode, Throughput, criterion_group, criterion_main,
};
use opt_benches::{caches, ids, load, opt_125m, random, step};
use opt_core::{
    Opt,
    backends::{self, BackendOptions},
};
use std::time::Duration;

/// Adds one backend's figures to the groups that all share.
fn measure(c: &mut Criterion, name: &str, make: &dyn Fn() -> Opt) {
    let mut in_group =
        |group: &str, tokens: Option<usize>, body: &mut dyn FnMut(&mut criterion::Bencher<'_>)| {
            let mut group = c.benchmark_group(group);
            group.sample_size(10).sampling_mode(SamplingMode::Flat).warm_up_time(Duration::from_millis(500));
            if let Some(tokens) = tokens {
                group.throughput(Throughput::Elements(tokens as u64));
            }
            group.bench_function(BenchmarkId::from_parameter(name), |b| body(b));
        };
    in_group("load", None, &mut |b| b.iter_with_large_drop(make));
    // Made when the first figure that was asked for needs it.
    let opt = std::cell::LazyCell::new(make);
    for (group, tokens) in [("first token", 32), ("prefill 128", 128), ("prefill 512", 512)] {
        let counted = (tokens > 32).then_some(tokens);
        in_group(group, counted, &mut |b| {
            let prompt = ids(tokens, opt.config());
            b.iter_batched_ref(
                || caches(&opt, 1).expect("cache"),
                |caches| step(&opt, caches, &prompt).expect("forward"),
                BatchSize::PerIteration,
            );
        });
    }
    for batch in [1, 8] {
        in_group(&format!("decode, batch {batch}"), Some(batch), &mut |b| {
            let mut caches = caches(&opt, batch).expect("cache");
            step(&opt, &mut caches, &ids(32, opt.config())).expect("forward");
            b.iter(|| {
                step(&opt, &mut caches, &[7]).expect("forward");
                // Every step is the 33rd, however many there are.
                caches.iter_mut().for_each(|cache| cache.truncate(32).expect("truncate"));
            });
        });
    }
}

fn backends(c: &mut Criterion) {
    let checkpoint = random(&opt_125m().expect("config")).expect("checkpoint");
    for (backend, info) in backends::list(&BackendOptions::default()) {
        let info = match info {
            Ok(info) => info,
            Err(why) => {
                eprintln!("skipped: {backend}: {why}");
                continue;
            }
        };
        eprintln!("{backend}: {}", info.device);
        for dtype in info.dtypes {
            measure(c, &format!("{backend} {dtype}"), &|| load(&checkpoint, backend, dtype).expect("model"));
        }
    }
}

criterion_group!(benches, backends);
criterion_main!(benches);
