//! The ops of training beside the default bodies on host arrays, at shapes that hurt: no rows, one, odd widths, more
//! than a workgroup takes, and more than a binding holds.

mod common;

use common::model::{Numbers, quantize};
use opt_backend::{
    Activation, AdamW, Attend, Backend, Clip, DType, Dropout, ErrorKind, HostMatrix, Layout, NormParams, Op,
    Reference, Sgd, Smoothing, Span, Then, Train,
    ndarray::{Array2, Axis, s},
    quant::{Groups, Levels, NF4, Quantized, Zeros},
};
use opt_backend_wgpu::Wgpu;

/// What came of each case, by name.
struct Cases<'a, B: Train> {
    b: &'a B,
    numbers: Numbers,
    found: Vec<(String, Array2<f32>)>,
}

impl<B: Train> Cases<'_, B> {
    fn up(&self, x: &Array2<f32>) -> B::Tensor {
        self.b.upload(x.view()).expect("upload")
    }

    fn random(&mut self, rows: usize, width: usize) -> B::Tensor {
        let x = self.numbers.matrix(rows, width);
        self.up(&x)
    }

    fn keep(&mut self, name: impl Into<String>, x: &B::Tensor) {
        let x = self.b.block_on(self.b.read(x)).expect("read");
        self.found.push((name.into(), x));
    }
}

/// Runs the cases on the backend of host arrays and on `b`, and compares.
fn compare(b: &Wgpu, tolerance: f32, on_host: fn(&mut Cases<'_, Reference>), here: fn(&mut Cases<'_, Wgpu>)) {
    let host = Reference::new();
    let mut expected = Cases { b: &host, numbers: Numbers(11), found: Vec::new() };
    on_host(&mut expected);
    let before = b.counters().counts();
    let mut found = Cases { b, numbers: Numbers(11), found: Vec::new() };
    here(&mut found);
    let taken = b.counters().counts().since(&before);
    let defaults: Vec<Op> = Op::TRAIN.into_iter().filter(|op| taken.default_bodies(*op) > 0).collect();
    assert!(defaults.is_empty(), "went through the host: {defaults:?}");
    assert_eq!(expected.found.len(), found.found.len());
    for ((name, expected), (_, found)) in expected.found.iter().zip(&found.found) {
        assert_eq!(expected.dim(), found.dim(), "{name}");
        let largest = expected.iter().fold(0f32, |most, v| most.max(v.abs()));
        for ((at, e), f) in expected.indexed_iter().zip(found) {
            let allowed = tolerance * largest.max(1e-3);
            assert!((e - f).abs() <= allowed, "{name} at {at:?}: expected {e}, found {f}, largest {largest}");
        }
    }
}

fn backends() -> Vec<Wgpu> {
    let Some(builder) = common::builder() else { return Vec::new() };
    let tight = builder.clone().default_limits().features(false, false).software(false);
    [builder, tight].map(|builder| builder.build().expect("the adapter was there a moment ago")).into()
}

macro_rules! both {
    ($b:expr, $tolerance:expr, $cases:ident) => {
        compare($b, $tolerance, $cases::<Reference>, $cases::<Wgpu>)
    };
}

/// Rows and widths.
const SHAPES: [[usize; 2]; 7] = [[0, 5], [1, 1], [1, 7], [3, 64], [17, 33], [70, 130], [2, 1030]];

