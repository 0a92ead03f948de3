//! Steps of AdamW with moments in eight bits.
//!
//! Where a moment is about half-way between two levels, rounding decides which of them its code is of, and either will
//! do. So that this does not add up over the steps, the oracle takes each from the moments that the backend has.

use super::optimizers::{CLIPS, SHAPES, clipping, new_gradient};
use crate::conformance::{
    Outcome, Run, Tolerance,
    data::{Data, read},
    ensure,
};
use crate::{
    AdamW, Clip, Moments8, Train,
    moments::{BLOCK, DynamicMap, SIGNED, UNSIGNED},
    oracle::gradient,
};
use ndarray::{Array2, ArrayView1, Zip};

pub(super) fn run<B: Train>(run: &mut Run<'_, B>) {
    for shape in SHAPES.into_iter().filter(|[_, width]| run.row_fits(*width)).collect::<Vec<_>>() {
        for clip in CLIPS {
            for weight_decay in [0.0, 0.1] {
                let case = format!("{shape:?}, clip {clip:?}, decay {weight_decay}");
                run.case("adamw8", &case, |b, data| adamw8(b, data, shape, clip, weight_decay));
            }
        }
    }
}

fn adamw8<B: Train>(
    b: &B,
    data: &mut Data,
    shape: [usize; 2],
    clip: Option<f32>,
    weight_decay: f32,
) -> Outcome {
    let mut param = data.matrix(shape[0], shape[1]);
    let mut on_device = b.upload(param.view())?;
    let mut held =
        Moments8::shapes(shape).try_map(|shape| Ok::<_, crate::Error>(Array2::<f32>::zeros(shape)))?;
    let mut moments = Moments8::shapes(shape).try_map(|shape| b.zeros(shape))?;
    for step in [1, 2, 3, 100_000] {
        let eps = if step == 2 { 1e-2 } else { 1e-6 };
        let adam = AdamW { lr: 0.05, beta1: 0.9, beta2: 0.99, eps, weight_decay, step };
        let mut g = new_gradient(data, shape);
        if step < 3 {
            // A block of zeros, which then is none.
            g.iter_mut().take(BLOCK).for_each(|g| *g = 0.0);
        }
        let gradient_on_device = b.upload(g.view())?;
        let (sum, sum_host, factor) = clipping(b, &gradient_on_device, clip)?;
        let clip = clip.map(|max_norm| Clip { sum_squares: &sum, max_norm });
        b.adamw8(&mut on_device, &gradient_on_device, &mut moments, adam, clip)?;

        let [mut first, mut second] = gradient::decode_moments(&held, shape);
        // What is rounded on the way to a moment is of the size of its terms.
        let terms = Zip::from(&first)
            .and(&g)
            .map_collect(|m, g| (adam.beta1 * m).abs() + ((1.0 - adam.beta1) * g * factor).abs());
        gradient::adamw(&mut param, g.view(), [&mut first, &mut second], adam, factor);
        let tolerance = data.tolerance();
        tolerance.compare(&format!("step {step}"), read(b, &on_device)?.view(), param.view())?;
        let Moments8 { first: codes, second: second_codes, scales } =
            moments.parts_of(|part| read(b, part))?;
        let coded =
            |what: &str, map, codes: &Array2<f32>, scales, moment: &Array2<f32>, terms: &Array2<f32>| {
                Coded { map, tolerance }.check(what, codes, scales, [moment, terms])
            };
        coded(&format!("first moment after step {step}"), &SIGNED, &codes, scales.column(0), &first, &terms)?;
        let what = format!("second moment after step {step}");
        coded(&what, &UNSIGNED, &second_codes, scales.column(1), &second, &second)?;
        held = Moments8 { first: codes, second: second_codes, scales };
        super::unchanged(b, "the gradient", &gradient_on_device, &g)?;
        super::unchanged(b, "the sum of squares", &sum, &sum_host)?;
    }
    Ok(())
}

/// How a moment is coded.
struct Coded<'a> {
    map: &'a DynamicMap,
    tolerance: Tolerance,
}

impl Coded<'_> {
    /// Fails unless the codes are of the levels next to the moment, which is the sum of numbers as large as `terms`.
    fn check(
        &self,
        what: &str,
        codes: &Array2<f32>,
        scales: ArrayView1<'_, f32>,
        [moment, terms]: [&Array2<f32>; 2],
    ) -> Outcome {
        let [moment, terms]: [Vec<f32>; 2] = [moment, terms].map(|m| m.iter().copied().collect());
        let blocks = moment.chunks(BLOCK).zip(terms.chunks(BLOCK));
        for (i, (values, terms)) in blocks.enumerate() {
            self.check_block(&format!("{what}, block {i}"), codes.row(i), scales[i], [values, terms])?;
        }
        Ok(())
    }

    fn check_block(
        &self,
        what: &str,
        codes: ArrayView1<'_, f32>,
        scale: f32,
        [values, terms]: [&[f32]; 2],
    ) -> Outcome {
        let most = |values: &[f32]| values.iter().fold(0.0_f64, |most, v| most.max(f64::from(v.abs())));
        let expected = most(values);
        ensure(
            (f64::from(scale) - expected).abs() <= self.tolerance.max * most(terms),
            format_args!("{what}: expected the scale {expected:e}, found {scale:e}"),
        )?;
        let digits: Vec<u8> =
            codes.iter().flat_map(|v| (*v as u32).to_le_bytes().into_iter().take(3)).collect();
        let whole = codes.iter().all(|v| (*v as u32) < 1 << 24 && *v == *v as u32 as f32);
        ensure(whole, format_args!("{what}: expected integers of 24 bits, found {codes}"))?;
        let rest = &digits[values.len()..];
        ensure(
            rest.iter().all(|digit| *digit == 0),
            format_args!("{what}: expected 0 for what is no element, found {rest:?}"),
        )?;
        // Whatever its codes, a block of scale 0 is 0.
        if expected == 0.0 {
            return Ok(());
        }
        for (i, ((digit, value), term)) in digits.iter().zip(values).zip(terms).enumerate() {
            let wanted = f64::from(*value) / expected;
            let level = |code: u8| f64::from(self.map.levels[usize::from(code)]);
            let nearest = level(self.map.code(wanted as f32));
            let slack = self.tolerance.max * (wanted.abs() + f64::from(*term) / expected);
            ensure(
                (level(*digit) - wanted).abs() <= (nearest - wanted).abs() + slack,
                format_args!(
                    "{what}, element {i} of {}: expected {wanted:e} of the scale as {nearest:e}, found code {digit}, {:e}",
                    values.len(),
                    level(*digit)
                ),
            )?;
        }
        Ok(())
    }
}
