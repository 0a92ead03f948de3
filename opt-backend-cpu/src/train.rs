//! [`Train`] for [`Cpu`]: arguments are checked here, once; kernels below may rely on them.

use crate::{
    Cpu, Linear, Norm, Table, Tensor,
    backend::ELEMENTS,
    grad::{attention, elements, loss, norm},
};
use opt_backend::{
    Activation, AdamW, Attend, Clip, DType, Dropout, Error, Layout, Moments8, Result, Sgd, Smoothing, Train,
    check,
    moments::{BLOCK, PACKED},
    oracle,
};
use opt_kernels::{
    matmul::{self, Out},
    memory::{Buffer, Shared, out_of_memory},
    pack::Packed,
    simd::math,
    spare::Keep,
};
use std::ops::Range;

/// Columns of a task that adds rows to others.
const COLUMNS: usize = 256;

/// This part of what is at `target`.
///
/// # Safety
/// The range exists, its elements are written, and nobody else accesses them while the slice lives.
unsafe fn part<'a>(target: Shared<f32>, range: &Range<usize>) -> &'a mut [f32] {
    // SAFETY: the caller's promise.
    unsafe { std::slice::from_raw_parts_mut(target.at(range.start), range.len()) }
}

impl Cpu {
    /// Room for a tensor.
    fn room(&self, op: &'static str, [rows, width]: [usize; 2]) -> Result<Buffer> {
        let len = rows.checked_mul(width).ok_or_else(|| out_of_memory(op, usize::MAX))?;
        Buffer::reserve(&self.guards, op, len)
    }

    /// A tensor of one element.
    fn single(&self, op: &'static str, x: f64) -> Result<Tensor> {
        let data = Buffer::holding(&self.guards, op, vec![x as f32])?;
        Ok(Tensor { data, shape: [1, 1] })
    }

    /// Where a product of this shape goes: to new memory, or to `into`, which it is added to.
    ///
    /// # Safety
    /// If `write` succeeds, it has written every element, or added to it.
    unsafe fn accumulated(
        &self,
        op: &'static str,
        shape: [usize; 2],
        into: Option<Tensor>,
        write: impl FnOnce(Out) -> Result<()>,
    ) -> Result<Tensor> {
        let Some(mut into) = into else {
            let write = |target| write(Out { target, add: false });
            // SAFETY: the caller's promise.
            return unsafe { Tensor::written(&self.guards, op, shape, write) };
        };
        check::same_shape(op, into.shape, shape)?;
        write(Out { target: into.data.target(), add: true })?;
        Ok(into)
    }

    /// dy times a packed weight.
    fn times(&self, op: &'static str, dy: &Tensor, weight: &Packed, into: Option<Tensor>) -> Result<Tensor> {
        let ([outputs, inputs], [rows, width]) = (weight.shape(), dy.shape);
        check::width(op, width, outputs)?;
        let order = match weight {
            Packed::Codes(codes) => codes.order().map(|order| (order, codes.places())),
            _ => None,
        };
        let write = |out: Out| {
            let Some((order, places)) = order else {
                // SAFETY: the width is checked, and places are the inputs.
                return unsafe {
                    matmul::multiply_by_transpose(self.machine(), &dy.data, dy.shape, weight, out)
                };
            };
            let multiply = |target| {
                // SAFETY: as above, and the tensor has an element for each place.
                unsafe {
                    let out = Out { target, add: false };
                    matmul::multiply_by_transpose(self.machine(), &dy.data, dy.shape, weight, out)
                }
            };
            // SAFETY: all of it is written.
            let by_place = unsafe { Tensor::written(&self.guards, op, [rows, places], multiply)? };
            self.for_ranges(rows, ELEMENTS / places.max(1), |range| {
                for row in range {
                    let from = &by_place.data[row * places..][..places];
                    for (&input, &x) in order.iter().zip(from) {
                        // Padding is no input.
                        if (input as usize) < inputs {
                            // SAFETY: this element exists, has been written if it is added to, and belongs to this
                            // task alone.
                            unsafe {
                                let to = out.target.at(row * inputs + input as usize);
                                *to = if out.add { *to + x } else { x };
                            }
                        }
                    }
                }
            })
        };
        // SAFETY: every element of a product is written; an order has a place for each input.
        unsafe { self.accumulated(op, [rows, inputs], into, write) }
    }

