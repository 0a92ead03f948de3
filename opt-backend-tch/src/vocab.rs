//! What is done with logits, on the device: only what is asked for comes back.

use crate::{
    Table, Tch,
    error::{Tried, torch},
    tensor::{Tensor, upload},
};
use opt_backend::{Result, TargetScore, TopK, check, ndarray::ArrayView1, oracle};
use tch::Kind;

/// Logits that [`log_probs`] holds at a time.
const LOGITS_HELD: usize = 8 << 20;

/// See [`opt_backend::Backend::top_k`].
pub(crate) fn top_k(tch: &Tch, logits: &Tensor, k: usize) -> Result<Vec<TopK>> {
    const OP: &str = "top_k";
    let [rows, width] = logits.shape();
    let k = k.min(width);
    if rows == 0 || width == 0 {
        let empty = || oracle::top_k(ArrayView1::from(&[]), 0);
        return Ok((0..rows).map(|_| empty()).collect());
    }
    let x = logits.matrix_as(OP, Kind::Float)?;
    let log_sum_exp = x.f_logsumexp([1], true).map_err(torch(OP))?;
    // Rounded logits are often equal, others hardly ever: for those the ids among equals are settled at once.
    if k > 1 && logits.kind() != Kind::Float {
        return exactly(tch, &x, &log_sum_exp, [rows, width], k);
    }
    // One more than asked for shows whether there are equals on both sides of the end.
    let kept = (k + usize::from(k > 1)).min(width);
    let best = match k {
        0 => None,
        // Of equals this gives the first.
        1 => Some(x.f_max_dim(1, true).map_err(torch(OP))?),
        _ => Some(x.f_topk(kept as i64, 1, true, true).map_err(torch(OP))?),
    };
    let Some((values, ids)) = best else {
        let found = read(OP, tch, &[log_sum_exp.f_view_dtype(Kind::Int).map_err(torch(OP))?], [rows, 1])?;
        return Ok(found
            .iter()
            .map(|bits| TopK { ids: vec![], logits: vec![], log_sum_exp: float(*bits) })
            .collect());
    };
    let found = read_found(tch, &values, &ids, &log_sum_exp, [rows, kept])?;
    let unsettled = |top: &TopK| {
        let at_the_end = top.logits.len() > k && top.logits.get(k - 1) == top.logits.get(k);
        at_the_end || top.logits.iter().any(|logit| logit.is_nan())
    };
    if found.iter().any(unsettled) {
        return exactly(tch, &x, &log_sum_exp, [rows, width], k);
    }
    Ok(found.into_iter().map(|top| sorted(top, k)).collect())
}

/// The first `k` in the order of the trait: largest first, the lower id first among equals.
fn sorted(top: TopK, k: usize) -> TopK {
    let mut pairs: Vec<(f32, u32)> = top.logits.iter().copied().zip(top.ids.iter().copied()).collect();
    // Sorting is stable and values come sorted: only equals change places.
    pairs.sort_by(|a, b| b.0.partial_cmp(&a.0).unwrap_or(std::cmp::Ordering::Equal).then(a.1.cmp(&b.1)));
    pairs.truncate(k);
    let (logits, ids) = pairs.into_iter().unzip();
    TopK { ids, logits, log_sum_exp: top.log_sum_exp }
}

/// The `k` largest of f32 logits by a key of (logit, id) that no two share. NaN counts as -∞.
fn exactly(
    tch: &Tch,
    x: &tch::Tensor,
    log_sum_exp: &tch::Tensor,
    [rows, width]: [usize; 2],
    k: usize,
) -> Result<Vec<TopK>> {
    const OP: &str = "top_k";
    let search = || -> Tried<(tch::Tensor, tch::Tensor)> {
        // Adding 0 makes -0 of 0. The bits of a float, below zero with all but the sign flipped, are in its order.
        let numbers =
            x.f_nan_to_num(f64::NEG_INFINITY, f64::INFINITY, f64::NEG_INFINITY)?.f_add_scalar(0.0)?;
        let bits = numbers.f_view_dtype(Kind::Int)?;
        let flip = bits.f_bitwise_right_shift_tensor_scalar(31)?.f_bitwise_and(0x7fff_ffff)?;
        let order = bits.f_bitwise_xor_tensor(&flip)?.f_totype(Kind::Int64)?;
        let last = i64::from(u32::MAX);
        let id = tch::Tensor::f_arange(width as i64, (Kind::Int64, tch.device()))?;
        let key = order.f_mul_scalar(last + 1)?.f_sub(&id)?.f_add_scalar(last)?;
        let (keys, _) = key.f_topk(k as i64, 1, true, true)?;
        let ids = keys.f_bitwise_and(last)?.f_bitwise_xor(last)?;
        Ok((x.f_gather(1, &ids, false)?, ids))
    };
    let (values, ids) = search().map_err(torch(OP))?;
    read_found(tch, &values, &ids, log_sum_exp, [rows, k])
}

