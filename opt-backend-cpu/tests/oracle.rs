//! Every op at every instruction set of this machine against the reference bodies, over shapes that hurt.

use opt_backend::{
    Activation, Attend, Backend, CacheDType, CacheSpec, DType, HostMatrix, HostVector, NormParams, Op, Span,
    Then,
    half::{bf16, f16},
    ndarray::{Array1, Array2, ArrayView2, Axis, concatenate, s},
    oracle,
};
use opt_backend_cpu::{Cache, Compute, Cpu, SimdLevel};

/// Uniform numbers within -1..1 from a counter.
fn noise(seed: u64) -> impl FnMut() -> f32 {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    }
}

fn random(rows: usize, columns: usize, seed: u64) -> Array2<f32> {
    let mut next = noise(seed);
    Array2::from_shape_simple_fn((rows, columns), &mut next)
}

fn backends() -> Vec<Cpu> {
    let levels = SimdLevel::ALL.into_iter().filter(|level| level.is_available());
    levels.map(|level| Cpu::builder().threads(3).simd(Some(level)).build().unwrap()).collect()
}

fn close(what: &str, cpu: &Cpu, found: ArrayView2<'_, f32>, expected: ArrayView2<'_, f32>) {
    assert_eq!(found.dim(), expected.dim(), "{what}");
    let (mut noise, mut power, mut worst, mut largest) = (0.0, 0.0, 0.0_f64, 1.0_f64);
    for (&f, &e) in found.iter().zip(expected) {
        let (f, e) = (f64::from(f), f64::from(e));
        noise += (f - e) * (f - e);
        power += e * e;
        worst = worst.max((f - e).abs());
        largest = largest.max(e.abs());
        assert!(f.is_finite(), "{what} with {}: {f}, not {e}", cpu.simd());
    }
    assert!(worst <= 2e-5 * largest, "{what} with {}: off by {worst:e} at most {largest}", cpu.simd());
    assert!(noise <= 1e-10 * power, "{what} with {}: NMSE {:e}", cpu.simd(), noise / power);
}

fn get(cpu: &Cpu, x: <Cpu as Backend>::Tensor) -> Array2<f32> {
    cpu.block_on(cpu.read_owned(x)).unwrap()
}

#[test]
fn linear() {
    let shapes = [
        (1, 1, 1),
        (1, 768, 96),
        (2, 33, 7),
        (5, 80, 33),
        (12, 257, 64),
        (13, 520, 31),
        (40, 64, 100),
        (3, 0, 5),
        (0, 8, 8),
    ];
    for cpu in backends() {
        for (rows, depth, outputs) in shapes {
            let (x, w) = (random(rows, depth, 1), random(outputs, depth, 2));
            let bias = random(1, outputs, 3).remove_axis(Axis(0));
            let residual = random(rows, outputs, 4);
            let what = format!("linear {rows}x{depth}x{outputs}");
            let up = cpu.upload(x.view()).unwrap();
            let plain = cpu.new_linear(HostMatrix::F32(w.view()), None, DType::F32).unwrap();
            let biased = cpu
                .new_linear(HostMatrix::F32(w.view()), Some(HostVector::F32(bias.view())), DType::F32)
                .unwrap();
            let y = get(&cpu, cpu.linear(&up, &plain, Then::Nothing).unwrap());
            close(&what, &cpu, y.view(), oracle::linear(x.view(), w.view(), None, None).view());
            for activation in [Activation::Relu, Activation::Gelu, Activation::Tanh] {
                let y = get(&cpu, cpu.linear(&up, &biased, Then::Activate(activation)).unwrap());
                let expected = oracle::linear(x.view(), w.view(), Some(bias.view()), Some(activation));
                close(&format!("{what} {activation}"), &cpu, y.view(), expected.view());
            }
            let add = Then::Add(cpu.upload(residual.view()).unwrap());
            let y = get(&cpu, cpu.linear(&up, &biased, add).unwrap());
            let expected = oracle::linear(x.view(), w.view(), Some(bias.view()), None) + &residual;
            close(&format!("{what} add"), &cpu, y.view(), expected.view());
            for y in cpu.qkv(&up, &plain, &plain, &plain).unwrap() {
                close(
                    &what,
                    &cpu,
                    get(&cpu, y).view(),
                    oracle::linear(x.view(), w.view(), None, None).view(),
                );
            }
            let back = cpu.block_on(cpu.read_linear(&biased)).unwrap();
            assert_eq!((back.weight, back.bias), (w, Some(bias)));
        }
        assert_eq!(cpu.counters().counts().defaults.iter().sum::<u64>(), 0);
    }
}

