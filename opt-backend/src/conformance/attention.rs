//! Attention, with and without caches.

use super::{
    Outcome, Run,
    data::{Data, read},
    ensure,
};
use crate::{Attend, Backend, CacheDType, CacheSpec, Span, oracle};
use ndarray::{Array2, ArrayView2, Axis, concatenate, s};

/// (heads, head_dim)
const HEADS: [(usize, usize); 7] = [(1, 1), (1, 80), (2, 80), (3, 7), (4, 64), (12, 8), (2, 128)];

pub(super) fn run<B: Backend>(run: &mut Run<'_, B>) {
    without_cache(run);
    with_cache(run);
    large_scores(run);
    long(run);
}

/// Rows of one sequence each, laid out in a batch.
struct Batch {
    q: Array2<f32>,
    k: Array2<f32>,
    v: Array2<f32>,
    spans: Vec<Span>,
}

impl Batch {
    fn new(data: &mut Data, lengths: &[usize], width: usize) -> Self {
        let rows = lengths.iter().sum();
        let [q, k, v] = [(); 3].map(|()| data.matrix(rows, width));
        Self { q, k, v, spans: Span::lay_out(lengths.iter().copied()) }
    }

    fn upload<B: Backend>(&self, b: &B) -> Outcome<[B::Tensor; 3]> {
        Ok([b.upload(self.q.view())?, b.upload(self.k.view())?, b.upload(self.v.view())?])
    }

    fn rows<'a>(&self, of: &'a Array2<f32>, span: Span) -> ArrayView2<'a, f32> {
        of.slice(s![span.rows(), ..])
    }
}

/// What came before, per span; empty without caches.
type Past = Vec<(Array2<f32>, Array2<f32>)>;

/// Calls `attend` and `attention_weights` and compares each span with the oracle. Caches are filled with `past`.
fn check<B: Backend>(b: &B, data: &Data, batch: &Batch, heads: usize, past: Option<&Past>) -> Outcome {
    let width = batch.q.ncols();
    let spec =
        CacheSpec { layers: 2, heads, head_dim: width / heads, dtype: CacheDType::F32, capacity_hint: 0 };
    // The second of two layers, so that one mistaken for the other shows.
    let attend = Attend { heads, layer: 1, spans: &batch.spans };
    for weights_too in [false, true] {
        let mut caches = Vec::new();
        for (keys, values) in past.into_iter().flatten() {
            let mut cache = b.new_cache(spec)?;
            b.cache_seed(&mut cache, 1, keys.view(), values.view())?;
            caches.push(cache);
        }
        let [q, k, v] = batch.upload(b)?;
        let mut borrowed: Vec<&mut B::Cache> = caches.iter_mut().collect();
        let borrowed = past.is_some().then_some(&mut borrowed[..]);
        let (found, weights) = if weights_too {
            let (found, weights) = b.attention_weights(q, k, v, attend, borrowed)?;
            let weights = b.block_on(weights)?;
            ensure(
                weights.len() == batch.spans.len(),
                format_args!("expected weights of {} spans, found {}", batch.spans.len(), weights.len()),
            )?;
            (found, weights)
        } else {
            (b.attend(q, k, v, attend, borrowed)?, Vec::new())
        };
        let found = read(b, &found)?;
        ensure(
            found.dim() == batch.q.dim(),
            format_args!("expected the shape {:?}, found {:?}", batch.q.dim(), found.dim()),
        )?;
        for (i, &span) in batch.spans.iter().enumerate() {
            let (mut keys, mut values) =
                (batch.rows(&batch.k, span).to_owned(), batch.rows(&batch.v, span).to_owned());
            if let Some(past) = past {
                keys = joined(&past[i].0, &keys);
                values = joined(&past[i].1, &values);
            }
            let q = batch.rows(&batch.q, span);
            let (expected, expected_weights) = oracle::attend(q, keys.view(), values.view(), heads);
            let what = format!("span {i}");
            data.tolerance().compare(&what, batch.rows(&found, span), expected.view())?;
            if let Some(weights) = weights.get(i) {
                data.tolerance().compare("weights", weights.view(), expected_weights.view())?;
            }
            if let Some(cache) = caches.get(i) {
                let held = b.block_on(b.cache_read(cache, 1))?;
                ensure(
                    held.keys == keys && held.values == values,
                    "the cache does not hold what was appended",
                )?;
                ensure(b.cache_len(cache, 0) == 0, "another layer of the cache changed")?;
            }
        }
    }
    Ok(())
}

fn joined(a: &Array2<f32>, b: &Array2<f32>) -> Array2<f32> {
    concatenate(Axis(0), &[a.view(), b.view()]).unwrap_or_default()
}

fn without_cache<B: Backend>(run: &mut Run<'_, B>) {
    let lengths: [&[usize]; 9] =
        [&[], &[0], &[1], &[2], &[33], &[70], &[1, 1, 1, 1], &[3, 0, 1, 17, 0], &[0, 5, 64, 1, 2, 65, 9]];
    for (heads, head_dim) in HEADS {
        for lengths in lengths {
            let case = format!("{heads} heads of {head_dim}, spans {lengths:?}");
            run.case("attend", case, |b, data| {
                let batch = Batch::new(data, lengths, heads * head_dim);
                check(b, data, &batch, heads, None)
            });
        }
    }
    run.case("attend", "spans out of order and with gaps", |b, data| {
        let mut batch = Batch::new(data, &[40], 2 * 16);
        batch.spans =
            [(21, 7), (0, 5), (9, 0), (10, 1), (30, 10)].map(|(start, len)| Span { start, len }).into();
        check(b, data, &batch, 2, None)
    });
    run.case("attend", "rows that no span covers", |b, data| {
        let mut batch = Batch::new(data, &[4], 8);
        batch.spans.clear();
        check(b, data, &batch, 1, None)
    });
}

