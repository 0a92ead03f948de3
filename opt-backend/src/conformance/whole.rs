//! Whole models: the same tokens, however they are cut and batched, give the same logits.

use super::{
    Kit, Outcome, Run, Tolerance,
    compare::same_bits,
    data::Data,
    model::{Batch, Model, SHAPES, Shape, VOCABULARY},
};
use crate::{Backend, DType, Reference};
use ndarray::{Array2, ArrayView2, Axis, concatenate, s};

/// Prompt lengths: one of one token, one past a block.
const LENGTHS: [usize; 4] = [23, 1, 8, 70];

pub(super) fn run<B: Backend>(run: &mut Run<'_, B>) {
    let (kit, deterministic) = (run.kit, run.deterministic);
    for shape in SHAPES {
        for dtype in run.dtypes.clone() {
            let name = |what: &str| format!("{}, {dtype}: {what}", shape.name);
            let expected = reference(shape, dtype, kit);
            let case = |b: &B, body: &dyn Fn(&Model<B>, &Expected) -> Outcome| -> Outcome {
                let expected = expected.as_ref().map_err(|error| super::Verdict::Failed(error.clone()))?;
                let tolerance =
                    if kit.rounds_for(dtype) { Tolerance::BF16_ACTIVATIONS } else { kit.tolerance };
                body(
                    &Model::new(b, shape, dtype, kit)?,
                    &Expected { tolerance, deterministic, sequences: expected },
                )
            };
            run.case("model", name("prefill without cache"), |b, _| case(b, &|m, e| no_cache(b, m, e)));
            run.case("model", name("prefill in chunks"), |b, _| case(b, &|m, e| chunks(b, m, e)));
            run.case("model", name("token by token"), |b, _| case(b, &|m, e| tokens(b, m, e)));
            run.case("model", name("ragged batch"), |b, _| case(b, &|m, e| batched(b, m, e)));
            run.case("model", name("forked mid-way"), |b, _| case(b, &|m, e| forked(b, m, e)));
        }
    }
}

/// Token ids and their logits as [`Reference`] gives them.
type Sequences = Vec<(Vec<u32>, Array2<f32>)>;

struct Expected<'a> {
    tolerance: Tolerance,
    deterministic: bool,
    sequences: &'a Sequences,
}

impl Expected<'_> {
    /// `found` against the reference, and bit by bit against the same computed in one piece by this backend.
    fn check(&self, what: &str, found: &Array2<f32>, whole: ArrayView2<'_, f32>, i: usize) -> Outcome {
        self.tolerance.compare(what, found.view(), self.sequences[i].1.view())?;
        if self.deterministic { same_bits(&format!("{what} and whole"), found.view(), whole) } else { Ok(()) }
    }
}

fn reference(shape: Shape, dtype: DType, kit: Kit) -> Result<Sequences, String> {
    let run = |b: &Reference| {
        let mut data = Data::new("prompts", kit);
        let model = Model::new(b, shape, dtype, kit)?;
        let prompts = LENGTHS.iter().map(|&len| {
            let ids: Vec<u32> = (0..len).map(|_| data.below(VOCABULARY) as u32).collect();
            let logits = model.run(b, &Batch::new(&[(0, &ids)]), None)?;
            Ok((ids, logits))
        });
        prompts.collect::<crate::Result<_>>()
    };
    run(&Reference::new()).map_err(|error| format!("the reference itself failed: {error}"))
}

/// Runs one sequence over a cache, cut into pieces that end at `cuts`.
fn pieces<B: Backend>(
    b: &B,
    model: &Model<B>,
    cache: &mut B::Cache,
    ids: &[u32],
    start: usize,
    cuts: &[usize],
) -> Outcome<Array2<f32>> {
    let mut parts = Vec::new();
    let mut from = start;
    for &to in cuts {
        let batch = Batch::new(&[(from, &ids[from..to])]);
        parts.push(model.run(b, &batch, Some(&mut [&mut *cache]))?);
        from = to;
    }
    Ok(joined(&parts))
}

fn joined(parts: &[Array2<f32>]) -> Array2<f32> {
    let views: Vec<_> = parts.iter().map(|part| part.view()).collect();
    concatenate(Axis(0), &views).unwrap_or_default()
}

/// A sequence in one piece over an empty cache: what the other ways must equal.
fn whole<B: Backend>(b: &B, model: &Model<B>, ids: &[u32]) -> Outcome<Array2<f32>> {
    pieces(b, model, &mut model.new_cache(b)?, ids, 0, &[ids.len()])
}

fn no_cache<B: Backend>(b: &B, model: &Model<B>, expected: &Expected<'_>) -> Outcome {
    for (i, (ids, _)) in expected.sequences.iter().enumerate() {
        let found = model.run(b, &Batch::new(&[(0, ids)]), None)?;
        let whole = whole(b, model, ids)?;
        expected.check("without a cache", &found, whole.view(), i)?;
        expected.tolerance.compare("with a cache", whole.view(), expected.sequences[i].1.view())?;
    }
    Ok(())
}

