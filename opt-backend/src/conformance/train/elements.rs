//! What works element by element or row by row.

use crate::conformance::{
    Outcome, Run,
    compare::same_bits,
    data::{Data, read},
    ensure,
};
use crate::{Activation, Dropout, Train, oracle::gradient};
use ndarray::{Array2, Axis, array, concatenate};

/// `[rows, width]`: none, one, odd widths, more than one block of 256 either way, and more
/// elements than a task or a workgroup has.
const SHAPES: [[usize; 2]; 9] =
    [[0, 7], [1, 1], [1, 257], [33, 80], [130, 7], [5, 768], [300, 257], [1000, 3], [3, 70_000]];

pub(super) fn run<B: Train>(run: &mut Run<'_, B>) {
    for [rows, width] in SHAPES.into_iter().filter(|[_, width]| run.row_fits(*width)).collect::<Vec<_>>() {
        let case = format!("[{rows}, {width}]");
        run.case("copy", &case, |b, data| {
            let x = data.matrix(rows, width);
            let tensor = b.upload(x.view())?;
            let copy = b.copy(&tensor)?;
            same_bits("copy", read(b, &copy)?.view(), x.view())?;
            b.scale(tensor, 3.0)?;
            super::unchanged(b, "the copy, once x is scaled", &copy, &x)
        });
        run.case("zeros", &case, |b, data| {
            let zeros = b.zeros([rows, width])?;
            same_bits("zeros", read(b, &zeros)?.view(), ndarray::Array2::zeros((rows, width)).view())?;
            // They can be written to.
            let x = data.matrix(rows, width);
            let sum = b.add(zeros, &b.upload(x.view())?)?;
            same_bits("0 + x", read(b, &sum)?.view(), x.view())
        });
        run.case("sum_rows", &case, |b, data| {
            let x = data.matrix(rows, width);
            let tensor = b.upload(x.view())?;
            let found = read(b, &b.sum_rows(&tensor)?)?;
            data.tolerance().compare("sums", found.view(), gradient::sum_rows(x.view()).view())?;
            super::unchanged(b, "x", &tensor, &x)
        });
        run.case("add_row", &case, |b, data| {
            let (x, row) = (data.matrix(rows, width), data.matrix(1, width));
            let tensor = b.upload(row.view())?;
            let found = read(b, &b.add_row(b.upload(x.view())?, &tensor)?)?;
            data.tolerance().compare("rows", found.view(), (x + &row).view())?;
            super::unchanged(b, "row", &tensor, &row)
        });
        run.case("mul_row", &case, |b, data| {
            let (x, row) = (data.matrix(rows, width), data.matrix(1, width));
            let tensor = b.upload(row.view())?;
            let found = read(b, &b.mul_row(b.upload(x.view())?, &tensor)?)?;
            data.tolerance().compare("rows", found.view(), (x * &row).view())?;
            super::unchanged(b, "row", &tensor, &row)
        });
        run.case("mul", &case, |b, data| {
            let (x, y) = (data.matrix(rows, width), data.matrix(rows, width));
            let tensor = b.upload(y.view())?;
            let found = read(b, &b.mul(b.upload(x.view())?, &tensor)?)?;
            data.tolerance().compare("product", found.view(), (x * &y).view())?;
            super::unchanged(b, "y", &tensor, &y)
        });
        run.case("scale", &case, |b, data| {
            let x = data.matrix(rows, width);
            [0.0, 1.0, -1.5, 1e-3].into_iter().try_for_each(|factor| {
                let found = read(b, &b.scale(b.upload(x.view())?, factor)?)?;
                data.tolerance().compare(&format!("times {factor}"), found.view(), (&x * factor).view())
            })
        });
        run.case("sum_squares", &case, |b, data| {
            let x = data.matrix(rows, width);
            let tensor = b.upload(x.view())?;
            let found = read(b, &b.sum_squares(&[&tensor])?)?;
            data.tolerance().compare(
                "sum",
                found.view(),
                array![[squares(std::slice::from_ref(&x))]].view(),
            )?;
            super::unchanged(b, "x", &tensor, &x)
        });
        run.case("dropout", &case, |b, data| dropout(b, data, [rows, width]));
    }
    run.case("sum_squares", "parts of several shapes", sum_squares);
    activations(run);
    scatter_add(run);
    concat(run);
}

