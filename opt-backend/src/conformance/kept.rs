//! What ops are lent, and what they gave earlier, stays as it is: backends that reuse memory get this wrong.

use super::{
    Outcome, Run,
    compare::same_bits,
    data::{Data, read},
};
use crate::{Activation, Attend, Backend, DType, HostMatrix, NormParams, Span, Then};
use ndarray::Array2;

pub(super) fn run<B: Backend>(run: &mut Run<'_, B>) {
    run.case("kept", "operands that ops borrow", borrowed);
    run.case("kept", "results of earlier ops", results);
}

fn borrowed<B: Backend>(b: &B, data: &mut Data) -> Outcome {
    for rows in [1, 9] {
        let x = data.matrix(rows, 33);
        let tensor = b.upload(x.view())?;
        let (linear, _) = data.linear(b, [33, 33], true, DType::F32)?;
        let norm = b.new_norm(NormParams { width: 33, eps: 1e-5, weight: None, bias: None })?;
        let table = b.new_table(HostMatrix::F32(data.weight(50, 33).view()), DType::F32)?;
        let unchanged = |op: &str| -> Outcome { same_bits(op, read(b, &tensor)?.view(), x.view()) };
        b.layer_norm(&tensor, &norm)?;
        unchanged("x after layer_norm")?;
        b.linear(&tensor, &linear, Then::Nothing)?;
        b.linear(&tensor, &linear, Then::Activate(Activation::Relu))?;
        b.linear(&tensor, &linear, Then::Add(b.upload(x.view())?))?;
        unchanged("x after linear")?;
        b.qkv(&tensor, &linear, &linear, &linear)?;
        unchanged("x after qkv")?;
        b.add(b.upload(x.view())?, &tensor)?;
        unchanged("y after add")?;
        b.take_rows(&tensor, &[0])?;
        unchanged("x after take_rows")?;
        b.logits(&tensor, &table)?;
        unchanged("x after logits")?;
        b.block_on(b.log_probs(&tensor, &table, &vec![7; rows]))?;
        unchanged("x after log_probs")?;
        b.block_on(b.top_k(&tensor, 3))?;
        unchanged("x after top_k")?;
    }
    Ok(())
}

/// Runs every op several times, keeps all that comes out, and reads it twice.
fn results<B: Backend>(b: &B, data: &mut Data) -> Outcome {
    let (linear, _) = data.linear(b, [24, 24], true, DType::F32)?;
    let norm = b.new_norm(NormParams { width: 24, eps: 1e-5, weight: None, bias: None })?;
    let table = b.new_table(HostMatrix::F32(data.weight(24, 24).view()), DType::F32)?;
    let mut kept: Vec<(String, B::Tensor, Array2<f32>)> = Vec::new();
    let mut x = data.matrix(6, 24);
    for round in 0..3 {
        let up = |x: &Array2<f32>| b.upload(x.view());
        let spans = Span::lay_out([2, 4]);
        let attend = Attend { heads: 3, layer: 0, spans: &spans };
        let [q, k, v] = b.qkv(&up(&x)?, &linear, &linear, &linear)?;
        let made = [
            ("gather", b.gather(&table, &[1, 2, 3, 4, 5, 6])?),
            ("add_gathered", b.add_gathered(up(&x)?, &table, &[1, 2, 3, 4, 5, 6])?),
            ("layer_norm", b.layer_norm(&up(&x)?, &norm)?),
            ("linear", b.linear(&up(&x)?, &linear, Then::Activate(Activation::Gelu))?),
            ("linear, add", b.linear(&up(&x)?, &linear, Then::Add(up(&x)?))?),
            ("add", b.add(up(&x)?, &up(&x)?)?),
            ("take_rows", b.take_rows(&up(&x)?, &[5, 4, 3, 2, 1, 0])?),
            ("logits", b.logits(&up(&x)?, &table)?),
            ("attend", b.attend(q, k, v, attend, None)?),
        ];
        for (op, tensor) in made {
            let value = read(b, &tensor)?;
            kept.push((format!("{op} of round {round}"), tensor, value));
        }
        x = data.matrix(6, 24);
    }
    kept.iter().try_for_each(|(what, tensor, value)| same_bits(what, read(b, tensor)?.view(), value.view()))
}
