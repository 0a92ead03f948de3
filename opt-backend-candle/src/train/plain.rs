//! What training needs, as candle's own ops: how devices other than the CPU compute.
//!
//! As in [`crate::plain`] nothing that a tensor holds is changed once it is handed out.

use crate::{
    plain::{Plain, by_head, mish_factor},
    weights::{Kept, Norm, foreign},
};
use candle_core::{D, DType, Result as CandleResult, Tensor};
use candle_nn::ops::{log_softmax, sigmoid, softmax_last_dim};
use opt_backend::{Activation, AdamW, Attend, Dropout, Layout, Sgd, Smoothing};
use std::f64::consts;

/// Rows of a span that attend at a time: weights are `[heads, rows, positions]`.
const ATTENTION_ROWS: usize = 256;

impl Plain {
    /// `x + y` if there is an `x`.
    fn added(&self, into: Option<&Tensor>, y: Tensor) -> CandleResult<Tensor> {
        match into {
            Some(into) if y.elem_count() > 0 => into + y,
            Some(into) => Ok(into.clone()),
            None => Ok(y),
        }
    }

    pub(crate) fn matmul(
        &self,
        a: &Tensor,
        b: &Tensor,
        layout: Layout,
        dtype: DType,
        shape: [usize; 2],
        into: Option<&Tensor>,
    ) -> CandleResult<Tensor> {
        if a.elem_count() == 0 || b.elem_count() == 0 {
            return match into {
                Some(into) => Ok(into.clone()),
                None => self.zeros(shape),
            };
        }
        let (a, b) = (a.to_dtype(dtype)?, b.to_dtype(dtype)?);
        // candle's products on the CPU sum in f16 what is in f16.
        let (a, b) = match (dtype, a.device()) {
            (candle_core::DType::F16, candle_core::Device::Cpu) => {
                (a.to_dtype(DType::F32)?, b.to_dtype(DType::F32)?)
            }
            _ => (a, b),
        };
        let y = match layout {
            Layout::Times => a.matmul(&b),
            Layout::TimesTransposed => a.matmul(&b.t()?),
            Layout::TransposedTimes => a.t()?.matmul(&b),
        };
        self.added(into, y?.to_dtype(DType::F32)?)
    }

    /// `dy W + into`, in the weight's format, which is f32 where it is quantized.
    pub(crate) fn through(&self, dy: &Tensor, weight: &Kept, into: Option<&Tensor>) -> CandleResult<Tensor> {
        let [outputs, inputs] = weight.shape();
        let rows = dy.dim(0)?;
        if rows * outputs * inputs == 0 {
            return match into {
                Some(into) => Ok(into.clone()),
                None => self.zeros([rows, inputs]),
            };
        }
        let y = match weight {
            Kept::Dense(weight) => {
                dy.to_dtype(weight.data.dtype())?.matmul(&weight.data)?.to_dtype(DType::F32)?
            }
            Kept::Tiles(tiles) => {
                let mut sum = None;
                for (i, block) in tiles.tiles(0..outputs).enumerate() {
                    let block = block?;
                    let columns = dy.narrow(1, i * tiles.tile, block.dim(0)?)?.contiguous()?;
                    sum = Some(self.added(sum.as_ref(), columns.matmul(&block)?)?);
                }
                match sum {
                    Some(sum) => sum,
                    None => self.zeros([rows, inputs])?,
                }
            }
            Kept::Host(_) => return Err(candle_core::Error::wrap(foreign("linear_grad"))),
        };
        self.added(into, y)
    }

    /// Rows of mean 0 and variance 1, and what each was multiplied by.
    fn normalised(&self, x: &Tensor, norm: &Norm) -> CandleResult<[Tensor; 2]> {
        let centred = x.broadcast_sub(&x.mean_keepdim(1)?)?;
        let variance = centred.sqr()?.mean_keepdim(1)?;
        let scale = (variance + f64::from(norm.eps))?.sqrt()?.recip()?;
        Ok([centred.broadcast_mul(&scale)?, scale])
    }

