//! Every op of training at every instruction set, against the default bodies.

use opt_backend::{
    Activation, AdamW, Attend, Backend, Clip, DType, Dropout, HostMatrix, HostVector, Layout, NormParams, Op,
    Reference, Sgd, Smoothing, Span, Then, Train,
    ndarray::{Array2, array, s},
    quant::{Groups, Levels, NF4, Quantized, Zeros},
};
use opt_backend_cpu::{Compute, Cpu, SimdLevel};

fn random(rows: usize, columns: usize, seed: u64) -> Array2<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    Array2::from_shape_simple_fn((rows, columns), || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    })
}

/// Whether `OPT_QUICK_TESTS` is set, as for emulated machines, which take a minute for what others do in a second.
fn quick() -> bool {
    std::env::var_os("OPT_QUICK_TESTS").is_some()
}

/// The level that has the most: its kernels are those of the levels below it where they have no use for more.
fn last() -> SimdLevel {
    SimdLevel::ALL.into_iter().rfind(|level| level.is_available()).expect("scalar is everywhere")
}

/// Backends of every level (the last alone if it is to be quick), and what is common to all tests: nothing goes through
/// a default body, and nothing is written outside a buffer.
fn each(check: impl Fn(&Cpu)) {
    let levels = SimdLevel::ALL.into_iter().filter(|level| level.is_available());
    for level in levels.filter(|level| !quick() || *level == last()) {
        for threads in [1, 3] {
            let cpu = Cpu::builder().threads(threads).simd(Some(level)).guarded(true);
            let cpu = cpu.build().expect("the level is there");
            println!("{level}, {threads} threads");
            check(&cpu);
            assert_eq!(cpu.guard_faults(), [""; 0], "{level}");
            for op in Op::TRAIN {
                assert_eq!(cpu.counters().counts().default_bodies(op), 0, "{op:?}");
            }
        }
    }
}

fn up<B: Backend>(b: &B, x: &Array2<f32>) -> B::Tensor {
    b.upload(x.view()).expect("it fits")
}

fn down<B: Backend>(b: &B, x: &B::Tensor) -> Array2<f32> {
    b.block_on(b.read(x)).expect("it is ready")
}

#[track_caller]
fn close(found: &Array2<f32>, expected: &Array2<f32>, nmse: f64, what: &str) {
    assert_eq!(found.dim(), expected.dim(), "{what}");
    let (mut noise, mut power) = (0.0, 0.0);
    let largest = expected.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
    for (f, e) in found.iter().zip(expected) {
        let error = f64::from(*f) - f64::from(*e);
        assert!(
            error.abs() <= 300.0 * nmse.sqrt() * f64::from(largest.max(1e-30)),
            "{what}: {f}, not {e}, of at most {largest}"
        );
        noise += error * error;
        power += f64::from(*e) * f64::from(*e);
    }
    assert!(noise <= nmse * power, "{what}: {:e}", noise / power);
}

/// Evaluates an expression, a tensor of `$b`, with the backend and the reference, and compares.
macro_rules! same {
    ($cpu:expr, $nmse:expr, $what:expr, $b:ident => $of:expr) => {{
        let found = {
            let $b = $cpu;
            let x = $of.expect("it fits");
            down($b, &x)
        };
        let expected = {
            let $b = &Reference::new();
            let x = $of.expect("it fits");
            down($b, &x)
        };
        close(&found, &expected, $nmse, &$what);
    }};
}

const TIGHT: f64 = 1e-11;

const LAYOUTS: [Layout; 3] = [Layout::TimesTransposed, Layout::Times, Layout::TransposedTimes];

fn operands([n, k, m]: [usize; 3], layout: Layout) -> (Array2<f32>, Array2<f32>) {
    let (a, b) = match layout {
        Layout::TimesTransposed => ([n, k], [m, k]),
        Layout::Times => ([n, k], [k, m]),
        Layout::TransposedTimes => ([k, n], [k, m]),
    };
    (random(a[0], a[1], 1), random(b[0], b[1], 2))
}

