//! Every op as candle's own: how devices other than the CPU compute.
//!
//! Activations are f32. Functions here return candle's results, and their callers know the op's name. What a tensor
//! holds is never changed once it is handed out: candle's views share storage.

use crate::{
    cache::Cache,
    error::convert,
    train::Maps,
    weights::{Kept, Linear, Norm, foreign},
};
use candle_core::{DType, Device, Result as CandleResult, Tensor};
use opt_backend::{Activation, Attend, Error, ErrorKind, Result, Span};
use std::{
    ops::Range,
    sync::{Mutex, OnceLock},
};

/// Rows of a long prompt that attend at a time: scores are `[heads, rows, positions]`.
const ROWS: usize = 256;

/// A device on which candle computes.
#[derive(Debug)]
pub(crate) struct Plain {
    pub(crate) device: Device,
    /// n, n - 1, ..., 1 for the last n asked for: [`Plain::best`] needs it at each step.
    countdown: Mutex<Option<Tensor>>,
    /// What [`Plain::adamw8`] looks up, once it has.
    pub(crate) maps: OnceLock<Maps>,
}

/// The best entry of each row of logits, on the host. A row without a finite largest number has none.
pub(crate) struct Best {
    /// (id, logit)
    pub(crate) entry: Option<(u32, f32)>,
    /// log Σ exp(logit - largest)
    pub(crate) log_sum: f32,
    /// Target's logit - largest, if there are targets.
    pub(crate) target: f32,
}

impl Plain {
    pub(crate) fn new(device: &Device) -> Self {
        Self { device: device.clone(), countdown: Mutex::new(None), maps: OnceLock::new() }
    }

    pub(crate) fn zeros(&self, shape: [usize; 2]) -> CandleResult<Tensor> {
        Tensor::zeros(&shape, DType::F32, &self.device)
    }

    /// Indices on the device.
    pub(crate) fn indices(&self, ids: impl Iterator<Item = u32>) -> CandleResult<Tensor> {
        let ids: Vec<u32> = ids.collect();
        let len = ids.len();
        Tensor::from_vec(ids, len, &self.device)
    }

    pub(crate) fn gather(&self, table: &Kept, ids: &[u32]) -> CandleResult<Tensor> {
        let shape = [ids.len(), table.shape()[1]];
        if shape.contains(&0) {
            return self.zeros(shape);
        }
        let ids = self.indices(ids.iter().copied())?;
        match table {
            Kept::Dense(table) => table.data.index_select(&ids, 0)?.to_dtype(DType::F32),
            Kept::Tiles(tiles) => tiles.gather(&ids),
            Kept::Host(_) => Err(candle_core::Error::wrap(foreign("gather"))),
        }
    }

    pub(crate) fn take_rows(&self, x: &Tensor, width: usize, rows: &[usize]) -> CandleResult<Tensor> {
        if rows.is_empty() || width == 0 {
            return self.zeros([rows.len(), width]);
        }
        x.index_select(&self.indices(rows.iter().map(|&row| row as u32))?, 0)
    }

    /// candle's kernels take the variance as E[x²] - E[x]², which cancels in rows far from zero; so rows are centred
    /// before, which changes nothing else.
    pub(crate) fn layer_norm(&self, x: &Tensor, norm: &Norm) -> CandleResult<Tensor> {
        if x.elem_count() == 0 {
            return self.zeros(x.dims2()?.into());
        }
        let centred = x.broadcast_sub(&x.mean_keepdim(1)?)?;
        candle_nn::ops::layer_norm(&centred, &norm.scale, &norm.shift, norm.eps)
    }

    /// `x Wᵀ` in the weight's format, which is f32 where it is quantized.
    pub(crate) fn product(&self, x: &Tensor, weight: &Kept) -> CandleResult<Tensor> {
        let [outputs, depth] = weight.shape();
        let rows = x.dim(0)?;
        if rows * outputs * depth == 0 {
            return self.zeros([rows, outputs]);
        }
        match weight {
            Kept::Dense(weight) => {
                x.to_dtype(weight.data.dtype())?.matmul(&weight.data.t()?)?.to_dtype(DType::F32)
            }
            Kept::Tiles(tiles) => tiles.product(x),
            Kept::Host(_) => Err(candle_core::Error::wrap(foreign("linear"))),
        }
    }

    pub(crate) fn linear(&self, x: &Tensor, linear: &Linear) -> CandleResult<Tensor> {
        let y = self.product(x, &linear.weight)?;
        match &linear.bias {
            Some(bias) if y.elem_count() > 0 => y.broadcast_add(bias),
            _ => Ok(y),
        }
    }

