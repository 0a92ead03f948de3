//! Gradients of LayerNorm.

use crate::conformance::{
    Outcome, Run,
    data::{Data, read},
    ensure,
};
use crate::{HostVector, NormParams, Train, oracle, oracle::gradient};
use ndarray::{Array1, Array2, Axis};

pub(super) fn run<B: Train>(run: &mut Run<'_, B>) {
    for width in [1, 7, 33, 80, 257, 768, 1500] {
        for rows in [0, 1, 5, 67] {
            for (affine, eps) in [((true, true), 1e-5), ((false, false), 1e-5), ((true, false), 1e-3)] {
                let case = format!("[{rows}, {width}], affine {affine:?}, eps {eps:e}");
                each(run, &case, move |data| data.matrix(rows, width), affine, eps);
            }
        }
    }
    // Variances around eps, so that its size and place show.
    let little = |data: &mut Data| data.matrix(9, 80).mapv_into(|v| v * 3e-3);
    each(run, "rows of little variance", little, (false, false), 1e-5);
    // A variance computed as E[x²] - E[x]² in f32 cancels here.
    each(run, "rows far from zero", |data| data.matrix(9, 257) + 32.0, (true, true), 1e-5);
    let constant = |data: &mut Data| {
        let mut x = data.matrix(6, 33);
        [0.0, 0.5, -4.0].iter().enumerate().for_each(|(i, v)| x.row_mut(2 * i).fill(*v));
        x
    };
    each(run, "constant rows", constant, (true, true), 1e-5);
    run.case("norm_of", "from parameters on the device", norm_of);
}

/// Both ops, on the same numbers.
fn each<B: Train>(
    run: &mut Run<'_, B>,
    case: &str,
    x: impl Fn(&mut Data) -> Array2<f32>,
    affine: (bool, bool),
    eps: f32,
) {
    for params in [false, true] {
        let op = if params { "layer_norm_grad_params" } else { "layer_norm_grad" };
        run.case(op, case, |b, data| {
            let x = x(data);
            check(b, data, x, affine, eps, params)
        });
    }
}

fn check<B: Train>(
    b: &B,
    data: &mut Data,
    x: Array2<f32>,
    (weight, bias): (bool, bool),
    eps: f32,
    params: bool,
) -> Outcome {
    let (rows, width) = x.dim();
    let (x, dy) = (data.held(x), data.matrix(rows, width));
    let mut vector = |wanted: bool| wanted.then(|| data.matrix(1, width).row(0).to_owned());
    let (weight, bias): (Option<Array1<f32>>, Option<Array1<f32>>) = (vector(weight), vector(bias));
    let norm = b.new_norm(NormParams {
        width,
        eps,
        weight: weight.as_ref().map(|w| HostVector::F32(w.view())),
        bias: bias.as_ref().map(|c| HostVector::F32(c.view())),
    })?;
    let (dx, d_weight, d_bias) =
        gradient::layer_norm(x.view(), weight.as_ref().map(|w| w.view()), eps, dy.view());
    let (tx, ty) = (b.upload(x.view())?, b.upload(dy.view())?);
    if params {
        let [found_weight, found_bias] = b.layer_norm_grad_params(&tx, &norm, &ty)?;
        let row = |v: Array1<f32>| v.insert_axis(Axis(0));
        data.tolerance().compare("weight", read(b, &found_weight)?.view(), row(d_weight).view())?;
        data.tolerance().compare("bias", read(b, &found_bias)?.view(), row(d_bias).view())?;
    } else {
        let found = read(b, &b.layer_norm_grad(&tx, &norm, &ty)?)?;
        data.tolerance().compare("dx", found.view(), dx.view())?;
    }
    super::unchanged(b, "x", &tx, &x)?;
    super::unchanged(b, "dy", &ty, &dy)
}

fn norm_of<B: Train>(b: &B, data: &mut Data) -> Outcome {
    for (width, eps) in [(1, 1e-5), (33, 1e-5), (257, 1e-3)] {
        let (weight, bias, x) = (data.matrix(1, width), data.matrix(1, width), data.matrix(5, width));
        let (tw, tb) = (b.upload(weight.view())?, b.upload(bias.view())?);
        let norm = b.norm_of(&tw, &tb, eps)?;
        let held = b.block_on(b.read_norm(&norm))?;
        ensure(held.width == width && held.eps == eps, "another width or eps")?;
        ensure(held.weight == Some(weight.row(0).to_owned()), "the weight differs")?;
        ensure(held.bias == Some(bias.row(0).to_owned()), "the bias differs")?;
        let expected = oracle::layer_norm(x.view(), Some(weight.row(0)), Some(bias.row(0)), eps);
        let found = read(b, &b.layer_norm(&b.upload(x.view())?, &norm)?)?;
        data.tolerance().compare("applied", found.view(), expected.view())?;
        super::unchanged(b, "the weight it is of", &tw, &weight)?;
        super::unchanged(b, "the bias it is of", &tb, &bias)?;
    }
    Ok(())
}
