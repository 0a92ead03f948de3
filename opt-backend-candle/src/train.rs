//! [`Train`] for [`Candle`]: arguments are checked here, once; the two ways of computing rely on it.
//!
//! On the CPU what is owned or handed in by `&mut` is changed in place. Elsewhere a new tensor takes its place.

mod eight_bits;
mod plain;

use crate::{
    Candle, Linear, Norm, Table, Tensor, Way,
    error::convert,
    host,
    weights::{Kept, Weight},
};
use opt_backend::{
    Activation, AdamW, Attend, Backend, Clip, DType, Dropout, Error, ErrorKind, Layout, Moments8, Result,
    Sgd, Smoothing, Train, check, oracle,
};

pub(crate) use eight_bits::Maps;

impl Candle {
    /// A copy in a format, in memory of its own.
    fn copied(&self, op: &'static str, x: &Tensor, dtype: candle_core::DType) -> Result<candle_core::Tensor> {
        let copy = match &self.way {
            _ if dtype != candle_core::DType::F32 => x.data.to_dtype(dtype),
            Way::Cpu(_) => x.data.copy(),
            // What a tensor holds never changes there.
            Way::Plain(_) => Ok(x.data.clone()),
        };
        copy.map_err(|error| convert(op, error))
    }

    /// `[1, width]` as a vector, rounded to `dtype`, in f32 and in memory of its own.
    fn vector(&self, op: &'static str, x: &Tensor, dtype: candle_core::DType) -> Result<candle_core::Tensor> {
        let wide = |x: candle_core::Tensor| x.to_dtype(candle_core::DType::F32)?.reshape(x.elem_count());
        wide(self.copied(op, x, dtype)?).map_err(|error| convert(op, error))
    }

    fn clip_shape(clip: Option<&Clip<'_, Tensor>>) -> Result<()> {
        clip.map_or(Ok(()), |clip| check::same_shape("clip", clip.sum_squares.shape, [1, 1]))
    }
}

/// What gradients are multiplied by on the CPU.
fn factor(kernels: &crate::cpu::Kernels, clip: Option<Clip<'_, Tensor>>) -> Result<f32> {
    let Some(clip) = clip else { return Ok(1.0) };
    let sum = kernels.number("clip", &clip.sum_squares.data)?;
    Ok(oracle::gradient::clip_factor(sum, clip.max_norm))
}

impl Train for Candle {
    fn linear_of(&self, weight: &Tensor, bias: Option<&Tensor>, dtype: DType) -> Result<Linear> {
        let op = "linear_of";
        if let Some(bias) = bias {
            check::same_shape(op, bias.shape, [1, weight.shape[0]])?;
        }
        let dtype = host::dtype(op, dtype)?;
        let bias = bias.map(|bias| self.vector(op, bias, dtype)).transpose()?;
        let data = self.copied(op, weight, dtype)?;
        Ok(Linear { weight: Kept::Dense(Weight { data, shape: weight.shape }), bias })
    }

    fn norm_of(&self, weight: &Tensor, bias: &Tensor, eps: f32) -> Result<Norm> {
        let op = "norm_of";
        let width = weight.shape[1];
        for vector in [weight, bias] {
            check::same_shape(op, vector.shape, [1, width])?;
        }
        let [weight, bias] = [weight, bias].map(|x| self.vector(op, x, candle_core::DType::F32));
        Ok(Norm::of(width, weight?, bias?, eps))
    }

    fn zeros(&self, shape: [usize; 2]) -> Result<Tensor> {
        let zeros = candle_core::Tensor::zeros(&shape[..], candle_core::DType::F32, &self.device);
        Self::tensor("zeros", shape, zeros)
    }

    fn copy(&self, x: &Tensor) -> Result<Tensor> {
        Ok(Tensor { data: self.copied("copy", x, candle_core::DType::F32)?, shape: x.shape })
    }