    pub(crate) fn activate(&self, x: Tensor, activation: Activation) -> Result<Tensor> {
        if x.elem_count() == 0 {
            return Ok(x);
        }
        let y = match activation {
            Activation::Relu => x.relu(),
            Activation::Gelu => x.gelu_erf(),
            Activation::GeluTanh => x.gelu(),
            Activation::Gelu10 => x.gelu_erf().and_then(|y| y.clamp(-10.0, 10.0)),
            Activation::QuickGelu => {
                (&x * 1.702).and_then(|y| candle_nn::ops::sigmoid(&y)).and_then(|y| &x * y)
            }
            Activation::Silu => x.silu(),
            Activation::Sigmoid => candle_nn::ops::sigmoid(&x),
            Activation::Tanh => x.tanh(),
            Activation::Relu6 => x.clamp(0.0, 6.0),
            Activation::Relu2 => x.relu().and_then(|y| y.sqr()),
            Activation::LeakyRelu => x.maximum(&(&x * 0.01).map_err(|e| convert("linear", e))?),
            Activation::Mish => mish(&x),
            Activation::Laplace => {
                // Mean and deviation are defined with six digits, not as 1/√2.
                #[allow(clippy::approx_constant)]
                const MEAN: f64 = 0.707107;
                let width = 0.282095 * std::f64::consts::SQRT_2;
                let z = x.affine(width.recip(), -MEAN / width);
                z.and_then(|z| z.erf()).and_then(|e| e.affine(0.5, 0.5))
            }
            Activation::Linear => Ok(x),
            other => {
                let message = format_args!("this device has no activation {other}");
                return Err(Error::new(ErrorKind::Unsupported, "linear", message));
            }
        };
        y.map_err(|error| convert("linear", error))
    }

    /// Appends rows of `keys` and `values`.
    pub(crate) fn append(
        &self,
        op: &'static str,
        cache: &mut Cache,
        layer: usize,
        [keys, values]: [&Tensor; 2],
        rows: Range<usize>,
    ) -> Result<()> {
        let (heads, dim) = (cache.spec.heads, cache.spec.head_dim);
        cache.append(op, &self.device, layer, rows.len(), |room, at| {
            for (stored, new) in [(&room.keys, keys), (&room.values, values)] {
                let by_head = by_head(new, rows.start..rows.end, heads, dim);
                by_head.and_then(|new| stored.write(&new, at)).map_err(|error| convert(op, error))?;
            }
            Ok(())
        })
    }

    /// Attention of spans over their caches, which hold the new rows already, or within themselves.
    pub(crate) fn attend(
        &self,
        [q, k, v]: [&Tensor; 3],
        [rows, width]: [usize; 2],
        attend: Attend<'_>,
        caches: Option<&[&mut Cache]>,
    ) -> CandleResult<Tensor> {
        let (heads, dim) = (attend.heads, width / attend.heads);
        if let ([span], true) = (attend.spans, width > 0)
            && *span == (Span { start: 0, len: rows })
            && rows > 0
        {
            let [keys, values] = keys_values([k, v], attend, 0, caches, dim)?;
            return self.attend_span(q, *span, &keys, &values, heads, dim);
        }
        let out = self.zeros([rows, width])?;
        for (i, span) in attend.spans.iter().enumerate().filter(|(_, span)| span.len > 0 && width > 0) {
            let [keys, values] = keys_values([k, v], attend, i, caches, dim)?;
            let mixed = self.attend_span(q, *span, &keys, &values, heads, dim)?;
            out.slice_set(&mixed, 0, span.start)?;
        }
        Ok(out)
    }

    /// One span over `keys` and `values` `[heads, len, head_dim]`, of which its own are the last.
    fn attend_span(
        &self,
        q: &Tensor,
        span: Span,
        keys: &Tensor,
        values: &Tensor,
        heads: usize,
        dim: usize,
    ) -> CandleResult<Tensor> {
        let before = keys.dim(1)? - span.len;
        let scale = (dim as f64).sqrt().recip();
        let mut parts = Vec::new();
        for first in (0..span.len).step_by(ROWS) {
            let count = ROWS.min(span.len - first);
            let start = span.start + first;
            let queries = (by_head(q, start..start + count, heads, dim)? * scale)?;
            let seen = before + first + count;
            let mut scores = queries.matmul(&keys.narrow(1, 0, seen)?.t()?)?;
            if count > 1 {
                scores = self.masked(scores, before + first)?;
            }
            let weights = candle_nn::ops::softmax_last_dim(&scores)?;
            let mixed = weights.matmul(&values.narrow(1, 0, seen)?)?;
            parts.push(mixed.transpose(0, 1)?.reshape((count, heads * dim))?);
        }
        // Parts of a long prompt; a decode step has one, and then this copies nothing.
        Tensor::cat(&parts, 0)
    }