#[test]
fn half_weights() {
    let (rows, w) = (13, random(45, 300, 5));
    let w16 = w.mapv(f16::from_f32);
    let wb = w.mapv(bf16::from_f32);
    let exact = SimdLevel::ALL.into_iter().filter(|level| level.is_available() && level.bf16_dot());
    let exact = exact.map(|level| Cpu::builder().simd(Some(level)).compute(Compute::F32).build().unwrap());
    let all = backends().into_iter().map(|cpu| (cpu.simd().bf16_dot(), cpu));
    for (rounds, cpu) in all.chain(exact.map(|cpu| (false, cpu))) {
        for rows in [1, 3, 8, rows] {
            let x = random(rows, 300, 6);
            let up = cpu.upload(x.view()).unwrap();
            let cases = [
                (DType::F16, HostMatrix::F16(w16.view()), w16.mapv(f16::to_f32)),
                (DType::BF16, HostMatrix::BF16(wb.view()), wb.mapv(bf16::to_f32)),
                (DType::F16, HostMatrix::F32(w.view()), w16.mapv(f16::to_f32)),
                (DType::BF16, HostMatrix::F32(w.view()), wb.mapv(bf16::to_f32)),
                (DType::F32, HostMatrix::F16(w16.view()), w16.mapv(f16::to_f32)),
            ];
            for (dtype, host, expected) in cases {
                let linear = cpu.new_linear(host, None, dtype).unwrap();
                assert_eq!(cpu.block_on(cpu.read_linear(&linear)).unwrap().weight, expected);
                let y = get(&cpu, cpu.linear(&up, &linear, Then::Nothing).unwrap());
                // Activations that meet weights of bf16 are such themselves where there are instructions for that.
                let met = if rounds && dtype == DType::BF16 { x.mapv(|x| dtype.round(x)) } else { x.clone() };
                let expected = oracle::linear(met.view(), expected.view(), None, None);
                close(&format!("{dtype} {rows}"), &cpu, y.view(), expected.view());
            }
        }
        // Every half-precision number, the special ones included, is widened exactly.
        let all = Array2::from_shape_fn((1 << 11, 32), |(i, j)| f16::from_bits((i * 32 + j) as u16));
        let finite = all.mapv(|x| if x.is_finite() { x } else { f16::ZERO });
        let linear = cpu.new_linear(HostMatrix::F16(finite.view()), None, DType::F16).unwrap();
        for column in 0..32 {
            let one = Array2::from_shape_fn((1, 32), |(_, j)| f32::from(u8::from(j == column)));
            let y = get(&cpu, cpu.linear(&cpu.upload(one.view()).unwrap(), &linear, Then::Nothing).unwrap());
            assert_eq!(y.row(0), finite.column(column).mapv(f16::to_f32), "{}", cpu.simd());
        }
    }
}