    /// On the CPU operands stay f32.
    fn matmul(
        &self,
        a: &Tensor,
        b: &Tensor,
        layout: Layout,
        dtype: DType,
        into: Option<Tensor>,
    ) -> Result<Tensor> {
        let op = "matmul";
        let shape = layout.shape(a.shape, b.shape)?;
        if let Some(into) = &into {
            check::same_shape(op, into.shape, shape)?;
        }
        let dtype = host::dtype(op, dtype)?;
        match &self.way {
            Way::Cpu(kernels) => {
                let into = into.map(|into| into.data);
                Ok(Tensor { data: kernels.product(op, &a.data, &b.data, layout, shape, into)?, shape })
            }
            Way::Plain(plain) => {
                let into = into.as_ref().map(|into| &into.data);
                Self::tensor(op, shape, plain.matmul(&a.data, &b.data, layout, dtype, shape, into))
            }
        }
    }

    fn linear_grad(&self, dy: &Tensor, linear: &Linear, into: Option<Tensor>) -> Result<Tensor> {
        let op = "linear_grad";
        let [outputs, inputs] = linear.weight.shape();
        check::width(op, dy.shape[1], outputs)?;
        let shape = [dy.shape[0], inputs];
        if let Some(into) = &into {
            check::same_shape(op, into.shape, shape)?;
        }
        match &self.way {
            Way::Cpu(kernels) => {
                let into = into.map(|into| into.data);
                Ok(Tensor { data: kernels.through(op, &dy.data, &linear.weight, into)?, shape })
            }
            Way::Plain(plain) => {
                let into = into.as_ref().map(|into| &into.data);
                Self::tensor(op, shape, plain.through(&dy.data, &linear.weight, into))
            }
        }
    }

    fn logits_grad(&self, dy: &Tensor, head: &Table) -> Result<Tensor> {
        let op = "logits_grad";
        let [entries, width] = head.0.shape();
        check::width(op, dy.shape[1], entries)?;
        let shape = [dy.shape[0], width];
        match &self.way {
            Way::Cpu(kernels) => Ok(Tensor { data: kernels.through(op, &dy.data, &head.0, None)?, shape }),
            Way::Plain(plain) => Self::tensor(op, shape, plain.through(&dy.data, &head.0, None)),
        }
    }

    fn layer_norm_grad(&self, x: &Tensor, norm: &Norm, dy: &Tensor) -> Result<Tensor> {
        let op = "layer_norm_grad";
        check::same_shape(op, dy.shape, x.shape)?;
        check::width(op, x.shape[1], norm.width)?;
        match &self.way {
            Way::Cpu(kernels) => {
                Ok(Tensor { data: kernels.layer_norm_grad(op, &x.data, norm, &dy.data)?, shape: x.shape })
            }
            Way::Plain(plain) => Self::tensor(op, x.shape, plain.layer_norm_grad(&x.data, norm, &dy.data)),
        }
    }

    fn layer_norm_grad_params(&self, x: &Tensor, norm: &Norm, dy: &Tensor) -> Result<[Tensor; 2]> {
        let op = "layer_norm_grad";
        check::same_shape(op, dy.shape, x.shape)?;
        check::width(op, x.shape[1], norm.width)?;
        let both = match &self.way {
            Way::Cpu(kernels) => kernels.layer_norm_grad_params(op, &x.data, norm, &dy.data)?,
            Way::Plain(plain) => {
                let both = plain.layer_norm_grad_params(&x.data, norm, &dy.data);
                both.map_err(|error| convert(op, error))?
            }
        };
        Ok(both.map(|data| Tensor { data, shape: [1, norm.width] }))
    }