fn each<B: Train>(cases: &mut Cases<'_, B>) {
    for [rows, width] in SHAPES {
        let name = |op: &str| format!("{op} of {rows}x{width}");
        let x = cases.random(rows, width);
        let y = cases.random(rows, width);
        let row = cases.random(1, width);
        let zeros = cases.b.zeros([rows, width]).expect("zeros");
        cases.keep(name("zeros"), &zeros);
        let copy = || cases.b.copy(&x).expect("copy");
        let dropout = Dropout { p: 0.3, seed: 0x1234_5678_9abc_def0 };
        let results = [
            ("mul", cases.b.mul(copy(), &y)),
            ("mul by itself", cases.b.mul(copy(), &x)),
            ("mul_row", cases.b.mul_row(copy(), &row)),
            ("add_row", cases.b.add_row(copy(), &row)),
            ("scale", cases.b.scale(copy(), -1.75)),
            ("dropout", cases.b.dropout(copy(), dropout)),
            ("no dropout", cases.b.dropout(copy(), Dropout { p: 0.0, seed: 3 })),
            ("sum_rows", cases.b.sum_rows(&x)),
            ("concat", cases.b.concat(&[&x, &y, &row])),
            ("sum_squares", cases.b.sum_squares(&[&x, &y, &row])),
        ];
        for (op, result) in results {
            cases.keep(name(op), &result.expect(op));
        }
        // Padding that is not zero would show in the next product.
        let activated =
            cases.b.activate(cases.b.copy(&x).expect("copy"), Activation::Sigmoid).expect("sigmoid");
        let product = cases.b.matmul(&activated, &activated, Layout::TimesTransposed, DType::F32, None);
        cases.keep(name("padding"), &product.expect("matmul"));
        cases.keep(name("what was copied"), &x);
    }
    let none = cases.b.concat(&[]).expect("concat");
    cases.keep("concat of nothing", &none);
    let none = cases.b.sum_squares(&[]).expect("sum_squares");
    cases.keep("sum_squares of nothing", &none);
}

fn activations<B: Train>(cases: &mut Cases<'_, B>) {
    let x = Array2::from_shape_fn((5, 41), |(i, j)| (i * 41 + j) as f32 * 0.15 - 15.0);
    let x = cases.up(&x);
    let dy = cases.random(5, 41);
    for activation in Activation::all() {
        let y = cases.b.activate(cases.b.copy(&x).expect("copy"), activation).expect("activate");
        cases.keep(format!("{activation}"), &y);
        let dx = cases.b.activate_grad(&x, cases.b.copy(&dy).expect("copy"), activation).expect("gradient");
        cases.keep(format!("{activation} backwards"), &dx);
    }
}

fn products<B: Train>(cases: &mut Cases<'_, B>) {
    for [n, k, m] in [[0, 3, 5], [1, 1, 1], [3, 0, 5], [5, 7, 9], [65, 33, 70], [64, 64, 64], [2, 130, 67]] {
        for layout in [Layout::TimesTransposed, Layout::Times, Layout::TransposedTimes] {
            let [a, b] = match layout {
                Layout::TimesTransposed => [[n, k], [m, k]],
                Layout::Times => [[n, k], [k, m]],
                Layout::TransposedTimes => [[k, n], [k, m]],
            };
            // That can be rounded to bf16 or not.
            let [a, b] = [a, b].map(|[rows, width]| {
                let x = cases.numbers.matrix(rows, width).mapv(|v| DType::BF16.round(v));
                cases.up(&x)
            });
            let into = cases.random(n, m);
            let y = cases.b.matmul(&a, &b, layout, DType::F32, None).expect("matmul");
            cases.keep(format!("{layout:?} {n} {k} {m}"), &y);
            let y = cases.b.matmul(&a, &b, layout, DType::BF16, Some(into)).expect("matmul");
            cases.keep(format!("{layout:?} {n} {k} {m} into"), &y);
        }
    }
}

