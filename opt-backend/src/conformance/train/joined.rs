//! Operands that are parts of one buffer: a backend may run queries, keys and values as one, weights and results alike.

use crate::conformance::{
    Outcome, Run,
    data::{Data, read},
};
use crate::{
    Activation, Attend, DType, Dropout, HostMatrix, Layout, Sgd, Span, Then, Train, oracle, oracle::gradient,
};
use ndarray::{Array2, Axis, array, concatenate};

pub(super) fn run<B: Train>(run: &mut Run<'_, B>) {
    for dtype in run.dtypes.clone() {
        run.case("joined", format_args!("results of qkv as operands, in {dtype}"), |b, data| {
            let weights = [(); 3].map(|()| data.weight(48, 32));
            let linears = weights.each_ref().map(|w| b.new_linear(HostMatrix::F32(w.view()), None, dtype));
            operands(b, data, linears, 32)
        });
        run.case("joined", format_args!("linears that qkv has joined, in {dtype}"), |b, data| {
            let weights = [(); 3].map(|()| data.weight(48, 32));
            let linears = weights.each_ref().map(|w| b.new_linear(HostMatrix::F32(w.view()), None, dtype));
            gradients(b, data, linears, 32, dtype)
        });
        run.case("joined", format_args!("trained linears through qkv, in {dtype}"), |b, data| {
            let weight = data.matrix(48, 32);
            let linear = b.linear_of(&b.upload(weight.view())?, None, dtype)?;
            let x = data.matrix(3, 32);
            let x = b.upload(x.view())?;
            let expected = read(b, &b.linear(&x, &linear, Then::Nothing)?)?;
            for y in b.qkv(&x, &linear, &linear, &linear)? {
                data.tolerance().compare("qkv", read(b, &y)?.view(), expected.view())?;
            }
            Ok(())
        });
    }
}

/// What ops make of q, k and v, as against the same numbers uploaded.
fn operands<B: Train>(
    b: &B,
    data: &mut Data,
    linears: [crate::Result<B::Linear>; 3],
    input: usize,
) -> Outcome {
    let [q, k, v] = linears;
    let (q, k, v) = (q?, k?, v?);
    let (x, dy) = (data.matrix(9, input), data.matrix(9, 48));
    let [q, k, v] = b.qkv(&b.upload(x.view())?, &q, &k, &v)?;
    let (hq, hk, hv) = (read(b, &q)?, read(b, &k)?, read(b, &v)?);
    let ty = b.upload(dy.view())?;
    let tolerance = data.tolerance();
    let same = |what: &str, found: &B::Tensor, expected: &Array2<f32>| {
        tolerance.compare(what, read(b, found)?.view(), expected.view())
    };
    let spans = [Span { start: 0, len: 9 }];
    let found = b.attend_grad([&q, &k, &v], &ty, Attend { heads: 3, layer: 0, spans: &spans })?;
    let expected = gradient::attend(hq.view(), hk.view(), hv.view(), 3, dy.view());
    found.iter().zip(&expected).try_for_each(|(found, expected)| same("attend_grad", found, expected))?;
    let found = b.matmul(&k, &v, Layout::TransposedTimes, DType::F32, None)?;
    same("matmul", &found, &gradient::matmul(hk.view(), hv.view(), Layout::TransposedTimes))?;
    same("sum_rows", &b.sum_rows(&v)?, &gradient::sum_rows(hv.view()))?;
    let both = concatenate![Axis(0), hq.view(), dy.view()];
    same("concat", &b.concat(&[&q, &ty])?, &both)?;
    let squares: f64 = hk.iter().map(|&v| f64::from(v).powi(2)).sum();
    same("sum_squares", &b.sum_squares(&[&k])?, &array![[squares as f32]])?;
    let found = b.activate_grad(&v, b.copy(&q)?, Activation::Relu)?;
    same("activate_grad", &found, &gradient::activate(hv.view(), hq.view(), Activation::Relu))?;
    let gelu = hk.mapv(|v| Activation::Gelu.apply(f64::from(v)) as f32);
    same("activate", &b.activate(b.copy(&k)?, Activation::Gelu)?, &gelu)?;
    // A part that is written to leaves the others as they are.
    let mut param = b.copy(&q)?;
    let sgd = Sgd { lr: 0.1, momentum: 0.0, weight_decay: 0.0 };
    b.sgd(&mut param, &v, None, sgd, None)?;
    let mut expected = hq.clone();
    gradient::sgd(&mut expected, hv.view(), None, sgd, 1.0);
    same("sgd", &param, &expected)?;
    let dropout = Dropout { p: 0.5, seed: 3 };
    let mut expected = hq.clone();
    gradient::dropout(&mut expected, dropout);
    same("dropout", &b.dropout(q, dropout)?, &expected)?;
    same("mul", &b.mul(k, &v)?, &(&hk * &hv))?;
    super::unchanged(b, "values, once queries and keys are used up", &v, &hv)
}

/// Gradients through linears that qkv has run as one, each added to the one before.
fn gradients<B: Train>(
    b: &B,
    data: &mut Data,
    linears: [crate::Result<B::Linear>; 3],
    input: usize,
    dtype: DType,
) -> Outcome {
    let [q, k, v] = linears;
    let linears = [q?, k?, v?];
    let (x, dy) = (data.matrix(5, input), data.matrix(5, 48));
    let [q, k, v] = &linears;
    b.qkv(&b.upload(x.view())?, q, k, v)?;
    let tensor = b.upload(dy.view())?;
    // dy as it is, or rounded as activations are where they meet such weights.
    let mut expected = [Array2::zeros((5, input)), Array2::zeros((5, input))];
    let mut sum = None;
    for linear in &linears {
        let weight = b.block_on(b.read_linear(linear))?.weight;
        for (expected, dy) in expected.iter_mut().zip([data.met(&dy, dtype), dy.clone()]) {
            *expected += &oracle::gradient::matmul(dy.view(), weight.view(), Layout::Times);
        }
        sum = Some(b.linear_grad(&tensor, linear, sum)?);
    }
    match sum {
        Some(sum) => data.tolerance().compare_any("sum", read(b, &sum)?.view(), &expected),
        None => Ok(()),
    }
}
