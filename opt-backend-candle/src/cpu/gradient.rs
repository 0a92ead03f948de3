//! What training needs beside attention's gradient, on the memory of candle's tensors: mostly the loops of
//! [`opt_kernels::gradient`], cut for all threads. Results that are owned are changed in place.

use super::{Kernels, simd};
use crate::{
    error::convert,
    host::{self, change, numbers},
    weights::{Kept, Norm, foreign},
};
use candle_core::{DType, Tensor};
use opt_backend::{
    Activation, AdamW, Dropout, Layout, Result, Sgd, Smoothing,
    moments::{BLOCK, PACKED},
};
use opt_kernels::gradient;
use pulp::Arch;

/// Elements of a weight that are widened at a time: 4 MiB.
const WIDENED: usize = 1 << 20;
/// Exponentials that are added in f32.
const CHUNK: usize = 1024;

impl Kernels {
    /// Calls `body` with parts of `x` and the index of each part's first element; parts end where rows do.
    fn in_parts(
        &self,
        op: &'static str,
        x: &Tensor,
        width: usize,
        each: usize,
        body: impl Fn(usize, &mut [f32]) + Send + Sync,
    ) -> Result<()> {
        change::<f32, _>(op, x, |x| {
            let work = each.saturating_mul(x.len());
            let share = self.pool.share(x.len().div_ceil(width.max(1)), work) * width.max(1);
            let parts = x.chunks_mut(share).enumerate().collect();
            self.pool.each(work, parts, |(i, part): (usize, &mut [f32])| body(i * share, part));
        })
    }

    /// Calls `body` with each element of `x` and the one of `y`.
    fn with_other(
        &self,
        op: &'static str,
        x: &Tensor,
        y: &Tensor,
        each: usize,
        body: impl Fn(&mut f32, f32) + Send + Sync,
    ) -> Result<()> {
        let (storage, layout) = y.storage_and_layout();
        let y = numbers::<f32>(op, &storage, layout)?;
        self.in_parts(op, x, 1, each, |first, x| {
            x.iter_mut().zip(&y[first..]).for_each(|(x, y)| body(x, *y));
        })
    }

    /// Calls `body` with each element of `x` and the one of `row` in its column.
    pub(crate) fn with_row(
        &self,
        op: &'static str,
        x: &Tensor,
        row: &Tensor,
        body: impl Fn(&mut f32, f32) + Send + Sync,
    ) -> Result<()> {
        let (storage, layout) = row.storage_and_layout();
        let row = numbers::<f32>(op, &storage, layout)?;
        self.in_parts(op, x, row.len(), 1, |_, x| {
            for x in x.chunks_mut(row.len().max(1)) {
                x.iter_mut().zip(row).for_each(|(x, r)| body(x, *r));
            }
        })
    }

    pub(crate) fn mul(&self, op: &'static str, x: &Tensor, y: &Tensor) -> Result<()> {
        self.with_other(op, x, y, 1, |x, y| *x *= y)
    }

    pub(crate) fn scale(&self, op: &'static str, x: &Tensor, factor: f32) -> Result<()> {
        self.in_parts(op, x, 1, 1, |_, x| x.iter_mut().for_each(|x| *x *= factor))
    }

    pub(crate) fn activate(&self, op: &'static str, x: &Tensor, activation: Activation) -> Result<()> {
        self.in_parts(op, x, 1, 10, |_, x| simd::activate(self.arch, activation, x))
    }

    /// `dy` times the slope at `x`.
    pub(crate) fn activate_grad(
        &self,
        op: &'static str,
        dy: &Tensor,
        x: &Tensor,
        activation: Activation,
    ) -> Result<()> {
        match activation {
            Activation::Linear => Ok(()),
            Activation::Relu => self.with_other(op, dy, x, 1, |d, x| *d = if x > 0.0 { *d } else { 0.0 }),
            // Some dozens of multiplications' worth in double precision.
            _ => self.with_other(op, dy, x, 50, |d, x| {
                *d = (activation.slope(f64::from(x)) * f64::from(*d)) as f32;
            }),
        }
    }

    pub(crate) fn dropout(&self, op: &'static str, x: &Tensor, dropout: Dropout) -> Result<()> {
        self.in_parts(op, x, 1, 8, |first, x| gradient::dropout(x, first, dropout))
    }

