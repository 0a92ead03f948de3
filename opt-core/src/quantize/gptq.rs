//! GPTQ (arXiv 2210.17323), with the steps and defaults of its authors' gptq.py.

use super::{
    Gram, QuantSpec,
    round::{Grid, Rule},
    rows::finite_row,
};
use crate::{Error, ErrorKind, Result, parallel};
use ndarray::{Array2, ArrayView2, ArrayViewMut2, Axis, linalg::general_mat_mul, s};
use opt_backend::{
    HostMatrix,
    quant::{Groups, Levels, Quantized, Zeros},
};
use serde::{Deserialize, Serialize};
use std::sync::atomic::{AtomicBool, Ordering};

/// The choices of GPTQ beside those of a [`QuantSpec`].
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct GptqOptions {
    /// Quantizes the columns in the order of their inputs' energy, the largest first (activation order). With groups,
    /// unless [`GptqOptions::static_groups`], the inputs of a group then lie anywhere in the row.
    pub desc_act: bool,
    /// Takes the scales of all groups from the weights as they were, so that groups stay runs under
    /// [`GptqOptions::desc_act`].
    pub static_groups: bool,
    /// Computes the inputs of a layer's later linears with the quantized earlier ones of the same layer. Needs four
    /// passes over the calibration text instead of one.
    pub true_sequential: bool,
    /// Added to the diagonal of the Hessian, as a share of its mean.
    pub damping: f64,
    /// Quantizes with f32 scales even where f16 would do.
    pub f32_scales: bool,
}

impl Default for GptqOptions {
    fn default() -> Self {
        Self {
            desc_act: false,
            static_groups: false,
            true_sequential: false,
            damping: 0.01,
            f32_scales: false,
        }
    }
}

impl GptqOptions {
    /// Sets [`GptqOptions::desc_act`].
    #[must_use]
    pub fn desc_act(self, desc_act: bool) -> Self {
        Self { desc_act, ..self }
    }

    /// Sets [`GptqOptions::static_groups`].
    #[must_use]
    pub fn static_groups(self, static_groups: bool) -> Self {
        Self { static_groups, ..self }
    }

    /// Sets [`GptqOptions::true_sequential`].
    #[must_use]
    pub fn true_sequential(self, true_sequential: bool) -> Self {
        Self { true_sequential, ..self }
    }

    /// Sets [`GptqOptions::damping`].
    #[must_use]
    pub fn damping(self, damping: f64) -> Self {
        Self { damping, ..self }
    }

    /// Sets [`GptqOptions::f32_scales`].
    #[must_use]
    pub fn f32_scales(self, f32_scales: bool) -> Self {
        Self { f32_scales, ..self }
    }

    /// # Errors
    /// [`ErrorKind::Option`] for a format without integers or a damping that is not above 0.
    pub(super) fn check(&self, spec: &QuantSpec) -> Result<()> {
        let fail = |message: String| Err(Error::new(ErrorKind::Option, message));
        spec.validate()?;
        if !spec.format.is_integer() {
            return fail(format!("GPTQ: expected an integer format, found {}", spec.format));
        }
        if !(self.damping > 0.0 && self.damping.is_finite()) {
            return fail(format!("damping: expected a number above 0, found {}", self.damping));
        }
        Ok(())
    }
}

/// Columns whose errors are gathered before the rest of the matrix is told of them.
const BLOCK: usize = 128;

