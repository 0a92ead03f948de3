//! How close is close enough.

use super::{Outcome, ensure, fail};
use crate::{DType, Error, ErrorKind};
use ndarray::{Array2, ArrayView, ArrayView2, Dimension};

/// How far a result may be from the oracle's. Both bounds must hold.
///
/// | computed in | max \|difference\| / max(1, max \|value\|) | NMSE |
/// |---|---|---|
/// | f32 | 2e-5 | 1e-10 |
/// | f32 on a GPU, [`Tolerance::GPU_F32`] | 6e-5 | 1e-9 |
/// | int16 activations, [`Tolerance::INT16_ACTIVATIONS`] | 1e-2 | 5e-5 |
/// | models with bf16 activations, [`Tolerance::BF16_ACTIVATIONS`] | 6e-3 | 1.5e-5 |
/// | int8 activations, [`Tolerance::INT8_ACTIVATIONS`] | 5e-2 | 1e-3 |
/// | f16 | 5e-3 | 1e-5 |
/// | bf16 | 4e-2 | 5e-4 |
///
/// NMSE is Σ (found - expected)² / Σ expected². It catches what is wrong a little everywhere: the tanh form of GELU
/// in place of the exact one shows as 5e-8. Of fewer than 32 numbers it says little (one that happens to lie near
/// zero has a large relative error), so there only the first bound applies.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Tolerance {
    /// Bound of max |difference| / max(1, max |value|).
    pub max: f64,
    /// Bound of the normalised mean square error.
    pub nmse: f64,
}

impl Tolerance {
    /// For f32 in shading languages, which let `exp`, division and the like be off by some units in the last place.
    pub const GPU_F32: Self = Self { max: 6e-5, nmse: 1e-9 };

    /// For products whose activations are rounded to int16, per row and group of at most 32, and whose levels, where
    /// weights have such, are rounded to int8. (Of integer weights the NMSE is below 1e-8.)
    pub const INT16_ACTIVATIONS: Self = Self { max: 1e-2, nmse: 5e-5 };

    /// For whole models whose activations are rounded to bf16 as they meet weights of bf16, and whose sums are f32. Half
    /// a unit in the last of eight bits gives an NMSE of 3e-6 for one product; the suite's models have been seen with
    /// 7.4e-6 and 2.9e-3, and the bounds are twice that.
    pub const BF16_ACTIVATIONS: Self = Self { max: 6e-3, nmse: 1.5e-5 };

    /// For products whose activations are rounded to int8, per row and group of at most 32.
    pub const INT8_ACTIVATIONS: Self = Self { max: 5e-2, nmse: 1e-3 };

    /// The tolerance for results computed and held in `dtype`.
    pub const fn of(dtype: DType) -> Self {
        match dtype {
            DType::F32 => Self { max: 2e-5, nmse: 1e-10 },
            DType::F16 => Self { max: 5e-3, nmse: 1e-5 },
            DType::BF16 => Self { max: 4e-2, nmse: 5e-4 },
        }
    }

    /// Compares two arrays of the same shape.
    pub(super) fn compare<D: Dimension>(
        self,
        what: &str,
        found: ArrayView<'_, f32, D>,
        expected: ArrayView<'_, f32, D>,
    ) -> Outcome {
        let shapes = (found.shape().to_vec(), expected.shape().to_vec());
        ensure(
            shapes.0 == shapes.1,
            format_args!("{what}: expected the shape {:?}, found {:?}", shapes.1, shapes.0),
        )?;
        let (mut largest, mut at, mut scale) = (0.0, 0, 1.0f64);
        let (mut squares, mut differences) = (0.0, 0.0);
        for (i, (&f, &e)) in found.iter().zip(&expected).enumerate() {
            let (f, e) = (f64::from(f), f64::from(e));
            if !f.is_finite() {
                return fail(format_args!(
                    "{what}: expected {e}, found {f} as element {i} of {:?}",
                    shapes.1
                ));
            }
            scale = scale.max(e.abs());
            squares += e * e;
            differences += (f - e) * (f - e);
            if (f - e).abs() > largest {
                (largest, at) = ((f - e).abs(), i);
            }
        }
        let nmse = if found.len() < 32 || squares == 0.0 { 0.0 } else { differences / squares };
        let value = |a: &ArrayView<'_, f32, D>| a.iter().nth(at).copied().unwrap_or(f32::NAN);
        ensure(
            largest <= self.max * scale && nmse <= self.nmse,
            format_args!(
                "{what}: max |difference| {largest:.2e} (allowed {:.2e}), NMSE {nmse:.2e} (allowed {:.0e}); \
                 expected {}, found {} as element {at} of {:?}",
                self.max * scale,
                self.nmse,
                value(&expected),
                value(&found),
                shapes.1
            ),
        )
    }

    /// Compares with each of several results that are all right; the failure, if any, tells of the first.
    pub(super) fn compare_any(
        self,
        what: &str,
        found: ArrayView2<'_, f32>,
        expected: &[Array2<f32>],
    ) -> Outcome {
        let mut first = None;
        for expected in expected {
            match self.compare(what, found, expected.view()) {
                Ok(()) => return Ok(()),
                failed => first = first.or(Some(failed)),
            }
        }
        first.unwrap_or(Ok(()))
    }

    /// Compares two sequences of numbers.
    pub(super) fn compare_slices(self, what: &str, found: &[f32], expected: &[f32]) -> Outcome {
        self.compare(what, ndarray::aview1(found), ndarray::aview1(expected))
    }
}

/// Fails unless the arrays are equal bit for bit (0 and -0 differ, NaN equals itself).
pub(super) fn same_bits<D: Dimension>(
    what: &str,
    found: ArrayView<'_, f32, D>,
    expected: ArrayView<'_, f32, D>,
) -> Outcome {
    let shapes = (found.shape(), expected.shape());
    ensure(
        shapes.0 == shapes.1,
        format_args!("{what}: expected the shape {:?}, found {:?}", shapes.1, shapes.0),
    )?;
    let differing = found.iter().zip(&expected).filter(|(f, e)| f.to_bits() != e.to_bits());
    let number = differing.clone().count();
    match differing.into_iter().next() {
        None => Ok(()),
        Some((f, e)) => fail(format_args!(
            "{what}: {number} of {} elements are not bit-equal; the first: expected {e:e}, found {f:e}",
            found.len()
        )),
    }
}

/// Fails unless the call failed as one whose operands do not fit.
pub(super) fn refused<T>(what: &str, result: Result<T, Error>) -> Outcome {
    match result {
        Err(error) if error.kind() == ErrorKind::Shape => Ok(()),
        Err(error) => fail(format_args!("{what}: expected a Shape error, found {:?}: {error}", error.kind())),
        Ok(_) => fail(format_args!("{what}: expected a Shape error, found success")),
    }
}
