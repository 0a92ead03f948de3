//! Causal attention over spans and caches.

use crate::{
    Cache, Tch, cache,
    error::torch,
    tensor::{Tensor, upload},
};
use opt_backend::{Attend, Result, Span, check, ndarray::ArrayView1};
use tch::Kind;

const OP: &str = "attend";

/// What LibTorch's fused kernel is told of which positions a row sees.
enum Seen {
    /// One row, the last of its sequence: all.
    All,
    /// As many rows as positions: those up to its own.
    Causal,
    /// True where seen: `[rows, positions]`, or `[sequences, 1, rows, positions]`.
    Masked(tch::Tensor),
}

/// See [`opt_backend::Backend::attend`].
pub(crate) fn attend(
    tch: &Tch,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    attend: Attend<'_>,
    caches: Option<&mut [&mut Cache]>,
) -> Result<Tensor> {
    check::spans(OP, attend, q.shape())?;
    check::same_shape(OP, k.shape(), q.shape())?;
    check::same_shape(OP, v.shape(), q.shape())?;
    let [_, width] = q.shape();
    let head_dim = width / attend.heads;
    let mut pieces = Vec::with_capacity(attend.spans.len());
    match caches {
        Some(caches) => {
            check::caches(attend, caches.len())?;
            // All checks come before the first append: an error leaves every cache as it was.
            for cache in caches.iter() {
                cache.check(OP, attend.layer, width)?;
                check::heads(OP, attend, cache.heads())?;
            }
            if let Some(out) = one_row_each(tch, q, k, v, attend, caches)? {
                return Ok(out);
            }
            for (span, cache) in attend.spans.iter().zip(caches.iter_mut()) {
                cache.append(OP, attend.layer, k, v, span.rows())?;
            }
            for (span, cache) in attend.spans.iter().zip(caches.iter()).filter(|(span, _)| span.len > 0) {
                let [keys, values] = cache.keys_values(OP, attend.layer)?;
                let queries = queries(q, span.start, [1, span.len, attend.heads, head_dim])?;
                let positions = cache.len(attend.layer);
                let out = fused(&queries, &keys, &values, seen(tch, span.len, positions)?)?;
                pieces.push((*span, rows_of(&out, [span.len, width])?));
            }
        }
        None => {
            for (span, sequences) in runs(attend.spans) {
                let shape = [sequences, span.len, attend.heads, head_dim];
                let [q, k, v] = [q, k, v].map(|x| queries(x, span.start, shape));
                let out = fused(&q?, &k?, &v?, seen(tch, span.len, span.len)?)?;
                let all = Span { start: span.start, len: sequences * span.len };
                pieces.push((all, rows_of(&out, [all.len, width])?));
            }
        }
    }
    assemble(tch, pieces, q.shape())
}

/// A decode step: each sequence has one row, in their order. `None`, and nothing done, if it is not that or the caches
/// are better served one by one.
fn one_row_each(
    tch: &Tch,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    attend: Attend<'_>,
    caches: &mut [&mut Cache],
) -> Result<Option<Tensor>> {
    let [rows, width] = q.shape();
    let in_order = attend.spans.iter().enumerate().all(|(i, span)| span.start == i && span.len == 1);
    if !in_order || attend.spans.len() != rows {
        return Ok(None);
    }
    let Some(together) = cache::append_together(OP, caches, attend.layer, k, v, 0)? else { return Ok(None) };
    let queries = queries(q, 0, [rows, 1, attend.heads, width / attend.heads])?;
    let out = fused(&queries, &together.keys, &together.values, own_positions(tch, &together.lengths)?)?;
    Ok(Some(Tensor::new(rows_of(&out, [rows, width])?, Kind::Float, [rows, width])))
}

