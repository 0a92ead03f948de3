//! Arguments of training ops that do not fit: an error of kind Shape, no panic, what was lent by `&mut` as it was.

use super::{unchanged, upload};
use crate::conformance::{Outcome, Run, compare::refused, data::Data};
use crate::{
    Activation, AdamW, Attend, Clip, DType, HostMatrix, Layout, Moments8, NormParams, Sgd, Smoothing, Span,
    Train, moments::PACKED,
};
use ndarray::Array2;

pub(super) fn run<B: Train>(run: &mut Run<'_, B>) {
    run.case("errors", "linear_of, norm_of", made_of);
    run.case("errors", "matmul", matmul);
    run.case("errors", "linear_grad, logits_grad", products);
    run.case("errors", "layer_norm_grad, layer_norm_grad_params", norms);
    run.case("errors", "attend_grad", attention);
    run.case("errors", "cross_entropy, soft_targets", losses);
    run.case("errors", "activate_grad, add_row, mul_row, mul", elements);
    run.case("errors", "scatter_add, concat", rows);
    run.case("errors", "adamw", adamw);
    run.case("errors", "adamw8", adamw8);
    run.case("errors", "sgd", sgd);
}

fn ones<B: Train>(b: &B, [rows, width]: [usize; 2]) -> Outcome<B::Tensor> {
    Ok(upload(b, &Array2::ones((rows, width)))?)
}

fn made_of<B: Train>(b: &B, _: &mut Data) -> Outcome {
    let weight = ones(b, [4, 3])?;
    for shape in [[0, 4], [1, 3], [1, 5], [2, 4], [4, 1], [1, 0]] {
        let bias = ones(b, shape)?;
        refused(&format!("linear_of, bias {shape:?}"), b.linear_of(&weight, Some(&bias), DType::F32))?;
        let row = ones(b, [1, 4])?;
        refused(&format!("norm_of, bias {shape:?}"), b.norm_of(&row, &bias, 1e-5))?;
        refused(&format!("norm_of, weight {shape:?}"), b.norm_of(&bias, &row, 1e-5))?;
    }
    Ok(())
}

fn matmul<B: Train>(b: &B, _: &mut Data) -> Outcome {
    for (layout, a, right) in [
        (Layout::TimesTransposed, [2, 3], [4, 3]),
        (Layout::Times, [2, 3], [3, 4]),
        (Layout::TransposedTimes, [3, 2], [3, 4]),
    ] {
        let left = ones(b, a)?;
        for dtype in [DType::F32, DType::BF16] {
            for wrong in [[4, 2], [2, 4], [5, 5], [1, 1], [0, 0], [1, 12]] {
                let found = b.matmul(&left, &ones(b, wrong)?, layout, dtype, None);
                refused(&format!("{layout:?} of {a:?} and {wrong:?}"), found)?;
            }
            for wrong in [[4, 2], [2, 3], [1, 4], [2, 5], [0, 4], [1, 8], [8, 1]] {
                let found = b.matmul(&left, &ones(b, right)?, layout, dtype, Some(ones(b, wrong)?));
                refused(&format!("{layout:?}, into {wrong:?}"), found)?;
            }
        }
    }
    Ok(())
}

fn products<B: Train>(b: &B, data: &mut Data) -> Outcome {
    let (linear, _) = data.linear(b, [3, 5], true, DType::F32)?;
    let table = b.new_table(HostMatrix::F32(data.weight(5, 3).view()), DType::F32)?;
    for width in [0, 1, 3, 4, 6, 10] {
        let dy = ones(b, [2, width])?;
        refused(&format!("linear_grad of width {width}"), b.linear_grad(&dy, &linear, None))?;
        refused(&format!("logits_grad of width {width}"), b.logits_grad(&dy, &table))?;
    }
    for shape in [[1, 3], [3, 3], [2, 2], [2, 5], [3, 2], [0, 3], [1, 6]] {
        let found = b.linear_grad(&ones(b, [2, 5])?, &linear, Some(ones(b, shape)?));
        refused(&format!("linear_grad into {shape:?}"), found)?;
    }
    Ok(())
}

fn norms<B: Train>(b: &B, _: &mut Data) -> Outcome {
    let norm = b.new_norm(NormParams { width: 4, eps: 1e-5, weight: None, bias: None })?;
    let x = ones(b, [3, 4])?;
    for shape in [[2, 4], [4, 3], [3, 3], [3, 5], [1, 4], [1, 12], [0, 4]] {
        let dy = ones(b, shape)?;
        refused(&format!("dy {shape:?}"), b.layer_norm_grad(&x, &norm, &dy))?;
        refused(&format!("dy {shape:?}, parameters"), b.layer_norm_grad_params(&x, &norm, &dy))?;
    }
    for width in [1, 3, 5, 8] {
        let x = ones(b, [2, width])?;
        refused(&format!("width {width}"), b.layer_norm_grad(&x, &norm, &x))?;
        refused(&format!("width {width}, parameters"), b.layer_norm_grad_params(&x, &norm, &x))?;
    }
    Ok(())
}

