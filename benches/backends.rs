//! Prefill and decode of the OPT-125m shape, every backend of the build beside every other in one run.
//!
//!     cargo bench -p opt-benches

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use opt_benches::{ids, load, opt_125m, random};
use opt_core::{
    CacheDType, DType, Opt,
    backends::{self, BackendOptions},
    engine::{Forward, KvCache, Sequence, Want},
};

/// Runs `tokens` behind each cache and reads the last row's logits.
fn step(opt: &Opt, caches: &mut [KvCache], tokens: &[u32]) {
    let sequence =
        |cache| Sequence { cache: Some(cache), ..Sequence::new(tokens).want(Want::Logits { rows: 1 }) };
    let sequences = caches.iter_mut().map(sequence).collect();
    opt.engine().forward_blocking(Forward { sequences, ..Forward::default() }).expect("forward");
}

fn caches(opt: &Opt, batch: usize) -> Vec<KvCache> {
    (0..batch).map(|_| opt.engine().new_cache(CacheDType::F32).expect("cache")).collect()
}

fn backends(c: &mut Criterion) {
    let config = opt_125m().expect("config");
    let checkpoint = random(&config).expect("checkpoint");
    for (backend, info) in backends::list(&BackendOptions::default()) {
        let info = match info {
            Ok(info) => info,
            Err(why) => {
                eprintln!("skipped: {backend}: {why}");
                continue;
            }
        };
        for dtype in info.dtypes.iter().copied().filter(|dtype| *dtype != DType::F16) {
            let opt = load(&checkpoint, backend, dtype).expect("model");
            let mut group = c.benchmark_group(format!("{backend} {dtype}"));
            group.sample_size(10);
            for tokens in [128, 512] {
                let prompt = ids(tokens, &config);
                group.throughput(Throughput::Elements(tokens as u64));
                group.bench_function(BenchmarkId::new("prefill", tokens), |b| {
                    b.iter(|| step(&opt, &mut caches(&opt, 1), &prompt));
                });
            }
            for batch in [1, 8] {
                let mut caches = caches(&opt, batch);
                step(&opt, &mut caches, &ids(32, &config));
                group.throughput(Throughput::Elements(batch as u64));
                group.bench_function(BenchmarkId::new("decode", batch), |b| {
                    b.iter(|| {
                        step(&opt, &mut caches, &[7]);
                        // Every step is the 33rd, however many there are.
                        caches.iter_mut().for_each(|cache| cache.truncate(32).expect("truncate"));
                    });
                });
            }
        }
    }
}

criterion_group!(benches, backends);
criterion_main!(benches);
