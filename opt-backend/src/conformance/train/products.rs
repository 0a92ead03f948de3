//! What multiplies: matrices, and gradients with weights in every format.

use crate::conformance::{
    Outcome, Run, Tolerance,
    compare::same_bits,
    data::{Data, read},
    ensure,
    quantized::{FORMATS, SHAPES},
};
use crate::{DType, HostMatrix, Layout, Then, Train, oracle, oracle::gradient};
use ndarray::Array2;

pub(super) fn run<B: Train>(run: &mut Run<'_, B>) {
    matmul(run);
    linear_of(run);
    linear_grad(run);
    logits_grad(run);
    quantized(run);
}

const LAYOUTS: [Layout; 3] = [Layout::TimesTransposed, Layout::Times, Layout::TransposedTimes];

/// `[n, k, m]`: without rows, without depth, every remainder of the usual blockings, and sums long enough to be split.
const PRODUCTS: [[usize; 3]; 14] = [
    [0, 7, 5],
    [5, 7, 0],
    [5, 0, 7],
    [1, 1, 1],
    [1, 7, 33],
    [1, 768, 130],
    [2, 257, 7],
    [3, 33, 80],
    [4, 1500, 5],
    [17, 768, 257],
    [33, 80, 7],
    [65, 31, 129],
    [200, 64, 70],
    [257, 5, 257],
];

fn matmul<B: Train>(run: &mut Run<'_, B>) {
    for layout in LAYOUTS {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            for shape in PRODUCTS {
                let case = format!("{layout:?} [n, k, m] {shape:?} in {dtype}");
                run.case("matmul", case, |b, data| product(b, data, layout, dtype, shape));
            }
        }
    }
}

fn product<B: Train>(b: &B, data: &mut Data, layout: Layout, dtype: DType, [n, k, m]: [usize; 3]) -> Outcome {
    let (a, c) = (data.matrix(n, k), data.weight(m, k));
    let c = data.held(c);
    let (a, c) = match layout {
        Layout::TimesTransposed => (a, c),
        Layout::Times => (a, flipped(&c)),
        Layout::TransposedTimes => (flipped(&a), flipped(&c)),
    };
    // Rounded, or, where the backend has no arithmetic in that format, as they are.
    let rounded = [&a, &c].map(|x| x.mapv(|v| dtype.round(v)));
    let plain = [
        gradient::matmul(rounded[0].view(), rounded[1].view(), layout),
        gradient::matmul(a.view(), c.view(), layout),
    ];
    let [ta, tc] = [b.upload(a.view())?, b.upload(c.view())?];
    let found = read(b, &b.matmul(&ta, &tc, layout, dtype, None)?)?;
    // A product may be held in f32, or in the format it was computed in: nothing between.
    let held = found.iter().all(|&v| dtype.round(v) == v);
    let tolerance = if held && dtype != DType::F32 { Tolerance::of(dtype) } else { data.tolerance() };
    tolerance.compare_any("product", found.view(), &plain)?;
    let into = data.matrix(n, m);
    let found = read(b, &b.matmul(&ta, &tc, layout, dtype, Some(b.upload(into.view())?))?)?;
    tolerance.compare_any("product, into", found.view(), &plain.map(|plain| plain + &into))?;
    super::unchanged(b, "the first operand", &ta, &a)?;
    super::unchanged(b, "the second operand", &tc, &c)
}

fn flipped(x: &Array2<f32>) -> Array2<f32> {
    x.t().as_standard_layout().into_owned()
}