const SHAPES: [[usize; 3]; 14] = [
    [0, 3, 4],
    [3, 0, 4],
    [3, 4, 0],
    [1, 1, 1],
    [5, 7, 3],
    [12, 256, 32],
    [13, 257, 33],
    [37, 512, 64],
    [8, 513, 77],
    [130, 9, 8],
    [61, 1030, 16],
    [25, 31, 230],
    [1100, 20, 40],
    [530, 300, 7],
];

#[test]
fn products_of_matrices() {
    each(|cpu| {
        for shape in SHAPES {
            for layout in LAYOUTS {
                let (a, b) = operands(shape, layout);
                let into = random(shape[0], shape[2], 3);
                for (dtype, nmse) in [(DType::F32, TIGHT), (DType::BF16, 1e-4)] {
                    let what = format!("{shape:?} {layout:?} {dtype}");
                    same!(cpu, nmse, what, b_ => b_.matmul(&up(b_, &a), &up(b_, &b), layout, dtype, None));
                    let into = &into;
                    same!(cpu, nmse, what, b_ =>
                        b_.matmul(&up(b_, &a), &up(b_, &b), layout, dtype, Some(up(b_, into))));
                }
            }
        }
    });
}

/// More than is woven at a time.
#[test]
fn large_products_are_those_of_packed_weights() {
    // Thousands of millions of multiplications: nothing to emulate.
    if quick() {
        return;
    }
    let level = last();
    let cpu = Cpu::builder().threads(2).simd(Some(level)).build().expect("the level is there");
    for [n, k, m] in [[700, 5000, 40], [9000, 600, 33], [300, 20_000, 70]] {
        let (x, w) = (random(n, k, 4), random(m, k, 5));
        for dtype in [DType::F32, DType::BF16] {
            let linear = cpu.linear_of(&up(&cpu, &w), None, dtype).expect("it fits");
            let y = cpu.linear(&up(&cpu, &x), &linear, Then::Nothing).expect("it fits");
            let expected = down(&cpu, &y);
            for layout in LAYOUTS {
                let (a, b) = match layout {
                    Layout::TimesTransposed => (x.clone(), w.clone()),
                    Layout::Times => (x.clone(), w.t().as_standard_layout().into_owned()),
                    Layout::TransposedTimes => {
                        (x.t().as_standard_layout().into_owned(), w.t().as_standard_layout().into_owned())
                    }
                };
                let y = cpu.matmul(&up(&cpu, &a), &up(&cpu, &b), layout, dtype, None).expect("it fits");
                let y = down(&cpu, &y);
                if dtype == DType::F32 || level.bf16_dot() {
                    assert!(y == expected, "{layout:?} {dtype}");
                }
            }
            let dx = cpu.linear_grad(&y, &linear, None).expect("it fits");
            let exact = Reference::new().matmul(&down(&cpu, &y), &w, Layout::Times, dtype, None);
            let nmse = if dtype == DType::F32 { TIGHT } else { 1e-4 };
            close(&down(&cpu, &dx), &exact.expect("it fits"), nmse, "dx");
        }
    }
}

/// Weights of one shape in every format.
fn quantized(
    [out, input]: [usize; 2],
    levels: Levels,
    groups: Groups,
    count: usize,
    each: bool,
) -> Quantized {
    let most: u16 = if levels == (Levels::Integers { bits: 8 }) { 256 } else { 16 };
    let below = |x: f32| ((x + 1.0) / 2.0 * f32::from(most)).min(f32::from(most - 1));
    let codes = random(out, input, 7).mapv(|x| below(x) as u8);
    let scales = random(out, count, 8).mapv(|x| x * 0.01 + 0.02);
    let zeros = if each {
        Zeros::Each(random(out, count, 9).mapv(|x| below(x) as u16))
    } else {
        Zeros::Same(most / 2)
    };
    Quantized::new(codes, scales, zeros, levels, groups).expect("it fits")
}