/// Quantizes a weight `[out, in]` so that its products with given inputs change least: column by column, each column's
/// rounding error made up for in the columns that follow.
///
/// `gram` is the sum over the inputs; `name` is for messages. Inputs that were always 0 get the weight 0. Groups take
/// their scales from the weights as the steps before left them at the start of the group's block of 128 columns. Scales
/// are f16 numbers where that can be, as [`QuantSpec::quantize`] has them. In symmetric groups without a negative weight
/// gptq.py spans 0..max over all codes around a zero point in the middle, and clips half of them; here they are spanned
/// as all others.
///
/// ```
/// use opt_core::{ndarray::array, quantize::{GptqOptions, Gram, QuantFormat, QuantSpec, gptq}};
/// use opt_backend::HostMatrix;
///
/// let mut gram = Gram::new(2);
/// gram.add(array![[1.0, 0.9], [0.5, 0.6], [-1.0, -1.1]].view())?;
/// let spec = QuantSpec::new(QuantFormat::Int3).per_row().zero_points(true);
/// let weight = array![[0.3_f32, -0.8]];
/// let quantized = gptq("fc1", HostMatrix::F32(weight.view()), &gram, &spec, &GptqOptions::default())?;
/// assert_eq!(quantized.shape(), [1, 2]);
/// # Ok::<(), opt_core::Error>(())
/// ```
///
/// # Errors
/// [`ErrorKind::Option`] for choices that do not fit each other or the weight, [`ErrorKind::Checkpoint`] for weights or
/// inputs that are not finite.
pub fn gptq(
    name: &str,
    weight: HostMatrix<'_>,
    gram: &Gram,
    spec: &QuantSpec,
    options: &GptqOptions,
) -> Result<Quantized> {
    solve(weight, gram, spec, options).map_err(|e| e.at(format_args!("tensor {name}")))
}

fn solve(weight: HostMatrix<'_>, gram: &Gram, spec: &QuantSpec, options: &GptqOptions) -> Result<Quantized> {
    options.check(spec)?;
    let [out, inputs] = weight.shape();
    let group = spec.groups(inputs)?;
    if gram.inputs() != inputs {
        let message = format_args!("expected the sum over inputs of width {inputs}, found {}", gram.inputs());
        return Err(Error::new(ErrorKind::Option, message));
    }
    let mut original = Array2::zeros((out, inputs));
    for (o, mut row) in original.outer_iter_mut().enumerate() {
        if let Some(row) = row.as_slice_mut() {
            finite_row(&weight, o, row)?;
        }
    }
    let prepared = Prepared::new(original, gram, options)?;
    let job = Job { prepared: &prepared, spec, options, group };
    for half in [true, false] {
        if half && options.f32_scales {
            continue;
        }
        if let Some(quantized) = job.run(half)? {
            return Ok(quantized);
        }
    }
    Err(Error::new(ErrorKind::Checkpoint, "expected scales that f32 can hold"))
}

/// A weight and the factor of its inverse Hessian, columns in the order of the work.
struct Prepared {
    /// In the order of the file.
    original: Array2<f32>,
    dead: Vec<bool>,
    /// The column that each step works on.
    order: Vec<usize>,
    /// Upper triangular U with Uᵀ U = H⁻¹, `[in, in]`, steps.
    factor: Array2<f32>,
}

impl Prepared {
    fn new(original: Array2<f32>, gram: &Gram, options: &GptqOptions) -> Result<Self> {
        let sum = gram.full();
        let inputs = sum.nrows();
        let mut diagonal: Vec<f32> = sum.diag().to_vec();
        if sum.iter().any(|x| !x.is_finite()) {
            return Err(Error::new(ErrorKind::Checkpoint, "expected finite inputs, found infinite or NaN"));
        }
        let dead: Vec<bool> = diagonal.iter().map(|d| *d == 0.0).collect();
        // Any number but 0 will do for an input that never was: it is on no row but its own. GPTQ takes 1 on its scale of
        // H = 2 / n Σ x xᵀ over n sequences, which does count in the mean of the damping.
        let unit = gram.samples().max(1) as f32 / 2.0;
        diagonal.iter_mut().for_each(|d| {
            if *d == 0.0 {
                *d = unit
            }
        });
        let mut order: Vec<usize> = (0..inputs).collect();
        if options.desc_act {
            let energy = |column: &usize| diagonal.get(*column).copied().unwrap_or_default();
            order.sort_by(|a, b| energy(b).total_cmp(&energy(a)));
        }
        let mean = diagonal.iter().map(|d| f64::from(*d)).sum::<f64>() / inputs.max(1) as f64;
        let factor = inverse_factor(&sum, &diagonal, &order, options.damping * mean)?;
        Ok(Self { original, dead, order, factor })
    }
}