    pub(crate) fn layer_norm_grad(&self, x: &Tensor, norm: &Norm, dy: &Tensor) -> CandleResult<Tensor> {
        if x.elem_count() == 0 {
            return self.zeros(x.dims2()?.into());
        }
        let [normal, scale] = self.normalised(x, norm)?;
        let inner = dy.broadcast_mul(&norm.scale)?;
        let product = (&inner * &normal)?.mean_keepdim(1)?;
        let inner = inner.broadcast_sub(&inner.mean_keepdim(1)?)?;
        (inner - normal.broadcast_mul(&product)?)?.broadcast_mul(&scale)
    }

    pub(crate) fn layer_norm_grad_params(
        &self,
        x: &Tensor,
        norm: &Norm,
        dy: &Tensor,
    ) -> CandleResult<[Tensor; 2]> {
        if x.elem_count() == 0 {
            let zeros = || self.zeros([1, norm.width]);
            return Ok([zeros()?, zeros()?]);
        }
        let [normal, _] = self.normalised(x, norm)?;
        Ok([(normal * dy)?.sum_keepdim(0)?, dy.sum_keepdim(0)?])
    }

    pub(crate) fn attend_grad(
        &self,
        [q, k, v, dy]: [&Tensor; 4],
        [rows, width]: [usize; 2],
        attend: Attend<'_>,
    ) -> CandleResult<[Tensor; 3]> {
        let (heads, dim) = (attend.heads, width / attend.heads);
        let outs = [self.zeros([rows, width])?, self.zeros([rows, width])?, self.zeros([rows, width])?];
        for span in attend.spans.iter().filter(|span| span.len > 0 && width > 0) {
            let of_heads = |x: &Tensor| by_head(x, span.rows(), heads, dim);
            let gradients = self.span_grad(&of_heads(k)?, &of_heads(v)?, |first, count| {
                let rows = span.start + first..span.start + first + count;
                Ok([by_head(q, rows.clone(), heads, dim)?, by_head(dy, rows, heads, dim)?])
            })?;
            for (out, gradient) in outs.iter().zip(gradients) {
                let rows = gradient.transpose(0, 1)?.reshape((span.len, width))?;
                // Made above, and not handed out yet.
                out.slice_set(&rows, 0, span.start)?;
            }
        }
        Ok(outs)
    }

    /// The gradients of one span, `[heads, len, head_dim]` each, some rows at a time.
    fn span_grad(
        &self,
        keys: &Tensor,
        values: &Tensor,
        rows: impl Fn(usize, usize) -> CandleResult<[Tensor; 2]>,
    ) -> CandleResult<[Tensor; 3]> {
        let (_, len, dim) = keys.dims3()?;
        let scale = (dim as f64).sqrt().recip();
        let (mut dq, mut dk, mut dv) = (Vec::new(), keys.zeros_like()?, keys.zeros_like()?);
        for first in (0..len).step_by(ATTENTION_ROWS) {
            let count = ATTENTION_ROWS.min(len - first);
            let [q, dy] = rows(first, count)?;
            // Of rows that do not see a position its weight is 0.
            let scores = (q.matmul(&keys.t()?)? * scale)?;
            let weights = softmax_last_dim(&self.masked(scores, first)?)?;
            let d = dy.matmul(&values.t()?)?;
            let mean = (&weights * &d)?.sum_keepdim(D::Minus1)?;
            let d = ((&weights * d.broadcast_sub(&mean)?)? * scale)?;
            dq.push(d.matmul(keys)?);
            dk = (dk + d.t()?.contiguous()?.matmul(&q)?)?;
            dv = (dv + weights.t()?.contiguous()?.matmul(&dy)?)?;
        }
        Ok([Tensor::cat(&dq, 1)?, dk, dv])
    }

    /// `dy` times the slope at `x`; `None` if the function is not known.
    pub(crate) fn activate_grad(
        &self,
        x: &Tensor,
        dy: &Tensor,
        activation: Activation,
    ) -> CandleResult<Option<Tensor>> {
        if x.elem_count() == 0 || activation == Activation::Linear {
            return Ok(Some(dy.clone()));
        }
        slope(x, activation)?.map(|slope| dy * slope).transpose()
    }

