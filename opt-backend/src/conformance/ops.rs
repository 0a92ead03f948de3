//! Storage, and the ops that work row by row.

use super::{
    Outcome, Run,
    compare::same_bits,
    data::{Data, new_linear, read},
    ensure,
};
use crate::{Activation, Backend, DType, HostMatrix, HostVector, NormParams, Then, oracle};
use half::{bf16, f16};
use ndarray::{Array2, ArrayView1, Axis, s};

pub(super) fn run<B: Backend>(run: &mut Run<'_, B>) {
    storage(run);
    weights(run);
    gather(run);
    layer_norm(run);
    linear(run);
    qkv(run);
    add_and_take(run);
}

/// Uploads and reads, of whole arrays and of views whose elements do not lie end to end.
fn storage<B: Backend>(run: &mut Run<'_, B>) {
    for [rows, width] in [[0, 1], [0, 80], [1, 1], [1, 257], [33, 7], [129, 80]] {
        run.case("upload", format_args!("[{rows}, {width}]"), |b, data| {
            let x = data.matrix(rows, width);
            let tensor = b.upload(x.view())?;
            ensure(b.shape(&tensor) == [rows, width], format_args!("shape says {:?}", b.shape(&tensor)))?;
            same_bits("read", read(b, &tensor)?.view(), x.view())?;
            same_bits("read_owned", b.block_on(b.read_owned(tensor))?.view(), x.view())
        });
    }
    run.case("upload", "strided views", |b, data| {
        let x = data.matrix(12, 10);
        let views = [
            ("transposed", x.t()),
            ("every other row", x.slice(s![..;2, ..])),
            ("every third column", x.slice(s![.., 1..;3])),
            ("rows reversed", x.slice(s![..;-1, ..])),
            ("columns reversed", x.slice(s![.., ..;-1])),
            ("a block", x.slice(s![2..5, 3..7])),
            ("one row broadcast", x.slice(s![3..4, ..])),
        ];
        for (what, view) in views {
            same_bits(what, read(b, &b.upload(view)?)?.view(), view)?;
        }
        let row = x.row(0);
        let repeated = row.broadcast((5, 10)).ok_or(super::Verdict::Failed("cannot broadcast".into()))?;
        same_bits("a row repeated", read(b, &b.upload(repeated)?)?.view(), repeated)
    });
    run.case("read", "is of the tensor as it was", |b, data| {
        let [x, y] = [(); 2].map(|()| data.matrix(5, 33));
        let (first, second) = (b.upload(x.view())?, b.upload(y.view())?);
        let pending = b.read(&first);
        let sum = b.add(first, &second)?;
        let later = b.read(&second);
        drop(second);
        let sum = b.block_on(b.read_owned(sum))?;
        // Awaited in the other order than asked for.
        same_bits("the second", b.block_on(later)?.view(), y.view())?;
        same_bits("the first", b.block_on(pending)?.view(), x.view())?;
        data.tolerance().compare("the sum", sum.view(), (&x + &y).view())
    });
}