    /// Calls `body` with parts of `x`, and where they start.
    fn in_place(&self, x: &mut Tensor, body: impl Fn(&Range<usize>, &mut [f32]) + Sync) -> Result<()> {
        let len = x.data.len();
        let target = x.data.target();
        self.for_ranges(len, ELEMENTS, |range| {
            // SAFETY: this range exists and belongs to this task alone.
            body(&range, unsafe { part(target, &range) });
        })
    }

    /// Calls `body` with each row of `x`.
    fn each_row(&self, x: &mut Tensor, body: impl Fn(&mut [f32]) + Sync) -> Result<()> {
        let [rows, width] = x.shape;
        let target = x.data.target();
        self.for_ranges(rows, ELEMENTS / width.max(1), |rows| {
            for row in rows {
                // SAFETY: this row exists and belongs to this task alone.
                body(unsafe { part(target, &(row * width..(row + 1) * width)) });
            }
        })
    }

    /// Copies the elements of `from` to where they begin in `to`.
    fn copied(&self, from: &[f32], to: Shared<f32>, start: usize) -> Result<()> {
        self.for_ranges(from.len(), ELEMENTS, |range| {
            let from = &from[range.clone()];
            // SAFETY: this range exists and belongs to this task alone.
            unsafe { to.at(start + range.start).copy_from_nonoverlapping(from.as_ptr(), from.len()) };
        })
    }

    fn row_of(op: &'static str, row: &Tensor, width: usize) -> Result<Vec<f32>> {
        check::same_shape(op, row.shape, [1, width])?;
        Ok(row.data.to_vec())
    }

    fn clip_factor(clip: Option<Clip<'_, Tensor>>) -> Result<f32> {
        let Some(clip) = clip else { return Ok(1.0) };
        check::same_shape("clip", clip.sum_squares.shape, [1, 1])?;
        let sum = clip.sum_squares.data.first().copied().unwrap_or_default();
        Ok(oracle::gradient::clip_factor(sum, clip.max_norm))
    }
}

impl Train for Cpu {
    fn linear_of(&self, weight: &Tensor, bias: Option<&Tensor>, dtype: DType) -> Result<Linear> {
        let bias = bias.map(|bias| Cpu::row_of("linear_of", bias, weight.shape[0])).transpose()?;
        let weight = Packed::of_rows(self.machine(), &weight.data, weight.shape, dtype, "linear_of")?;
        Ok(Linear { weight, bias })
    }

    fn norm_of(&self, weight: &Tensor, bias: &Tensor, eps: f32) -> Result<Norm> {
        let [_, width] = weight.shape;
        let weight = Some(Cpu::row_of("norm_of", weight, width)?);
        let bias = Some(Cpu::row_of("norm_of", bias, width)?);
        Ok(Norm { width, eps, weight, bias })
    }

    fn zeros(&self, shape: [usize; 2]) -> Result<Tensor> {
        let write = |out: Shared<f32>| {
            self.for_ranges(shape[0] * shape[1], ELEMENTS, |range| {
                // SAFETY: this range exists and belongs to this task alone.
                unsafe { out.at(range.start).write_bytes(0, range.len()) };
            })
        };
        // SAFETY: every element is written.
        unsafe { Tensor::written(&self.guards, "zeros", shape, write) }
    }

    fn copy(&self, x: &Tensor) -> Result<Tensor> {
        // SAFETY: every element is written.
        unsafe { Tensor::written(&self.guards, "copy", x.shape, |out| self.copied(&x.data, out, 0)) }
    }

    fn matmul(
        &self,
        a: &Tensor,
        b: &Tensor,
        layout: Layout,
        dtype: DType,
        into: Option<Tensor>,
    ) -> Result<Tensor> {
        self.training.get_or_init(Keep::default);
        let shape = layout.shape(a.shape, b.shape)?;
        let write = |out| {
            // SAFETY: shapes are checked, and the output is ours.
            unsafe {
                matmul::multiply(self.machine(), (&a.data, a.shape), (&b.data, b.shape), layout, dtype, out)
            }
        };
        // SAFETY: a product writes every element.
        unsafe { self.accumulated("matmul", shape, into, write) }
    }