fn norms<B: Train>(cases: &mut Cases<'_, B>) {
    for [rows, width] in SHAPES {
        let name = |op: &str| format!("{op} of {rows}x{width}");
        let (x, dy) = (cases.random(rows, width), cases.random(rows, width));
        let [weight, bias] = [(); 2].map(|()| cases.random(1, width));
        let plain = NormParams { width, eps: 1e-5, weight: None, bias: None };
        let norms = [cases.b.new_norm(plain), cases.b.norm_of(&weight, &bias, 1e-5)];
        for norm in norms {
            let norm = norm.expect("a norm");
            let y = cases.b.layer_norm(&x, &norm).expect("layer_norm");
            cases.keep(name("layer_norm"), &y);
            let dx = cases.b.layer_norm_grad(&x, &norm, &dy).expect("layer_norm_grad");
            cases.keep(name("layer_norm_grad"), &dx);
            let [d_weight, d_bias] = cases.b.layer_norm_grad_params(&x, &norm, &dy).expect("of parameters");
            cases.keep(name("of the weight"), &d_weight);
            cases.keep(name("of the bias"), &d_bias);
            let read = cases.b.block_on(cases.b.read_norm(&norm)).expect("read_norm");
            if let (Some(weight), Some(bias)) = (read.weight, read.bias) {
                cases.found.push((name("read weight"), weight.insert_axis(Axis(0))));
                cases.found.push((name("read bias"), bias.insert_axis(Axis(0))));
            }
        }
    }
}

fn weights<B: Train>(cases: &mut Cases<'_, B>) {
    for [rows, out, input] in [[1, 1, 1], [0, 4, 4], [3, 7, 5], [20, 66, 97], [70, 130, 64]] {
        let (weight, bias) = (cases.random(out, input), cases.random(1, out));
        let (x, dy, into) = (cases.random(rows, input), cases.random(rows, out), cases.random(rows, input));
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            for bias in [None, Some(&bias)] {
                let name =
                    |op: &str| format!("{op}, {rows} rows, {out}x{input} {dtype}, bias {}", bias.is_some());
                let linear = cases.b.linear_of(&weight, bias, dtype).expect("linear_of");
                let y = cases.b.linear(&x, &linear, Then::Nothing).expect("linear");
                cases.keep(name("linear"), &y);
                let dx = cases.b.linear_grad(&dy, &linear, None).expect("linear_grad");
                cases.keep(name("linear_grad"), &dx);
                let into = Some(cases.b.copy(&into).expect("copy"));
                let dx = cases.b.linear_grad(&dy, &linear, into).expect("linear_grad");
                cases.keep(name("linear_grad into"), &dx);
                let read = cases.b.block_on(cases.b.read_linear(&linear)).expect("read_linear");
                cases.found.push((name("read weight"), read.weight));
                cases.found.extend(read.bias.map(|bias| (name("read bias"), bias.insert_axis(Axis(0)))));
            }
            let rows = cases.numbers.matrix(out, input);
            let table = cases.b.new_table(HostMatrix::F32(rows.view()), dtype).expect("new_table");
            let dx = cases.b.logits_grad(&dy, &table).expect("logits_grad");
            cases.keep(format!("logits_grad of {out}x{input} {dtype}"), &dx);
        }
    }
}

fn quantized<B: Train>(cases: &mut Cases<'_, B>) {
    let (out, input) = (70, 96);
    let host = cases.numbers.matrix(out, input);
    let mut weights = vec![quantize(&host, 4).expect("int4"), quantize(&host, 8).expect("int8")];
    let scales = Array2::from_shape_simple_fn((out, 3), || 0.1 * cases.numbers.next());
    let codes = Array2::from_shape_simple_fn((out, input), || cases.numbers.below(16) as u8);
    let zeros = Array2::from_shape_simple_fn((out, 3), || cases.numbers.below(16) as u16);
    let levels = Levels::Integers { bits: 4 };
    // Columns in another order, a zero point to each group, and levels from a table.
    let index = (0..input).map(|i| (i * 5 % 3) as u32).collect();
    let kinds = [
        (Zeros::Same(8), levels, Groups::Index(index)),
        (Zeros::Each(zeros), levels, Groups::Runs(32)),
        (Zeros::Same(0), Levels::Table(NF4), Groups::Runs(32)),
    ];
    for (zeros, levels, groups) in kinds {
        weights.push(Quantized::new(codes.clone(), scales.clone(), zeros, levels, groups).expect("it fits"));
    }
    for (i, weight) in weights.iter().enumerate() {
        let linear = cases.b.new_quantized_linear(weight, None).expect("linear");
        let table = cases.b.new_quantized_table(weight).expect("table");
        for rows in [1, 67] {
            let (dy, into) = (cases.random(rows, out), cases.random(rows, input));
            let dx = cases.b.linear_grad(&dy, &linear, None).expect("linear_grad");
            cases.keep(format!("linear_grad of format {i}, {rows} rows"), &dx);
            let dx = cases.b.linear_grad(&dy, &linear, Some(into)).expect("linear_grad");
            cases.keep(format!("linear_grad into of format {i}, {rows} rows"), &dx);
            let dx = cases.b.logits_grad(&dy, &table).expect("logits_grad");
            cases.keep(format!("logits_grad of format {i}, {rows} rows"), &dx);
        }
    }
}

