//! Losses, and their gradients in the place of the logits.

use crate::{
    Tch,
    error::{Tried, torch},
    tensor::Tensor,
};
use opt_backend::{Result, Smoothing, check};
use tch::Kind;

/// Logits of the teacher that are held in f32 at a time, twice.
const LOGITS_HELD: usize = 8 << 20;

/// See [`opt_backend::Train::cross_entropy`].
pub(crate) fn cross_entropy(
    tch: &Tch,
    logits: Tensor,
    targets: &[u32],
    smoothing: Smoothing,
) -> Result<[Tensor; 2]> {
    const OP: &str = "cross_entropy";
    let [rows, entries] = logits.shape();
    check::ids(OP, targets, entries)?;
    check::targets(OP, targets, rows)?;
    let mut x = logits.into_own(OP)?;
    let (scale, epsilon) = (f64::from(smoothing.scale), f64::from(smoothing.epsilon));
    if rows == 0 {
        return result(OP, tch, None, x, [rows, entries]);
    }
    let targets = tch.indices(OP, targets.iter().map(|target| i64::from(*target)))?;
    let mut compute = || -> Tried<tch::Tensor> {
        let targets = targets.f_unsqueeze(1)?;
        let _ = x.f_internal_log_softmax_out(&x, 1, false)?;
        let mut loss = x.f_gather(1, &targets, false)?.f_sum(Kind::Float)?;
        let _ = loss.f_mul_scalar_(scale * (epsilon - 1.0))?;
        let each = scale * epsilon / entries as f64;
        if epsilon > 0.0 {
            let _ = loss.f_sub_(&x.f_sum(Kind::Float)?.f_mul_scalar(each)?)?;
        }
        let _ = x.f_exp_()?;
        let _ = x.f_mul_scalar_(scale)?;
        if epsilon > 0.0 {
            let _ = x.f_add_scalar_(-each)?;
        }
        let wanted = scale * (epsilon - 1.0);
        let wanted = tch::Tensor::f_full([rows as i64, 1], wanted, (Kind::Float, tch.device()))?;
        let _ = x.f_scatter_add_(1, &targets, &wanted)?;
        Ok(loss)
    };
    let loss = compute().map_err(torch(OP))?;
    result(OP, tch, Some(loss), x, [rows, entries])
}

/// See [`opt_backend::Train::soft_targets`].
pub(crate) fn soft_targets(
    tch: &Tch,
    student: Tensor,
    teacher: &Tensor,
    temperature: f32,
    scale: f32,
) -> Result<[Tensor; 2]> {
    const OP: &str = "soft_targets";
    let [rows, entries] = student.shape();
    check::same_shape(OP, teacher.shape(), [rows, entries])?;
    let x = student.into_own(OP)?;
    let (t, scale) = (f64::from(temperature), f64::from(scale));
    if rows == 0 || entries == 0 {
        return result(OP, tch, None, x, [rows, entries]);
    }
    let teacher = teacher.matrix(OP)?;
    let share = (LOGITS_HELD / entries).max(1);
    let part = |start: usize| -> Tried<tch::Tensor> {
        let (start, count) = (start as i64, share.min(rows - start) as i64);
        let mut s = x.f_narrow(0, start, count)?;
        let mut difference = teacher.f_narrow(0, start, count)?.f_to_dtype(Kind::Float, false, true)?;
        for cooled in [&mut s, &mut difference] {
            let _ = cooled.f_div_scalar_(t)?;
            let _ = cooled.f_internal_log_softmax_out(cooled, 1, false)?;
        }
        let p = difference.f_exp()?;
        let _ = difference.f_sub_(&s)?;
        let _ = difference.f_mul_(&p)?;
        let _ = s.f_exp_()?;
        let _ = s.f_sub_(&p)?;
        let _ = s.f_mul_scalar_(scale * t)?;
        difference.f_sum(Kind::Float)
    };
    let losses: Tried<Vec<_>> = (0..rows).step_by(share).map(part).collect();
    let loss = losses
        .and_then(|losses| tch::Tensor::f_stack(&losses, 0)?.f_sum(Kind::Float)?.f_mul_scalar(t * t * scale));
    result(OP, tch, Some(loss.map_err(torch(OP))?), x, [rows, entries])
}

/// The loss, 0 if there is none, as `[1, 1]`, and the gradient.
fn result(
    op: &'static str,
    tch: &Tch,
    loss: Option<tch::Tensor>,
    gradient: tch::Tensor,
    shape: [usize; 2],
) -> Result<[Tensor; 2]> {
    let loss = match loss {
        Some(loss) => loss.f_reshape([1, 1]),
        None => tch::Tensor::f_zeros([1, 1], (Kind::Float, tch.device())),
    };
    let loss = Tensor::new(loss.map_err(torch(op))?, Kind::Float, [1, 1]);
    Ok([loss, Tensor::new(gradient, Kind::Float, shape)])
}