fn linear_of<B: Train>(run: &mut Run<'_, B>) {
    for dtype in run.dtypes.clone() {
        for [out, input] in [[1, 1], [7, 33], [80, 257], [768, 64]] {
            for bias in [true, false] {
                let case = format!("[{out}, {input}] held as {dtype}, bias {bias}");
                run.case("linear_of", case, |b, data| {
                    let weight = data.weight(out, input);
                    let (weight, row) = (data.held(weight), bias.then(|| data.matrix(1, out)));
                    let on_device = b.upload(weight.view())?;
                    let bias = row.as_ref().map(|row| b.upload(row.view())).transpose()?;
                    let linear = b.linear_of(&on_device, bias.as_ref(), dtype)?;
                    let held = b.block_on(b.read_linear(&linear))?;
                    let expected = weight.mapv(|v| dtype.round(v));
                    same_bits("weight", held.weight.view(), expected.view())?;
                    // A bias may be held more exactly than the weight.
                    let as_expected = match (&held.bias, &row) {
                        (Some(found), Some(row)) => {
                            found == row.row(0) || *found == row.row(0).mapv(|v| dtype.round(v))
                        }
                        (found, row) => found.is_none() && row.is_none(),
                    };
                    ensure(
                        as_expected,
                        format_args!("bias: expected {row:?} or rounded, found {:?}", held.bias),
                    )?;
                    let x = data.matrix(5, input);
                    let (found, met) =
                        (b.linear(&b.upload(x.view())?, &linear, Then::Nothing)?, data.met(&x, dtype));
                    let expected = oracle::linear(met.view(), held.weight.view(), held.bias_view(), None);
                    data.tolerance().compare("applied", read(b, &found)?.view(), expected.view())?;
                    super::unchanged(b, "the weight it is of", &on_device, &weight)
                });
            }
        }
    }
}

/// `[rows, in, out]` of linears.
const LINEARS: [[usize; 3]; 11] = [
    [0, 7, 5],
    [1, 1, 1],
    [1, 33, 257],
    [1, 768, 130],
    [2, 257, 7],
    [4, 5, 1500],
    [7, 257, 257],
    [17, 64, 768],
    [33, 80, 7],
    [65, 31, 129],
    [200, 64, 70],
];

fn linear_grad<B: Train>(run: &mut Run<'_, B>) {
    for dtype in run.dtypes.clone() {
        for [rows, input, out] in LINEARS {
            for bias in [true, false] {
                let case = format!("[{rows}, {out}] to {input} in {dtype}, bias {bias}");
                run.case("linear_grad", case, |b, data| {
                    let (linear, held) = data.linear(b, [input, out], bias, dtype)?;
                    let tolerance = data.tolerance();
                    check_linear(b, data, &linear, &held.weight, rows, dtype, tolerance)
                });
            }
        }
        run.case("linear_grad", format_args!("of a trained weight in {dtype}"), |b, data| {
            let weight = data.matrix(33, 80);
            let linear = b.linear_of(&b.upload(weight.view())?, None, dtype)?;
            let held = b.block_on(b.read_linear(&linear))?;
            let tolerance = data.tolerance();
            check_linear(b, data, &linear, &held.weight, 9, dtype, tolerance)
        });
    }
}

/// dy W with the weight as it was read back; dy as it is, or rounded as activations are where they meet `dtype`.
fn check_linear<B: Train>(
    b: &B,
    data: &mut Data,
    linear: &B::Linear,
    weight: &Array2<f32>,
    rows: usize,
    dtype: DType,
    tolerance: Tolerance,
) -> Outcome {
    let (out, input) = weight.dim();
    let (dy, into) = (data.matrix(rows, out), data.matrix(rows, input));
    let tensor = b.upload(dy.view())?;
    let plain = [data.met(&dy, dtype), dy.clone()]
        .map(|dy| gradient::matmul(dy.view(), weight.view(), Layout::Times));
    let found = read(b, &b.linear_grad(&tensor, linear, None)?)?;
    tolerance.compare_any(&format!("{rows} rows"), found.view(), &plain)?;
    let found = read(b, &b.linear_grad(&tensor, linear, Some(b.upload(into.view())?))?)?;
    tolerance.compare_any(&format!("{rows} rows, into"), found.view(), &plain.map(|plain| plain + &into))?;
    super::unchanged(b, "dy", &tensor, &dy)
}