fn squares(parts: &[Array2<f32>]) -> f32 {
    parts.iter().flatten().map(|&v| f64::from(v).powi(2)).sum::<f64>() as f32
}

fn sum_squares<B: Train>(b: &B, data: &mut Data) -> Outcome {
    let found = read(b, &b.sum_squares(&[])?)?;
    data.tolerance().compare("of no part", found.view(), array![[0.0_f32]].view())?;
    let shapes = [[1, 257], [33, 80], [0, 9], [768, 64], [1, 1], [5, 7]];
    let parts = shapes.map(|[rows, width]| data.matrix(rows, width));
    let tensors = parts.iter().map(|part| b.upload(part.view())).collect::<crate::Result<Vec<_>>>()?;
    let borrowed: Vec<&B::Tensor> = tensors.iter().collect();
    let found = read(b, &b.sum_squares(&borrowed)?)?;
    data.tolerance().compare("sum", found.view(), array![[squares(&parts)]].view())?;
    // One part twice counts twice.
    let found = read(b, &b.sum_squares(&[&tensors[1], &tensors[1]])?)?;
    let twice = 2.0 * squares(&parts[1..2]);
    data.tolerance().compare("one part twice", found.view(), array![[twice]].view())
}

/// Dropped are exactly the elements that [`Dropout::keeps`] does not keep.
fn dropout<B: Train>(b: &B, data: &mut Data, [rows, width]: [usize; 2]) -> Outcome {
    // No zeros of its own, so that a zero says dropped.
    let x = data.matrix(rows, width).mapv_into(|v| if v.abs() < 0.01 { 1.0 } else { v });
    for p in [0.0, 0.1, 0.5, 0.9] {
        for seed in [0, 1, u64::MAX, 0x1234_5678_9abc_def0, 1 << 32] {
            let dropout = Dropout { p, seed };
            let found = read(b, &b.dropout(b.upload(x.view())?, dropout)?)?;
            ensure(
                found.dim() == x.dim(),
                format_args!("expected the shape {:?}, found {:?}", x.dim(), found.dim()),
            )?;
            let wrong = found.iter().enumerate().position(|(i, v)| dropout.keeps(i as u32) != (*v != 0.0));
            if let Some(at) = wrong {
                let kept = if dropout.keeps(at as u32) { "kept" } else { "dropped" };
                return super::super::fail(format_args!("{dropout:?}: expected element {at} {kept}"));
            }
            let mut expected = x.clone();
            gradient::dropout(&mut expected, dropout);
            data.tolerance().compare(&format!("{dropout:?}"), found.view(), expected.view())?;
        }
    }
    Ok(())
}

fn activations<B: Train>(run: &mut Run<'_, B>) {
    for activation in Activation::all() {
        for [rows, width] in [[0, 7], [1, 1], [9, 257], [33, 80]] {
            for factor in [2.0, 32.0] {
                let x = move |data: &mut Data| {
                    let mut x = data.matrix(rows, width).mapv_into(|v| factor * v);
                    // Corners, where the slope is what torch says it is.
                    for (v, corner) in x.iter_mut().skip(3).zip([0.0, -0.0, 6.0, -10.0, 10.0]) {
                        *v = corner;
                    }
                    data.held(x)
                };
                let case = format!("{activation} of [{rows}, {width}] times {factor}");
                run.case("activate", &case, |b, data| {
                    let x = x(data);
                    let found = read(b, &b.activate(b.upload(x.view())?, activation)?)?;
                    let expected = x.mapv(|v| activation.apply(f64::from(v)) as f32);
                    data.tolerance().compare("values", found.view(), expected.view())
                });
                run.case("activate_grad", case, |b, data| {
                    let (x, dy) = (x(data), data.matrix(rows, width));
                    let tensor = b.upload(x.view())?;
                    let found = read(b, &b.activate_grad(&tensor, b.upload(dy.view())?, activation)?)?;
                    let expected = gradient::activate(x.view(), dy.view(), activation);
                    data.tolerance().compare("gradient", found.view(), expected.view())?;
                    super::unchanged(b, "x", &tensor, &x)
                });
            }
        }
    }
}