#[test]
fn gradients_through_weights() {
    each(|cpu| {
        for [rows, out, input] in
            [[0, 5, 6], [1, 1, 1], [3, 33, 65], [14, 70, 40], [37, 600, 130], [9, 256, 32]]
        {
            let (w, dy) = (random(out, input, 1), random(rows, out, 2));
            let into = random(rows, input, 3);
            let bias = random(1, out, 4);
            for (dtype, nmse) in [(DType::F32, TIGHT), (DType::F16, TIGHT), (DType::BF16, 1e-4)] {
                let what = format!("{rows} x {out} x {input} {dtype}");
                let view = || HostMatrix::F32(w.view());
                same!(cpu, nmse, what, b => b.linear_grad(&up(b, &dy), &b.new_linear(view(), None, dtype).unwrap(), None));
                same!(cpu, nmse, what, b => b.linear_grad(
                    &up(b, &dy), &b.linear_of(&up(b, &w), None, dtype).unwrap(), Some(up(b, &into))));
                same!(cpu, nmse, what, b => b.logits_grad(&up(b, &dy), &b.new_table(view(), dtype).unwrap()));
                let nmse = if dtype == DType::F32 { TIGHT } else { 1e-4 };
                same!(cpu, nmse, what, b => b.linear(
                    &up(b, &into), &b.linear_of(&up(b, &w), Some(&up(b, &bias)), dtype).unwrap(), Then::Nothing));
                let of = cpu.linear_of(&up(cpu, &w), Some(&up(cpu, &bias)), dtype).unwrap();
                let as_given = HostVector::F32(bias.row(0));
                let new = cpu.new_linear(view(), Some(as_given), dtype).unwrap();
                assert!(
                    cpu.block_on(cpu.read_linear(&of)).unwrap().weight
                        == cpu.block_on(cpu.read_linear(&new)).unwrap().weight
                );
            }
            for levels in [Levels::Integers { bits: 8 }, Levels::Integers { bits: 4 }, Levels::Table(NF4)] {
                for each in [false, true] {
                    let scattered = (0..input).map(|i| (i % 3.min(input)) as u32).collect();
                    for (groups, count) in [
                        (Groups::Runs(32), input.div_ceil(32)),
                        (Groups::Runs(5), input.div_ceil(5)),
                        (Groups::Index(scattered), 3.min(input)),
                    ] {
                        if each && matches!(levels, Levels::Table(_)) {
                            continue;
                        }
                        let what = format!("{rows} x {out} x {input} {levels:?} {groups:?}");
                        let weight = quantized([out, input], levels, groups, count, each);
                        same!(cpu, TIGHT, what, b => b.linear_grad(
                            &up(b, &dy), &b.new_quantized_linear(&weight, None).unwrap(), Some(up(b, &into))));
                        same!(cpu, TIGHT, what, b =>
                            b.logits_grad(&up(b, &dy), &b.new_quantized_table(&weight).unwrap()));
                    }
                }
            }
        }
    });
    // Activations as they are: then gradients of bf16 weights are as exact as any.
    let cpu = Cpu::builder().threads(2).compute(Compute::F32).build().unwrap();
    let (w, dy) = (random(100, 70, 1), random(20, 100, 2));
    let w = w.mapv(|w| DType::BF16.round(w));
    same!(&cpu, TIGHT, "f32", b => b.linear_grad(&up(b, &dy), &b.linear_of(&up(b, &w), None, DType::BF16).unwrap(), None));
}

#[test]
fn norms() {
    each(|cpu| {
        for [rows, width] in [[0, 4], [1, 1], [3, 7], [70, 768], [5, 130]] {
            let x = random(rows, width, 1) * 3.0 + 5.0;
            let (dy, weight, bias) = (random(rows, width, 2), random(1, width, 3), random(1, width, 4));
            let what = format!("{rows} x {width}");
            macro_rules! norms {
                ($b:ident) => {
                    [
                        $b.norm_of(&up($b, &weight), &up($b, &bias), 1e-5).unwrap(),
                        $b.new_norm(NormParams { width, eps: 1e-5, weight: None, bias: None }).unwrap(),
                    ]
                };
            }
            for i in 0..2 {
                same!(cpu, 1e-11, what, b => b.layer_norm(&up(b, &x), &norms!(b)[i]));
                // Of a single element, the gradient is zero but for roundings.
                if width > 1 {
                    same!(cpu, 1e-11, what, b => b.layer_norm_grad(&up(b, &x), &norms!(b)[i], &up(b, &dy)));
                }
                for j in 0..2 {
                    same!(cpu, 1e-11, what, b =>
                        b.layer_norm_grad_params(&up(b, &x), &norms!(b)[i], &up(b, &dy)).map(|[w, b]| if j == 0 { w } else { b }));
                }
            }
        }
    });
}