    fn linear_grad(&self, dy: &Tensor, linear: &Linear, into: Option<Tensor>) -> Result<Tensor> {
        self.training.get_or_init(Keep::default);
        self.times("linear_grad", dy, &linear.weight, into)
    }

    fn logits_grad(&self, dy: &Tensor, head: &Table) -> Result<Tensor> {
        self.times("logits_grad", dy, &head.0, None)
    }

    fn layer_norm_grad(&self, x: &Tensor, norm: &Norm, dy: &Tensor) -> Result<Tensor> {
        check::same_shape("layer_norm_grad", dy.shape, x.shape)?;
        check::width("layer_norm_grad", x.shape[1], norm.width)?;
        let write = |out| {
            // SAFETY: the output has the input's size.
            unsafe { norm::of_input(&self.pool, self.level, &x.data, norm, &dy.data, out) }
        };
        // SAFETY: every row is written.
        unsafe { Tensor::written(&self.guards, "layer_norm_grad", x.shape, write) }
    }

    fn layer_norm_grad_params(&self, x: &Tensor, norm: &Norm, dy: &Tensor) -> Result<[Tensor; 2]> {
        check::same_shape("layer_norm_grad", dy.shape, x.shape)?;
        check::width("layer_norm_grad", x.shape[1], norm.width)?;
        let shape = [1, norm.width];
        let (mut weight, mut bias) =
            (self.room("layer_norm_grad_params", shape)?, self.room("layer_norm_grad_params", shape)?);
        let out = [weight.target(), bias.target()];
        // SAFETY: sizes are checked, and every column is written.
        unsafe {
            norm::of_params(&self.pool, self.level, &x.data, norm, &dy.data, out)?;
            weight.written();
            bias.written();
        }
        Ok([weight, bias].map(|data| Tensor { data, shape }))
    }

    fn attend_grad(&self, [q, k, v]: [&Tensor; 3], dy: &Tensor, attend: Attend<'_>) -> Result<[Tensor; 3]> {
        let op = "attend_grad";
        let shape = q.shape;
        check::spans(op, attend, shape)?;
        for other in [k, v, dy] {
            check::same_shape(op, other.shape, shape)?;
        }
        let mut gradients = [self.room(op, shape)?, self.room(op, shape)?, self.room(op, shape)?];
        let out = gradients.each_mut().map(Buffer::target);
        let apart = attend.spans.windows(2).all(|pair| pair[0].rows().end <= pair[1].start);
        let covered: usize = attend.spans.iter().map(|span| span.len).sum();
        if !apart || covered < shape[0] {
            // Rows of no span are zeros.
            for out in out {
                self.for_ranges(shape[0] * shape[1], ELEMENTS, |range| {
                    // SAFETY: this range exists and belongs to this task alone.
                    unsafe { out.at(range.start).write_bytes(0, range.len()) };
                })?;
            }
        }
        let of = attention::Attention {
            q: &q.data,
            k: &k.data,
            v: &v.data,
            dy: &dy.data,
            width: shape[1],
            heads: attend.heads,
            out,
        };
        // Spans that may overlap write one after the other.
        for spans in attend.spans.chunks(if apart { attend.spans.len().max(1) } else { 1 }) {
            // SAFETY: sizes are checked above, and the gradients are ours.
            unsafe { attention::attend_grad(&self.pool, self.level, of, spans)? };
        }
        for gradient in &mut gradients {
            // SAFETY: spans cover all rows or the rest is zeroed.
            unsafe { gradient.written() };
        }
        Ok(gradients.map(|data| Tensor { data, shape }))
    }

    fn activate(&self, mut x: Tensor, activation: Activation) -> Result<Tensor> {
        self.in_place(&mut x, |_, x| self.level.run(math::Activate(activation, x)))?;
        Ok(x)
    }

    fn activate_grad(&self, x: &Tensor, mut dy: Tensor, activation: Activation) -> Result<Tensor> {
        check::same_shape("activate_grad", dy.shape, x.shape)?;
        self.in_place(&mut dy, |range, dy| {
            self.level.run(math::Slope(activation, &x.data[range.clone()], dy));
        })?;
        Ok(dy)
    }

