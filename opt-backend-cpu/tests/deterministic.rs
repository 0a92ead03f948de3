//! A row's result is bit-equal whatever batch, chunk and thread count it is computed with.

use opt_backend::{
    Activation, Attend, Backend, CacheDType, CacheSpec, DType, HostMatrix, NormParams, Span, Then,
    ndarray::{Array2, concatenate, s},
    quant::{Groups, Levels, NF4, Quantized, Zeros},
};
use opt_backend_cpu::{Compute, Cpu, SimdLevel};
use proptest::prelude::*;

fn random(rows: usize, columns: usize, seed: u64) -> Array2<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    Array2::from_shape_simple_fn((rows, columns), || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    })
}

fn bits(x: &Array2<f32>) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

/// A level this machine has and a number of threads.
fn machine() -> impl Strategy<Value = (SimdLevel, usize)> {
    let levels: Vec<SimdLevel> = SimdLevel::ALL.into_iter().filter(|level| level.is_available()).collect();
    (prop::sample::select(levels), 2_usize..5)
}

fn build(level: SimdLevel, threads: usize) -> Cpu {
    Cpu::builder().threads(threads).simd(Some(level)).build().expect("the level is there")
}

/// Lengths that add up to at most `most`.
fn chunks(most: usize) -> impl Strategy<Value = Vec<usize>> {
    prop::collection::vec(1..=most / 3, 1..6).prop_map(move |mut lengths| {
        let mut left = most;
        lengths.retain_mut(|len| {
            *len = (*len).min(left);
            left -= *len;
            *len > 0
        });
        lengths
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn rows_alone_equal_rows_in_a_batch(
        (level, threads) in machine(),
        rows in 1_usize..60,
        depth in prop::sample::select(vec![1_usize, 33, 255, 256, 257, 520, 768]),
        outputs in prop::sample::select(vec![1_usize, 7, 33, 80, 130]),
        dtype in prop::sample::select(vec![DType::F32, DType::F16, DType::BF16]),
        // Says whether activations are rounded for weights of bf16.
        compute in prop::sample::select(vec![Compute::default(), Compute::F32]),
        seed in any::<u64>(),
    ) {
        let [one, many] = [1, threads].map(|threads| {
            Cpu::builder().threads(threads).simd(Some(level)).compute(compute).build().expect("the level is there")
        });
        let (x, w, residual) = (random(rows, depth, seed), random(outputs, depth, !seed), random(rows, outputs, seed ^ 9));
        let compute = |cpu: &Cpu, range: std::ops::Range<usize>| {
            let part = |x: &Array2<f32>| cpu.upload(x.slice(s![range.clone(), ..])).expect("it fits");
            let linear = cpu.new_linear(HostMatrix::F32(w.view()), None, dtype).expect("it fits");
            let table = cpu.new_table(HostMatrix::F32(w.view()), dtype).expect("it fits");
            let norm = NormParams { width: depth, eps: 1e-5, weight: None, bias: None };
            let normed = cpu.layer_norm(&part(&x), &cpu.new_norm(norm).expect("it fits")).expect("it fits");
            let y = [
                cpu.linear(&normed, &linear, Then::Nothing),
                cpu.linear(&normed, &linear, Then::Activate(Activation::Gelu)),
                cpu.linear(&normed, &linear, Then::Add(part(&residual))),
                cpu.logits(&normed, &table),
            ];
            y.map(|y| cpu.block_on(cpu.read_owned(y.expect("it fits"))).expect("it is ready"))
        };
        let whole = compute(&many, 0..rows);
        for row in 0..rows {
            let alone = compute(&one, row..row + 1);
            for (whole, alone) in whole.iter().zip(&alone) {
                prop_assert_eq!(bits(&whole.slice(s![row..row + 1, ..]).to_owned()), bits(alone), "row {}", row);
            }
        }
    }

    #[test]
    fn rows_of_quantized_products_equal_rows_alone(
        (level, threads) in machine(),
        rows in 1_usize..40,
        depth in prop::sample::select(vec![1_usize, 33, 64, 320, 768]),
        outputs in prop::sample::select(vec![1_usize, 7, 33, 130]),
        levels in prop::sample::select(vec![
            Levels::Integers { bits: 8 }, Levels::Integers { bits: 4 }, Levels::Table(NF4),
        ]),
        group in prop::sample::select(vec![5_usize, 32, 64, 1000]),
        (zeros, outliers, scattered) in any::<(bool, bool, bool)>(),
        compute in prop::sample::select(vec![Compute::Int8, Compute::Int16, Compute::F32]),
        seed in any::<u64>(),
    ) {
        let count: u16 = if levels == (Levels::Integers { bits: 8 }) { 256 } else { 16 };
        let below = |x: f32, count: u16| (((x + 1.0) / 2.0 * f32::from(count)) as u16).min(count - 1);
        let groups = depth.div_ceil(group);
        let codes = random(outputs, depth, seed).mapv(|x| below(x, count) as u8);
        let scales = random(outputs, groups, seed ^ 1);
        let zeros = if zeros {
            Zeros::Each(random(outputs, groups, seed ^ 2).mapv(|x| below(x, count)))
        } else {
            Zeros::Same(count / 2)
        };
        let groups = if scattered {
            Groups::Index((0..depth).map(|i| (i * 7 % depth / group) as u32).collect())
        } else {
            Groups::Runs(group)
        };
        let mut weight = Quantized::new(codes, scales, zeros, levels, groups).expect("it fits");
        if outliers {
            weight = weight.keep_outliers(0.8);
        }
        let x = random(rows, depth, !seed);
        let run = |threads: usize, range: std::ops::Range<usize>| {
            let cpu = Cpu::builder().threads(threads).simd(Some(level)).compute(compute).build();
            let cpu = cpu.expect("the level is there");
            let linear = cpu.new_quantized_linear(&weight, None).expect("it fits");
            let x = cpu.upload(x.slice(s![range, ..])).expect("it fits");
            let y = cpu.linear(&x, &linear, Then::Nothing).expect("it fits");
            cpu.block_on(cpu.read_owned(y)).expect("it is ready")
        };
        let whole = run(threads, 0..rows);
        for row in 0..rows {
            let alone = run(1, row..row + 1);
            prop_assert_eq!(bits(&whole.slice(s![row..row + 1, ..]).to_owned()), bits(&alone), "row {}", row);
        }
    }

    #[test]
    fn prefill_in_chunks_equals_prefill_at_once(
        (level, threads) in machine(),
        lengths in chunks(200),
        (heads, head_dim) in prop::sample::select(vec![(1_usize, 64_usize), (3, 7), (2, 80), (1, 1), (12, 16)]),
        dtype in prop::sample::select(vec![CacheDType::F32, CacheDType::F16, CacheDType::Int8]),
        seed in any::<u64>(),
    ) {
        let (one, many) = (build(level, 1), build(level, threads));
        let total: usize = lengths.iter().sum();
        let width = heads * head_dim;
        let qkv = [1, 2, 3].map(|i| random(total, width, seed.wrapping_add(i)) * 3.0);
        let spec = CacheSpec { layers: 1, heads, head_dim, dtype, capacity_hint: total };
        let run = |cpu: &Cpu, lengths: &[usize]| {
            let mut cache = cpu.new_cache(spec).expect("it fits");
            let mut parts = Vec::new();
            let mut start = 0;
            for &len in lengths {
                let [q, k, v] = qkv.each_ref().map(|x| cpu.upload(x.slice(s![start..start + len, ..])).expect("it fits"));
                let spans = [Span { start: 0, len }];
                let attend = Attend { heads, layer: 0, spans: &spans };
                let y = cpu.attend(q, k, v, attend, Some(&mut [&mut cache])).expect("it fits");
                parts.push(cpu.block_on(cpu.read_owned(y)).expect("it is ready"));
                start += len;
            }
            let views: Vec<_> = parts.iter().map(|part| part.view()).collect();
            concatenate(ndarray::Axis(0), &views).expect("equal widths")
        };
        let whole = bits(&run(&many, &[total]));
        prop_assert_eq!(&bits(&run(&one, &lengths)), &whole);
        prop_assert_eq!(&bits(&run(&many, &vec![1; total])), &whole);
        if dtype == CacheDType::F32 {
            let [q, k, v] = qkv.each_ref().map(|x| many.upload(x.view()).expect("it fits"));
            let spans = [Span { start: 0, len: total }];
            let y = many.attend(q, k, v, Attend { heads, layer: 0, spans: &spans }, None).expect("it fits");
            prop_assert_eq!(&bits(&many.block_on(many.read_owned(y)).expect("it is ready")), &whole);
        }
    }

    #[test]
    fn rows_of_many_sequences_equal_rows_alone(
        (level, threads) in machine(),
        // As many as share the heads of a row among themselves, and fewer.
        lengths in prop::collection::vec(0_usize..100, 1..30),
        (heads, head_dim) in prop::sample::select(vec![(1_usize, 64_usize), (3, 7), (9, 5), (12, 16)]),
        dtype in prop::sample::select(vec![CacheDType::F32, CacheDType::F16, CacheDType::Int8]),
        seed in any::<u64>(),
    ) {
        let (one, many) = (build(level, 1), build(level, threads));
        let (width, count) = (heads * head_dim, lengths.len());
        let spec = CacheSpec { layers: 1, heads, head_dim, dtype, capacity_hint: 100 };
        // All sequences begin with what the longest has: forks, some of which share a block that is not full.
        let head = [1, 2, 3].map(|i| random(100, width, seed.wrapping_add(i)));
        let step = [4, 5, 6].map(|i| random(count, width, seed.wrapping_add(i)) * 3.0);
        let upload = |cpu: &Cpu, x: &Array2<f32>, rows: std::ops::Range<usize>| {
            cpu.upload(x.slice(s![rows, ..])).expect("it fits")
        };
        let begin = |cpu: &Cpu| {
            let mut cache = cpu.new_cache(spec).expect("it fits");
            let [q, k, v] = head.each_ref().map(|x| upload(cpu, x, 0..100));
            let spans = [Span { start: 0, len: 100 }];
            cpu.attend(q, k, v, Attend { heads, layer: 0, spans: &spans }, Some(&mut [&mut cache])).expect("it fits");
            let fork = |len: &usize| {
                let mut fork = cpu.cache_fork(&cache).expect("it fits");
                cpu.cache_truncate(&mut fork, *len).expect("it fits");
                fork
            };
            lengths.iter().map(fork).collect::<Vec<_>>()
        };
        let mut caches = begin(&many);
        let [q, k, v] = step.each_ref().map(|x| upload(&many, x, 0..count));
        let spans: Vec<Span> = (0..count).map(|start| Span { start, len: 1 }).collect();
        let attend = Attend { heads, layer: 0, spans: &spans };
        let y = many.attend(q, k, v, attend, Some(&mut caches.iter_mut().collect::<Vec<_>>())).expect("it fits");
        let together = many.block_on(many.read_owned(y)).expect("it is ready");
        for (row, cache) in begin(&one).iter_mut().enumerate() {
            let [q, k, v] = step.each_ref().map(|x| upload(&one, x, row..row + 1));
            let spans = [Span { start: 0, len: 1 }];
            let y = one.attend(q, k, v, Attend { heads, layer: 0, spans: &spans }, Some(&mut [cache])).expect("it fits");
            let alone = one.block_on(one.read_owned(y)).expect("it is ready");
            prop_assert_eq!(bits(&together.slice(s![row..row + 1, ..]).to_owned()), bits(&alone), "row {}", row);
        }
    }
}