fn attention<B: Train>(cases: &mut Cases<'_, B>) {
    let span = |start, len| Span { start, len };
    let batches: [(usize, usize, usize, Vec<Span>); 7] = [
        (0, 2, 4, vec![]),
        (1, 1, 1, vec![span(0, 1)]),
        (9, 3, 5, vec![span(0, 4), span(4, 0), span(6, 3)]),
        (140, 2, 16, vec![span(0, 70), span(70, 70)]),
        (70, 1, 72, vec![span(3, 67)]),
        // Rows of two spans: of no use, but not to be guessed at.
        (8, 2, 4, vec![span(0, 5), span(3, 5)]),
        (8, 2, 4, vec![span(0, 8), span(3, 5)]),
    ];
    for (rows, heads, head_dim, spans) in batches {
        let attend = Attend { heads, layer: 0, spans: &spans };
        let [q, k, v, dy] = [(); 4].map(|()| cases.random(rows, heads * head_dim));
        let gradients = cases.b.attend_grad([&q, &k, &v], &dy, attend).expect("attend_grad");
        for (what, gradient) in ["q", "k", "v"].into_iter().zip(&gradients) {
            cases.keep(format!("gradient of {what}, {rows} rows, {heads} heads of {head_dim}"), gradient);
        }
    }
}

fn losses<B: Train>(cases: &mut Cases<'_, B>) {
    for [rows, width] in [[0, 5], [1, 1], [3, 7], [5, 1500], [300, 9]] {
        let (x, y) = (cases.numbers.matrix(rows, width) * 6.0, cases.numbers.matrix(rows, width) * 6.0);
        let (x, y) = (cases.up(&x), cases.up(&y));
        let targets: Vec<u32> = (0..rows).map(|_| cases.numbers.below(width) as u32).collect();
        for epsilon in [0.0, 0.1] {
            let smoothing = Smoothing { scale: 0.25, epsilon };
            let logits = cases.b.copy(&x).expect("copy");
            let [loss, d] = cases.b.cross_entropy(logits, &targets, smoothing).expect("cross_entropy");
            cases.keep(format!("cross_entropy of {rows}x{width}, {epsilon}"), &loss);
            cases.keep(format!("gradient of cross_entropy of {rows}x{width}, {epsilon}"), &d);
        }
        for temperature in [1.0, 2.5] {
            let student = cases.b.copy(&x).expect("copy");
            let [loss, d] = cases.b.soft_targets(student, &y, temperature, 0.5).expect("soft_targets");
            cases.keep(format!("soft_targets of {rows}x{width} at {temperature}"), &loss);
            cases.keep(format!("gradient of soft_targets of {rows}x{width} at {temperature}"), &d);
        }
    }
}