    fn cross_entropy(
        &self,
        mut logits: Tensor,
        targets: &[u32],
        smoothing: Smoothing,
    ) -> Result<[Tensor; 2]> {
        let [rows, entries] = logits.shape;
        check::ids("cross_entropy", targets, entries)?;
        check::targets("cross_entropy", targets, rows)?;
        let of_row =
            |i: usize, row: &mut [f32]| loss::cross_entropy(self.level, row, targets[i] as usize, smoothing);
        // SAFETY: the logits are ours.
        let total = unsafe { loss::total(&self.pool, logits.data.target(), logits.shape, of_row)? };
        Ok([self.single("cross_entropy", total * f64::from(smoothing.scale))?, logits])
    }

    fn soft_targets(
        &self,
        mut student: Tensor,
        teacher: &Tensor,
        temperature: f32,
        scale: f32,
    ) -> Result<[Tensor; 2]> {
        check::same_shape("soft_targets", teacher.shape, student.shape)?;
        let width = student.shape[1];
        let of_row = |i: usize, row: &mut [f32]| {
            loss::soft_targets(self.level, row, &teacher.data[i * width..][..width], temperature, scale)
        };
        // SAFETY: the student's logits are ours.
        let total = unsafe { loss::total(&self.pool, student.data.target(), student.shape, of_row)? };
        Ok([self.single("soft_targets", total * f64::from(scale))?, student])
    }

    fn scatter_add(&self, mut into: Tensor, rows: &[usize], dy: &Tensor) -> Result<Tensor> {
        let [entries, width] = into.shape;
        check::rows("scatter_add", rows, entries)?;
        check::same_shape("scatter_add", dy.shape, [rows.len(), width])?;
        let target = into.data.target();
        // Rows may repeat; so tasks share out the columns.
        self.for_ranges(width, COLUMNS, |columns| {
            for (i, &row) in rows.iter().enumerate() {
                let dy = &dy.data[i * width..][columns.clone()];
                // SAFETY: these columns of the row exist and belong to this task alone.
                let to = unsafe { part(target, &(row * width + columns.start..row * width + columns.end)) };
                to.iter_mut().zip(dy).for_each(|(x, d)| *x += d);
            }
        })?;
        Ok(into)
    }

    fn concat(&self, parts: &[&Tensor]) -> Result<Tensor> {
        let width = parts.first().map_or(0, |part| part.shape[1]);
        let mut rows = 0_usize;
        for part in parts {
            check::width("concat", part.shape[1], width)?;
            rows = rows
                .checked_add(part.shape[0])
                .ok_or_else(|| Error::shape("concat", "more rows than can be counted"))?;
        }
        let write = |out| {
            let mut start = 0;
            for part in parts {
                self.copied(&part.data, out, start)?;
                start += part.data.len();
            }
            Ok(())
        };
        // SAFETY: the parts are all there is.
        unsafe { Tensor::written(&self.guards, "concat", [rows, width], write) }
    }

    fn sum_rows(&self, x: &Tensor) -> Result<Tensor> {
        let width = x.shape[1];
        // SAFETY: there is room for a sum of each column.
        let write = |out| unsafe { norm::sum_rows(&self.pool, self.level, &x.data, width, out) };
        // SAFETY: every column is written.
        unsafe { Tensor::written(&self.guards, "sum_rows", [1, width], write) }
    }

    fn add_row(&self, mut x: Tensor, row: &Tensor) -> Result<Tensor> {
        check::same_shape("add_row", row.shape, [1, x.shape[1]])?;
        self.each_row(&mut x, |x| x.iter_mut().zip(&*row.data).for_each(|(x, y)| *x += y))?;
        Ok(x)
    }

    fn mul_row(&self, mut x: Tensor, row: &Tensor) -> Result<Tensor> {
        check::same_shape("mul_row", row.shape, [1, x.shape[1]])?;
        self.each_row(&mut x, |x| x.iter_mut().zip(&*row.data).for_each(|(x, y)| *x *= y))?;
        Ok(x)
    }

    fn mul(&self, mut x: Tensor, y: &Tensor) -> Result<Tensor> {
        check::same_shape("mul", y.shape, x.shape)?;
        self.in_place(&mut x, |range, x| {
            x.iter_mut().zip(&y.data[range.clone()]).for_each(|(x, y)| *x *= y);
        })?;
        Ok(x)
    }

