//! For backends whose [`crate::Info::deterministic`] says so: a row alone is bit-equal to the row in any batch or chunk.
//!
//! At the widths of real models, where kernels split sums and switch with the number of rows.

use super::{
    Outcome, Run,
    compare::same_bits,
    data::{Data, read},
};
use crate::{Activation, Attend, Backend, CacheDType, CacheSpec, DType, HostMatrix, NormParams, Span, Then};
use ndarray::{Array2, Axis, concatenate, s};

const ROWS: usize = 67;

pub(super) fn run<B: Backend>(run: &mut Run<'_, B>) {
    if !run.deterministic {
        return;
    }
    for dtype in run.dtypes.clone() {
        for [input, out] in [[768, 65], [1500, 17], [40, 700]] {
            run.case("deterministic", format_args!("linear {input} to {out} in {dtype}"), |b, data| {
                linear(b, data, input, out, dtype)
            });
        }
        run.case("deterministic", format_args!("gather, logits, log_probs, top_k in {dtype}"), |b, data| {
            head(b, data, dtype)
        });
    }
    run.case("deterministic", "layer_norm of width 768", |b, data| {
        let x = data.matrix(ROWS, 768);
        let norm = b.new_norm(NormParams { width: 768, eps: 1e-5, weight: None, bias: None })?;
        alike(b, &x, |x| Ok(b.layer_norm(&x, &norm)?))
    });
    for (heads, head_dim) in [(2, 64), (3, 80)] {
        let case = format!("attend, {heads} heads of {head_dim}, in chunks and batches");
        run.case("deterministic", case, |b, data| attend(b, data, heads, head_dim));
    }
}

/// Runs `op` on all rows at once and in pieces, and compares.
fn alike<B: Backend>(b: &B, x: &Array2<f32>, op: impl Fn(B::Tensor) -> Outcome<B::Tensor>) -> Outcome {
    let whole = read(b, &op(b.upload(x.view())?)?)?;
    for (start, size) in [(0, 1), (16, 1), (ROWS - 1, 1), (3, 2), (31, 5), (7, 16), (27, 40)] {
        let rows = s![start..start + size, ..];
        let piece = read(b, &op(b.upload(x.slice(rows))?)?)?;
        same_bits(&format!("{size} rows from {start}"), piece.view(), whole.slice(rows))?;
    }
    Ok(())
}

fn linear<B: Backend>(b: &B, data: &mut Data, input: usize, out: usize, dtype: DType) -> Outcome {
    let x = data.matrix(ROWS, input);
    let linears = [data.linear(b, [input, out], true, dtype)?, data.linear(b, [input, out], false, dtype)?];
    for (linear, _) in &linears {
        alike(b, &x, |x| Ok(b.linear(&x, linear, Then::Nothing)?))?;
        alike(b, &x, |x| Ok(b.linear(&x, linear, Then::Activate(Activation::Gelu))?))?;
        alike(b, &x, |x| {
            let residual = b.upload(Array2::from_elem((b.shape(&x)[0], out), 0.3).view())?;
            Ok(b.linear(&x, linear, Then::Add(residual))?)
        })?;
    }
    for which in [1, 2] {
        alike(b, &x, |x| {
            let [q, k, v] = b.qkv(&x, &linears[0].0, &linears[1].0, &linears[0].0)?;
            Ok([q, k, v].into_iter().nth(which).unwrap_or(x))
        })?;
    }
    Ok(())
}

fn head<B: Backend>(b: &B, data: &mut Data, dtype: DType) -> Outcome {
    let table = b.new_table(HostMatrix::F32(data.weight(500, 257).view()), dtype)?;
    let x = data.matrix(ROWS, 257);
    alike(b, &x, |x| Ok(b.logits(&x, &table)?))?;
    let targets: Vec<u32> = (0..ROWS).map(|_| data.below(500) as u32).collect();
    let all = b.upload(x.view())?;
    let whole = b.block_on(b.log_probs(&all, &table, &targets))?;
    let tops = b.block_on(b.top_k(&b.logits(&all, &table)?, 7))?;
    for row in [0, 15, 40, ROWS - 1] {
        let one = b.upload(x.slice(s![row..row + 1, ..]))?;
        let score = b.block_on(b.log_probs(&one, &table, &targets[row..row + 1]))?;
        super::ensure(
            score[..] == whole[row..row + 1],
            format_args!("log_probs of row {row}: {score:?} alone, {:?} among {ROWS}", whole[row]),
        )?;
        let top = b.block_on(b.top_k(&b.logits(&one, &table)?, 7))?;
        super::ensure(
            top[..] == tops[row..row + 1],
            format_args!("top_k of row {row}: {top:?} alone, {:?} among {ROWS}", tops[row]),
        )?;
    }
    Ok(())
}

/// New rows over caches of several lengths: whole, cut, and together with other sequences.
fn attend<B: Backend>(b: &B, data: &mut Data, heads: usize, head_dim: usize) -> Outcome {
    let width = heads * head_dim;
    let spec = CacheSpec { layers: 1, heads, head_dim, dtype: CacheDType::F32, capacity_hint: 0 };
    let operands = [(); 3].map(|()| data.matrix(ROWS, width));
    let mut caches = Vec::new();
    for held in [0, 129, 300] {
        let mut cache = b.new_cache(spec)?;
        let [keys, values] = [(); 2].map(|()| data.matrix(held, width));
        b.cache_seed(&mut cache, 0, keys.view(), values.view())?;
        caches.push((held, cache));
    }
    // Rows `from..to` of the operands for each of the caches, as one batch.
    let step = |caches: &mut [B::Cache], from: usize, to: usize| -> Outcome<Vec<Array2<f32>>> {
        let of = |x: &Array2<f32>| {
            let views = vec![x.slice(s![from..to, ..]); caches.len()];
            b.upload(concatenate(Axis(0), &views).unwrap_or_default().view())
        };
        let [q, k, v] = &operands;
        let spans = Span::lay_out(vec![to - from; caches.len()]);
        let attend = Attend { heads, layer: 0, spans: &spans };
        let (q, k, v) = (of(q)?, of(k)?, of(v)?);
        let mut borrowed: Vec<&mut B::Cache> = caches.iter_mut().collect();
        let found = read(b, &b.attend(q, k, v, attend, Some(&mut borrowed))?)?;
        Ok(spans.iter().map(|span| found.slice(s![span.rows(), ..]).to_owned()).collect())
    };
    let forks = || caches.iter().map(|(_, cache)| b.cache_fork(cache)).collect::<crate::Result<Vec<_>>>();
    let together = step(&mut forks()?, 0, ROWS)?;
    for (mut fork, (whole, (held, _))) in forks()?.into_iter().zip(together.iter().zip(&caches)) {
        let alone = step(std::slice::from_mut(&mut fork), 0, ROWS)?;
        same_bits(&format!("after {held}: alone"), alone[0].view(), whole.view())?;
    }
    for size in [1, 16, 40] {
        let mut forks = forks()?;
        for from in (0..ROWS).step_by(size) {
            let to = (from + size).min(ROWS);
            for ((found, whole), (held, _)) in step(&mut forks, from, to)?.iter().zip(&together).zip(&caches)
            {
                let what = format!("after {held}: {size} rows from {from}");
                same_bits(&what, found.view(), whole.slice(s![from..to, ..]))?;
            }
        }
    }
    Ok(())
}