#[test]
fn layer_norm() {
    for cpu in backends() {
        for (rows, width) in [(1, 1), (1, 768), (33, 80), (7, 33), (0, 64), (300, 768)] {
            // A mean far from zero: its square swamps the variance in single precision.
            let x = random(rows, width, 7).mapv(|v| v + 300.0);
            let (w, b) = (random(1, width, 8).remove_axis(Axis(0)), random(1, width, 9).remove_axis(Axis(0)));
            for (weight, bias) in [(None, None), (Some(&w), None), (Some(&w), Some(&b))] {
                let host = |v: Option<&'_ Array1<f32>>| v.map(|v| v.to_owned());
                let (hw, hb) = (host(weight), host(bias));
                let norm = NormParams {
                    width,
                    eps: 1e-5,
                    weight: hw.as_ref().map(|v| HostVector::F32(v.view())),
                    bias: hb.as_ref().map(|v| HostVector::F32(v.view())),
                };
                let norm = cpu.new_norm(norm).unwrap();
                let y = get(&cpu, cpu.layer_norm(&cpu.upload(x.view()).unwrap(), &norm).unwrap());
                let [weight, bias] = [&hw, &hb].map(|v| v.as_ref().map(|v| v.view()));
                let expected = oracle::layer_norm(x.view(), weight, bias, 1e-5);
                close(&format!("layer_norm {rows}x{width}"), &cpu, y.view(), expected.view());
            }
        }
    }
}

/// Appends in the given chunks and compares each to the reference over all that came before.
fn attention(cpu: &Cpu, heads: usize, head_dim: usize, chunks: &[usize], dtype: CacheDType) {
    let width = heads * head_dim;
    let total: usize = chunks.iter().sum();
    // Scores with some spread, so that softmax is not flat.
    let q = random(total, width, 10) * 4.0;
    let (k, v) = (random(total, width, 11), random(total, width, 12));
    let spec = CacheSpec { layers: 2, heads, head_dim, dtype, capacity_hint: total };
    let mut cache = cpu.new_cache(spec).unwrap();
    let mut done = 0;
    for &chunk in chunks {
        let rows = s![done..done + chunk, ..];
        let [tq, tk, tv] = [&q, &k, &v].map(|x| cpu.upload(x.slice(rows)).unwrap());
        let spans = [Span { start: 0, len: chunk }];
        let attend = Attend { heads, layer: 1, spans: &spans };
        let y = get(cpu, cpu.attend(tq, tk, tv, attend, Some(&mut [&mut cache])).unwrap());
        done += chunk;
        assert_eq!((cpu.cache_len(&cache, 0), cpu.cache_len(&cache, 1)), (0, done));
        let held = cpu.block_on(cpu.cache_read(&cache, 1)).unwrap();
        if dtype == CacheDType::F32 {
            assert_eq!(held.keys, k.slice(s![..done, ..]));
            assert_eq!(held.values, v.slice(s![..done, ..]));
        } else {
            let bound = if dtype == CacheDType::F16 { 5e-4 } else { 1.0 / 254.0 + 1e-6 };
            for (held, exact) in [(&held.keys, &k), (&held.values, &v)] {
                assert!(held.iter().zip(exact).all(|(h, e)| (h - e).abs() <= bound));
            }
        }
        // What is held is what is attended to: then any storage format must meet the bounds of f32.
        let (expected, _) = oracle::attend(q.slice(rows), held.keys.view(), held.values.view(), heads);
        close(&format!("attend {heads}x{head_dim} {dtype:?} at {done}"), cpu, y.view(), expected.view());
    }
}

#[test]
fn attend() {
    // The oracle takes a minute for it on an emulated machine.
    let long = if std::env::var_os("OPT_QUICK_TESTS").is_some() { 300 } else { 2047 };
    for cpu in backends() {
        for dtype in [CacheDType::F32, CacheDType::F16, CacheDType::Int8] {
            attention(&cpu, 1, 1, &[1, 1, 3], dtype);
            attention(&cpu, 2, 80, &[37, 1, 1, 64], dtype);
            attention(&cpu, 3, 7, &[5, 0, 100, 1], dtype);
            attention(&cpu, 1, 33, &[31, 1, 1, 1, 200], dtype);
        }
        attention(&cpu, 2, 64, &[long, 1], CacheDType::F32);
    }
}