fn attention<B: Train>(b: &B, _: &mut Data) -> Outcome {
    const ROWS: usize = 5;
    const WIDTH: usize = 6;
    let span = |start, len| Span { start, len };
    let good = [span(0, 2), span(2, 3)];
    let call = |what: &str, heads, spans: &[Span], shapes: [[usize; 2]; 4]| -> Outcome {
        let [q, k, v, dy] = shapes.map(|shape| ones(b, shape));
        let (q, k, v, dy) = (q?, k?, v?, dy?);
        refused(what, b.attend_grad([&q, &k, &v], &dy, Attend { heads, layer: 0, spans }).map(|_| ()))
    };
    let right = [[ROWS, WIDTH]; 4];
    for heads in [0, 4, 5, 7, usize::MAX] {
        call(&format!("{heads} heads of width {WIDTH}"), heads, &good, right)?;
    }
    for bad in [span(2, 4), span(6, 1), span(usize::MAX, 2), span(1, usize::MAX), span(5, 1)] {
        call(&format!("{bad:?}"), 2, &[good[0], bad], right)?;
    }
    for which in 0..4 {
        for wrong in [[4, WIDTH], [6, WIDTH], [ROWS, 4], [ROWS, 8], [0, WIDTH], [WIDTH, ROWS]] {
            let mut shapes = right;
            shapes[which] = wrong;
            call(&format!("operand {which} of shape {wrong:?}"), 2, &good, shapes)?;
        }
    }
    Ok(())
}

fn losses<B: Train>(b: &B, _: &mut Data) -> Outcome {
    let smoothing = Smoothing { scale: 1.0, epsilon: 0.0 };
    for targets in [&[][..], &[0], &[0, 1, 2], &[0, 4], &[u32::MAX, 0], &[1 << 31, 0]] {
        let found = b.cross_entropy(ones(b, [2, 4])?, targets, smoothing).map(|_| ());
        refused(&format!("cross_entropy of [2, 4] at {targets:?}"), found)?;
    }
    let teacher = ones(b, [2, 4])?;
    for shape in [[1, 4], [3, 4], [2, 3], [2, 5], [4, 2], [0, 4], [1, 8]] {
        let found = b.soft_targets(ones(b, shape)?, &teacher, 2.0, 1.0).map(|_| ());
        refused(&format!("soft_targets of {shape:?} and [2, 4]"), found)?;
    }
    Ok(())
}

fn elements<B: Train>(b: &B, _: &mut Data) -> Outcome {
    let x = || ones(b, [3, 4]);
    for shape in [[2, 4], [3, 3], [1, 4], [3, 1], [0, 4], [4, 3], [1, 12], [1, 1]] {
        let y = ones(b, shape)?;
        refused(&format!("mul [3, 4] and {shape:?}"), b.mul(x()?, &y))?;
        let found = b.activate_grad(&y, x()?, Activation::Gelu);
        refused(&format!("activate_grad of {shape:?}, dy [3, 4]"), found)?;
    }
    for shape in [[0, 4], [2, 4], [3, 4], [1, 3], [1, 5], [1, 1], [4, 1], [1, 12]] {
        let row = ones(b, shape)?;
        refused(&format!("add_row {shape:?} to [3, 4]"), b.add_row(x()?, &row))?;
        refused(&format!("mul_row {shape:?} and [3, 4]"), b.mul_row(x()?, &row))?;
    }
    Ok(())
}

fn rows<B: Train>(b: &B, _: &mut Data) -> Outcome {
    let dy = ones(b, [2, 4])?;
    for rows in [&[3, 0][..], &[0, usize::MAX], &[0], &[], &[0, 1, 2]] {
        refused(&format!("scatter_add to {rows:?} of 3"), b.scatter_add(ones(b, [3, 4])?, rows, &dy))?;
    }
    for width in [1, 3, 5, 8] {
        let found = b.scatter_add(ones(b, [3, width])?, &[0, 1], &dy);
        refused(&format!("scatter_add of width 4 into {width}"), found)?;
        let other = ones(b, [2, width])?;
        refused(&format!("concat of widths 4 and {width}"), b.concat(&[&dy, &other]))?;
        refused(&format!("concat of widths {width}, 4, 4"), b.concat(&[&other, &dy, &dy]))?;
    }
    refused("scatter_add to row 0 of none", b.scatter_add(ones(b, [0, 4])?, &[0, 0], &dy))
}

const WRONG: [[usize; 2]; 7] = [[2, 4], [3, 3], [1, 4], [4, 3], [0, 4], [1, 12], [1, 1]];

