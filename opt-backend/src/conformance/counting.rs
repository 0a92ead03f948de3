//! What a decode step costs in default bodies and transfers.

use super::{
    Kit, Run, Tolerance, ensure,
    model::{Batch, Model, SHAPES},
};
use crate::{
    Attend, Backend, Counts, DType, Op, Result, Span,
    quant::{Groups, Levels, Quantized, Zeros},
};
use ndarray::Array2;

pub(super) fn run<B: Backend>(run: &mut Run<'_, B>) {
    let (mut step, mut tour) = (Counts::default(), Counts::default());
    let reads = run.suite.reads_per_step;
    run.case("counters", "a decode step", |b, _| {
        step = decode_step(b)?;
        let allowed = reads.unwrap_or(u64::MAX);
        ensure(
            step.reads <= allowed,
            format_args!("expected at most {allowed} reads in a decode step, found {step}"),
        )
    });
    let ops = run.suite.no_defaults.clone();
    run.case("counters", "default bodies", |b, _| {
        tour = defaults_used(b)?;
        let used: Vec<Op> = ops.iter().copied().filter(|&op| tour.default_bodies(op) > 0).collect();
        ensure(
            used.is_empty(),
            format_args!("expected overrides of {used:?}, found their default bodies called"),
        )
    });
    run.report.step = step;
    run.report.tour = tour;
}

/// What one decode step of three sequences counts, from token ids to the five best next tokens, after a prefill.
///
/// The model has two layers. A backend with all ops overridden reads once (the top-k) and runs no default body.
///
/// # Errors
/// Those of the ops.
pub fn decode_step<B: Backend>(b: &B) -> Result<Counts> {
    let (model, mut caches) = prefilled(b)?;
    let before = b.counters().counts();
    let hidden = step(b, &model, &mut caches)?;
    let last = b.take_rows(&hidden, &[0, 1, 2])?;
    b.block_on(b.top_k(&model.logits(b, &last)?, 5))?;
    Ok(b.counters().counts().since(&before))
}

/// What calling every op at least once counts; [`Counts::default_bodies`] tells which ops a backend has not
/// overridden. (A default body may call others: LogProbs, for one, calls `logits`.)
///
/// # Errors
/// Those of the ops.
pub fn defaults_used<B: Backend>(b: &B) -> Result<Counts> {
    let (model, mut caches) = prefilled(b)?;
    let before = b.counters().counts();
    let hidden = step(b, &model, &mut caches)?;
    let last = b.take_rows(&hidden, &[0, 1, 2])?;
    b.block_on(b.log_probs(&last, model.head(), &[1, 2, 3]))?;
    b.block_on(b.top_k(&model.logits(b, &last)?, 5))?;
    let sum = b.add(last, &hidden)?;
    let operand = || b.upload(Array2::ones((3, 4)).view());
    let attend = Attend { heads: 2, layer: 0, spans: &[Span { start: 0, len: 3 }] };
    let (_, weights) = b.attention_weights(operand()?, operand()?, operand()?, attend, None)?;
    b.block_on(weights)?;
    let levels = Levels::Integers { bits: 4 };
    let quantized =
        Quantized::new(Array2::zeros((4, 4)), Array2::ones((4, 1)), Zeros::Same(8), levels, Groups::Runs(4))?;
    drop((sum, b.new_quantized_linear(&quantized, None)?, b.new_quantized_table(&quantized)?));
    Ok(b.counters().counts().since(&before))
}

const PROMPTS: [&[u32]; 3] = [&[2, 17, 40, 8], &[2], &[2, 99]];

fn prefilled<B: Backend>(b: &B) -> Result<(Model<B>, Vec<B::Cache>)> {
    let tolerance = Tolerance::of(DType::F32);
    let kit = Kit { activations: DType::F32, bf16: false, tolerance, quantized: tolerance };
    let dtype = b.info().dtypes.first().copied().unwrap_or_default();
    let model = Model::new(b, SHAPES[0], dtype, kit)?;
    let mut caches = PROMPTS.iter().map(|_| model.new_cache(b)).collect::<Result<Vec<_>>>()?;
    let mut borrowed: Vec<&mut B::Cache> = caches.iter_mut().collect();
    model.hidden(b, &Batch::new(&PROMPTS.map(|ids| (0, ids))), Some(&mut borrowed))?;
    Ok((model, caches))
}

fn step<B: Backend>(b: &B, model: &Model<B>, caches: &mut [B::Cache]) -> Result<B::Tensor> {
    let sequences: Vec<(usize, &[u32])> = PROMPTS.iter().map(|ids| (ids.len(), &[5u32][..])).collect();
    let mut borrowed: Vec<&mut B::Cache> = caches.iter_mut().collect();
    model.hidden(b, &Batch::new(&sequences), Some(&mut borrowed))
}