#[test]
fn attend_without_cache_and_ragged() {
    for cpu in backends() {
        let (heads, width) = (2, 32);
        let [q, k, v] = [1, 2, 3].map(|seed| random(60, width, seed));
        let spans = Span::lay_out([3, 0, 40, 1]);
        let [tq, tk, tv] = [&q, &k, &v].map(|x| cpu.upload(x.view()).unwrap());
        let y = get(&cpu, cpu.attend(tq, tk, tv, Attend { heads, layer: 0, spans: &spans }, None).unwrap());
        for span in &spans {
            let rows = s![span.rows(), ..];
            let (expected, _) = oracle::attend(q.slice(rows), k.slice(rows), v.slice(rows), heads);
            close("ragged attend", &cpu, y.slice(rows), expected.view());
        }
        assert!(y.slice(s![44.., ..]).iter().all(|&y| y == 0.0));
    }
}

#[test]
fn forks_do_not_see_each_other() {
    for (cpu, dtype) in backends().into_iter().flat_map(|cpu| {
        let cpu = std::sync::Arc::new(cpu);
        [CacheDType::F32, CacheDType::F16, CacheDType::Int8].map(move |dtype| (cpu.clone(), dtype))
    }) {
        let spec = CacheSpec { layers: 1, heads: 2, head_dim: 5, dtype, capacity_hint: 0 };
        for len in [0, 1, 31, 32, 40, 64] {
            let x = random(len + 10, 10, 13);
            let up = cpu.upload(x.view()).unwrap();
            let mut one = cpu.new_cache(spec).unwrap();
            cpu.cache_append(&mut one, 0, &up, &up, 0..len).unwrap();
            let mut two = cpu.cache_fork(&one).unwrap();
            cpu.cache_append(&mut two, 0, &up, &up, len..len + 3).unwrap();
            cpu.cache_append(&mut one, 0, &up, &up, len + 5..len + 10).unwrap();
            let read = |cache: &Cache| cpu.block_on(cpu.cache_read(cache, 0)).unwrap();
            let fresh = |rows: ArrayView2<'_, f32>| {
                let mut cache = cpu.new_cache(spec).unwrap();
                cpu.cache_seed(&mut cache, 0, rows, rows).unwrap();
                read(&cache)
            };
            let tail = |rows: std::ops::Range<usize>| {
                concatenate(Axis(0), &[x.slice(s![..len, ..]), x.slice(s![rows, ..])]).unwrap()
            };
            assert_eq!(read(&two), fresh(tail(len..len + 3).view()));
            assert_eq!(read(&one), fresh(tail(len + 5..len + 10).view()));
            // Shortened and grown again, the other side is still as it was.
            let kept = read(&two);
            let mut three = cpu.cache_fork(&two).unwrap();
            cpu.cache_truncate(&mut three, len / 2).unwrap();
            cpu.cache_append(&mut three, 0, &up, &up, 0..len + 1).unwrap();
            assert_eq!(read(&two), kept);
            let expected = concatenate(Axis(0), &[x.slice(s![..len / 2, ..]), x.slice(s![..len + 1, ..])]);
            assert_eq!(read(&three), fresh(expected.unwrap().view()));
        }
    }
}