    fn attend_grad(&self, [q, k, v]: [&Tensor; 3], dy: &Tensor, attend: Attend<'_>) -> Result<[Tensor; 3]> {
        let op = "attend_grad";
        let shape = q.shape;
        check::spans(op, attend, shape)?;
        for other in [k, v, dy] {
            check::same_shape(op, other.shape, shape)?;
        }
        let all = [&q.data, &k.data, &v.data, &dy.data];
        let gradients = match &self.way {
            Way::Cpu(kernels) => kernels.attend_grad(all, shape, attend)?,
            Way::Plain(plain) => plain.attend_grad(all, shape, attend).map_err(|error| convert(op, error))?,
        };
        Ok(gradients.map(|data| Tensor { data, shape }))
    }

    fn activate(&self, x: Tensor, activation: Activation) -> Result<Tensor> {
        match &self.way {
            Way::Cpu(kernels) => {
                kernels.activate("activate", &x.data, activation)?;
                Ok(x)
            }
            Way::Plain(plain) => Ok(Tensor { data: plain.activate(x.data, activation)?, shape: x.shape }),
        }
    }

    fn activate_grad(&self, x: &Tensor, dy: Tensor, activation: Activation) -> Result<Tensor> {
        let op = "activate_grad";
        check::same_shape(op, dy.shape, x.shape)?;
        match &self.way {
            Way::Cpu(kernels) => {
                kernels.activate_grad(op, &dy.data, &x.data, activation)?;
                Ok(dy)
            }
            Way::Plain(plain) => {
                let gradient = plain.activate_grad(&x.data, &dy.data, activation);
                let data = gradient.map_err(|error| convert(op, error))?.ok_or_else(|| {
                    let message = format_args!("this device has no activation {activation}");
                    Error::new(ErrorKind::Unsupported, op, message)
                })?;
                Ok(Tensor { data, shape: x.shape })
            }
        }
    }

    fn cross_entropy(&self, logits: Tensor, targets: &[u32], smoothing: Smoothing) -> Result<[Tensor; 2]> {
        let op = "cross_entropy";
        let [rows, entries] = logits.shape;
        check::ids(op, targets, entries)?;
        check::targets(op, targets, rows)?;
        match &self.way {
            Way::Cpu(kernels) => {
                let data = kernels.cross_entropy(&logits.data, entries, targets, smoothing)?;
                Ok([Tensor { data, shape: [1, 1] }, logits])
            }
            Way::Plain(plain) => {
                let both = plain.cross_entropy(&logits.data, logits.shape, targets, smoothing);
                let [loss, gradient] = both.map_err(|error| convert(op, error))?;
                Ok([Tensor { data: loss, shape: [1, 1] }, Tensor { data: gradient, shape: logits.shape }])
            }
        }
    }

    fn soft_targets(
        &self,
        student: Tensor,
        teacher: &Tensor,
        temperature: f32,
        scale: f32,
    ) -> Result<[Tensor; 2]> {
        let op = "soft_targets";
        let shape = student.shape;
        check::same_shape(op, teacher.shape, shape)?;
        match &self.way {
            Way::Cpu(kernels) => {
                let (of, t) = (&student.data, temperature);
                let data = kernels.soft_targets(of, &teacher.data, shape[1], t, scale)?;
                Ok([Tensor { data, shape: [1, 1] }, student])
            }
            Way::Plain(plain) => {
                let both = plain.soft_targets(&student.data, &teacher.data, temperature, scale);
                let [loss, gradient] = both.map_err(|error| convert(op, error))?;
                Ok([Tensor { data: loss, shape: [1, 1] }, Tensor { data: gradient, shape }])
            }
        }
    }

    fn scatter_add(&self, into: Tensor, rows: &[usize], dy: &Tensor) -> Result<Tensor> {
        let op = "scatter_add";
        let [entries, width] = into.shape;
        check::rows(op, rows, entries)?;
        check::same_shape(op, dy.shape, [rows.len(), width])?;
        match &self.way {
            Way::Cpu(kernels) => {
                kernels.scatter_add(&into.data, width, rows, &dy.data)?;
                Ok(into)
            }
            Way::Plain(plain) => Self::tensor(op, into.shape, plain.scatter_add(&into.data, rows, &dy.data)),
        }
    }