fn scattered<B: Train>(cases: &mut Cases<'_, B>) {
    for (entries, count, width) in [(1, 0, 3), (1, 5, 1), (7, 40, 9), (300, 20, 130)] {
        let (into, dy) = (cases.random(entries, width), cases.random(count, width));
        let rows: Vec<usize> = (0..count).map(|_| cases.numbers.below(entries)).collect();
        let sum = cases.b.scatter_add(into, &rows, &dy).expect("scatter_add");
        cases.keep(format!("scatter_add of {count} to {entries}x{width}"), &sum);
    }
}

fn optimizers<B: Train>(cases: &mut Cases<'_, B>) {
    for [rows, width] in SHAPES {
        let gradient = cases.random(rows, width);
        let norm = cases.b.sum_squares(&[&gradient]).expect("sum_squares");
        for clipped in [false, true] {
            let clip = || clipped.then_some(Clip { sum_squares: &norm, max_norm: 0.5 });
            let name = |what: &str| format!("{what} of {rows}x{width}, clipped {clipped}");
            let mut param = cases.random(rows, width);
            let kept = cases.b.copy(&param).expect("copy");
            let zeros = cases.up(&Array2::zeros((rows, width)));
            let mut moments = [cases.b.copy(&zeros).expect("copy"), zeros];
            for step in 1..4 {
                let adam = AdamW { lr: 0.1, beta1: 0.9, beta2: 0.99, eps: 1e-6, weight_decay: 0.02, step };
                cases.b.adamw(&mut param, &gradient, &mut moments, adam, clip()).expect("adamw");
            }
            cases.keep(name("adamw"), &param);
            let [first, second] = &moments;
            cases.keep(name("first moment"), first);
            cases.keep(name("second moment"), second);
            let sgd = Sgd { lr: 0.1, momentum: 0.8, weight_decay: 0.05 };
            let mut velocity = cases.random(rows, width);
            for _ in 0..2 {
                cases.b.sgd(&mut param, &gradient, Some(&mut velocity), sgd, clip()).expect("sgd");
            }
            cases.keep(name("sgd with velocity"), &param);
            cases.keep(name("velocity"), &velocity);
            cases.b.sgd(&mut param, &gradient, None, sgd, clip()).expect("sgd");
            cases.keep(name("sgd"), &param);
            cases.keep(name("what was copied before"), &kept);
        }
    }
}

#[test]
fn elements() {
    for b in backends() {
        both!(&b, 1e-5, each);
        both!(&b, 2e-6, activations);
    }
}

#[test]
fn products_and_weights() {
    for b in backends() {
        both!(&b, 1e-5, products);
        both!(&b, 1e-5, weights);
        both!(&b, 1e-5, quantized);
    }
}

#[test]
fn rows_and_losses() {
    for b in backends() {
        both!(&b, 2e-5, norms);
        both!(&b, 1e-5, losses);
        both!(&b, 1e-5, scattered);
    }
}

#[test]
fn attention_backwards() {
    for b in backends() {
        both!(&b, 1e-5, attention);
    }
}

#[test]
fn steps() {
    for b in backends() {
        both!(&b, 1e-5, optimizers);
    }
}

/// Bindings so small that every operand lies in several buffers.
#[test]
fn split_by_small_bindings() {
    let Some(builder) = common::builder() else { return };
    let b = builder.clone().max_binding(32 << 10).build().expect("the adapter was there a moment ago");
    both!(&b, 1e-5, each);
    both!(&b, 1e-5, products);
    both!(&b, 1e-5, weights);
    both!(&b, 1e-5, quantized);
    both!(&b, 2e-5, norms);
    both!(&b, 1e-5, losses);
    both!(&b, 1e-5, scattered);
    both!(&b, 1e-5, optimizers);
    // Sequences that lie in two buffers, none of which is larger than one.
    let b = builder.max_binding(9 << 10).build().expect("the adapter was there a moment ago");
    both!(&b, 1e-5, attention_of_two);
}