    pub(crate) fn cross_entropy(
        &self,
        logits: &Tensor,
        [rows, entries]: [usize; 2],
        targets: &[u32],
        smoothing: Smoothing,
    ) -> CandleResult<[Tensor; 2]> {
        if rows == 0 {
            return Ok([self.zeros([1, 1])?, logits.clone()]);
        }
        let (scale, epsilon) = (f64::from(smoothing.scale), f64::from(smoothing.epsilon));
        let log_probs = log_softmax(logits, 1)?;
        let targets = self.indices(targets.iter().copied())?.reshape((rows, 1))?;
        let mut loss = (log_probs.gather(&targets, 1)?.sum_all()? * (scale * (epsilon - 1.0)))?;
        let each = scale * epsilon / entries as f64;
        if epsilon > 0.0 {
            loss = (loss - (log_probs.sum_all()? * each)?)?;
        }
        let gradient = log_probs.exp()?.affine(scale, -each)?;
        let wanted = Tensor::full((scale * (epsilon - 1.0)) as f32, (rows, 1), &self.device)?;
        Ok([loss.reshape((1, 1))?, gradient.scatter_add(&targets, &wanted, 1)?])
    }

    pub(crate) fn soft_targets(
        &self,
        student: &Tensor,
        teacher: &Tensor,
        temperature: f32,
        scale: f32,
    ) -> CandleResult<[Tensor; 2]> {
        if student.elem_count() == 0 {
            return Ok([self.zeros([1, 1])?, student.clone()]);
        }
        let (t, scale) = (f64::from(temperature), f64::from(scale));
        let cooled = |logits: &Tensor| log_softmax(&(logits / t)?, 1);
        let (s, log_p) = (cooled(student)?, cooled(teacher)?);
        let p = log_p.exp()?;
        let loss = ((log_p - &s)? * &p)?.sum_all()?;
        Ok([(loss * (t * t * scale))?.reshape((1, 1))?, ((s.exp()? - p)? * (scale * t))?])
    }

    pub(crate) fn scatter_add(&self, into: &Tensor, rows: &[usize], dy: &Tensor) -> CandleResult<Tensor> {
        if dy.elem_count() == 0 {
            return Ok(into.clone());
        }
        into.index_add(&self.indices(rows.iter().map(|row| *row as u32))?, dy, 0)
    }

    pub(crate) fn concat(&self, parts: &[&Tensor], shape: [usize; 2]) -> CandleResult<Tensor> {
        let parts: Vec<&Tensor> = parts.iter().copied().filter(|part| part.elem_count() > 0).collect();
        if parts.is_empty() { self.zeros(shape) } else { Tensor::cat(&parts, 0) }
    }

    pub(crate) fn sum_rows(&self, x: &Tensor, width: usize) -> CandleResult<Tensor> {
        if x.elem_count() == 0 { self.zeros([1, width]) } else { x.sum_keepdim(0) }
    }

    /// candle has no ops on the bits of integers: the mask comes from the host.
    pub(crate) fn dropout(&self, x: &Tensor, shape: [usize; 2], dropout: Dropout) -> CandleResult<Tensor> {
        if x.elem_count() == 0 {
            return Ok(x.clone());
        }
        let scale = dropout.scale();
        let kept = |i: usize| if dropout.keeps(i as u32) { scale } else { 0.0 };
        let mask: Vec<f32> = (0..shape[0] * shape[1]).map(kept).collect();
        x * Tensor::from_vec(mask, &shape, &self.device)?
    }

    pub(crate) fn sum_squares(&self, parts: &[&Tensor]) -> CandleResult<Tensor> {
        let mut sum = self.zeros([1, 1])?;
        for part in parts.iter().filter(|part| part.elem_count() > 0) {
            sum = (sum + part.sqr()?.sum_all()?.reshape((1, 1))?)?;
        }
        Ok(sum)
    }

    /// What gradients are multiplied by, `[1, 1]`.
    pub(crate) fn clip_factor(&self, sum_squares: &Tensor, max_norm: f32) -> CandleResult<Tensor> {
        ((sum_squares.sqrt()? + 1e-6)?.recip()? * f64::from(max_norm))?.minimum(1.0)
    }

    fn clipped(&self, g: &Tensor, factor: Option<&Tensor>) -> CandleResult<Tensor> {
        match factor {
            Some(factor) => g.broadcast_mul(factor),
            None => Ok(g.clone()),
        }
    }