/// U, upper triangular, with Uᵀ U = H⁻¹, where H is `sum` with another diagonal, damped, rows and columns in `order`.
///
/// With J the reversal of the order and L Lᵀ = J H J, U is J L⁻¹ J: one factorization and one triangular inverse, where
/// the definition (factor, invert, factor) takes three steps of that cost and loses more to rounding.
fn inverse_factor(sum: &Array2<f32>, diagonal: &[f32], order: &[usize], damp: f64) -> Result<Array2<f32>> {
    use faer::{
        Mat, Par, Side,
        linalg::{solvers::Llt, triangular_inverse::invert_lower_triangular},
    };
    let n = order.len();
    let reversed: Vec<usize> = order.iter().rev().copied().collect();
    let at = |i: usize, j: usize| {
        let (Some(&a), Some(&b)) = (reversed.get(i), reversed.get(j)) else { return 0.0 };
        if a == b {
            return f64::from(diagonal.get(a).copied().unwrap_or_default()) + damp;
        }
        f64::from(sum.get((a, b)).copied().unwrap_or_default())
    };
    let hessian = Mat::from_fn(n, n, at);
    let factored = Llt::new(hessian.as_ref(), Side::Lower).map_err(|_| {
        let message =
            "the Hessian of the inputs is not positive definite; expected more damping or calibration text";
        Error::new(ErrorKind::Option, message)
    })?;
    drop(hessian);
    let mut inverse = Mat::<f64>::zeros(n, n);
    invert_lower_triangular(inverse.as_mut(), factored.L(), Par::Seq);
    drop(factored);
    let upper = |(i, j): (usize, usize)| if j < i { 0.0 } else { *inverse.get(n - 1 - i, n - 1 - j) as f32 };
    Ok(Array2::from_shape_fn((n, n), upper))
}

struct Job<'a> {
    prepared: &'a Prepared,
    spec: &'a QuantSpec,
    options: &'a GptqOptions,
    group: usize,
}

/// Some rows: weights as they are changed, and what becomes of them.
struct Band<'a> {
    first: usize,
    weights: ArrayViewMut2<'a, f32>,
    codes: ArrayViewMut2<'a, u8>,
    scales: ArrayViewMut2<'a, f32>,
    zeros: ArrayViewMut2<'a, u16>,
}