/// Linears, tables and norms come back in logical order, rounded to the dtype they are held in.
fn weights<B: Backend>(run: &mut Run<'_, B>) {
    for dtype in run.dtypes.clone() {
        for [out, input] in [[1, 1], [7, 33], [80, 257], [130, 64]] {
            run.case("new_linear", format_args!("[{out}, {input}] held as {dtype}"), |b, data| {
                let (weight, bias) = (data.weight(out, input), data.vector(out));
                let held = |w: &Array2<f32>| w.mapv(|v| dtype.round(v));
                let check = |what: &str, source: HostMatrix<'_>, expected: Array2<f32>| -> Outcome {
                    let linear = b.new_linear(source, None, dtype)?;
                    let host = b.block_on(b.read_linear(&linear))?;
                    same_bits(what, host.weight.view(), expected.view())?;
                    ensure(host.bias.is_none(), format_args!("{what}: a bias came out of nowhere"))?;
                    let table = b.new_table(source, dtype)?;
                    ensure(b.table_shape(&table) == [out, input], "the table has another shape")?;
                    let rows = b.block_on(b.read_table(&table, 0..out))?;
                    same_bits(&format!("{what}: table"), rows.view(), expected.view())?;
                    let rows = b.block_on(b.read_table(&table, out / 2..out))?;
                    same_bits("the table's end", rows.view(), expected.slice(s![out / 2.., ..]))
                };
                check("from f32", HostMatrix::F32(weight.view()), held(&weight))?;
                let half = weight.mapv(f16::from_f32);
                check("from f16", HostMatrix::F16(half.view()), held(&half.mapv(f16::to_f32)))?;
                let brain = weight.mapv(bf16::from_f32);
                check("from bf16", HostMatrix::BF16(brain.view()), held(&brain.mapv(bf16::to_f32)))?;
                let flipped = weight.t().to_owned();
                check("from a transposed view", HostMatrix::F32(flipped.t()), held(&weight))?;
                let flipped = half.t().to_owned();
                let view = HostMatrix::F16(flipped.t());
                check("from a transposed f16 view", view, held(&half.mapv(f16::to_f32)))?;
                let reversed = weight.slice(s![..;-1, ..;-1]);
                check("from a reversed view", HostMatrix::F32(reversed), held(&reversed.to_owned()))?;

                // A bias may be held more exactly than the weight.
                let exact = bias.as_slice().unwrap_or_default();
                let rounded: Vec<f32> = exact.iter().map(|&v| dtype.round(v)).collect();
                let linear = new_linear(b, weight.view(), Some(bias.view()), dtype)?;
                let found = b.block_on(b.read_linear(&linear))?.bias.map(|bias| bias.to_vec());
                let as_expected = [exact, &rounded].iter().any(|v| found.as_deref() == Some(*v));
                ensure(as_expected, format_args!("bias: expected {rounded:?}, found {found:?}"))
            });
        }
    }
    run.case("new_norm", "parameters come back", |b, data| {
        let (weight, bias) = (data.matrix(2, 33), data.vector(33).mapv(f16::from_f32));
        // One strided, one of another dtype.
        let columns = weight.t().to_owned();
        let (weight, bias) = (columns.column(1), bias.view());
        let params = NormParams {
            width: 33,
            eps: 1e-5,
            weight: Some(HostVector::F32(weight)),
            bias: Some(HostVector::F16(bias)),
        };
        let norm = b.block_on(b.read_norm(&b.new_norm(params)?))?;
        ensure(norm.width == 33 && norm.eps == 1e-5, format_args!("width {}, eps {}", norm.width, norm.eps))?;
        ensure(norm.weight == Some(weight.to_owned()), "the weight differs")?;
        ensure(norm.bias == Some(bias.mapv(f16::to_f32)), "the bias differs")
    });
}

fn gather<B: Backend>(run: &mut Run<'_, B>) {
    for dtype in run.dtypes.clone() {
        for [entries, width] in [[1, 1], [5, 7], [33, 80], [300, 257]] {
            for rows in [0, 1, 3, 67] {
                let case = format!("{rows} of [{entries}, {width}] in {dtype}");
                run.case("gather", case.clone(), |b, data| {
                    let table = b.new_table(HostMatrix::F32(data.weight(entries, width).view()), dtype)?;
                    let held = b.block_on(b.read_table(&table, 0..entries))?;
                    let ids: Vec<u32> = (0..rows).map(|_| data.below(entries) as u32).collect();
                    let expected = pick(&held, &ids);
                    let found = read(b, &b.gather(&table, &ids)?)?;
                    data.tolerance().compare("rows", found.view(), expected.view())
                });
                run.case("add_gathered", case, |b, data| {
                    let table = b.new_table(HostMatrix::F32(data.weight(entries, width).view()), dtype)?;
                    let held = b.block_on(b.read_table(&table, 0..entries))?;
                    // Descending: positions need not be 0, 1, 2.
                    let ids: Vec<u32> = (0..rows).rev().map(|i| (i % entries) as u32).collect();
                    let x = data.matrix(rows, width);
                    let expected = &x + &pick(&held, &ids);
                    let found = read(b, &b.add_gathered(b.upload(x.view())?, &table, &ids)?)?;
                    data.tolerance().compare("rows", found.view(), expected.view())
                });
            }
        }
    }
}