    /// Scores `[heads, rows, positions]` with -∞ where row i does not see: past `before + i`.
    pub(crate) fn masked(&self, scores: Tensor, before: usize) -> CandleResult<Tensor> {
        let (_, rows, seen) = scores.dims3()?;
        let last = Tensor::arange(before as u32, (before + rows) as u32, &self.device)?.reshape((rows, 1))?;
        let position = Tensor::arange(0, seen as u32, &self.device)?.reshape((1, seen))?;
        let visible = position.broadcast_le(&last)?;
        let hidden = Tensor::new(f32::NEG_INFINITY, &self.device)?;
        visible.broadcast_as(scores.shape())?.where_cond(&scores, &hidden.broadcast_as(scores.shape())?)
    }

    /// The best entry of each row of `logits` `[rows, entries]` and, if there are targets, their logits: a few
    /// numbers a row are read, not the row.
    pub(crate) fn best(
        &self,
        logits: &Tensor,
        [rows, entries]: [usize; 2],
        targets: Option<&[u32]>,
    ) -> CandleResult<Vec<Best>> {
        if rows == 0 || entries == 0 {
            return Ok((0..rows).map(|_| Best { entry: None, log_sum: 0.0, target: 0.0 }).collect());
        }
        let max = logits.max_keepdim(1)?;
        let shifted = logits.broadcast_sub(&max)?;
        let log_sum = shifted.exp()?.sum_keepdim(1)?.log()?;
        // candle's argmax names any of equals; this names the first: of those that equal the largest, the one from
        // which most entries follow. (f32 counts to 2²⁴ without a gap.)
        let follows = logits.broadcast_eq(&max)?.to_dtype(DType::F32)?;
        let follows = follows.broadcast_mul(&self.countdown(entries)?)?.max_keepdim(1)?;
        let mut columns = vec![max, follows, log_sum];
        if let Some(targets) = targets {
            let targets = self.indices(targets.iter().copied())?.reshape((rows, 1))?;
            columns.push(shifted.gather(&targets, 1)?);
        }
        let host = Tensor::cat(&columns, 1)?.to_vec2::<f32>()?;
        let best = |row: &Vec<f32>| {
            let [logit, follows, log_sum] = [0, 1, 2].map(|i| row.get(i).copied().unwrap_or(f32::NAN));
            let found = logit.is_finite() && log_sum.is_finite() && follows >= 1.0;
            let entry = found.then(|| ((entries - follows as usize) as u32, logit));
            Best { entry, log_sum, target: row.get(3).copied().unwrap_or(0.0) }
        };
        Ok(host.iter().map(best).collect())
    }

    /// n, n - 1, ..., 1 on the device.
    fn countdown(&self, n: usize) -> CandleResult<Tensor> {
        let mut held = self.countdown.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        match &*held {
            Some(held) if held.dim(1)? == n => Ok(held.clone()),
            _ => {
                let numbers: Vec<f32> = (1..=n).rev().map(|i| i as f32).collect();
                let made = Tensor::from_vec(numbers, (1, n), &self.device)?;
                *held = Some(made.clone());
                Ok(made)
            }
        }
    }
}

/// Rows of `x` `[_, heads * dim]` as `[heads, rows, dim]`, contiguous.
pub(crate) fn by_head(x: &Tensor, rows: Range<usize>, heads: usize, dim: usize) -> CandleResult<Tensor> {
    let part = x.narrow(0, rows.start, rows.len())?;
    part.reshape((rows.len(), heads, dim))?.transpose(0, 1)?.contiguous()
}

/// What span `i` attends to: of each `[heads, len, dim]`.
fn keys_values(
    [k, v]: [&Tensor; 2],
    attend: Attend<'_>,
    i: usize,
    caches: Option<&[&mut Cache]>,
    dim: usize,
) -> CandleResult<[Tensor; 2]> {
    let held = caches.and_then(|caches| caches.get(i)).and_then(|cache| cache.layers.get(attend.layer));
    match held.and_then(|layer| layer.held()) {
        Some((room, len)) => Ok([room.keys.wide(len)?, room.values.wide(len)?]),
        None => {
            let rows = attend.spans.get(i).map_or(0..0, |span| span.rows());
            Ok([by_head(k, rows.clone(), attend.heads, dim)?, by_head(v, rows, attend.heads, dim)?])
        }
    }
}

/// x tanh(ln(1 + eˣ)).
fn mish(x: &Tensor) -> CandleResult<Tensor> {
    x * mish_factor(x)?
}

/// tanh(ln(1 + eˣ)) = n / (n + 2) with n = eˣ (eˣ + 2); beyond 20 it is 1.
pub(crate) fn mish_factor(x: &Tensor) -> CandleResult<Tensor> {
    let e = x.minimum(20.0)?.exp()?;
    let n = (&e * (&e + 2.0)?)?;
    &n / (&n + 2.0)?
}