    /// Parameters and both moments after the step.
    pub(crate) fn adamw(
        &self,
        [p, m, v]: [&Tensor; 3],
        g: &Tensor,
        adam: AdamW,
        factor: Option<&Tensor>,
    ) -> CandleResult<[Tensor; 3]> {
        if p.elem_count() == 0 {
            return Ok([p.clone(), m.clone(), v.clone()]);
        }
        let number = |v: f32| f64::from(v);
        let (step_size, root) = adam.corrections();
        let g = self.clipped(g, factor)?;
        let m = ((m * number(adam.beta1))? + (&g * number(1.0 - adam.beta1))?)?;
        let v = ((v * number(adam.beta2))? + (g.sqr()? * number(1.0 - adam.beta2))?)?;
        let divisor = v.sqrt()?.affine(number(root).recip(), number(adam.eps))?;
        let step = ((&m / divisor)? * number(step_size))?;
        let p = ((p * number(1.0 - adam.lr * adam.weight_decay))? - step)?;
        Ok([p, m, v])
    }

    /// Parameters and velocity after the step.
    pub(crate) fn sgd(
        &self,
        p: &Tensor,
        g: &Tensor,
        v: Option<&Tensor>,
        sgd: Sgd,
        factor: Option<&Tensor>,
    ) -> CandleResult<(Tensor, Option<Tensor>)> {
        if p.elem_count() == 0 {
            return Ok((p.clone(), v.cloned()));
        }
        let step = (self.clipped(g, factor)? + (p * f64::from(sgd.weight_decay))?)?;
        let v = v.map(|v| (v * f64::from(sgd.momentum))? + &step).transpose()?;
        let step = v.as_ref().unwrap_or(&step);
        Ok(((p - (step * f64::from(sgd.lr))?)?, v))
    }
}

/// The derivative of an activation at each element.
// MEGA rounds its constants: 0.707107 is not 1/√2.
#[allow(clippy::approx_constant)]
fn slope(x: &Tensor, activation: Activation) -> CandleResult<Option<Tensor>> {
    let holds = |mask: Tensor| mask.to_dtype(DType::F32);
    let density = |z: &Tensor| z.sqr()?.affine(-0.5, 0.0)?.exp()? * consts::TAU.sqrt().recip();
    let gelu = || {
        let below = (x * consts::FRAC_1_SQRT_2)?.erf()?.affine(0.5, 0.5)?;
        below + (x * density(x)?)?
    };
    // Of x σ(k x).
    let gated = |k: f64| {
        let z = (x * k)?;
        let gate = sigmoid(&z)?;
        let around = ((z * gate.affine(-1.0, 1.0)?)? + 1.0)?;
        gate * around
    };
    Ok(Some(match activation {
        Activation::Relu => holds(x.gt(0.0_f32)?)?,
        Activation::Gelu => gelu()?,
        Activation::Gelu10 => (gelu()? * holds(x.gelu_erf()?.le(10.0_f32)?)?)?,
        Activation::GeluTanh => {
            let k = (2.0 / consts::PI).sqrt();
            let squares = x.sqr()?;
            let t = (x * squares.affine(0.044715 * k, k)?)?.tanh()?;
            let rise = (t.sqr()?.affine(-1.0, 1.0)? * squares.affine(3.0 * 0.044715 * k, k)?)?;
            ((t.affine(0.5, 0.5))? + ((x * 0.5)? * rise)?)?
        }
        Activation::QuickGelu => gated(1.702)?,
        Activation::Silu => gated(1.0)?,
        Activation::Sigmoid => {
            let gate = sigmoid(x)?;
            (&gate * gate.affine(-1.0, 1.0)?)?
        }
        Activation::Tanh => x.tanh()?.sqr()?.affine(-1.0, 1.0)?,
        Activation::Relu6 => (holds(x.gt(0.0_f32)?)? * holds(x.lt(6.0_f32)?)?)?,
        Activation::Relu2 => (x.relu()? * 2.0)?,
        Activation::LeakyRelu => holds(x.gt(0.0_f32)?)?.affine(0.99, 0.01)?,
        Activation::Mish => {
            let t = mish_factor(x)?;
            let rise = (t.sqr()?.affine(-1.0, 1.0)? * sigmoid(x)?)?;
            (t + (x * rise)?)?
        }
        Activation::Laplace => {
            let width = 0.282095_f64;
            (density(&x.affine(width.recip(), -0.707107 / width)?)? * width.recip())?
        }
        Activation::Linear => x.ones_like()?,
        _ => return Ok(None),
    }))
}