fn with_cache<B: Backend>(run: &mut Run<'_, B>) {
    // (positions already held, new rows) of each sequence
    let cases: [&[(usize, usize)]; 8] = [
        &[],
        &[(0, 1)],
        &[(1, 1)],
        &[(63, 1)],
        &[(64, 2)],
        &[(5, 0)],
        &[(0, 20), (130, 1), (7, 33), (0, 0), (12, 0), (64, 64)],
        &[(31, 1), (32, 1), (127, 1), (128, 1), (3, 1), (0, 1)],
    ];
    for (heads, head_dim) in HEADS {
        for case in cases {
            run.case(
                "attend",
                format_args!("{heads} heads of {head_dim}, cached (past, new) {case:?}"),
                |b, data| check_past(b, data, heads, head_dim, case),
            );
        }
    }
    run.case("attend", "cached, spans out of order", |b, data| {
        let mut batch = Batch::new(data, &[3, 1, 9], 2 * 16);
        batch.spans.rotate_left(1);
        let past = [4, 0, 2].map(|held| (data.matrix(held, 32), data.matrix(held, 32))).into();
        check(b, data, &batch, 2, Some(&past))
    });
    for dtype in [CacheDType::F16, CacheDType::Int8] {
        run.case("attend", format_args!("over a cache held as {dtype:?}"), |b, data| {
            let spec = CacheSpec { layers: 1, heads: 2, head_dim: 80, dtype, capacity_hint: 64 };
            let mut cache = super::cache::new_cache(b, spec)?;
            for rows in [19, 1, 46, 1] {
                let batch = Batch::new(data, &[rows], 160);
                let [q, k, v] = batch.upload(b)?;
                let attend = Attend { heads: 2, layer: 0, spans: &batch.spans };
                let found = read(b, &b.attend(q, k, v, attend, Some(&mut [&mut cache]))?)?;
                // Attention is over what the cache holds, the new rows included: a chunk more or less is the same.
                let held = b.block_on(b.cache_read(&cache, 0))?;
                let (expected, _) = oracle::attend(batch.q.view(), held.keys.view(), held.values.view(), 2);
                data.tolerance().compare("rows", found.view(), expected.view())?;
            }
            Ok(())
        });
    }
}

fn check_past<B: Backend>(
    b: &B,
    data: &mut Data,
    heads: usize,
    head_dim: usize,
    case: &[(usize, usize)],
) -> Outcome {
    let width = heads * head_dim;
    let new: Vec<usize> = case.iter().map(|(_, new)| *new).collect();
    let batch = Batch::new(data, &new, width);
    let past = case.iter().map(|(held, _)| (data.matrix(*held, width), data.matrix(*held, width))).collect();
    check(b, data, &batch, heads, Some(&past))
}

/// Scores around ±10⁴ that differ by little: exp overflows unless the largest is subtracted first, and a mask that
/// adds a finite number is not enough.
fn large_scores<B: Backend>(run: &mut Run<'_, B>) {
    for sign in [1.0, -1.0] {
        run.case("attend", format_args!("scores around {}", sign * 1e4), |b, data| {
            let mut batch = Batch::new(data, &[24, 9], 2 * 16);
            // Integers, and √16 = 4: the scores (37500 · sign + small) / 4 are exact in f32.
            let small = data.integers(33, 1, 3);
            batch.q.fill(50.0);
            batch.k.fill(50.0 * sign);
            for head in [0, 16] {
                batch.q.column_mut(head).fill(1.0);
                batch.k.column_mut(head).assign(&small.column(0));
            }
            if sign < 0.0 {
                // What must not be seen would win by far.
                let last = batch.k.nrows() - 1;
                batch.k.row_mut(last).fill(50.0);
                batch.k.row_mut(23).fill(50.0);
            }
            check(b, data, &batch, 2, None)?;
            let past = vec![(batch.k.clone(), batch.v.clone()), (batch.k.clone(), batch.v.clone())];
            check(b, data, &batch, 2, Some(&past))
        });
    }
}

fn long<B: Backend>(run: &mut Run<'_, B>) {
    if !run.suite.heavy {
        return;
    }
    for (heads, head_dim) in [(1, 80), (2, 64)] {
        let cases: [&[(usize, usize)]; 3] = [&[(2047, 1)], &[(2045, 3), (0, 5), (2048, 1)], &[(1900, 148)]];
        for case in cases {
            run.case(
                "attend",
                format_args!("{heads} heads of {head_dim}, cached (past, new) {case:?}"),
                |b, data| check_past(b, data, heads, head_dim, case),
            );
        }
    }
    run.case("attend", "2 heads of 16, one span of 2048", |b, data| {
        let batch = Batch::new(data, &[2048], 32);
        check(b, data, &batch, 2, None)
    });
}