/// Of the positions of the longest sequence, those that each has.
fn own_positions(tch: &Tch, lengths: &[usize]) -> Result<Seen> {
    let longest = lengths.iter().copied().max().unwrap_or(0);
    if lengths.iter().all(|len| *len == longest) {
        return Ok(Seen::All);
    }
    let ends: Vec<i64> = lengths.iter().map(|len| *len as i64).collect();
    let ends = upload(OP, ArrayView1::from(&ends), tch.device())?;
    let mask = || {
        let positions = tch::Tensor::f_arange(longest as i64, (Kind::Int64, tch.device()))?;
        let before_end = positions.f_lt_tensor(&ends.f_unsqueeze(1)?)?;
        before_end.f_reshape([lengths.len() as i64, 1, 1, longest as i64])
    };
    Ok(Seen::Masked(mask().map_err(torch(OP))?))
}

/// Spans of equal length that lie end to end, as the first of them and their number; without empty ones.
pub(crate) fn runs(spans: &[Span]) -> Vec<(Span, usize)> {
    let mut runs: Vec<(Span, usize)> = Vec::new();
    for &span in spans.iter().filter(|span| span.len > 0) {
        match runs.last_mut() {
            Some((first, count))
                if first.len == span.len && first.start + *count * first.len == span.start =>
            {
                *count += 1;
            }
            _ => runs.push((span, 1)),
        }
    }
    runs
}

/// `[sequences, heads, rows, head_dim]` in f32, from the row `start` on.
pub(crate) fn queries(x: &Tensor, start: usize, shape: [usize; 4]) -> Result<tch::Tensor> {
    let heads = x.heads(OP, start, shape)?;
    if x.kind() == Kind::Float { Ok(heads) } else { heads.f_totype(Kind::Float).map_err(torch(OP)) }
}

fn seen(tch: &Tch, rows: usize, positions: usize) -> Result<Seen> {
    if rows == 1 {
        return Ok(Seen::All);
    }
    if rows == positions {
        return Ok(Seen::Causal);
    }
    let before = (positions - rows) as i64;
    let mask = tch::Tensor::f_ones([rows as i64, positions as i64], (Kind::Bool, tch.device()))
        .and_then(|all| all.f_tril(before));
    Ok(Seen::Masked(mask.map_err(torch(OP))?))
}

/// softmax(q kᵀ / √head_dim) v, `[sequences, heads, rows, head_dim]`.
fn fused(q: &tch::Tensor, k: &tch::Tensor, v: &tch::Tensor, seen: Seen) -> Result<tch::Tensor> {
    let (mask, causal) = match &seen {
        Seen::All => (None, false),
        Seen::Causal => (None, true),
        Seen::Masked(mask) => (Some(mask), false),
    };
    tch::Tensor::f_scaled_dot_product_attention(q, k, v, mask, 0.0, causal, None, false).map_err(torch(OP))
}

/// `[sequences, heads, rows, head_dim]` as rows: a view, since the fused kernel lays its result out so.
pub(crate) fn rows_of(heads: &tch::Tensor, [rows, width]: [usize; 2]) -> Result<tch::Tensor> {
    let rows =
        heads.f_transpose(1, 2).and_then(|rows_first| rows_first.f_reshape([rows as i64, width as i64]));
    rows.map_err(torch(OP))
}

/// One tensor of the results of the spans. Rows of no span are zeros.
pub(crate) fn assemble(tch: &Tch, mut pieces: Vec<(Span, tch::Tensor)>, shape: [usize; 2]) -> Result<Tensor> {
    let [rows, width] = shape;
    let end = pieces.iter().try_fold(0, |end, (span, _)| (span.start == end).then_some(end + span.len));
    let data = match (end == Some(rows), pieces.len()) {
        (true, 1) => pieces.swap_remove(0).1,
        (true, 2..) => {
            let parts: Vec<&tch::Tensor> = pieces.iter().map(|(_, part)| part).collect();
            tch::Tensor::f_cat(&parts, 0).map_err(torch(OP))?
        }
        _ => {
            let size = [rows as i64, width as i64];
            let whole = tch::Tensor::f_zeros(size, (Kind::Float, tch.device())).map_err(torch(OP))?;
            for (span, part) in &pieces {
                let mut to = whole.f_narrow(0, span.start as i64, span.len as i64).map_err(torch(OP))?;
                to.f_copy_(part).map_err(torch(OP))?;
            }
            whole
        }
    };
    Ok(Tensor::new(data, Kind::Float, shape))
}