#[test]
fn tables_and_logits() {
    for cpu in backends() {
        for (entries, width) in [(50, 33), (1, 1), (2050, 80), (50272, 64)] {
            let t = random(entries, width, 14);
            let table = cpu.new_table(HostMatrix::F32(t.view()), DType::F32).unwrap();
            assert_eq!(cpu.table_shape(&table), [entries, width]);
            let ids: Vec<u32> = (0..70).map(|i| (i * 7919 % entries) as u32).collect();
            let rows: Vec<usize> = ids.iter().map(|&id| id as usize).collect();
            let entries_of = t.select(Axis(0), &rows);
            let gathered = cpu.gather(&table, &ids).unwrap();
            assert_eq!(cpu.block_on(cpu.read(&gathered)).unwrap(), entries_of);
            let twice = cpu.add_gathered(gathered, &table, &ids).unwrap();
            assert_eq!(get(&cpu, twice), &entries_of + &entries_of);
            let part = entries / 3..entries;
            assert_eq!(cpu.block_on(cpu.read_table(&table, part.clone())).unwrap(), t.slice(s![part, ..]));
            let x = random(5, width, 15);
            let up = cpu.upload(x.view()).unwrap();
            let logits = cpu.logits(&up, &table).unwrap();
            let expected = oracle::linear(x.view(), t.view(), None, None);
            let found = cpu.block_on(cpu.read(&logits)).unwrap();
            close("logits", &cpu, found.view(), expected.view());
            let targets: Vec<u32> = (0..5).map(|i| (i * 31 % entries) as u32).collect();
            let scores = cpu.block_on(cpu.log_probs(&up, &table, &targets)).unwrap();
            for ((row, &target), score) in found.outer_iter().zip(&targets).zip(scores) {
                let expected = oracle::target_score(row, target);
                assert_eq!(score.greedy, expected.greedy);
                assert!(
                    (score.log_prob - expected.log_prob).abs() <= 2e-6 * expected.log_prob.abs().max(1.0)
                );
            }
            for k in [0, 1, 5, 300, entries + 1] {
                for (row, top) in found.outer_iter().zip(cpu.block_on(cpu.top_k(&logits, k)).unwrap()) {
                    let expected = oracle::top_k(row, k);
                    assert_eq!((top.ids, top.logits), (expected.ids, expected.logits));
                    assert!(
                        (top.log_sum_exp - expected.log_sum_exp).abs()
                            <= 2e-6 * expected.log_sum_exp.abs().max(1.0)
                    );
                }
            }
        }
    }
}

#[test]
fn top_k_of_awkward_rows() {
    let inf = f32::INFINITY;
    let mut rows = vec![
        vec![1.0; 200],
        vec![-inf; 130],
        (0..500).map(|i| (i % 3) as f32).collect(),
        (0..500).map(|i| i as f32).collect(),
        (0..500).map(|i| -i as f32).collect(),
        vec![0.0, -0.0, 0.0, -0.0, inf, -inf, 1e-40],
    ];
    rows.push((0..300).map(|i| if i == 70 { f32::NAN } else { -(i as f32) }).collect());
    for cpu in backends() {
        for row in &rows {
            let row = Array2::from_shape_vec((1, row.len()), row.clone()).unwrap();
            let up = cpu.upload(row.view()).unwrap();
            for k in [1, 2, 64, 129] {
                let top = cpu.block_on(cpu.top_k(&up, k)).unwrap().remove(0);
                let expected = oracle::top_k(row.row(0), k);
                assert_eq!(top.ids, expected.ids);
                let [found, expected] = [top.log_sum_exp, expected.log_sum_exp];
                assert!(
                    found == expected
                        || (found.is_nan() && expected.is_nan())
                        || (found - expected).abs() < 1e-5 * expected.abs(),
                    "{found} {expected}"
                );
            }
        }
    }
}

#[test]
fn add_and_take_rows() {
    for cpu in backends() {
        for (rows, width) in [(0, 5), (1, 1), (33, 7), (200, 500)] {
            let (x, y) = (random(rows, width, 16), random(rows, width, 17));
            let up = cpu.upload(x.view()).unwrap();
            let sum = cpu.add(cpu.upload(x.view()).unwrap(), &cpu.upload(y.view()).unwrap()).unwrap();
            assert_eq!(get(&cpu, sum), &x + &y);
            let order: Vec<usize> = (0..rows).rev().chain(0..rows.min(1)).collect();
            assert_eq!(get(&cpu, cpu.take_rows(&up, &order).unwrap()), x.select(Axis(0), &order));
            // A matrix that does not lie row by row.
            assert_eq!(get(&cpu, cpu.upload(x.t()).unwrap()), x.t());
        }
    }
}

