//! What ops gave earlier stays as it is, also where parameters are updated in place; and what must repeat repeats.

use super::{every_op, unchanged, upload};
use crate::conformance::{
    Outcome, Run,
    compare::same_bits,
    data::{Data, read},
};
use crate::{AdamW, DType, Moments8, Op, Sgd, Then, Train};
use ndarray::Array2;

pub(super) fn run<B: Train>(run: &mut Run<'_, B>) {
    let dtypes = run.dtypes.clone();
    run.case("kept", "results of earlier ops", |b, data| {
        let mut kept = Vec::new();
        for round in 0..3 {
            let dtype = dtypes.get(round % dtypes.len().max(1)).copied().unwrap_or_default();
            for (op, tensor) in every_op(b, data, dtype)? {
                let value = read(b, &tensor)?;
                kept.push((format!("{op} of round {round}"), tensor, value));
            }
        }
        kept.iter().try_for_each(|(what, tensor, value)| unchanged(b, what, tensor, value))
    });
    run.case("kept", "what was made of parameters, once these are updated", updated);
    if run.deterministic {
        for dtype in run.dtypes.clone() {
            run.case("kept", format_args!("every op twice, bit for bit, in {dtype}"), |b, data| {
                let again = every_op(b, &mut data.clone(), dtype)?;
                for ((op, first), (_, second)) in every_op(b, data, dtype)?.iter().zip(&again) {
                    same_bits(op, read(b, second)?.view(), read(b, first)?.view())?;
                }
                Ok(())
            });
        }
    }
}

/// Linears, norms and copies are of the parameters as they were.
fn updated<B: Train>(b: &B, data: &mut Data) -> Outcome {
    let (x, weight, row) = (data.matrix(3, 33), data.matrix(33, 33), data.matrix(1, 33));
    let tensor = upload(b, &x)?;
    for optimizer in [Op::AdamW, Op::AdamW8, Op::Sgd] {
        let (mut w, mut v) = (upload(b, &weight)?, upload(b, &row)?);
        let linear = b.linear_of(&w, Some(&v), DType::F32)?;
        let norm = b.norm_of(&v, &v, 1e-5)?;
        let (copy, of_row) = (b.copy(&w)?, b.copy(&v)?);
        let before =
            [read(b, &b.linear(&tensor, &linear, Then::Nothing)?)?, read(b, &b.layer_norm(&tensor, &norm)?)?];
        for param in [&mut w, &mut v] {
            let shape = b.shape(param);
            let zeros = || upload(b, &Array2::zeros(shape));
            let ones = upload(b, &Array2::ones(shape))?;
            let adam = AdamW { lr: 0.1, beta1: 0.9, beta2: 0.99, eps: 1e-6, weight_decay: 0.1, step: 1 };
            match optimizer {
                Op::AdamW => b.adamw(param, &ones, &mut [zeros()?, zeros()?], adam, None)?,
                Op::AdamW8 => {
                    let mut moments = Moments8::shapes(shape).try_map(|shape| b.zeros(shape))?;
                    b.adamw8(param, &ones, &mut moments, adam, None)?;
                }
                _ => b.sgd(param, &ones, None, Sgd { lr: 0.1, momentum: 0.0, weight_decay: 0.0 }, None)?,
            }
        }
        unchanged(b, "a copy of the weight", &copy, &weight)?;
        unchanged(b, "a copy of the row", &of_row, &row)?;
        unchanged(b, "linear_of", &b.linear(&tensor, &linear, Then::Nothing)?, &before[0])?;
        unchanged(b, "norm_of", &b.layer_norm(&tensor, &norm)?, &before[1])?;
    }
    Ok(())
}
