//! Steps of optimizers: several in a row, so that state that is lost or not updated shows.

use crate::conformance::{
    Outcome, Run,
    data::{Data, read},
};
use crate::{AdamW, Clip, Sgd, Train, oracle::gradient};
use ndarray::Array2;

pub(super) const SHAPES: [[usize; 2]; 7] =
    [[0, 7], [1, 1], [1, 257], [33, 80], [7, 768], [300, 257], [2, 40_001]];

/// Largest norms: none, one that does not clip, one that does.
pub(super) const CLIPS: [Option<f32>; 3] = [None, Some(1e6), Some(0.7)];

pub(super) fn run<B: Train>(run: &mut Run<'_, B>) {
    for shape in SHAPES.into_iter().filter(|[_, width]| run.row_fits(*width)).collect::<Vec<_>>() {
        for clip in CLIPS {
            for weight_decay in [0.0, 0.1] {
                let case = format!("{shape:?}, clip {clip:?}, decay {weight_decay}");
                run.case("adamw", &case, |b, data| adamw(b, data, shape, clip, weight_decay));
                for momentum in [None, Some(0.0), Some(0.9)] {
                    let case = format!("{case}, momentum {momentum:?}");
                    run.case("sgd", case, |b, data| sgd(b, data, shape, clip, weight_decay, momentum));
                }
            }
        }
    }
}

/// A gradient whose columns are of three sizes and some of whose elements are zero.
pub(super) fn new_gradient(data: &mut Data, [rows, width]: [usize; 2]) -> Array2<f32> {
    let mut g = data.matrix(rows, width);
    for (i, mut column) in g.columns_mut().into_iter().enumerate() {
        let factor = [1.0, 0.01, 3.0][i % 3];
        column.mapv_inplace(|v| if v.abs() < 0.05 { 0.0 } else { factor * v });
    }
    data.held(g)
}

/// The sum of squares on the device, and the factor that follows from it.
pub(super) fn clipping<B: Train>(
    b: &B,
    g: &B::Tensor,
    max_norm: Option<f32>,
) -> Outcome<(B::Tensor, Array2<f32>, f32)> {
    let sum = b.sum_squares(&[g])?;
    let host = read(b, &sum)?;
    let factor = max_norm.map_or(1.0, |max| gradient::clip_factor(host[[0, 0]], max));
    Ok((sum, host, factor))
}

fn adamw<B: Train>(
    b: &B,
    data: &mut Data,
    shape: [usize; 2],
    clip: Option<f32>,
    weight_decay: f32,
) -> Outcome {
    let mut param = data.matrix(shape[0], shape[1]);
    let [mut first, mut second] = [(); 2].map(|()| Array2::<f32>::zeros(shape));
    let mut on_device = b.upload(param.view())?;
    let mut moments = [b.upload(first.view())?, b.upload(second.view())?];
    // The last as after a long run, when the moments are no longer corrected.
    for step in [1, 2, 3, 100_000] {
        let eps = if step == 2 { 1e-2 } else { 1e-6 };
        let adam = AdamW { lr: 0.05, beta1: 0.9, beta2: 0.99, eps, weight_decay, step };
        let g = new_gradient(data, shape);
        let gradient_on_device = b.upload(g.view())?;
        let (sum, sum_host, factor) = clipping(b, &gradient_on_device, clip)?;
        let clip = clip.map(|max_norm| Clip { sum_squares: &sum, max_norm });
        b.adamw(&mut on_device, &gradient_on_device, &mut moments, adam, clip)?;
        gradient::adamw(&mut param, g.view(), [&mut first, &mut second], adam, factor);
        let tolerance = data.tolerance();
        tolerance.compare(&format!("step {step}"), read(b, &on_device)?.view(), param.view())?;
        for ((name, found), expected) in
            ["first moment", "second moment"].iter().zip(&moments).zip([&first, &second])
        {
            let what = format!("{name} after step {step}");
            tolerance.compare(&what, read(b, found)?.view(), expected.view())?;
        }
        super::unchanged(b, "the gradient", &gradient_on_device, &g)?;
        super::unchanged(b, "the sum of squares", &sum, &sum_host)?;
    }
    Ok(())
}

fn sgd<B: Train>(
    b: &B,
    data: &mut Data,
    shape: [usize; 2],
    clip: Option<f32>,
    weight_decay: f32,
    momentum: Option<f32>,
) -> Outcome {
    let mut param = data.matrix(shape[0], shape[1]);
    let mut velocity = momentum.map(|_| Array2::<f32>::zeros(shape));
    let mut on_device = b.upload(param.view())?;
    let mut moving = velocity.as_ref().map(|velocity| b.upload(velocity.view())).transpose()?;
    for step in 1..=4 {
        let sgd = Sgd { lr: 0.1, momentum: momentum.unwrap_or(0.0), weight_decay };
        let g = new_gradient(data, shape);
        let gradient_on_device = b.upload(g.view())?;
        let (sum, sum_host, factor) = clipping(b, &gradient_on_device, clip)?;
        let clip = clip.map(|max_norm| Clip { sum_squares: &sum, max_norm });
        b.sgd(&mut on_device, &gradient_on_device, moving.as_mut(), sgd, clip)?;
        gradient::sgd(&mut param, g.view(), velocity.as_mut(), sgd, factor);
        let tolerance = data.tolerance();
        tolerance.compare(&format!("step {step}"), read(b, &on_device)?.view(), param.view())?;
        if let (Some(found), Some(expected)) = (&moving, &velocity) {
            let what = format!("velocity after step {step}");
            tolerance.compare(&what, read(b, found)?.view(), expected.view())?;
        }
        super::unchanged(b, "the gradient", &gradient_on_device, &g)?;
        super::unchanged(b, "the sum of squares", &sum, &sum_host)?;
    }
    Ok(())
}