    fn concat(&self, parts: &[&Tensor]) -> Result<Tensor> {
        let op = "concat";
        let width = parts.first().map_or(0, |part| part.shape[1]);
        for part in parts {
            check::width(op, part.shape[1], width)?;
        }
        let shape = [parts.iter().map(|part| part.shape[0]).sum(), width];
        let parts: Vec<&candle_core::Tensor> = parts.iter().map(|part| &part.data).collect();
        match &self.way {
            Way::Cpu(kernels) => Ok(Tensor { data: kernels.concat(&parts, shape)?, shape }),
            Way::Plain(plain) => Self::tensor(op, shape, plain.concat(&parts, shape)),
        }
    }

    fn sum_rows(&self, x: &Tensor) -> Result<Tensor> {
        let width = x.shape[1];
        match &self.way {
            Way::Cpu(kernels) => Ok(Tensor { data: kernels.sum_rows(&x.data, width)?, shape: [1, width] }),
            Way::Plain(plain) => Self::tensor("sum_rows", [1, width], plain.sum_rows(&x.data, width)),
        }
    }

    fn add_row(&self, x: Tensor, row: &Tensor) -> Result<Tensor> {
        let op = "add_row";
        check::same_shape(op, row.shape, [1, x.shape[1]])?;
        match &self.way {
            _ if x.shape.contains(&0) => Ok(x),
            Way::Cpu(kernels) => {
                kernels.with_row(op, &x.data, &row.data, |x, r| *x += r)?;
                Ok(x)
            }
            Way::Plain(_) => Self::tensor(op, x.shape, x.data.broadcast_add(&row.data)),
        }
    }

    fn mul_row(&self, x: Tensor, row: &Tensor) -> Result<Tensor> {
        let op = "mul_row";
        check::same_shape(op, row.shape, [1, x.shape[1]])?;
        match &self.way {
            _ if x.shape.contains(&0) => Ok(x),
            Way::Cpu(kernels) => {
                kernels.with_row(op, &x.data, &row.data, |x, r| *x *= r)?;
                Ok(x)
            }
            Way::Plain(_) => Self::tensor(op, x.shape, x.data.broadcast_mul(&row.data)),
        }
    }

    fn mul(&self, x: Tensor, y: &Tensor) -> Result<Tensor> {
        let op = "mul";
        check::same_shape(op, y.shape, x.shape)?;
        match &self.way {
            Way::Cpu(kernels) => {
                kernels.mul(op, &x.data, &y.data)?;
                Ok(x)
            }
            Way::Plain(_) => Self::tensor(op, x.shape, &x.data * &y.data),
        }
    }

    fn scale(&self, x: Tensor, factor: f32) -> Result<Tensor> {
        let op = "scale";
        match &self.way {
            Way::Cpu(kernels) => {
                kernels.scale(op, &x.data, factor)?;
                Ok(x)
            }
            Way::Plain(_) => Self::tensor(op, x.shape, &x.data * f64::from(factor)),
        }
    }

    fn dropout(&self, x: Tensor, dropout: Dropout) -> Result<Tensor> {
        let op = "dropout";
        match &self.way {
            Way::Cpu(kernels) => {
                kernels.dropout(op, &x.data, dropout)?;
                Ok(x)
            }
            Way::Plain(plain) => {
                self.counters().upload(size_of::<f32>() * x.shape[0] * x.shape[1]);
                Self::tensor(op, x.shape, plain.dropout(&x.data, x.shape, dropout))
            }
        }
    }

    fn sum_squares(&self, parts: &[&Tensor]) -> Result<Tensor> {
        let parts: Vec<&candle_core::Tensor> = parts.iter().map(|part| &part.data).collect();
        match &self.way {
            Way::Cpu(kernels) => Ok(Tensor { data: kernels.sum_squares(&parts)?, shape: [1, 1] }),
            Way::Plain(plain) => Self::tensor("sum_squares", [1, 1], plain.sum_squares(&parts)),
        }
    }