fn attention_of_two<B: Train>(cases: &mut Cases<'_, B>) {
    let spans = [Span { start: 0, len: 60 }, Span { start: 60, len: 64 }, Span { start: 126, len: 10 }];
    let attend = Attend { heads: 2, layer: 0, spans: &spans };
    let [q, k, v, dy] = [(); 4].map(|()| cases.random(140, 32));
    let gradients = cases.b.attend_grad([&q, &k, &v], &dy, attend).expect("attend_grad");
    for (what, gradient) in ["q", "k", "v"].into_iter().zip(&gradients) {
        cases.keep(format!("gradient of {what}"), gradient);
    }
}

#[test]
fn a_sequence_larger_than_a_binding_is_refused() {
    let Some(builder) = common::builder() else { return };
    let b = builder.max_binding(8 << 10).build().expect("the adapter was there a moment ago");
    let x = b.upload(Array2::zeros((140, 32)).view()).expect("upload");
    let spans = [Span { start: 0, len: 140 }];
    let attend = Attend { heads: 2, layer: 0, spans: &spans };
    let error = b.attend_grad([&x, &x, &x], &x, attend).expect_err("it does not fit");
    assert_eq!(error.kind(), ErrorKind::OutOfMemory);
    assert!(error.to_string().contains("140 rows"), "{error}");
}

/// One step of a small network: the loss, then all parameters after it.
fn step<B: Train>(b: &B, numbers: &mut Numbers) -> Vec<B::Tensor> {
    let mut up = |rows, width| b.upload(numbers.matrix(rows, width).view()).expect("upload");
    let (x, mut weight, mut bias) = (up(40, 24), up(50, 24), up(1, 50));
    let (mut norm_weight, mut norm_bias) = (up(1, 24), up(1, 24));
    let mut moments: Vec<[B::Tensor; 2]> = Vec::new();
    for shape in [[50, 24], [1, 50], [1, 24], [1, 24]] {
        moments.push([(); 2].map(|()| b.zeros(shape).expect("zeros")));
    }
    let before = b.counters().counts();
    let one = || -> opt_backend::Result<(B::Tensor, Vec<B::Tensor>)> {
        let norm = b.norm_of(&norm_weight, &norm_bias, 1e-5)?;
        let linear = b.linear_of(&weight, Some(&bias), DType::F32)?;
        let normal = b.layer_norm(&x, &norm)?;
        let wide = b.linear(&normal, &linear, Then::Nothing)?;
        let logits = b.activate(b.copy(&wide)?, Activation::GeluTanh)?;
        let targets: Vec<u32> = (0..40).collect();
        let [loss, d] = b.cross_entropy(logits, &targets, Smoothing { scale: 0.025, epsilon: 0.1 })?;
        let d = b.activate_grad(&wide, d, Activation::GeluTanh)?;
        let d_weight = b.matmul(&d, &normal, Layout::TransposedTimes, DType::F32, None)?;
        let d_bias = b.sum_rows(&d)?;
        let d = b.linear_grad(&d, &linear, None)?;
        let [d_norm_weight, d_norm_bias] = b.layer_norm_grad_params(&x, &norm, &d)?;
        Ok((loss, vec![d_weight, d_bias, d_norm_weight, d_norm_bias]))
    };
    let (loss, gradients) = one().expect("gradients");
    let all: Vec<&B::Tensor> = gradients.iter().collect();
    let squares = b.sum_squares(&all).expect("sum_squares");
    let adam = AdamW { lr: 0.01, beta1: 0.9, beta2: 0.999, eps: 1e-4, weight_decay: 0.1, step: 1 };
    let mut params = [&mut weight, &mut bias, &mut norm_weight, &mut norm_bias];
    for ((param, gradient), moments) in params.iter_mut().zip(&gradients).zip(&mut moments) {
        let clip = Some(Clip { sum_squares: &squares, max_norm: 0.1 });
        b.adamw(param, gradient, moments, adam, clip).expect("adamw");
    }
    let taken = b.counters().counts().since(&before);
    if b.info().name == "wgpu" {
        assert_eq!((taken.uploads, taken.reads, taken.submissions), (0, 0, 0), "{taken}");
    }
    vec![loss, squares, weight, bias, norm_weight, norm_bias]
}