fn scatter_add<B: Train>(run: &mut Run<'_, B>) {
    // (name, entries, rows)
    let same = vec![2; 70];
    let many: Vec<usize> = (0..300).map(|i| (i * 337) % 1000).collect();
    let few: Vec<usize> = (0..300).map(|i| (i * i) % 7).collect();
    let picks: [(&str, usize, Vec<usize>); 8] = [
        ("none", 5, vec![]),
        ("none into none", 0, vec![]),
        ("one", 5, vec![4]),
        ("all backwards", 5, vec![4, 3, 2, 1, 0]),
        ("some twice", 5, vec![2, 2, 0, 4, 2, 0, 1, 1]),
        ("70 into one", 5, same),
        ("300 into 1000", 1000, many),
        ("300 into 7", 7, few),
    ];
    for width in [1, 33, 80, 257, 768] {
        for (what, entries, rows) in &picks {
            run.case("scatter_add", format_args!("{what} of [{entries}, {width}]"), |b, data| {
                let (into, dy) = (data.matrix(*entries, width), data.matrix(rows.len(), width));
                let tensor = b.upload(dy.view())?;
                let found = read(b, &b.scatter_add(b.upload(into.view())?, rows, &tensor)?)?;
                let mut expected = into;
                gradient::scatter_add(&mut expected, rows, dy.view());
                data.tolerance().compare("sums", found.view(), expected.view())?;
                super::unchanged(b, "dy", &tensor, &dy)
            });
        }
    }
}

fn concat<B: Train>(run: &mut Run<'_, B>) {
    run.case("concat", "of no part", |b, _| {
        let found = b.shape(&b.concat(&[])?);
        ensure(found == [0, 0], format_args!("expected [0, 0], found {found:?}"))
    });
    let lengths: [&[usize]; 6] = [&[0], &[3], &[1, 1, 1], &[0, 2, 0, 5], &[33, 1, 65], &[0, 0]];
    for width in [1, 33, 257] {
        for lengths in lengths {
            run.case("concat", format_args!("{lengths:?} rows of {width}"), |b, data| {
                let parts: Vec<Array2<f32>> = lengths.iter().map(|&rows| data.matrix(rows, width)).collect();
                let tensors =
                    parts.iter().map(|part| b.upload(part.view())).collect::<crate::Result<Vec<_>>>()?;
                let found = read(b, &b.concat(&tensors.iter().collect::<Vec<_>>())?)?;
                let views: Vec<_> = parts.iter().map(|part| part.view()).collect();
                let expected = concatenate(Axis(0), &views).unwrap_or_default();
                same_bits("rows", found.view(), expected.view())?;
                for (tensor, part) in tensors.iter().zip(&parts) {
                    super::unchanged(b, "a part", tensor, part)?;
                }
                Ok(())
            });
        }
    }
    run.case("concat", "one part twice", |b, data| {
        let x = data.matrix(3, 7);
        let tensor = b.upload(x.view())?;
        let found = read(b, &b.concat(&[&tensor, &tensor])?)?;
        let expected = concatenate(Axis(0), &[x.view(), x.view()]).unwrap_or_default();
        same_bits("rows", found.view(), expected.view())
    });
}