    fn adamw(
        &self,
        param: &mut Tensor,
        gradient: &Tensor,
        moments: &mut [Tensor; 2],
        adam: AdamW,
        clip: Option<Clip<'_, Tensor>>,
    ) -> Result<()> {
        let op = "adamw";
        for other in [gradient, &moments[0], &moments[1]] {
            check::same_shape(op, other.shape, param.shape)?;
        }
        Self::clip_shape(clip.as_ref())?;
        let [m, v] = moments;
        let all = [&param.data, &m.data, &v.data];
        match &self.way {
            Way::Cpu(kernels) => kernels.adamw(all, &gradient.data, adam, factor(kernels, clip)?),
            Way::Plain(plain) => {
                let updated = || {
                    let factor =
                        clip.map(|c| plain.clip_factor(&c.sum_squares.data, c.max_norm)).transpose()?;
                    plain.adamw(all, &gradient.data, adam, factor.as_ref())
                };
                [param.data, m.data, v.data] = updated().map_err(|error| convert(op, error))?;
                Ok(())
            }
        }
    }

    fn adamw8(
        &self,
        param: &mut Tensor,
        gradient: &Tensor,
        moments: &mut Moments8<Tensor>,
        adam: AdamW,
        clip: Option<Clip<'_, Tensor>>,
    ) -> Result<()> {
        let op = "adamw8";
        check::same_shape(op, gradient.shape, param.shape)?;
        check::moments8(op, moments.parts().map(|part| part.shape), param.shape)?;
        Self::clip_shape(clip.as_ref())?;
        let held = moments.parts().map(|part| &part.data);
        match &self.way {
            Way::Cpu(kernels) => {
                kernels.adamw8(&param.data, &gradient.data, held, adam, factor(kernels, clip)?)
            }
            Way::Plain(plain) => {
                let [first, second, scales] = held;
                let held = Moments8 { first, second, scales };
                let updated = || {
                    let factor =
                        clip.map(|c| plain.clip_factor(&c.sum_squares.data, c.max_norm)).transpose()?;
                    plain.adamw8(&param.data, &gradient.data, held, adam, factor.as_ref())
                };
                let (p, updated) = updated().map_err(|error| convert(op, error))?;
                [moments.first.data, moments.second.data, moments.scales.data] =
                    [updated.first, updated.second, updated.scales];
                param.data = p;
                Ok(())
            }
        }
    }

    fn sgd(
        &self,
        param: &mut Tensor,
        gradient: &Tensor,
        velocity: Option<&mut Tensor>,
        sgd: Sgd,
        clip: Option<Clip<'_, Tensor>>,
    ) -> Result<()> {
        let op = "sgd";
        check::same_shape(op, gradient.shape, param.shape)?;
        if let Some(velocity) = &velocity {
            check::same_shape(op, velocity.shape, param.shape)?;
        }
        Self::clip_shape(clip.as_ref())?;
        let held = velocity.as_ref().map(|velocity| &velocity.data);
        match &self.way {
            Way::Cpu(kernels) => kernels.sgd(&param.data, &gradient.data, held, sgd, factor(kernels, clip)?),
            Way::Plain(plain) => {
                let updated = || {
                    let factor =
                        clip.map(|c| plain.clip_factor(&c.sum_squares.data, c.max_norm)).transpose()?;
                    plain.sgd(&param.data, &gradient.data, held, sgd, factor.as_ref())
                };
                let (p, v) = updated().map_err(|error| convert(op, error))?;
                if let (Some(velocity), Some(v)) = (velocity, v) {
                    velocity.data = v;
                }
                param.data = p;
                Ok(())
            }
        }
    }
}
