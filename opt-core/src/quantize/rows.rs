//! Quantizing the rows of a weight, on all cores.

use crate::{Error, ErrorKind, Result, parallel};
use ndarray::Array2;
use opt_backend::HostMatrix;
use std::sync::{Mutex, PoisonError};

/// Rows that a thread takes at once.
const SHARE: usize = 16;
/// Weights of fewer elements are not worth a thread.
const SMALL: usize = 1 << 16;

/// What rounding makes of a weight `[out, in]`.
pub(super) struct Rounded {
    /// `[out, in]`
    pub(super) codes: Array2<u8>,
    /// `[out, groups]`
    pub(super) scales: Array2<f32>,
    /// `[out, groups]`
    pub(super) zeros: Array2<u16>,
}

/// A row of [`Rounded`], or several, to be filled.
pub(super) struct Rows<'a> {
    pub(super) codes: &'a mut [u8],
    pub(super) scales: &'a mut [f32],
    pub(super) zeros: &'a mut [u16],
}

impl<'a> Rows<'a> {
    /// Parts of so many rows of `inputs` codes and `groups` groups.
    fn split(self, rows: usize, [inputs, groups]: [usize; 2]) -> impl Iterator<Item = Rows<'a>> {
        let parts = self.codes.chunks_mut(rows * inputs).zip(self.scales.chunks_mut(rows * groups));
        let parts = parts.zip(self.zeros.chunks_mut(rows * groups));
        parts.map(|((codes, scales), zeros)| Rows { codes, scales, zeros })
    }
}

/// Lets `work` fill each row from the weights in it, which are finite.
///
/// # Errors
/// [`ErrorKind::Checkpoint`] for the first row with a weight that is not finite.
pub(super) fn each_row(
    weight: &HostMatrix<'_>,
    group: usize,
    work: impl Fn(&[f32], Rows<'_>) + Sync,
) -> Result<Rounded> {
    let [out, inputs] = weight.shape();
    let groups = inputs.div_ceil(group);
    let mut codes = vec![0; out * inputs];
    let (mut scales, mut zeros) = (vec![0.0; out * groups], vec![0; out * groups]);
    let failed: Mutex<Option<(usize, Error)>> = Mutex::new(None);
    let some_rows = |(first, share): (usize, Rows<'_>)| {
        let mut values = vec![0.0; inputs];
        for (i, target) in share.split(1, [inputs, groups]).enumerate() {
            let row = first + i;
            if let Err(error) = finite_row(weight, row, &mut values) {
                let mut failed = failed.lock().unwrap_or_else(PoisonError::into_inner);
                if failed.as_ref().is_none_or(|(earliest, _)| row < *earliest) {
                    *failed = Some((row, error));
                }
                return;
            }
            work(&values, target);
        }
    };
    if out * inputs > 0 {
        let all = Rows { codes: &mut codes, scales: &mut scales, zeros: &mut zeros };
        let shares = all.split(SHARE, [inputs, groups]).enumerate().map(|(i, share)| (i * SHARE, share));
        let threads = if out * inputs < SMALL { 1 } else { parallel::cores() };
        parallel::for_each(threads, shares, some_rows);
    }
    if let Some((_, error)) = failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
        return Err(error);
    }
    let misfit = |e| Error::because(ErrorKind::Checkpoint, "a weight's codes", e);
    Ok(Rounded {
        codes: Array2::from_shape_vec((out, inputs), codes).map_err(misfit)?,
        scales: Array2::from_shape_vec((out, groups), scales).map_err(misfit)?,
        zeros: Array2::from_shape_vec((out, groups), zeros).map_err(misfit)?,
    })
}

/// Copies row `row` of a weight, all of which must be finite.
pub(super) fn finite_row(weight: &HostMatrix<'_>, row: usize, out: &mut [f32]) -> Result<()> {
    weight.row_f32(row, out);
    match out.iter().position(|w| !w.is_finite()) {
        None => Ok(()),
        Some(column) => {
            let found = out.get(column).copied().unwrap_or(f32::NAN);
            let message = format_args!("expected finite weights, found {found} at [{row}, {column}]");
            Err(Error::new(ErrorKind::Checkpoint, message))
        }
    }
}