#[test]
fn attention() {
    each(|cpu| {
        for (heads, head_dim) in [(1, 1), (2, 64), (3, 7), (1, 80), (1, 128)] {
            for lengths in [&[1][..], &[0, 5, 2], &[49], &[13, 300], &[31, 33, 48, 97]] {
                let rows: usize = lengths.iter().sum();
                let [q, k, v, dy] = [1, 2, 3, 4].map(|i| random(rows + 1, heads * head_dim, i) * 2.0);
                let mut spans = Span::lay_out(lengths.iter().copied());
                if lengths.len() == 2 {
                    // Rows that two spans share, and some that none covers.
                    spans = vec![Span { start: 5, len: 60 }, Span { start: 0, len: 40 }];
                }
                let attend = Attend { heads, layer: 0, spans: &spans };
                for i in 0..3 {
                    let what = format!("{heads} heads of {head_dim}, {lengths:?}, {i}");
                    // With one position, queries and keys have no influence.
                    if rows == 1 && i < 2 {
                        continue;
                    }
                    same!(cpu, 1e-10, what, b => b
                        .attend_grad([&up(b, &q), &up(b, &k), &up(b, &v)], &up(b, &dy), attend)
                        .map(|gradients| gradients.into_iter().nth(i).unwrap()));
                }
            }
        }
    });
}

#[test]
fn losses() {
    each(|cpu| {
        for [rows, entries] in [[0, 3], [1, 1], [3, 5], [7, 1029], [2, 5000]] {
            let x = random(rows, entries, 1) * 8.0;
            let teacher = random(rows, entries, 2) * 8.0;
            let targets: Vec<u32> = (0..rows).map(|i| (i * 31 % entries) as u32).collect();
            for i in 0..2 {
                for epsilon in [0.0, 0.1] {
                    if entries == 1 {
                        continue;
                    }
                    let smoothing = Smoothing { scale: 0.25, epsilon };
                    let what = format!("{rows} x {entries}, {epsilon}, {i}");
                    same!(cpu, 1e-11, what, b => b
                        .cross_entropy(up(b, &x), &targets, smoothing).map(|[l, d]| if i == 0 { l } else { d }));
                }
                let what = format!("{rows} x {entries}, soft, {i}");
                same!(cpu, 1e-11, what, b => b
                    .soft_targets(up(b, &x), &up(b, &teacher), 2.0, 0.5).map(|[l, d]| if i == 0 { l } else { d }));
            }
        }
        // What is impossible stays so.
        let x = array![[0.0, f32::NEG_INFINITY, 1.0]];
        let [_, d] = cpu.cross_entropy(up(cpu, &x), &[2], Smoothing { scale: 1.0, epsilon: 0.0 }).unwrap();
        assert_eq!(down(cpu, &d)[[0, 1]], 0.0);
    });
}

#[test]
fn elements() {
    each(|cpu| {
        for [rows, width] in [[0, 4], [1, 1], [3, 7], [70, 768], [2, 40_000]] {
            let [x, y] = [1, 2].map(|i| random(rows, width, i) * 4.0);
            let row = random(1, width, 3);
            let what = format!("{rows} x {width}");
            for activation in Activation::all() {
                same!(cpu, 1e-10, format!("{what} {activation}"), b => b.activate(up(b, &x), activation));
                same!(cpu, 1e-10, format!("{what} {activation} slope"), b =>
                    b.activate_grad(&up(b, &x), up(b, &y), activation));
            }
            same!(cpu, 0.0, what, b => b.zeros([rows, width]));
            same!(cpu, 0.0, what, b => b.copy(&up(b, &x)));
            same!(cpu, 0.0, what, b => b.concat(&[&up(b, &x), &up(b, &row), &up(b, &y)]));
            same!(cpu, 0.0, what, b => b.add_row(up(b, &x), &up(b, &row)));
            same!(cpu, 0.0, what, b => b.mul_row(up(b, &x), &up(b, &row)));
            same!(cpu, 0.0, what, b => b.mul(up(b, &x), &up(b, &y)));
            same!(cpu, 0.0, what, b => b.scale(up(b, &x), 0.3));
            same!(cpu, 0.0, what, b => b.dropout(up(b, &x), Dropout { p: 0.3, seed: 0x1234_5678_9abc }));
            same!(cpu, 1e-12, what, b => b.sum_rows(&up(b, &x)));
            same!(cpu, 1e-12, what, b => b.sum_squares(&[&up(b, &x), &up(b, &row)]));
            let at: Vec<usize> = (0..rows).map(|i| i * 5 % 3).collect();
            same!(cpu, 1e-12, what, b => b.scatter_add(up(b, &random(3, width, 5)), &at, &up(b, &x)));
        }
        same!(cpu, 0.0, "nothing", b => b.concat(&[]));
    });
}

