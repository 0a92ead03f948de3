//! The ops of training against their default bodies, on both ways that this backend has of computing them.
//!
//! `OPT_TEST_DEVICE` (`cuda:0`, `metal`) runs all of it on another device than the CPU.

use opt_backend::{
    Activation, AdamW, Attend, Backend, Clip, DType, Dropout, HostMatrix, Layout, NormParams, Op, Reference,
    Sgd, Smoothing, Span, Train,
    half::{bf16, f16},
    ndarray::{Array2, s},
    quant::{Groups, Levels, NF4, Quantized, Zeros},
};
use opt_backend_candle::{Builder, Candle};

type Host = Array2<f32>;

fn backends() -> Vec<Candle> {
    let device = std::env::var("OPT_TEST_DEVICE").unwrap_or_else(|_| "cpu".to_owned());
    let build = |builder: Builder| builder.device(&device).build().expect("the device is there");
    vec![build(Candle::builder().threads(2)), build(Candle::builder().plain(true))]
}

/// Numbers around 0 that differ from seed to seed.
fn matrix(seed: usize, rows: usize, width: usize) -> Host {
    let mut state = seed as u64 * 77 + 1;
    Array2::from_shape_simple_fn((rows, width), || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u32 << 23) as f32 - 1.0
    })
}

#[track_caller]
fn close_by(what: &str, found: &Host, expected: &Host, tolerance: f32) {
    assert_eq!(found.dim(), expected.dim(), "{what}");
    let largest = expected.iter().fold(0.0_f32, |max, v| max.max(v.abs()));
    for (i, (f, e)) in found.iter().zip(expected).enumerate() {
        let allowed = tolerance * (e.abs() + 0.1 * largest) + 1e-9;
        assert!((f - e).abs() <= allowed, "{what}, element {i}: expected {e}, found {f}");
    }
}

/// The same ops on a backend and on the reference.
struct Pair<'a> {
    tested: &'a Candle,
    reference: Reference,
}

macro_rules! both {
    ($pair:expr, |$b:ident, $up:ident| $body:expr) => {{
        let found = {
            let $b = $pair.tested;
            let $up = |m: &Host| $b.upload(m.view()).unwrap();
            let reads = || $b.counters().counts().reads;
            let before = reads();
            let results = $body;
            assert_eq!(reads(), before, "an op of training reads nothing back");
            results.into_iter().map(|x| $b.block_on($b.read(&x)).unwrap()).collect::<Vec<_>>()
        };
        let expected = {
            let $b = &$pair.reference;
            let $up = |m: &Host| $b.upload(m.view()).unwrap();
            $body.into_iter().map(|x| $b.block_on($b.read(&x)).unwrap()).collect::<Vec<_>>()
        };
        (found, expected)
    }};
}

impl Pair<'_> {
    #[track_caller]
    fn same(&self, what: &str, (found, expected): (Vec<Host>, Vec<Host>)) {
        self.near(what, (found, expected), 1e-5);
    }

    #[track_caller]
    fn near(&self, what: &str, (found, expected): (Vec<Host>, Vec<Host>), tolerance: f32) {
        assert_eq!(found.len(), expected.len());
        for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
            close_by(&format!("{what}, result {i}"), found, expected, tolerance);
        }
    }
}