fn logits_grad<B: Train>(run: &mut Run<'_, B>) {
    for dtype in run.dtypes.clone() {
        for [entries, width] in [[1, 1], [7, 33], [257, 80], [1000, 64], [300, 257], [130, 768]] {
            for rows in [0, 1, 3, 33] {
                let case = format!("{rows} of [{entries}, {width}] in {dtype}");
                run.case("logits_grad", case, |b, data| {
                    let weight = data.weight(entries, width);
                    let table = b.new_table(HostMatrix::F32(weight.view()), dtype)?;
                    let held = b.block_on(b.read_table(&table, 0..entries))?;
                    let tolerance = data.tolerance();
                    check_table(b, data, &table, &held, rows, dtype, tolerance)
                });
            }
        }
    }
    // OPT's own, or what is larger than one binding.
    let fit = run.max_binding.map(|bytes| (bytes / (64 * size_of::<f32>()) as u64) as usize);
    let entries = fit.filter(|&fit| fit <= 1 << 20).map_or(50272, |fit| fit + 8);
    if run.suite.heavy {
        run.case("logits_grad", format_args!("a large table of {entries} entries"), |b, data| {
            let weight = data.weight(entries, 64);
            let table = b.new_table(HostMatrix::F32(weight.view()), DType::F32)?;
            let tolerance = data.tolerance();
            check_table(b, data, &table, &weight, 2, DType::F32, tolerance)
        });
    }
}

fn check_table<B: Train>(
    b: &B,
    data: &mut Data,
    table: &B::Table,
    held: &Array2<f32>,
    rows: usize,
    dtype: DType,
    tolerance: Tolerance,
) -> Outcome {
    let dy = data.matrix(rows, held.nrows());
    let tensor = b.upload(dy.view())?;
    let expected =
        [data.met(&dy, dtype), dy.clone()].map(|dy| gradient::matmul(dy.view(), held.view(), Layout::Times));
    let found = read(b, &b.logits_grad(&tensor, table)?)?;
    tolerance.compare_any(&format!("{rows} rows"), found.view(), &expected)?;
    super::unchanged(b, "dy", &tensor, &dy)
}

fn quantized<B: Train>(run: &mut Run<'_, B>) {
    for format in FORMATS {
        for shape in SHAPES {
            run.case("linear_grad", format_args!("{}: {shape:?}", format.name), |b, data| {
                let weight = format.weight(data, shape)?;
                let linear = b.new_quantized_linear(&weight, None)?;
                let held = b.block_on(b.read_linear(&linear))?;
                let tolerance = data.quantized_tolerance();
                [0, 1, 5, 13, 40].into_iter().try_for_each(|rows| {
                    check_linear(b, data, &linear, &held.weight, rows, DType::F32, tolerance)
                })
            });
        }
        if run.suite.heavy {
            run.case(
                "linear_grad",
                format_args!("{}: more outputs than are unpacked at once", format.name),
                |b, data| {
                    let weight = format.weight(data, [9000, 128])?;
                    let linear = b.new_quantized_linear(&weight, None)?;
                    let held = b.block_on(b.read_linear(&linear))?;
                    let tolerance = data.quantized_tolerance();
                    check_linear(b, data, &linear, &held.weight, 9, DType::F32, tolerance)
                },
            );
        }
        for [entries, width] in [[130, 64], [257, 96], [5, 33], [1000, 64]] {
            let case = format!("{}: [{entries}, {width}]", format.name);
            run.case("logits_grad", case, |b, data| {
                let table = b.new_quantized_table(&format.weight(data, [entries, width])?)?;
                let held = b.block_on(b.read_table(&table, 0..entries))?;
                let tolerance = data.quantized_tolerance();
                [0, 1, 3, 11]
                    .into_iter()
                    .try_for_each(|rows| check_table(b, data, &table, &held, rows, DType::F32, tolerance))
            });
        }
    }
}