    /// A product of some rows, columns and depth by candle's matmul, on our threads.
    fn matmul(&self, op: &'static str, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        self.pool.install(|| a.matmul(b)).map_err(|error| convert(op, error))
    }

    /// What is added to `into`, if there is one, in its place.
    fn added(&self, op: &'static str, into: Option<Tensor>, y: Tensor) -> Result<Tensor> {
        let Some(into) = into else { return Ok(y) };
        self.with_other(op, &into, &y, 1, |x, y| *x += y)?;
        Ok(into)
    }

    /// `into` or zeros.
    fn nothing(&self, op: &'static str, into: Option<Tensor>, shape: [usize; 2]) -> Result<Tensor> {
        match into {
            Some(into) => Ok(into),
            None => host::tensor(op, host::zeros::<f32>(op, host::count(op, shape)?)?, &shape),
        }
    }

    pub(crate) fn product(
        &self,
        op: &'static str,
        a: &Tensor,
        b: &Tensor,
        layout: Layout,
        shape: [usize; 2],
        into: Option<Tensor>,
    ) -> Result<Tensor> {
        if a.elem_count() == 0 || b.elem_count() == 0 {
            return self.nothing(op, into, shape);
        }
        let turned = |m: &Tensor| {
            // Libraries that candle may be built with take some strides only.
            m.t().and_then(|m| if self.library { m.contiguous() } else { Ok(m) }).map_err(|e| convert(op, e))
        };
        let y = match layout {
            Layout::Times => self.matmul(op, a, b),
            Layout::TimesTransposed => self.matmul(op, a, &turned(b)?),
            Layout::TransposedTimes => self.matmul(op, &turned(a)?, b),
        };
        self.added(op, into, y?)
    }

    /// `dy W + into`.
    pub(crate) fn through(
        &self,
        op: &'static str,
        dy: &Tensor,
        weight: &Kept,
        into: Option<Tensor>,
    ) -> Result<Tensor> {
        let [outputs, inputs] = weight.shape();
        let rows = dy.dims().first().copied().unwrap_or(0);
        if rows == 0 || outputs == 0 || inputs == 0 {
            return self.nothing(op, into, [rows, inputs]);
        }
        if let Kept::Dense(weight) = weight
            && weight.data.dtype() == DType::F32
        {
            return self.added(op, into, self.matmul(op, dy, &weight.data)?);
        }
        let share = (WIDENED / inputs).clamp(1, outputs);
        let mut sum = into;
        for start in (0..outputs).step_by(share) {
            let count = share.min(outputs - start);
            let block = match weight {
                Kept::Dense(weight) => weight
                    .data
                    .narrow(0, start, count)
                    .and_then(|block| block.to_dtype(DType::F32))
                    .map_err(|error| convert(op, error))?,
                Kept::Host(weight) => {
                    let mut block = host::zeros(op, count * inputs)?;
                    let ids: Vec<u32> = (start..start + count).map(|row| row as u32).collect();
                    self.host.gather(op, weight, &ids, &mut block)?;
                    host::tensor(op, block, &[count, inputs])?
                }
                Kept::Tiles(_) => return Err(foreign(op)),
            };
            let columns = dy.narrow(1, start, count).and_then(|columns| columns.contiguous());
            let part = self.matmul(op, &columns.map_err(|error| convert(op, error))?, &block)?;
            sum = Some(self.added(op, sum, part)?);
        }
        self.nothing(op, sum, [rows, inputs])
    }

    pub(crate) fn layer_norm_grad(
        &self,
        op: &'static str,
        x: &Tensor,
        norm: &Norm,
        dy: &Tensor,
    ) -> Result<Tensor> {
        let locks = [x, dy, &norm.scale].map(Tensor::storage_and_layout);
        let [x, dy, scale] = locks.each_ref().map(|(storage, layout)| numbers::<f32>(op, storage, layout));
        let (x, dy, scale, width) = (x?, dy?, scale?, norm.width);
        let mut dx = host::zeros(op, x.len())?;
        let work = 20 * x.len();
        let rows = x.len() / width.max(1);
        let share = self.pool.share(rows, work) * width.max(1);
        let parts = x.chunks(share).zip(dy.chunks(share)).zip(dx.chunks_mut(share)).collect();
        self.pool.each(work, parts, |((x, dy), dx): ((&[f32], &[f32]), &mut [f32])| {
            gradient::layer_norm(x, Some(scale), norm.eps, dy, dx, width);
        });
        let shape = [rows, width];
        host::tensor(op, dx, &shape)
    }