    fn scale(&self, mut x: Tensor, factor: f32) -> Result<Tensor> {
        self.in_place(&mut x, |_, x| x.iter_mut().for_each(|x| *x *= factor))?;
        Ok(x)
    }

    fn dropout(&self, mut x: Tensor, dropout: Dropout) -> Result<Tensor> {
        self.in_place(&mut x, |range, x| {
            self.level.run(elements::Drop { x, first: range.start, dropout });
        })?;
        Ok(x)
    }

    fn sum_squares(&self, parts: &[&Tensor]) -> Result<Tensor> {
        let mut total = 0.0;
        for part in parts {
            let mut sums = vec![0.0; part.data.len().div_ceil(ELEMENTS)];
            let target = Shared(sums.as_mut_ptr());
            self.for_ranges(part.data.len(), ELEMENTS, |range| {
                let sum = self.level.run(elements::Squares(&part.data[range.clone()]));
                // SAFETY: there is one sum a range, which belongs to this task alone.
                unsafe { *target.at(range.start / ELEMENTS) = sum };
            })?;
            total += sums.iter().sum::<f64>();
        }
        self.single("sum_squares", total)
    }

    fn adamw(
        &self,
        param: &mut Tensor,
        gradient: &Tensor,
        moments: &mut [Tensor; 2],
        adam: AdamW,
        clip: Option<Clip<'_, Tensor>>,
    ) -> Result<()> {
        for other in [gradient, &moments[0], &moments[1]] {
            check::same_shape("adamw", other.shape, param.shape)?;
        }
        let factor = Cpu::clip_factor(clip)?;
        let corrections = adam.corrections();
        let [first, second] = moments.each_mut().map(|moment| moment.data.target());
        self.in_place(param, |range, param| {
            // SAFETY: all are of one shape, and this range of the moments belongs to this task alone.
            let moments = unsafe { [part(first, range), part(second, range)] };
            let gradient = &gradient.data[range.clone()];
            self.level.run(elements::Adam { param, gradient, moments, adam, corrections, factor });
        })
    }

    fn adamw8(
        &self,
        param: &mut Tensor,
        gradient: &Tensor,
        moments: &mut Moments8<Tensor>,
        adam: AdamW,
        clip: Option<Clip<'_, Tensor>>,
    ) -> Result<()> {
        check::same_shape("adamw8", gradient.shape, param.shape)?;
        check::moments8("adamw8", moments.parts().map(|part| part.shape), param.shape)?;
        let factor = Cpu::clip_factor(clip)?;
        let corrections = adam.corrections();
        let len = param.data.len();
        let param = param.data.target();
        let Moments8 { first, second, scales } = moments;
        let moments = [first, second, scales].map(|moment| moment.data.target());
        self.for_ranges(len.div_ceil(BLOCK), ELEMENTS / BLOCK, |blocks| {
            let range = blocks.start * BLOCK..len.min(blocks.end * BLOCK);
            let of = |width: usize| blocks.start * width..blocks.end * width;
            let [first, second, scales] = moments;
            // SAFETY: shapes are checked: parameters have these elements, and moments a row for each block. They belong
            // to this task alone.
            let (param, moments) = unsafe {
                let codes = of(PACKED);
                (part(param, &range), [part(first, &codes), part(second, &codes), part(scales, &of(2))])
            };
            let gradient = &gradient.data[range];
            self.level.run(elements::Adam8 { param, gradient, moments, adam, corrections, factor });
        })
    }

    fn sgd(
        &self,
        param: &mut Tensor,
        gradient: &Tensor,
        velocity: Option<&mut Tensor>,
        sgd: Sgd,
        clip: Option<Clip<'_, Tensor>>,
    ) -> Result<()> {
        check::same_shape("sgd", gradient.shape, param.shape)?;
        if let Some(velocity) = &velocity {
            check::same_shape("sgd", velocity.shape, param.shape)?;
        }
        let factor = Cpu::clip_factor(clip)?;
        let velocity = velocity.map(|velocity| velocity.data.target());
        self.in_place(param, |range, param| {
            // SAFETY: both are of one shape, and this range of the velocity belongs to this task alone.
            let velocity = velocity.map_or(&mut [][..], |velocity| unsafe { part(velocity, range) });
            elements::sgd(param, &gradient.data[range.clone()], velocity, sgd, factor);
        })
    }
}