fn adamw<B: Train>(b: &B, data: &mut Data) -> Outcome {
    let adam = AdamW { lr: 0.1, beta1: 0.9, beta2: 0.99, eps: 1e-6, weight_decay: 0.1, step: 1 };
    let right = data.matrix(3, 4);
    // Parameters, gradient, both moments, and the sum of squares.
    for which in 0..5 {
        for wrong in WRONG {
            if which == 4 && wrong == [1, 1] {
                continue;
            }
            let shape = |i| if i == which { wrong } else { [3, 4] };
            let mut host = [0, 1, 2, 3].map(|i| Array2::from_elem(shape(i), 0.5 + i as f32));
            host[0] = if which == 0 { host[0].clone() } else { right.clone() };
            let [mut param, g, m, v] = {
                let [p, g, m, v] = host.each_ref().map(|x| upload(b, x));
                [p?, g?, m?, v?]
            };
            let mut moments = [m, v];
            let sum_squares = ones(b, if which == 4 { wrong } else { [1, 1] })?;
            let clip = (which == 4).then_some(Clip { sum_squares: &sum_squares, max_norm: 0.1 });
            let what = format!("operand {which} of shape {wrong:?}");
            refused(&what, b.adamw(&mut param, &g, &mut moments, adam, clip))?;
            unchanged(b, &format!("{what}: parameters"), &param, &host[0])?;
            unchanged(b, &format!("{what}: first moment"), &moments[0], &host[2])?;
            unchanged(b, &format!("{what}: second moment"), &moments[1], &host[3])?;
        }
    }
    Ok(())
}

fn adamw8<B: Train>(b: &B, data: &mut Data) -> Outcome {
    let adam = AdamW { lr: 0.1, beta1: 0.9, beta2: 0.99, eps: 1e-6, weight_decay: 0.1, step: 1 };
    // Parameters, gradient, both moments, scales, and the sum of squares.
    let right = [[3, 4], [3, 4], [1, PACKED], [1, PACKED], [1, 2], [1, 1]];
    let codes = [[0, PACKED], [2, PACKED], [1, PACKED - 1], [1, PACKED + 1], [PACKED, 1], [3, 4]];
    let scales = [[0, 2], [2, 2], [1, 1], [1, 3], [2, 1], [3, 4]];
    for which in 0..right.len() {
        let wrong: &[[usize; 2]] = match which {
            2 | 3 => &codes,
            4 => &scales,
            _ => &WRONG,
        };
        for &wrong in wrong {
            if wrong == right[which] {
                continue;
            }
            let mut shapes = right;
            shapes[which] = wrong;
            let mut host = shapes.map(|[rows, width]| Array2::from_elem((rows, width), 3.0));
            host[0] = data.matrix(shapes[0][0], shapes[0][1]);
            let [param, g, first, second, scales, sum_squares] = host.each_ref().map(|x| upload(b, x));
            let (mut param, g, sum_squares) = (param?, g?, sum_squares?);
            let mut moments = Moments8 { first: first?, second: second?, scales: scales? };
            let clip = (which == 5).then_some(Clip { sum_squares: &sum_squares, max_norm: 0.1 });
            let what = format!("operand {which} of shape {wrong:?}");
            refused(&what, b.adamw8(&mut param, &g, &mut moments, adam, clip))?;
            unchanged(b, &format!("{what}: parameters"), &param, &host[0])?;
            for (part, host) in moments.parts().into_iter().zip(&host[2..]) {
                unchanged(b, &format!("{what}: moments"), part, host)?;
            }
        }
    }
    Ok(())
}

fn sgd<B: Train>(b: &B, data: &mut Data) -> Outcome {
    let sgd = Sgd { lr: 0.1, momentum: 0.9, weight_decay: 0.1 };
    let right = data.matrix(3, 4);
    // Parameters, gradient, velocity, and the sum of squares.
    for which in 0..4 {
        for wrong in WRONG {
            if which == 3 && wrong == [1, 1] {
                continue;
            }
            let shape = |i| if i == which { wrong } else { [3, 4] };
            let mut host = [0, 1, 2].map(|i| Array2::from_elem(shape(i), 0.5 + i as f32));
            host[0] = if which == 0 { host[0].clone() } else { right.clone() };
            let (mut param, g, mut velocity) =
                (upload(b, &host[0])?, upload(b, &host[1])?, upload(b, &host[2])?);
            let sum_squares = ones(b, if which == 3 { wrong } else { [1, 1] })?;
            let clip = (which == 3).then_some(Clip { sum_squares: &sum_squares, max_norm: 0.1 });
            let what = format!("operand {which} of shape {wrong:?}");
            refused(&what, b.sgd(&mut param, &g, Some(&mut velocity), sgd, clip))?;
            unchanged(b, &format!("{what}: parameters"), &param, &host[0])?;
            unchanged(b, &format!("{what}: velocity"), &velocity, &host[2])?;
            if which != 2 {
                let clip = (which == 3).then_some(Clip { sum_squares: &sum_squares, max_norm: 0.1 });
                refused(&format!("{what}, no velocity"), b.sgd(&mut param, &g, None, sgd, clip))?;
                unchanged(b, &format!("{what}, no velocity: parameters"), &param, &host[0])?;
            }
        }
    }
    Ok(())
}