fn pick(table: &Array2<f32>, ids: &[u32]) -> Array2<f32> {
    let ids: Vec<usize> = ids.iter().map(|&id| id as usize).collect();
    table.select(Axis(0), &ids)
}

fn layer_norm<B: Backend>(run: &mut Run<'_, B>) {
    for width in [1, 7, 33, 80, 257, 768] {
        for rows in [0, 1, 5] {
            for (affine, eps) in [((true, true), 1e-5), ((false, false), 1e-5), ((true, false), 1e-3)] {
                let case = format!("[{rows}, {width}], affine {affine:?}, eps {eps:e}");
                run.case("layer_norm", case, |b, data| {
                    let x = data.matrix(rows, width);
                    check_norm(b, data, x, affine, eps)
                });
            }
        }
    }
    // Variances around eps, so that its size and place show.
    run.case("layer_norm", "rows of little variance", |b, data| {
        let x = data.matrix(9, 80).mapv_into(|v| v * 3e-3);
        let x = data.held(x);
        check_norm(b, data, x, (false, false), 1e-5)
    });
    // A variance computed as E[x²] - E[x]² in f32 cancels here.
    run.case("layer_norm", "rows far from zero", |b, data| {
        let x = data.matrix(9, 257).mapv_into(|v| v + 32.0);
        let x = data.held(x);
        check_norm(b, data, x, (true, true), 1e-5)
    });
    run.case("layer_norm", "constant rows", |b, data| {
        let mut x = data.matrix(6, 33);
        [0.0, 3.0, -7.25, 512.0].iter().enumerate().for_each(|(i, v)| x.row_mut(i).fill(*v));
        check_norm(b, data, x.clone(), (false, false), 1e-5)?;
        check_norm(b, data, x, (true, true), 1e-5)
    });
}

fn check_norm<B: Backend>(b: &B, data: &mut Data, x: Array2<f32>, affine: (bool, bool), eps: f32) -> Outcome {
    let width = x.ncols();
    let weight = affine.0.then(|| data.vector(width));
    let bias = affine.1.then(|| data.vector(width));
    let [w, c] = [&weight, &bias].map(|v| v.as_ref().map(|v| v.view()));
    let host = |v: Option<_>| v.map(HostVector::F32);
    let norm = b.new_norm(NormParams { width, eps, weight: host(w), bias: host(c) })?;
    let found = read(b, &b.layer_norm(&b.upload(x.view())?, &norm)?)?;
    let expected = oracle::layer_norm(x.view(), w, c, eps);
    data.tolerance().compare("rows", found.view(), expected.view())
}

/// `[rows, in, out]`: every remainder of the usual blockings, and sums long enough to be split.
const LINEARS: [[usize; 3]; 16] = [
    [0, 7, 5],
    [1, 1, 1],
    [1, 7, 33],
    [1, 33, 257],
    [1, 80, 80],
    [1, 768, 130],
    [2, 257, 7],
    [3, 33, 80],
    [4, 1500, 5],
    [5, 80, 33],
    [7, 257, 257],
    [16, 64, 64],
    [17, 5, 1],
    [33, 80, 7],
    [65, 31, 129],
    [200, 64, 70],
];

fn linear<B: Backend>(run: &mut Run<'_, B>) {
    for dtype in run.dtypes.clone() {
        for [rows, input, out] in LINEARS {
            for bias in [true, false] {
                let case = format!("[{rows}, {input}] to {out} in {dtype}, bias {bias}");
                run.case("linear", case, |b, data| {
                    let x = data.matrix(rows, input);
                    check_linear(b, data, &x, out, bias, dtype, &[Some(Activation::Relu)])
                });
            }
        }
        run.case("linear", format_args!("every activation in {dtype}"), |b, data| {
            let x = data.matrix(9, 257).mapv_into(|v| v * 2.0);
            let all: Vec<_> = Activation::all().map(Some).collect();
            check_linear(b, data, &x, 33, true, dtype, &all)
        });
        run.case("linear", format_args!("every activation of large numbers in {dtype}"), |b, data| {
            let x = data.matrix(9, 33).mapv_into(|v| v * 32.0);
            let all: Vec<_> = Activation::all().map(Some).collect();
            check_linear(b, data, &x, 33, true, dtype, &all)
        });
    }
}