    pub(crate) fn layer_norm_grad_params(
        &self,
        op: &'static str,
        x: &Tensor,
        norm: &Norm,
        dy: &Tensor,
    ) -> Result<[Tensor; 2]> {
        let locks = [x, dy].map(Tensor::storage_and_layout);
        let [x, dy] = locks.each_ref().map(|(storage, layout)| numbers::<f32>(op, storage, layout));
        let (x, dy, width) = (x?, dy?, norm.width);
        let work = 20 * x.len();
        let share = self.pool.share(x.len() / width.max(1), work) * width.max(1);
        let mut sums = vec![[vec![0.0; width], vec![0.0; width]]; x.len().div_ceil(share)];
        let parts = x.chunks(share).zip(dy.chunks(share)).zip(&mut sums).collect();
        type Part<'a> = ((&'a [f32], &'a [f32]), &'a mut [Vec<f64>; 2]);
        self.pool.each(work, parts, |((x, dy), [weight, bias]): Part<'_>| {
            gradient::layer_norm_params(x, norm.eps, dy, [weight, bias]);
        });
        let total = |which: usize| {
            let column = |i: usize| sums.iter().map(|part| part[which][i]).sum::<f64>() as f32;
            host::tensor(op, (0..width).map(column).collect(), &[1, width])
        };
        Ok([total(0)?, total(1)?])
    }

    /// The loss; the gradient is in the place of the logits `[_, entries]`.
    pub(crate) fn cross_entropy(
        &self,
        logits: &Tensor,
        entries: usize,
        targets: &[u32],
        smoothing: Smoothing,
    ) -> Result<Tensor> {
        let op = "cross_entropy";
        let mut losses = vec![0.0; targets.len()];
        change::<f32, _>(op, logits, |logits| {
            let work = 20 * logits.len();
            let rows = logits.chunks_exact_mut(entries.max(1)).zip(targets).zip(&mut losses).collect();
            self.pool.each(work, rows, |((row, &target), loss): ((&mut [f32], &u32), &mut f64)| {
                *loss = row_cross_entropy(self.arch, row, target as usize, smoothing);
            });
        })?;
        let loss = losses.iter().sum::<f64>() * f64::from(smoothing.scale);
        host::tensor(op, vec![loss as f32], &[1, 1])
    }

    /// The loss; the gradient is in the place of the student's logits `[_, entries]`.
    pub(crate) fn soft_targets(
        &self,
        student: &Tensor,
        teacher: &Tensor,
        entries: usize,
        temperature: f32,
        scale: f32,
    ) -> Result<Tensor> {
        let op = "soft_targets";
        let (storage, layout) = teacher.storage_and_layout();
        let teacher = numbers::<f32>(op, &storage, layout)?;
        let entries = entries.max(1);
        let mut losses = vec![0.0; teacher.len() / entries];
        change::<f32, _>(op, student, |student| {
            let work = 40 * student.len();
            let rows = student.chunks_exact_mut(entries).zip(teacher.chunks_exact(entries));
            let rows = rows.zip(&mut losses).collect();
            self.pool.each(work, rows, |((student, teacher), loss): ((&mut [f32], &[f32]), &mut f64)| {
                *loss = row_soft_targets(self.arch, student, teacher, temperature, scale);
            });
        })?;
        let t = f64::from(temperature);
        let loss = losses.iter().sum::<f64>() * t * t * f64::from(scale);
        host::tensor(op, vec![loss as f32], &[1, 1])
    }

    /// Adds the rows of `dy` to `into`, `[_, width]`, which have been checked.
    pub(crate) fn scatter_add(&self, into: &Tensor, width: usize, rows: &[usize], dy: &Tensor) -> Result<()> {
        let op = "scatter_add";
        let (storage, layout) = dy.storage_and_layout();
        let dy = numbers::<f32>(op, &storage, layout)?;
        change::<f32, _>(op, into, |into| {
            for (row, dy) in rows.iter().zip(dy.chunks_exact(width.max(1))) {
                into[row * width..(row + 1) * width].iter_mut().zip(dy).for_each(|(x, d)| *x += d);
            }
        })
    }

    pub(crate) fn concat(&self, parts: &[&Tensor], shape: [usize; 2]) -> Result<Tensor> {
        let op = "concat";
        let mut out = host::reserve(op, host::count(op, shape)?)?;
        for part in parts {
            let (storage, layout) = part.storage_and_layout();
            out.extend_from_slice(numbers::<f32>(op, &storage, layout)?);
        }
        host::tensor(op, out, &shape)
    }

    pub(crate) fn sum_rows(&self, x: &Tensor, width: usize) -> Result<Tensor> {
        let op = "sum_rows";
        let (storage, layout) = x.storage_and_layout();
        let x = numbers::<f32>(op, &storage, layout)?;
        let share = self.pool.share(x.len() / width.max(1), x.len()) * width.max(1);
        let mut sums = vec![vec![0.0_f64; width]; x.len().div_ceil(share)];
        let parts = x.chunks(share).zip(&mut sums).collect();
        self.pool.each(x.len(), parts, |(x, sums): (&[f32], &mut Vec<f64>)| {
            for row in x.chunks_exact(width.max(1)) {
                sums.iter_mut().zip(row).for_each(|(sum, v)| *sum += f64::from(*v));
            }
        });
        let column = |i: usize| sums.iter().map(|part| part[i]).sum::<f64>() as f32;
        host::tensor(op, (0..width).map(column).collect(), &[1, width])
    }

    pub(crate) fn sum_squares(&self, parts: &[&Tensor]) -> Result<Tensor> {
        let op = "sum_squares";
        let mut sum = 0.0;
        for part in parts {
            let (storage, layout) = part.storage_and_layout();
            let x = numbers::<f32>(op, &storage, layout)?;
            let share = self.pool.share(x.len(), x.len());
            let mut sums = vec![0.0; x.len().div_ceil(share)];
            let tasks = x.chunks(share).zip(&mut sums).collect();
            self.pool.each(x.len(), tasks, |(x, sum): (&[f32], &mut f64)| *sum = gradient::sum_squares(x));
            sum += sums.iter().sum::<f64>();
        }
        host::tensor(op, vec![sum as f32], &[1, 1])
    }

    /// A tensor of one number.
    pub(crate) fn number(&self, op: &'static str, x: &Tensor) -> Result<f32> {
        let (storage, layout) = x.storage_and_layout();
        Ok(numbers::<f32>(op, &storage, layout)?.first().copied().unwrap_or(0.0))
    }

    pub(crate) fn adamw(&self, [p, m, v]: [&Tensor; 3], g: &Tensor, adam: AdamW, factor: f32) -> Result<()> {
        let op = "adamw";
        let (storage, layout) = g.storage_and_layout();
        let g = numbers::<f32>(op, &storage, layout)?;
        let update = |p: &mut [f32], m: &mut [f32], v: &mut [f32]| {
            let work = 10 * g.len();
            let share = self.pool.share(g.len(), work);
            let moments = m.chunks_mut(share).zip(v.chunks_mut(share));
            let parts = p.chunks_mut(share).zip(g.chunks(share)).zip(moments).collect();
            type Part<'a> = ((&'a mut [f32], &'a [f32]), (&'a mut [f32], &'a mut [f32]));
            self.pool.each(work, parts, |((p, g), (m, v)): Part<'_>| {
                gradient::adamw(p, g, [m, v], adam, factor);
            });
        };
        change::<f32, _>(op, p, |p| {
            change::<f32, _>(op, m, |m| change::<f32, _>(op, v, |v| update(p, m, v)))
        })??
    }

    /// `moments` are the codes of both and the scales.
    pub(crate) fn adamw8(
        &self,
        p: &Tensor,
        g: &Tensor,
        [first, second, scales]: [&Tensor; 3],
        adam: AdamW,
        factor: f32,
    ) -> Result<()> {
        let op = "adamw8";
        let (storage, layout) = g.storage_and_layout();
        let g = numbers::<f32>(op, &storage, layout)?;
        let update = |p: &mut [f32], first: &mut [f32], second: &mut [f32], scales: &mut [f32]| {
            let work = 60 * g.len();
            let share = self.pool.share(g.len().div_ceil(BLOCK), work);
            let elements = p.chunks_mut(share * BLOCK).zip(g.chunks(share * BLOCK));
            let codes = first.chunks_mut(share * PACKED).zip(second.chunks_mut(share * PACKED));
            let parts = elements.zip(codes.zip(scales.chunks_mut(share * 2))).collect();
            type Part<'a> = ((&'a mut [f32], &'a [f32]), ((&'a mut [f32], &'a mut [f32]), &'a mut [f32]));
            self.pool.each(work, parts, |((p, g), ((first, second), scales)): Part<'_>| {
                gradient::adamw8(p, g, [first, second, scales], adam, factor);
            });
        };
        change::<f32, _>(op, p, |p| {
            change::<f32, _>(op, first, |first| {
                change::<f32, _>(op, second, |second| {
                    change::<f32, _>(op, scales, |scales| update(p, first, second, scales))
                })
            })
        })???
    }

    pub(crate) fn sgd(
        &self,
        p: &Tensor,
        g: &Tensor,
        v: Option<&Tensor>,
        sgd: Sgd,
        factor: f32,
    ) -> Result<()> {
        let op = "sgd";
        let (storage, layout) = g.storage_and_layout();
        let g = numbers::<f32>(op, &storage, layout)?;
        let Some(v) = v else {
            return self.in_parts(op, p, 1, 4, |first, p| gradient::sgd(p, &g[first..], None, sgd, factor));
        };
        change::<f32, _>(op, v, |v| {
            change::<f32, _>(op, p, |p| {
                let work = 6 * g.len();
                let share = self.pool.share(g.len(), work);
                let parts = p.chunks_mut(share).zip(g.chunks(share)).zip(v.chunks_mut(share)).collect();
                self.pool.each(work, parts, |((p, g), v): ((&mut [f32], &[f32]), &mut [f32])| {
                    gradient::sgd(p, g, Some(v), sgd, factor);
                });
            })
        })?
    }
}