/// A whole step stays on the device, and does the same again to the last bit.
#[test]
fn a_step_stays_on_the_device() {
    let host = Reference::new();
    let expected = step(&host, &mut Numbers(5));
    for b in backends() {
        let read = |b: &Wgpu| {
            let found = step(b, &mut Numbers(5));
            found.iter().map(|x| b.block_on(b.read(x)).expect("read")).collect::<Vec<_>>()
        };
        let found = read(&b);
        for (i, (expected, found)) in expected.iter().zip(&found).enumerate() {
            for (e, f) in expected.iter().zip(found) {
                assert!((e - f).abs() < 2e-5 * e.abs().max(1.0), "{i}: expected {e}, found {f}");
            }
        }
        assert_eq!(found, read(&b));
    }
}

/// OPT's own table in f32, 147 MiB, trained as embedding and head under the 128 MiB that any device allows.
#[test]
fn the_real_table_at_default_limits() {
    let Some(builder) = common::builder() else { return };
    let b = builder.default_limits().build().expect("the adapter was there a moment ago");
    let (entries, width) = (50272, 768);
    let host =
        Array2::from_shape_fn((entries, width), |(i, j)| ((i * 31 + j * 17) % 1009) as f32 / 1009.0 - 0.5);
    let x = host.slice(s![100..102, ..]).to_owned() * 0.1;
    let mut table = b.upload(host.view()).expect("upload");
    let hidden = b.upload(x.view()).expect("upload");
    // Around the seam, which is at row 43,680, and at both ends.
    let rows = [0, 43_679, 43_680, 43_681, 43_690, 43_695, 50_271];
    let logits = b.matmul(&hidden, &table, Layout::TimesTransposed, DType::F32, None).expect("logits");
    let logits = b.block_on(b.read(&logits)).expect("read");
    let d = Array2::from_shape_fn((2, entries), |(i, j)| ((i * 7 + j * 3) % 11) as f32 * 0.1 - 0.5);
    let dy = b.upload(d.view()).expect("upload");
    let dx = b.matmul(&dy, &table, Layout::Times, DType::F32, None).expect("gradient of the hidden rows");
    let dx = b.block_on(b.read(&dx)).expect("read");
    let gradient = b.matmul(&dy, &hidden, Layout::TransposedTimes, DType::F32, None).expect("gradient");
    let embedded = b.upload(host.slice(s![0..7, ..])).expect("upload");
    let gradient = b.scatter_add(gradient, &rows, &embedded).expect("scatter_add");
    let sgd = Sgd { lr: 1.0, momentum: 0.0, weight_decay: 0.0 };
    b.sgd(&mut table, &gradient, None, sgd, None).expect("sgd");
    let found = b.block_on(b.read(&b.take_rows(&table, &rows).expect("take_rows"))).expect("read");
    for (i, &row) in rows.iter().enumerate() {
        for (j, found) in found.row(i).iter().enumerate() {
            let step = d[[0, row]] * x[[0, j]] + d[[1, row]] * x[[1, j]] + host[[i, j]];
            let expected = host[[row, j]] - step;
            assert!(
                (found - expected).abs() < 1e-5,
                "row {row}, column {j}: expected {expected}, found {found}"
            );
        }
        for k in 0..2 {
            let expected = x.row(k).dot(&host.row(row));
            assert!((logits[[k, row]] - expected).abs() < 1e-4, "logit {row} of {k}");
        }
    }
    let expected = d.dot(&host);
    for (found, expected) in dx.iter().zip(&expected) {
        assert!((found - expected).abs() < 0.05, "expected {expected}, found {found}");
    }
}