#[test]
#[allow(clippy::vec_init_then_push)] // one case a line
fn what_does_not_fit_is_an_error() {
    let cpu = Cpu::new().unwrap();
    let x = || cpu.upload(random(3, 8, 1).view()).unwrap();
    let other = || cpu.upload(random(2, 6, 1).view()).unwrap();
    let w = random(4, 8, 2);
    let linear = cpu.new_linear(HostMatrix::F32(w.view()), None, DType::F32).unwrap();
    let table = cpu.new_table(HostMatrix::F32(w.view()), DType::F32).unwrap();
    let bias = Array1::zeros(5);
    let norm = NormParams { width: 8, eps: 1e-5, weight: None, bias: None };
    let norm8 = cpu.new_norm(norm).unwrap();
    let spec = CacheSpec { layers: 1, heads: 2, head_dim: 4, dtype: CacheDType::F32, capacity_hint: 9 };
    let mut cache = cpu.new_cache(spec).unwrap();
    let mut fails = Vec::new();
    fails.push(cpu.linear(&other(), &linear, Then::Nothing).err());
    fails.push(cpu.linear(&x(), &linear, Then::Add(x())).err());
    fails.push(cpu.qkv(&other(), &linear, &linear, &linear).err());
    fails.push(
        cpu.new_linear(HostMatrix::F32(w.view()), Some(HostVector::F32(bias.view())), DType::F32).err(),
    );
    fails.push(cpu.new_norm(NormParams { weight: Some(HostVector::F32(bias.view())), ..norm }).err());
    fails.push(cpu.layer_norm(&other(), &norm8).err());
    fails.push(cpu.add(x(), &other()).err());
    fails.push(cpu.gather(&table, &[4]).err());
    fails.push(cpu.add_gathered(x(), &table, &[0, 1, u32::MAX]).err());
    fails.push(cpu.add_gathered(x(), &table, &[0, 1]).err());
    fails.push(cpu.logits(&other(), &table).err());
    fails.push(cpu.block_on(cpu.log_probs(&x(), &table, &[0, 1, 4])).err());
    fails.push(cpu.block_on(cpu.log_probs(&x(), &table, &[0, 1])).err());
    fails.push(cpu.block_on(cpu.log_probs(&other(), &table, &[0, 1])).err());
    fails.push(cpu.take_rows(&x(), &[3]).err());
    fails.push(cpu.block_on(cpu.read_table(&table, 2..5)).err());
    fails.push(cpu.cache_append(&mut cache, 0, &x(), &x(), 0..4).err());
    fails.push(cpu.cache_append(&mut cache, 1, &x(), &x(), 0..1).err());
    fails.push(cpu.cache_append(&mut cache, 0, &x(), &other(), 0..1).err());
    fails.push(cpu.block_on(cpu.cache_read(&cache, 1)).err());
    fails.push(cpu.new_cache(CacheSpec { heads: 0, ..spec }).err());
    let span = |start, len| [Span { start, len }];
    let mut attend = |q, heads, layer, spans: &[Span], cached: bool| {
        let mut caches = [&mut cache];
        let attend = Attend { heads, layer, spans };
        let caches: Option<&mut [&mut _]> = if cached { Some(&mut caches) } else { None };
        cpu.attend(q, x(), x(), attend, caches).err()
    };
    fails.push(attend(other(), 2, 0, &span(0, 1), false));
    fails.push(attend(x(), 0, 0, &span(0, 1), false));
    fails.push(attend(x(), 3, 0, &span(0, 1), false));
    fails.push(attend(x(), 2, 0, &span(2, 2), true));
    fails.push(attend(x(), 2, 0, &span(usize::MAX, 2), true));
    fails.push(attend(x(), 2, 1, &span(0, 2), true));
    fails.push(attend(x(), 4, 0, &span(0, 2), true));
    fails.push(attend(x(), 2, 0, &[], true));
    for (i, error) in fails.into_iter().enumerate() {
        let error = error.unwrap_or_else(|| panic!("case {i} did not fail"));
        assert_eq!(error.kind(), opt_backend::ErrorKind::Shape, "case {i}: {error}");
    }
    assert_eq!(cpu.cache_len(&cache, 0), 0);
    assert!(Cpu::builder().threads(0).build().is_err());
    let absent = SimdLevel::ALL.into_iter().find(|level| !level.is_available()).unwrap();
    assert!(Cpu::builder().simd(Some(absent)).build().is_err());
    assert_eq!(cpu.counters().counts().default_bodies(Op::Linear), 0);
}