/// Values `[rows, k]`, ids `[rows, k]` and `[rows, 1]`, in one transfer.
fn read_found(
    tch: &Tch,
    values: &tch::Tensor,
    ids: &tch::Tensor,
    log_sum_exp: &tch::Tensor,
    [rows, k]: [usize; 2],
) -> Result<Vec<TopK>> {
    const OP: &str = "top_k";
    let parts = || -> Tried<_> {
        Ok([values.f_view_dtype(Kind::Int)?, ids.f_totype(Kind::Int)?, log_sum_exp.f_view_dtype(Kind::Int)?])
    };
    let found = read(OP, tch, &parts().map_err(torch(OP))?, [rows, 2 * k + 1])?;
    let tops = found.chunks_exact(2 * k + 1).map(|row| {
        let (logits, rest) = row.split_at(k);
        let (ids, log_sum_exp) = rest.split_at(k);
        TopK {
            ids: ids.iter().map(|id| id.cast_unsigned()).collect(),
            logits: logits.iter().map(|bits| float(*bits)).collect(),
            log_sum_exp: log_sum_exp.first().map_or(f32::NAN, |bits| float(*bits)),
        }
    });
    Ok(tops.collect())
}

fn float(bits: i32) -> f32 {
    f32::from_bits(bits.cast_unsigned())
}

/// Columns of 32-bit elements side by side, copied to the host.
fn read(op: &'static str, tch: &Tch, parts: &[tch::Tensor], [rows, width]: [usize; 2]) -> Result<Vec<i32>> {
    tch.counters.read(rows * width * size_of::<i32>());
    let mut bits = vec![0; rows * width];
    let whole = tch::Tensor::f_cat(parts, 1).map_err(torch(op))?;
    whole.f_copy_data(&mut bits, rows * width).map_err(torch(op))?;
    Ok(bits)
}

/// See [`opt_backend::Backend::log_probs`].
pub(crate) fn log_probs(tch: &Tch, x: &Tensor, head: &Table, targets: &[u32]) -> Result<Vec<TargetScore>> {
    const OP: &str = "log_probs";
    let [rows, width] = x.shape();
    let [entries, expected] = head.shape;
    check::width(OP, width, expected)?;
    check::ids(OP, targets, entries)?;
    check::targets(OP, targets, rows)?;
    if rows == 0 {
        return Ok(Vec::new());
    }
    let share = (LOGITS_HELD / entries.max(1)).max(1);
    let mut parts = Vec::new();
    let mut start = 0;
    for targets in targets.chunks(share) {
        let targets: Vec<i64> = targets.iter().map(|target| i64::from(*target)).collect();
        let part = x.rows(start, targets.len());
        start += targets.len();
        let (logits, _) = head.logits(OP, tch, &part)?;
        let targets = upload(OP, ArrayView1::from(&targets), tch.device())?;
        let score = || {
            let logits = logits.f_to_dtype(Kind::Float, false, false)?;
            let targets = targets.f_unsqueeze(1)?;
            let log_prob = logits.f_gather(1, &targets, false)?.f_sub(&logits.f_logsumexp([1], true)?)?;
            // The first of the largest, as in `top_k`.
            let (_, best) = logits.f_max_dim(1, true)?;
            let greedy = best.f_eq_tensor(&targets)?.f_totype(Kind::Int)?;
            tch::Tensor::f_cat(&[log_prob.f_view_dtype(Kind::Int)?, greedy], 1)
        };
        parts.push(score().map_err(torch(OP))?);
    }
    let whole = tch::Tensor::f_cat(&parts, 0).map_err(torch(OP))?;
    let found = read(OP, tch, &[whole], [rows, 2])?;
    Ok(found
        .chunks_exact(2)
        .map(|row| TargetScore { log_prob: float(row[0]), greedy: row[1] != 0 })
        .collect())
}