#[test]
fn optimizers() {
    each(|cpu| {
        for [rows, width] in [[0, 4], [1, 1], [3, 7], [2, 40_000]] {
            let [p, g, m] = [1, 2, 3].map(|i| random(rows, width, i));
            let v = random(rows, width, 4).mapv(f32::abs);
            let adam = AdamW { lr: 1e-2, beta1: 0.9, beta2: 0.99, eps: 1e-8, weight_decay: 0.1, step: 3 };
            let sgd = Sgd { lr: 0.1, momentum: 0.9, weight_decay: 0.01 };
            for clipped in [false, true] {
                let sum = array![[9.0]];
                for i in 0..3 {
                    same!(cpu, 0.0, format!("{rows} x {width} adamw {i}"), b => {
                        let (mut p, mut moments) = (up(b, &p), [up(b, &m), up(b, &v)]);
                        let sum_squares = &up(b, &sum);
                        let clip = clipped.then_some(Clip { sum_squares, max_norm: 1.0 });
                        let [first, second] = {
                            b.adamw(&mut p, &up(b, &g), &mut moments, adam, clip).unwrap();
                            moments
                        };
                        Ok::<_, ()>([p, first, second].into_iter().nth(i).unwrap())
                    });
                    same!(cpu, 0.0, format!("{rows} x {width} sgd {i}"), b => {
                        let (mut p, mut velocity) = (up(b, &p), up(b, &m));
                        let sum_squares = &up(b, &sum);
                        let clip = clipped.then_some(Clip { sum_squares, max_norm: 1.0 });
                        let of = (i > 0).then_some(&mut velocity);
                        b.sgd(&mut p, &up(b, &g), of, sgd, clip).unwrap();
                        Ok::<_, ()>(if i == 2 { velocity } else { p })
                    });
                }
            }
        }
    });
}

/// A step's results do not depend on the number of threads.
#[test]
fn results_are_those_of_one_thread() {
    for level in SimdLevel::ALL.into_iter().filter(|level| level.is_available()) {
        let results = [1, 4].map(|threads| {
            let b = &Cpu::builder().threads(threads).simd(Some(level)).build().expect("the level is there");
            let (x, w, dy) = (random(75, 96, 1), random(130, 96, 2), random(75, 130, 3));
            let (x, w, dy) = (up(b, &x), up(b, &w), up(b, &dy));
            let spans = Span::lay_out([60, 15]);
            let attend = Attend { heads: 3, layer: 0, spans: &spans };
            let linear = b.linear_of(&w, None, DType::BF16).unwrap();
            let norm = NormParams { width: 96, eps: 1e-5, weight: None, bias: None };
            let norm = b.new_norm(norm).unwrap();
            let targets: Vec<u32> = (0..75).collect();
            let smoothing = Smoothing { scale: 1.0, epsilon: 0.1 };
            let mut all = vec![
                b.matmul(&dy, &x, Layout::TransposedTimes, DType::F32, None).unwrap(),
                b.matmul(&dy, &x, Layout::TransposedTimes, DType::BF16, None).unwrap(),
                b.linear_grad(&dy, &linear, None).unwrap(),
                b.layer_norm_grad(&x, &norm, &x).unwrap(),
                b.sum_rows(&x).unwrap(),
                b.sum_squares(&[&x, &dy]).unwrap(),
            ];
            all.extend(b.attend_grad([&x, &x, &x], &x, attend).unwrap());
            all.extend(b.layer_norm_grad_params(&x, &norm, &x).unwrap());
            all.extend(b.cross_entropy(dy, &targets, smoothing).unwrap());
            all.into_iter().map(|x| down(b, &x).mapv(f32::to_bits)).collect::<Vec<_>>()
        });
        assert!(results[0] == results[1], "{level}");
    }
}

