//! The gradient of attention.

use crate::{
    Tch,
    attention::{assemble, queries, rows_of, runs},
    error::{Tried, torch},
    tensor::Tensor,
};
use opt_backend::{Attend, Result, Span, check};
use tch::Kind;

const OP: &str = "attend_grad";
/// Attention weights that are held at a time where they are: 256 MiB.
const WEIGHTS_HELD: usize = 1 << 26;

/// See [`opt_backend::Train::attend_grad`].
pub(crate) fn attend_grad(
    tch: &Tch,
    [q, k, v]: [&Tensor; 3],
    dy: &Tensor,
    attend: Attend<'_>,
) -> Result<[Tensor; 3]> {
    let [rows, width] = q.shape();
    check::spans(OP, attend, [rows, width])?;
    for other in [k, v, dy] {
        check::same_shape(OP, other.shape(), [rows, width])?;
    }
    let head_dim = width / attend.heads;
    let mut pieces = [(); 3].map(|()| Vec::with_capacity(attend.spans.len()));
    let flash = tch.host_kernels();
    for (first, all) in runs(attend.spans).into_iter().filter(|_| width > 0) {
        // LibTorch's fused kernel holds no weights.
        let each = attend.heads.saturating_mul(first.len).saturating_mul(first.len);
        let share = if flash { all } else { (WEIGHTS_HELD / each.max(1)).clamp(1, all) };
        for done in (0..all).step_by(share) {
            let sequences = share.min(all - done);
            let span = Span { start: first.start + done * first.len, len: sequences * first.len };
            let shape = [sequences, first.len, attend.heads, head_dim];
            let [q, k, v, dy] = [q, k, v, dy].map(|x| queries(x, span.start, shape));
            let (q, k, v, dy) = (q?, k?, v?, dy?);
            let found = if flash { fused(&q, &k, &v, &dy) } else { composed(tch, &q, &k, &v, &dy) };
            let found = found.map_err(torch(OP))?;
            for (pieces, found) in pieces.iter_mut().zip(found) {
                pieces.push((span, rows_of(&found, [span.len, width])?));
            }
        }
    }
    let [dq, dk, dv] = pieces.map(|pieces| assemble(tch, pieces, [rows, width]));
    Ok([dq?, dk?, dv?])
}

/// By the kernels that LibTorch's own attention on the CPU is made of, forward again and backward.
fn fused(q: &tch::Tensor, k: &tch::Tensor, v: &tch::Tensor, dy: &tch::Tensor) -> Tried<[tch::Tensor; 3]> {
    let none = Option::<&tch::Tensor>::None;
    let (out, log_sums) =
        tch::Tensor::f_internal_scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, true, none, None)?;
    let (dq, dk, dv) = tch::Tensor::f_internal_scaled_dot_product_flash_attention_for_cpu_backward(
        dy, q, k, v, &out, &log_sums, 0.0, true, none, None,
    )?;
    Ok([dq, dk, dv])
}

/// By products of matrices `[sequences, heads, rows, head_dim]`.
fn composed(
    tch: &Tch,
    q: &tch::Tensor,
    k: &tch::Tensor,
    v: &tch::Tensor,
    dy: &tch::Tensor,
) -> Tried<[tch::Tensor; 3]> {
    let size = q.size();
    let (rows, head_dim) = (size.get(2).copied().unwrap_or(0), size.get(3).copied().unwrap_or(1));
    let scale = (head_dim as f64).sqrt().recip();
    let mut weights = q.f_matmul(&k.f_transpose(2, 3)?)?;
    let _ = weights.f_mul_scalar_(scale)?;
    let hidden = tch::Tensor::f_ones([rows, rows], (Kind::Bool, tch.device()))?.f_triu(1)?;
    let _ = weights.f_masked_fill_(&hidden, f64::NEG_INFINITY)?;
    let _ = weights.f_internal_softmax_out(&weights, -1, false)?;
    let dv = weights.f_transpose(2, 3)?.f_matmul(dy)?;
    let mut scores = dy.f_matmul(&v.f_transpose(2, 3)?)?;
    // weights · (d - Σ weights · d): d is finite, and weights are zero where nothing is seen.
    let mean = weights.f_mul(&scores)?.f_sum_dim_intlist(&[-1i64][..], true, Kind::Float)?;
    let _ = scores.f_sub_(&mean)?;
    let _ = scores.f_mul_(&weights)?;
    let _ = scores.f_mul_scalar_(scale)?;
    Ok([scores.f_matmul(k)?, scores.f_transpose(2, 3)?.f_matmul(q)?, dv])
}