/// eˣ⁻ᵐᵃˣ in place; the largest, and the sum of the results.
fn exponentials(arch: Arch, row: &mut [f32]) -> (f32, f64) {
    arch.dispatch(|| {
        let max = simd::largest(row);
        let mut sum = 0.0;
        for chunk in row.chunks_mut(CHUNK) {
            sum += f64::from(simd::exp_minus(chunk, max));
        }
        (max, sum)
    })
}

/// The loss of one row, without scale; its gradient takes the place of the logits.
fn row_cross_entropy(arch: Arch, row: &mut [f32], target: usize, smoothing: Smoothing) -> f64 {
    let (scale, epsilon) = (f64::from(smoothing.scale), f64::from(smoothing.epsilon));
    let entries = row.len() as f64;
    let of_target = f64::from(row[target]);
    let mean = if epsilon > 0.0 { row.iter().map(|&v| f64::from(v)).sum::<f64>() / entries } else { 0.0 };
    let (max, sum) = exponentials(arch, row);
    let total = f64::from(max) + sum.ln();
    let (factor, each) = ((scale / sum) as f32, (scale * epsilon / entries) as f32);
    row.iter_mut().for_each(|v| *v = *v * factor - each);
    row[target] -= (scale * (1.0 - epsilon)) as f32;
    (1.0 - epsilon) * (total - of_target) + epsilon * (total - mean)
}

