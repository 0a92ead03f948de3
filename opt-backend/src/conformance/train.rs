//! The ops of [`Train`] against [`crate::oracle::gradient`].

mod attention;
mod eight_bits;
mod elements;
mod errors;
mod joined;
mod kept;
mod losses;
mod norms;
mod optimizers;
mod products;

use super::{Kit, Outcome, Run, Tolerance, data::Data, ensure};
use crate::{
    Activation, AdamW, Attend, Clip, Counts, DType, Dropout, HostMatrix, Layout, Moments8, NormParams, Op,
    Result, Sgd, Smoothing, Span, Then, Train,
};
use ndarray::Array2;

pub(super) fn run<B: Train>(run: &mut Run<'_, B>) {
    products::run(run);
    norms::run(run);
    attention::run(run);
    elements::run(run);
    losses::run(run);
    optimizers::run(run);
    eight_bits::run(run);
    errors::run(run);
    kept::run(run);
    joined::run(run);
    counters(run);
}

fn counters<B: Train>(run: &mut Run<'_, B>) {
    let mut tour = Counts::default();
    let (ops, reads) = (run.suite.no_defaults.clone(), run.suite.reads_per_step);
    run.case("counters", "default bodies", |b, _| {
        tour = training_defaults_used(b)?;
        let used: Vec<Op> = ops.iter().copied().filter(|&op| tour.default_bodies(op) > 0).collect();
        ensure(
            used.is_empty(),
            format_args!("expected overrides of {used:?}, found their default bodies called"),
        )?;
        // The tour itself reads a weight; no op of training reads anything.
        let allowed = reads.map_or(u64::MAX, |_| 1);
        ensure(tour.reads <= allowed, format_args!("expected ops that read nothing back, found {tour}"))
    });
    run.report.tour = tour;
}

/// What calling every op of [`Train`] once counts; [`Counts::default_bodies`] tells which of [`Op::TRAIN`] a backend
/// has not overridden.
///
/// # Errors
/// Those of the ops.
pub fn training_defaults_used<B: Train>(b: &B) -> Result<Counts> {
    let tolerance = Tolerance::of(DType::F32);
    let kit = Kit { activations: DType::F32, bf16: false, tolerance, quantized: tolerance };
    let dtype = b.info().dtypes.first().copied().unwrap_or_default();
    let before = b.counters().counts();
    drop(every_op(b, &mut Data::new("tour", kit), dtype)?);
    Ok(b.counters().counts().since(&before))
}

fn upload<B: Train>(b: &B, x: &Array2<f32>) -> Result<B::Tensor> {
    b.upload(x.view())
}