fn chunks<B: Backend>(b: &B, model: &Model<B>, expected: &Expected<'_>) -> Outcome {
    let ids = &expected.sequences[3].0;
    let whole = whole(b, model, ids)?;
    for cuts in [&[1, 70][..], &[64, 65, 70], &[33, 66, 70], &[7, 7, 30, 69, 70]] {
        let found = pieces(b, model, &mut model.new_cache(b)?, ids, 0, cuts)?;
        expected.check(&format!("chunks that end at {cuts:?}"), &found, whole.view(), 3)?;
    }
    Ok(())
}

fn tokens<B: Backend>(b: &B, model: &Model<B>, expected: &Expected<'_>) -> Outcome {
    for i in [0, 3] {
        let ids = &expected.sequences[i].0;
        let cuts: Vec<usize> = (1..=ids.len()).collect();
        let found = pieces(b, model, &mut model.new_cache(b)?, ids, 0, &cuts)?;
        expected.check("token by token", &found, whole(b, model, ids)?.view(), i)?;
    }
    Ok(())
}

/// All sequences at once: prefill of unequal lengths, then prefill and decode mixed, shorter ones pausing.
fn batched<B: Backend>(b: &B, model: &Model<B>, expected: &Expected<'_>) -> Outcome {
    let all: Vec<&[u32]> = expected.sequences.iter().map(|(ids, _)| &ids[..]).collect();
    let mut caches = Vec::new();
    for _ in &all {
        caches.push(model.new_cache(b)?);
    }
    let mut done = vec![0; all.len()];
    let mut found = vec![Vec::new(); all.len()];
    for step in [[20, 1, 0, 60], [1, 0, 7, 1], [1, 0, 1, 1], [1, 0, 0, 8]] {
        let each = all.iter().zip(&done).zip(step);
        let sequences: Vec<_> = each.map(|((ids, &from), new)| (from, &ids[from..from + new])).collect();
        let batch = Batch::new(&sequences);
        let mut borrowed: Vec<&mut B::Cache> = caches.iter_mut().collect();
        let logits = model.run(b, &batch, Some(&mut borrowed))?;
        for (i, span) in batch.spans.iter().enumerate() {
            found[i].push(logits.slice(s![span.rows(), ..]).to_owned());
            done[i] += span.len;
        }
    }
    // Also without caches, all whole.
    let batch = Batch::new(&all.iter().map(|&ids| (0, ids)).collect::<Vec<_>>());
    let uncached = model.run(b, &batch, None)?;
    for (i, ids) in all.iter().enumerate() {
        let whole = whole(b, model, ids)?;
        expected.check(&format!("sequence {i} of the batch"), &joined(&found[i]), whole.view(), i)?;
        let rows = uncached.slice(s![batch.spans[i].rows(), ..]).to_owned();
        expected.check(&format!("sequence {i} of the batch without cache"), &rows, whole.view(), i)?;
    }
    Ok(())
}

/// Two continuations of one prefix, decoded side by side in one batch, equal the two run from the start.
fn forked<B: Backend>(b: &B, model: &Model<B>, expected: &Expected<'_>) -> Outcome {
    let first = &expected.sequences[3].0;
    let mut second = first.clone();
    second[64..].iter_mut().for_each(|id| *id = (*id + 1) % VOCABULARY as u32);
    for at in [64, 65] {
        second[64] = if at == 65 { first[64] } else { (first[64] + 1) % VOCABULARY as u32 };
        let mut original = model.new_cache(b)?;
        let prefix = pieces(b, model, &mut original, first, 0, &[at])?;
        let mut fork = b.cache_fork(&original)?;
        let mut found = [vec![prefix.clone()], vec![prefix]];
        for position in at..first.len() {
            let batch = Batch::new(&[
                (position, &first[position..position + 1]),
                (position, &second[position..position + 1]),
            ]);
            let logits = model.run(b, &batch, Some(&mut [&mut original, &mut fork]))?;
            for (i, found) in found.iter_mut().enumerate() {
                found.push(logits.slice(s![i..i + 1, ..]).to_owned());
            }
        }
        let [original, fork] = found.map(|parts| joined(&parts));
        expected.check(&format!("original, forked at {at}"), &original, whole(b, model, first)?.view(), 3)?;
        let fresh = whole(b, model, &second)?;
        let what = format!("fork at {at} and the same run from the start");
        expected.tolerance.compare(&what, fork.view(), fresh.view())?;
        if expected.deterministic {
            same_bits(&what, fork.view(), fresh.view())?;
        }
    }
    Ok(())
}