impl Job<'_> {
    /// All rows, which do not depend on each other. Nothing if scales are to be f16 and cannot.
    fn run(&self, half: bool) -> Result<Option<Quantized>> {
        let Prepared { original, dead, order, .. } = self.prepared;
        let (out, inputs) = original.dim();
        let mut weights = original.select(Axis(1), order);
        for (mut column, from) in weights.axis_iter_mut(Axis(1)).zip(order) {
            if dead.get(*from).copied().unwrap_or_default() {
                column.fill(0.0);
            }
        }
        let groups = inputs.div_ceil(self.group);
        let mut codes = Array2::<u8>::zeros((out, inputs));
        let mut scales = Array2::<f32>::zeros((out, groups));
        let mut zeros = Array2::<u16>::zeros((out, groups));
        // Small enough that threads share the work evenly, large enough for the products.
        let rows = out.div_ceil(16).clamp(1, 256);
        let impossible = AtomicBool::new(false);
        let bands = weights
            .axis_chunks_iter_mut(Axis(0), rows)
            .zip(codes.axis_chunks_iter_mut(Axis(0), rows))
            .zip(scales.axis_chunks_iter_mut(Axis(0), rows))
            .zip(zeros.axis_chunks_iter_mut(Axis(0), rows))
            .enumerate()
            .map(|(index, (((weights, codes), scales), zeros))| Band {
                first: index * rows,
                weights,
                codes,
                scales,
                zeros,
            });
        parallel::for_each(parallel::cores(), bands, |mut band| {
            if impossible.load(Ordering::Relaxed) || self.band(&mut band, half).is_none() {
                impossible.store(true, Ordering::Relaxed);
            }
        });
        if impossible.into_inner() {
            return Ok(None);
        }
        // Codes and groups in the order of the file.
        let mut places = vec![0; inputs];
        order.iter().enumerate().for_each(|(step, column)| {
            if let Some(place) = places.get_mut(*column) {
                *place = step;
            }
        });
        let anywhere = self.options.desc_act && groups > 1 && !self.options.static_groups;
        let codes = if self.options.desc_act { codes.select(Axis(1), &places) } else { codes };
        let groups = if anywhere {
            Groups::Index(places.iter().map(|step| (step / self.group) as u32).collect())
        } else {
            Groups::Runs(self.group)
        };
        let bits = self.spec.format.bits();
        let zeros = if self.spec.zero_points { Zeros::Each(zeros) } else { Zeros::Same(1 << (bits - 1)) };
        Ok(Some(Quantized::new(codes, scales, zeros, Levels::Integers { bits }, groups)?))
    }

    fn rule(&self) -> Rule {
        if self.spec.zero_points { Rule::MinMax } else { Rule::Gptq }
    }

    fn fit(&self, weights: &[f32], half: bool) -> Option<Grid> {
        Grid::fit(weights, self.spec.format.bits(), self.rule(), half)
    }

    /// The grids that are known before the work: those of whole rows and of static groups, `[rows][groups]`.
    fn known_grids(&self, band: &Band<'_>, half: bool) -> Option<Vec<Vec<Grid>>> {
        let inputs = band.weights.ncols();
        let dead = &self.prepared.dead;
        let rows = self.prepared.original.outer_iter().skip(band.first).take(band.weights.nrows());
        rows.map(|row| {
            let mut row = row.to_vec();
            if self.group < inputs {
                if !self.options.static_groups {
                    return Some(Vec::new());
                }
                // The order in gptq.py: scales of rows are found before weights of dead inputs are dropped, scales of
                // groups after.
                row.iter_mut().zip(dead).for_each(|(w, dead)| {
                    if *dead {
                        *w = 0.0
                    }
                });
            }
            row.chunks(self.group).map(|weights| self.fit(weights, half)).collect()
        })
        .collect()
    }

    fn band(&self, band: &mut Band<'_>, half: bool) -> Option<()> {
        let (rows, inputs) = band.weights.dim();
        let known = self.known_grids(band, half)?;
        let Prepared { order, factor, .. } = self.prepared;
        let mut grids: Vec<Option<Grid>> = vec![None; rows];
        let mut errors = Array2::<f32>::zeros((rows, BLOCK));
        for start in (0..inputs).step_by(BLOCK) {
            let end = inputs.min(start + BLOCK);
            let block = factor.slice(s![start..end, start..end]);
            for row in 0..rows {
                let all = band.weights.row(row).to_vec();
                let mut current = all.get(start..end)?.to_vec();
                for (i, step) in (start..end).enumerate() {
                    let known = known.get(row)?;
                    let place =
                        if self.options.static_groups { *order.get(step)? } else { step } / self.group;
                    let grid = match known.get(place) {
                        Some(grid) => *grid,
                        None if step % self.group == 0 => {
                            self.fit(all.get(step..inputs.min(step + self.group))?, half)?
                        }
                        None => (*grids.get(row)?)?,
                    };
                    *grids.get_mut(row)? = Some(grid);
                    *band.scales.get_mut((row, place))? = grid.scale;
                    *band.zeros.get_mut((row, place))? = grid.zero as u16;
                    let weight = *current.get(i)?;
                    let code = grid.code(weight);
                    *band.codes.get_mut((row, step))? = code as u8;
                    let following = block.row(i);
                    let following = following.as_slice()?.get(i..)?;
                    let error = (weight - grid.value(code)) / following.first()?;
                    current.get_mut(i..)?.iter_mut().zip(following).for_each(|(w, u)| *w -= error * u);
                    *errors.get_mut((row, i))? = error;
                }
            }
            self.pass_on(&errors.slice(s![.., ..end - start]), &mut band.weights, start, end);
        }
        Some(())
    }

    /// Makes up in the columns from `end` on for the errors of those from `start` on.
    fn pass_on(
        &self,
        errors: &ArrayView2<'_, f32>,
        weights: &mut ArrayViewMut2<'_, f32>,
        start: usize,
        end: usize,
    ) {
        let factor = self.prepared.factor.slice(s![start..end, end..]);
        general_mat_mul(-1.0, errors, &factor, 1.0, &mut weights.slice_mut(s![.., end..]));
    }
}