/// Calls every op once, on 6 rows of 24, and gives what came out with the op's name.
fn every_op<B: Train>(b: &B, data: &mut Data, dtype: DType) -> Result<Vec<(&'static str, B::Tensor)>> {
    let mut new = |rows, width| upload(b, &data.matrix(rows, width));
    let (x, y, row, vector) = (new(6, 24)?, new(6, 24)?, new(1, 24)?, new(1, 24)?);
    let (weight, entries) = (new(24, 24)?, new(24, 24)?);
    let host = b.block_on(b.read(&entries))?;
    let table = b.new_table(HostMatrix::F32(host.view()), dtype)?;
    let frozen = b.new_linear(HostMatrix::F32(host.view()), None, dtype)?;
    let plain = b.new_norm(NormParams { width: 24, eps: 1e-5, weight: None, bias: None })?;
    let linear = b.linear_of(&weight, Some(&row), dtype)?;
    let norm = b.norm_of(&vector, &row, 1e-5)?;
    let spans = Span::lay_out([2, 4]);
    let attend = Attend { heads: 3, layer: 0, spans: &spans };
    let smoothing = Smoothing { scale: 0.5, epsilon: 0.1 };
    let [dq, dk, dv] = b.attend_grad([&x, &y, &x], &y, attend)?;
    let [d_weight, d_bias] = b.layer_norm_grad_params(&x, &norm, &y)?;
    let [hard, d_hard] = b.cross_entropy(new(6, 24)?, &[0, 5, 23, 7, 7, 1], smoothing)?;
    let [soft, d_soft] = b.soft_targets(new(6, 24)?, &x, 2.0, 0.5)?;
    let sum = b.sum_squares(&[&x, &y])?;
    let clip = || Some(Clip { sum_squares: &sum, max_norm: 1.0 });
    let (mut param, mut moments) = (new(6, 24)?, [upload(b, &Array2::zeros((6, 24)))?, new(6, 24)?]);
    // Second moments are not negative.
    moments[1] = b.zeros([6, 24])?;
    let adam = AdamW { lr: 0.1, beta1: 0.9, beta2: 0.99, eps: 1e-6, weight_decay: 0.1, step: 1 };
    b.adamw(&mut param, &x, &mut moments, adam, clip())?;
    let [first, second] = moments;
    let mut eighth = new(6, 24)?;
    let mut coded = Moments8::shapes([6, 24]).try_map(|shape| b.zeros(shape))?;
    b.adamw8(&mut eighth, &x, &mut coded, adam, clip())?;
    let (mut other, mut velocity) = (new(6, 24)?, new(6, 24)?);
    b.sgd(&mut other, &x, Some(&mut velocity), Sgd { lr: 0.1, momentum: 0.9, weight_decay: 0.1 }, clip())?;
    Ok(vec![
        ("linear_of", b.linear(&x, &linear, Then::Nothing)?),
        ("norm_of", b.layer_norm(&x, &norm)?),
        ("zeros", b.zeros([6, 24])?),
        ("copy", b.copy(&x)?),
        ("matmul", b.matmul(&x, &weight, Layout::TimesTransposed, dtype, None)?),
        ("matmul, into", b.matmul(&x, &y, Layout::TransposedTimes, DType::F32, Some(new(24, 24)?))?),
        ("linear_grad", b.linear_grad(&x, &frozen, None)?),
        ("linear_grad, into", b.linear_grad(&x, &linear, Some(new(6, 24)?))?),
        ("logits_grad", b.logits_grad(&x, &table)?),
        ("layer_norm_grad", b.layer_norm_grad(&x, &plain, &y)?),
        ("layer_norm_grad_params, weight", d_weight),
        ("layer_norm_grad_params, bias", d_bias),
        ("attend_grad, q", dq),
        ("attend_grad, k", dk),
        ("attend_grad, v", dv),
        ("activate", b.activate(new(6, 24)?, Activation::Gelu)?),
        ("activate_grad", b.activate_grad(&x, new(6, 24)?, Activation::Gelu)?),
        ("cross_entropy, loss", hard),
        ("cross_entropy, gradient", d_hard),
        ("soft_targets, loss", soft),
        ("soft_targets, gradient", d_soft),
        ("scatter_add", b.scatter_add(new(9, 24)?, &[8, 0, 3, 3, 8, 1], &x)?),
        ("concat", b.concat(&[&x, &row, &y])?),
        ("sum_rows", b.sum_rows(&x)?),
        ("add_row", b.add_row(new(6, 24)?, &row)?),
        ("mul_row", b.mul_row(new(6, 24)?, &row)?),
        ("mul", b.mul(new(6, 24)?, &y)?),
        ("scale", b.scale(new(6, 24)?, -0.7)?),
        ("dropout", b.dropout(new(6, 24)?, Dropout { p: 0.3, seed: 7 })?),
        ("sum_squares", sum),
        ("adamw, parameters", param),
        ("adamw, first moment", first),
        ("adamw, second moment", second),
        ("adamw8, parameters", eighth),
        ("adamw8, first moment", coded.first),
        ("adamw8, second moment", coded.second),
        ("adamw8, scales", coded.scales),
        ("sgd, parameters", other),
        ("sgd, velocity", velocity),
    ])
}

/// Fails unless the tensor is still `expected`, bit for bit.
fn unchanged<B: Train>(b: &B, what: &str, x: &B::Tensor, expected: &Array2<f32>) -> Outcome {
    super::compare::same_bits(what, b.block_on(b.read(x))?.view(), expected.view())
}