/// The loss of one row, without scale and temperature's square; its gradient takes the place of the student's logits.
fn row_soft_targets(arch: Arch, student: &mut [f32], teacher: &[f32], temperature: f32, scale: f32) -> f64 {
    let mut p: Vec<f32> = teacher.iter().map(|v| v / temperature).collect();
    student.iter_mut().for_each(|v| *v /= temperature);
    let apart: Vec<f64> = p.iter().zip(&*student).map(|(t, s)| f64::from(*t) - f64::from(*s)).collect();
    let (p_max, p_sum) = exponentials(arch, &mut p);
    let (s_max, s_sum) = exponentials(arch, student);
    let totals = (f64::from(p_max) + p_sum.ln()) - (f64::from(s_max) + s_sum.ln());
    // Σ p (log p - log s) = Σ p (t - s) - (totals' difference), since Σ p is 1.
    let mixed: f64 = p.iter().zip(&apart).map(|(p, apart)| f64::from(*p) * apart).sum();
    let (of_s, of_p) = ((1.0 / s_sum) as f32, (1.0 / p_sum) as f32);
    let factor = scale * temperature;
    student.iter_mut().zip(&p).for_each(|(s, p)| *s = factor * (*s * of_s - p * of_p));
    mixed / p_sum - totals
}