fn check_linear<B: Backend>(
    b: &B,
    data: &mut Data,
    x: &Array2<f32>,
    out: usize,
    bias: bool,
    dtype: DType,
    activations: &[Option<Activation>],
) -> Outcome {
    let (linear, held) = data.linear(b, [x.ncols(), out], bias, dtype)?;
    let (tensor, met) = (b.upload(x.view())?, data.met(x, dtype));
    for &activation in [None].iter().chain(activations) {
        let expected = oracle::linear(met.view(), held.weight.view(), held.bias_view(), activation);
        let then = activation.map_or(Then::Nothing, Then::Activate);
        let found = read(b, &b.linear(&tensor, &linear, then)?)?;
        let name = activation.map_or("then nothing".to_owned(), |a| format!("then {a}"));
        data.tolerance().compare(&name, found.view(), expected.view())?;
    }
    let residual = data.matrix(x.nrows(), out);
    let plain = oracle::linear(met.view(), held.weight.view(), held.bias_view(), None);
    let then = Then::Add(b.upload(residual.view())?);
    let found = read(b, &b.linear(&tensor, &linear, then)?)?;
    data.tolerance().compare("then add", found.view(), (plain + residual).view())
}

fn qkv<B: Backend>(run: &mut Run<'_, B>) {
    for dtype in run.dtypes.clone() {
        for [rows, width] in [[0, 80], [1, 1], [1, 33], [3, 80], [9, 257], [40, 64]] {
            for biases in [[true; 3], [false; 3], [false, true, false]] {
                let case = format!("[{rows}, {width}] in {dtype}, biases {biases:?}");
                run.case("qkv", case, |b, data| {
                    let x = data.matrix(rows, width);
                    let [q, k, v] = biases.map(|bias| data.linear(b, [width, width], bias, dtype));
                    let (q, k, v) = (q?, k?, v?);
                    let (found, met) = (b.qkv(&b.upload(x.view())?, &q.0, &k.0, &v.0)?, data.met(&x, dtype));
                    for (name, (found, held)) in
                        ["q", "k", "v"].iter().zip(found.iter().zip([&q.1, &k.1, &v.1]))
                    {
                        let bias: Option<ArrayView1<'_, f32>> = held.bias_view();
                        let expected = oracle::linear(met.view(), held.weight.view(), bias, None);
                        data.tolerance().compare(name, read(b, found)?.view(), expected.view())?;
                    }
                    Ok(())
                });
            }
        }
    }
}

fn add_and_take<B: Backend>(run: &mut Run<'_, B>) {
    for [rows, width] in [[0, 7], [1, 1], [1, 257], [33, 80], [130, 7]] {
        run.case("add", format_args!("[{rows}, {width}]"), |b, data| {
            let [x, y] = [(); 2].map(|()| data.matrix(rows, width));
            let found = b.add(b.upload(x.view())?, &b.upload(y.view())?)?;
            data.tolerance().compare("sum", read(b, &found)?.view(), (x + y).view())
        });
    }
    let picks: [(&str, &[usize]); 6] = [
        ("none", &[]),
        ("one", &[4]),
        ("all in order", &[0, 1, 2, 3, 4]),
        ("all backwards", &[4, 3, 2, 1, 0]),
        ("some twice", &[2, 2, 0, 4, 2, 0, 1, 1]),
        ("the last", &[4, 4]),
    ];
    for width in [1, 33, 80, 257] {
        for (what, rows) in picks {
            run.case("take_rows", format_args!("{what} of [5, {width}]"), |b, data| {
                let x = data.matrix(5, width);
                let found = read(b, &b.take_rows(&b.upload(x.view())?, rows)?)?;
                same_bits("rows", found.view(), x.select(Axis(0), rows).view())
            });
        }
    }
    run.case("take_rows", "none of none", |b, data| {
        let x = data.matrix(0, 7);
        let found = read(b, &b.take_rows(&b.upload(x.view())?, &[])?)?;
        same_bits("rows", found.view(), x.view())
    });
}