fn each(check: impl Fn(&Pair<'_>)) {
    for tested in &backends() {
        check(&Pair { tested, reference: Reference::new() });
        let counts = tested.counters().counts();
        for op in Op::TRAIN {
            assert_eq!(counts.default_bodies(op), 0, "{op:?} is the default body");
        }
    }
}

const SHAPES: [[usize; 2]; 6] = [[0, 5], [1, 1], [1, 7], [3, 33], [70, 48], [129, 261]];

#[test]
fn products() {
    each(|pair| {
        for [n, k] in SHAPES {
            for m in [1, 5, 40] {
                for (layout, a, b) in [
                    (Layout::TimesTransposed, [n, k], [m, k]),
                    (Layout::Times, [n, k], [k, m]),
                    (Layout::TransposedTimes, [n, k], [n, m]),
                ] {
                    let (a, b) = (matrix(1, a[0], a[1]), matrix(2, b[0], b[1]));
                    let [rows, columns] = layout.shape(a.dim().into(), b.dim().into()).unwrap();
                    let into = matrix(3, rows, columns);
                    for dtype in [DType::F32, DType::BF16, DType::F16] {
                        let tolerance = if dtype == DType::F32 { 1e-5 } else { 2e-2 };
                        let what = format!("{layout:?} {n} {k} {m} {dtype}");
                        pair.near(
                            &what,
                            both!(pair, |t, up| {
                                let (a, b) = (up(&a), up(&b));
                                let alone = t.matmul(&a, &b, layout, dtype, None).unwrap();
                                let summed = t.matmul(&a, &b, layout, dtype, Some(up(&into))).unwrap();
                                vec![alone, summed]
                            }),
                            tolerance,
                        );
                    }
                }
            }
        }
        let (a, b) = (pair.tested.upload(matrix(1, 2, 3).view()), pair.tested.upload(matrix(1, 2, 4).view()));
        let (a, b) = (a.unwrap(), b.unwrap());
        assert!(pair.tested.matmul(&a, &b, Layout::Times, DType::F32, None).is_err());
        let into = Some(pair.tested.upload(matrix(1, 3, 3).view()).unwrap());
        assert!(pair.tested.matmul(&a, &b, Layout::TransposedTimes, DType::F32, into).is_err());
    });
}

#[test]
fn gradients_through_weights() {
    each(|pair| {
        for [rows, inputs] in SHAPES {
            for outputs in [1, 6, 300] {
                let weight = matrix(4, outputs, inputs);
                let (dy, into) = (matrix(5, rows, outputs), matrix(6, rows, inputs));
                for dtype in [DType::F32, DType::F16, DType::BF16] {
                    let tolerance = if dtype == DType::F32 { 1e-5 } else { 2e-2 };
                    pair.near(
                        &format!("{rows} {inputs} {outputs} {dtype}"),
                        both!(pair, |t, up| {
                            let linear = t.new_linear(HostMatrix::F32(weight.view()), None, dtype).unwrap();
                            let table = t.new_table(HostMatrix::F32(weight.view()), dtype).unwrap();
                            let own = t.linear_of(&up(&weight), None, dtype).unwrap();
                            let dy = up(&dy);
                            vec![
                                t.linear_grad(&dy, &linear, None).unwrap(),
                                t.linear_grad(&dy, &linear, Some(up(&into))).unwrap(),
                                t.linear_grad(&dy, &own, None).unwrap(),
                                t.logits_grad(&dy, &table).unwrap(),
                            ]
                        }),
                        tolerance,
                    );
                }
            }
        }
    });
}

#[test]
fn gradients_through_weights_that_were_joined() {
    each(|pair| {
        let weights = [7, 8, 9].map(|seed| matrix(seed, 48, 48));
        let (x, dy) = (matrix(10, 5, 48), matrix(11, 5, 48));
        pair.same(
            "joined",
            both!(pair, |t, up| {
                let linears = weights
                    .each_ref()
                    .map(|w| t.new_linear(HostMatrix::F32(w.view()), None, DType::F32).unwrap());
                let [q, k, v] = &linears;
                let _ = t.qkv(&up(&x), q, k, v).unwrap();
                let dy = up(&dy);
                let sum = t.linear_grad(&dy, q, None).unwrap();
                let sum = t.linear_grad(&dy, k, Some(sum)).unwrap();
                vec![t.linear_grad(&dy, v, Some(sum)).unwrap()]
            }),
        );
    });
}

#[test]
fn gradients_through_quantized_weights() {
    each(|pair| {
        // More rows than are expanded at a time.
        for (rows, inputs, outputs) in [(0, 64, 5), (1, 64, 3), (9, 128, 9000)] {
            let (dy, into) = (matrix(5, rows, outputs), matrix(6, rows, inputs));
            let scales = matrix(4, outputs, inputs / 32);
            for (levels, count) in [(Levels::Integers { bits: 8 }, 256), (Levels::Table(NF4), 16)] {
                let codes =
                    Array2::from_shape_fn((outputs, inputs), |(i, j)| ((i * 31 + j * 17) % count) as u8);
                let coded = Quantized::new(codes, scales.clone(), Zeros::Same(128), levels, Groups::Runs(32));
                let coded = coded.unwrap();
                pair.near(
                    &format!("{rows} {inputs} {outputs} {levels:?}"),
                    both!(pair, |t, up| {
                        let linear = t.new_quantized_linear(&coded, None).unwrap();
                        let table = t.new_quantized_table(&coded).unwrap();
                        let dy = up(&dy);
                        vec![
                            t.linear_grad(&dy, &linear, Some(up(&into))).unwrap(),
                            t.logits_grad(&dy, &table).unwrap(),
                        ]
                    }),
                    3e-5,
                );
            }
        }
    });
}

#[test]
fn norms() {
    each(|pair| {
        for [rows, width] in SHAPES {
            // Far from zero, where a mean in f32 is not good enough.
            let (x, dy) = (matrix(12, rows, width) + 10.0, matrix(13, rows, width));
            let (weight, bias) = (matrix(14, 1, width), matrix(15, 1, width));
            if width > 1 {
                pair.near(
                    &format!("{rows} {width}"),
                    both!(pair, |t, up| {
                        let plain =
                            t.new_norm(NormParams { width, eps: 1e-5, weight: None, bias: None }).unwrap();
                        let norm = t.norm_of(&up(&weight), &up(&bias), 1e-5).unwrap();
                        let (x, dy) = (up(&x), up(&dy));
                        let [a, b] = t.layer_norm_grad_params(&x, &norm, &dy).unwrap();
                        vec![
                            t.layer_norm(&x, &norm).unwrap(),
                            t.layer_norm_grad(&x, &norm, &dy).unwrap(),
                            t.layer_norm_grad(&x, &plain, &dy).unwrap(),
                            a,
                            b,
                        ]
                    }),
                    3e-5,
                );
            }
        }
    });
}

#[test]
fn attention() {
    each(|pair| {
        let span = |start, len| Span { start, len };
        for (rows, heads, dim, spans) in [
            (0, 1, 4, vec![]),
            (1, 2, 3, vec![span(0, 1)]),
            (7, 1, 5, vec![span(0, 7)]),
            (12, 3, 8, vec![span(0, 4), span(4, 4), span(8, 4)]),
            (20, 2, 16, vec![span(9, 5), span(1, 3), span(4, 0), span(15, 5)]),
            (200, 2, 64, vec![span(0, 131), span(131, 1), span(132, 67)]),
        ] {
            let x = [16, 17, 18, 19].map(|seed| 2.0 * matrix(seed, rows, heads * dim));
            let attend = Attend { heads, spans: &spans, layer: 0 };
            pair.near(
                &format!("{rows} {heads} {dim}"),
                both!(pair, |t, up| {
                    let [q, k, v, dy] = x.each_ref().map(up);
                    t.attend_grad([&q, &k, &v], &dy, attend).unwrap().into_iter().collect::<Vec<_>>()
                }),
                2e-5,
            );
        }
    });
}

#[test]
fn activations() {
    each(|pair| {
        for [rows, width] in SHAPES {
            let (x, dy) = (6.0 * matrix(20, rows, width), matrix(21, rows, width));
            for activation in Activation::all() {
                pair.near(
                    &format!("{rows} {width} {activation}"),
                    both!(pair, |t, up| {
                        let x = up(&x);
                        let gradient = t.activate_grad(&x, up(&dy), activation).unwrap();
                        let copy = t.copy(&x).unwrap();
                        vec![gradient, t.activate(x, activation).unwrap(), copy]
                    }),
                    3e-5,
                );
            }
        }
        // Where slopes jump.
        let x = Array2::from_shape_vec((1, 5), vec![0.0, 6.0, -0.0, 11.0, -11.0]).unwrap();
        for activation in Activation::all() {
            pair.near(
                &format!("{activation}"),
                both!(pair, |t, up| {
                    vec![t.activate_grad(&up(&x), up(&Array2::ones((1, 5))), activation).unwrap()]
                }),
                3e-5,
            );
        }
    });
}

#[test]
fn losses() {
    each(|pair| {
        for [rows, entries] in [[0, 3], [1, 1], [1, 9], [5, 33], [40, 5003]] {
            let logits = 8.0 * matrix(22, rows, entries);
            let teacher = 8.0 * matrix(23, rows, entries);
            let targets: Vec<u32> = (0..rows).map(|row| (row * 37 % entries) as u32).collect();
            for epsilon in [0.0, 0.1] {
                let smoothing = Smoothing { scale: 0.25, epsilon };
                pair.near(
                    &format!("{rows} {entries} {epsilon}"),
                    both!(pair, |t, up| {
                        let [loss, d] = t.cross_entropy(up(&logits), &targets, smoothing).unwrap();
                        vec![loss, d]
                    }),
                    2e-5,
                );
            }
            for temperature in [1.0, 2.5] {
                pair.near(
                    &format!("{rows} {entries} {temperature}"),
                    both!(pair, |t, up| {
                        let [loss, d] = t.soft_targets(up(&logits), &up(&teacher), temperature, 0.5).unwrap();
                        vec![loss, d]
                    }),
                    2e-5,
                );
            }
        }
        let logits = || pair.tested.upload(matrix(1, 2, 3).view()).unwrap();
        let smoothing = Smoothing { scale: 1.0, epsilon: 0.0 };
        assert!(pair.tested.cross_entropy(logits(), &[0, 3], smoothing).is_err());
        assert!(pair.tested.cross_entropy(logits(), &[0], smoothing).is_err());
    });
}

#[test]
fn rows_and_elements() {
    each(|pair| {
        for [rows, width] in SHAPES {
            let (x, y) = (matrix(24, rows, width), matrix(25, rows, width));
            let (row, table) = (matrix(26, 1, width), matrix(27, 11, width));
            let scattered: Vec<usize> = (0..rows).map(|i| i * i % 11).collect();
            pair.same(
                &format!("{rows} {width}"),
                both!(pair, |t, up| {
                    let (y, row) = (up(&y), up(&row));
                    let copy = t.copy(&y).unwrap();
                    vec![
                        t.add_row(up(&x), &row).unwrap(),
                        t.mul_row(up(&x), &row).unwrap(),
                        t.mul(up(&x), &y).unwrap(),
                        t.scale(copy, -1.5).unwrap(),
                        t.sum_rows(&y).unwrap(),
                        t.scatter_add(up(&table), &scattered, &y).unwrap(),
                        t.concat(&[&y, &row, &y]).unwrap(),
                        t.sum_squares(&[&y, &row]).unwrap(),
                        t.sum_squares(&[]).unwrap(),
                        y,
                    ]
                }),
            );
            for (p, seed) in [(0.0, 1), (0.1, 2), (0.9, u64::MAX - 5)] {
                let dropout = Dropout { p, seed };
                pair.same(
                    &format!("dropout {rows} {width} {p}"),
                    both!(pair, |t, up| { vec![t.dropout(up(&x), dropout).unwrap()] }),
                );
            }
        }
        let (table, rows) = (matrix(27, 11, 3), matrix(28, 4, 3));
        pair.same(
            "in order",
            both!(pair, |t, up| {
                vec![t.scatter_add(up(&table), &[5, 6, 7, 8], &up(&rows)).unwrap(), t.concat(&[]).unwrap()]
            }),
        );
        // More elements than a task of a thread.
        let x = matrix(29, 3, 70_000);
        pair.same(
            "large",
            both!(pair, |t, up| {
                let x = up(&x);
                let sum = t.sum_squares(&[&x]).unwrap();
                vec![sum, t.dropout(x, Dropout { p: 0.3, seed: 7 << 33 }).unwrap()]
            }),
        );
    });
}

#[test]
fn optimizers() {
    each(|pair| {
        for [rows, width] in [[0, 5], [1, 1], [3, 33], [2, 40_001]] {
            let [p, g] = [30, 31].map(|seed| matrix(seed, rows, width));
            for clipped in [false, true] {
                pair.same(
                    &format!("adamw {rows} {width} {clipped}"),
                    both!(pair, |t, up| {
                        let (mut p, g) = (up(&p), up(&g));
                        let mut moments = [(); 2].map(|()| up(&Array2::zeros((rows, width))));
                        // What others hold stays as it is.
                        let (old, old_moment) = (t.copy(&p).unwrap(), t.copy(&moments[0]).unwrap());
                        let linear = t.linear_of(&p, None, DType::F32).unwrap();
                        for step in 1..4 {
                            let adam = AdamW {
                                lr: 1e-2,
                                beta1: 0.9,
                                beta2: 0.99,
                                eps: 1e-8,
                                weight_decay: 0.1,
                                step,
                            };
                            let sum = t.sum_squares(&[&g]).unwrap();
                            let clip = clipped.then_some(Clip { sum_squares: &sum, max_norm: 0.5 });
                            t.adamw(&mut p, &g, &mut moments, adam, clip).unwrap();
                        }
                        let through = t.linear_grad(&up(&Array2::ones((1, rows))), &linear, None).unwrap();
                        let [m, v] = moments;
                        vec![p, g, m, v, old, old_moment, through]
                    }),
                );
                for momentum in [None, Some(0.9)] {
                    pair.same(
                        &format!("sgd {rows} {width} {clipped} {momentum:?}"),
                        both!(pair, |t, up| {
                            let (mut p, g) = (up(&p), up(&g));
                            let mut velocity = momentum.map(|_| up(&Array2::zeros((rows, width))));
                            for _ in 0..3 {
                                let sgd =
                                    Sgd { lr: 1e-2, momentum: momentum.unwrap_or(0.0), weight_decay: 0.1 };
                                let sum = t.sum_squares(&[&g]).unwrap();
                                let clip = clipped.then_some(Clip { sum_squares: &sum, max_norm: 0.5 });
                                t.sgd(&mut p, &g, velocity.as_mut(), sgd, clip).unwrap();
                            }
                            vec![p, g].into_iter().chain(velocity).collect::<Vec<_>>()
                        }),
                    );
                }
            }
        }
    });
}

#[test]
fn what_does_not_fit_is_refused_and_changes_nothing() {
    each(|pair| {
        let t = pair.tested;
        let up = |rows, width| t.upload(matrix(32, rows, width).view()).unwrap();
        let mut p = up(2, 3);
        let mut moments = [up(2, 3), up(2, 4)];
        let adam = AdamW { lr: 0.1, beta1: 0.9, beta2: 0.9, eps: 0.1, weight_decay: 0.0, step: 1 };
        assert!(t.adamw(&mut p, &up(2, 3), &mut moments, adam, None).is_err());
        let sgd = Sgd { lr: 0.1, momentum: 0.0, weight_decay: 0.0 };
        let wrong = Clip { sum_squares: &up(2, 3), max_norm: 1.0 };
        assert!(t.sgd(&mut p, &up(2, 3), None, sgd, Some(wrong)).is_err());
        assert!(t.sgd(&mut p, &up(3, 3), None, sgd, None).is_err());
        assert_eq!(t.block_on(t.read(&p)).unwrap(), matrix(32, 2, 3));
        assert!(t.concat(&[&up(1, 2), &up(1, 3)]).is_err());
        assert!(t.scatter_add(up(2, 3), &[2], &up(1, 3)).is_err());
        assert!(t.linear_of(&up(2, 3), Some(&up(1, 3)), DType::F32).is_err());
        assert!(t.norm_of(&up(1, 3), &up(1, 2), 1e-5).is_err());
    });
}

/// What weights of each format give.
#[test]
fn strided_and_narrow_operands() {
    each(|pair| {
        let weights = [40, 41, 42].map(|seed| matrix(seed, 48, 32));
        let (x, dy) = (matrix(43, 9, 32), matrix(44, 9, 48));
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            let rounded = |v: f32| match dtype {
                DType::BF16 => bf16::from_f32(v).to_f32(),
                DType::F16 => f16::from_f32(v).to_f32(),
                _ => v,
            };
            let (weights, x) = (weights.each_ref().map(|w| w.mapv(rounded)), x.mapv(rounded));
            let tolerance = if dtype == DType::F32 { 1e-5 } else { 3e-2 };
            pair.near(
                &format!("{dtype}"),
                both!(pair, |t, up| {
                    let linears = weights
                        .each_ref()
                        .map(|w| t.new_linear(HostMatrix::F32(w.view()), None, dtype).unwrap());
                    let [q, k, v] = &linears;
                    let [q, k, v] = t.qkv(&up(&x), q, k, v).unwrap();
                    let dy = up(&dy);
                    let spans = [Span { start: 0, len: 9 }];
                    let attend = Attend { heads: 3, spans: &spans, layer: 0 };
                    let [dq, dk, dv] = t.attend_grad([&q, &k, &v], &dy, attend).unwrap();
                    let copy = t.copy(&k).unwrap();
                    let mut p = t.copy(&q).unwrap();
                    let sgd = Sgd { lr: 0.1, momentum: 0.0, weight_decay: 0.0 };
                    t.sgd(&mut p, &v, None, sgd, None).unwrap();
                    vec![
                        dq,
                        dk,
                        dv,
                        p,
                        t.matmul(&k, &v, Layout::TransposedTimes, DType::F32, None).unwrap(),
                        t.sum_rows(&v).unwrap(),
                        t.concat(&[&q, &dy]).unwrap(),
                        t.sum_squares(&[&k]).unwrap(),
                        t.activate_grad(&v, t.copy(&q).unwrap(), Activation::Relu).unwrap(),
                        t.activate(copy, Activation::Gelu).unwrap(),
                        t.dropout(q, Dropout { p: 0.5, seed: 3 }).unwrap(),
                        t.mul(k, &v).unwrap(),
                    ]
                }),
                tolerance,
            );
        }
    });
}

#[test]
fn linears_of_parameters() {
    each(|pair| {
        let (weight, bias, x) = (matrix(45, 6, 5), matrix(46, 1, 6), matrix(47, 3, 5));
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            let tolerance = if dtype == DType::F32 { 1e-5 } else { 2e-2 };
            pair.near(
                &format!("{dtype}"),
                both!(pair, |t, up| {
                    let linear = t.linear_of(&up(&weight), Some(&up(&bias)), dtype).unwrap();
                    let x = up(&x);
                    let [q, k, v] = t.qkv(&x, &linear, &linear, &linear).unwrap();
                    vec![t.linear(&x, &linear, opt_backend::Then::Nothing).unwrap(), q, k, v]
                }),
                tolerance,
            );
            let t = pair.tested;
            let up = |m: &Host| t.upload(m.view()).unwrap();
            let linear = t.linear_of(&up(&weight), Some(&up(&bias)), dtype).unwrap();
            let read = t.block_on(t.read_linear(&linear)).unwrap();
            assert_eq!(read.weight, weight.mapv(|v| dtype.round(v)));
            assert_eq!(read.bias.unwrap(), bias.mapv(|v| dtype.round(v)).slice(s![0, ..]));
        }
    });
}
