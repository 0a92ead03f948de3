//! Losses and their gradients.

use crate::conformance::{
    Outcome, Run,
    data::{Data, read},
};
use crate::{Smoothing, Train, oracle, oracle::gradient};
use ndarray::{Array2, array};

/// `[rows, entries]`
const SHAPES: [[usize; 2]; 8] = [[0, 7], [1, 1], [1, 257], [2, 7], [3, 1000], [33, 67], [70, 130], [5, 2049]];

/// (name, factor, shift) of logits: ordinary ones, some that leave one probability, and some whose exp is no f32.
const SIZES: [(&str, f32, f32); 4] =
    [("ordinary", 1.0, 0.0), ("large", 20.0, 0.0), ("shifted up", 1.0, 120.0), ("shifted down", 1.0, -120.0)];

pub(super) fn run<B: Train>(run: &mut Run<'_, B>) {
    for [rows, entries] in SHAPES {
        for (size, factor, shift) in SIZES {
            let logits = move |data: &mut Data| {
                let x = data.matrix(rows, entries).mapv_into(|v| factor * v + shift);
                data.held(x)
            };
            for epsilon in [0.0, 0.1] {
                let case = format!("[{rows}, {entries}], {size} logits, smoothing {epsilon}");
                run.case("cross_entropy", case, |b, data| {
                    let x = logits(data);
                    // As one step of one sequence, and as a part of a larger one.
                    let scale = (rows.max(1) as f32).recip();
                    cross_entropy(b, data, &x, Smoothing { scale, epsilon })?;
                    cross_entropy(b, data, &x, Smoothing { scale: 0.3 * scale, epsilon })
                });
            }
            for temperature in [0.5, 1.0, 2.0] {
                let case = format!("[{rows}, {entries}], {size} logits, temperature {temperature}");
                run.case("soft_targets", case, |b, data| {
                    let (student, teacher) = (logits(data), logits(data));
                    soft_targets(b, data, &student, &teacher, temperature)?;
                    soft_targets(b, data, &student, &student, temperature)
                });
            }
        }
    }
    if run.suite.heavy {
        run.case("cross_entropy", "[3, 50272]", |b, data| {
            let x = data.matrix(3, 50272).mapv_into(|v| 4.0 * v);
            let x = data.held(x);
            cross_entropy(b, data, &x, Smoothing { scale: 0.5, epsilon: 0.1 })
        });
        run.case("soft_targets", "[3, 50272]", |b, data| {
            let (student, teacher) = (data.matrix(3, 50272), data.matrix(3, 50272));
            soft_targets(b, data, &student, &teacher, 2.0)
        });
    }
}

fn cross_entropy<B: Train>(b: &B, data: &mut Data, x: &Array2<f32>, smoothing: Smoothing) -> Outcome {
    let mut targets: Vec<u32> = (0..x.nrows()).map(|_| data.below(x.ncols()) as u32).collect();
    // Some rows get the most probable entry, as those of a trained model.
    for (target, row) in targets.iter_mut().zip(x.outer_iter()).step_by(2) {
        *target = oracle::argmax(row).unwrap_or(0) as u32;
    }
    let [loss, d] = b.cross_entropy(b.upload(x.view())?, &targets, smoothing)?;
    let (expected, expected_d) = gradient::cross_entropy(x.view(), &targets, smoothing);
    data.tolerance().compare("loss", read(b, &loss)?.view(), array![[expected]].view())?;
    data.tolerance().compare("gradient", read(b, &d)?.view(), expected_d.view())
}

fn soft_targets<B: Train>(
    b: &B,
    data: &Data,
    student: &Array2<f32>,
    teacher: &Array2<f32>,
    temperature: f32,
) -> Outcome {
    let held = b.upload(teacher.view())?;
    let scale = 0.8 / student.nrows().max(1) as f32;
    let [loss, d] = b.soft_targets(b.upload(student.view())?, &held, temperature, scale)?;
    let (expected, expected_d) = gradient::soft_targets(student.view(), teacher.view(), temperature, scale);
    data.tolerance().compare("loss", read(b, &loss)?.view(), array![[expected]].view())?;
    data.tolerance().compare("gradient", read(b, &d)?.view(), expected_d.view())?;
    super::unchanged(b, "the teacher's logits", &held, teacher)
}