#[test]
fn what_does_not_fit_is_refused_and_left_alone() {
    let cpu = &Cpu::builder().threads(2).build().expect("two threads");
    let t = |rows, width| up(cpu, &random(rows, width, 1));
    let f32 = DType::F32;
    assert!(cpu.matmul(&t(2, 3), &t(2, 4), Layout::TimesTransposed, f32, None).is_err());
    assert!(cpu.matmul(&t(2, 3), &t(2, 4), Layout::Times, f32, None).is_err());
    assert!(cpu.matmul(&t(2, 3), &t(3, 4), Layout::TransposedTimes, f32, None).is_err());
    assert!(cpu.matmul(&t(2, 3), &t(3, 4), Layout::Times, f32, Some(t(2, 3))).is_err());
    let linear = cpu.linear_of(&t(4, 3), Some(&t(1, 4)), f32).expect("it fits");
    assert!(cpu.linear_of(&t(4, 3), Some(&t(1, 3)), f32).is_err());
    assert!(cpu.linear_grad(&t(2, 3), &linear, None).is_err());
    assert!(cpu.linear_grad(&t(2, 4), &linear, Some(t(2, 4))).is_err());
    assert!(cpu.norm_of(&t(1, 4), &t(1, 3), 1e-5).is_err());
    let norm = cpu.norm_of(&t(1, 4), &t(1, 4), 1e-5).expect("it fits");
    assert!(cpu.layer_norm_grad(&t(2, 4), &norm, &t(2, 3)).is_err());
    assert!(cpu.layer_norm_grad_params(&t(2, 3), &norm, &t(2, 3)).is_err());
    let attend = Attend { heads: 2, layer: 0, spans: &[Span { start: 1, len: 2 }] };
    assert!(cpu.attend_grad([&t(2, 4), &t(2, 4), &t(2, 4)], &t(2, 4), attend).is_err());
    assert!(cpu.attend_grad([&t(3, 4), &t(3, 2), &t(3, 4)], &t(3, 4), attend).is_err());
    let smoothing = Smoothing { scale: 1.0, epsilon: 0.0 };
    assert!(cpu.cross_entropy(t(2, 3), &[1, 3], smoothing).is_err());
    assert!(cpu.cross_entropy(t(2, 3), &[1], smoothing).is_err());
    assert!(cpu.soft_targets(t(2, 3), &t(2, 4), 1.0, 1.0).is_err());
    assert!(cpu.scatter_add(t(2, 3), &[2], &t(1, 3)).is_err());
    assert!(cpu.scatter_add(t(2, 3), &[1], &t(1, 4)).is_err());
    assert!(cpu.concat(&[&t(2, 3), &t(2, 4)]).is_err());
    assert!(cpu.add_row(t(2, 3), &t(1, 2)).is_err());
    assert!(cpu.mul_row(t(2, 3), &t(2, 3)).is_err());
    assert!(cpu.mul(t(2, 3), &t(3, 2)).is_err());
    assert!(cpu.activate_grad(&t(2, 3), t(3, 2), Activation::Relu).is_err());
    let adam = AdamW { lr: 1.0, beta1: 0.9, beta2: 0.9, eps: 0.0, weight_decay: 0.0, step: 1 };
    let (mut param, mut moments) = (t(2, 3), [t(2, 3), t(2, 3)]);
    assert!(cpu.adamw(&mut param, &t(3, 2), &mut moments, adam, None).is_err());
    let clip = Clip { sum_squares: &t(1, 2), max_norm: 1.0 };
    assert!(cpu.adamw(&mut param, &t(2, 3), &mut moments, adam, Some(clip)).is_err());
    let sgd = Sgd { lr: 1.0, momentum: 0.0, weight_decay: 0.0 };
    assert!(cpu.sgd(&mut param, &t(2, 3), Some(&mut t(2, 2)), sgd, None).is_err());
    let expected = random(2, 3, 1);
    assert_eq!(down(cpu, &param), expected);
    assert_eq!(down(cpu, &moments[0]).slice(s![.., ..]), expected);
}
