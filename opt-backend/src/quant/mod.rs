//! Quantized weights: what a format means, written down once.
//!
//! Whatever a file calls its format (int8, GPTQ, NF4, q4_0, ...), its weights come to a backend as a [`Quantized`]: a
//! small unsigned code per element, a scale per output row and group of inputs, and perhaps a zero point beside each
//! scale.
//!
//! ```text
//! W[o, i] = scale[o, g(i)] * (code[o, i] - zero[o, g(i)])      integers
//! W[o, i] = scale[o, g(i)] * level[code[o, i]]                 a table of levels: NF4, FP4
//! ```
//!
//! Codes are handed over one a byte. Backends pack them; [`Quantized::regular`] puts them into the order that kernels
//! want, with groups of one size whatever the file had. The formulas above, in f32 and in this order of operations,
//! are the reference that kernels are compared to.

mod compute;
mod levels;
mod regular;

pub use compute::Compute;
pub use levels::{FP4, NF4};
pub use regular::Regular;

use crate::{Error, Result};
use ndarray::Array2;

/// What a code stands for.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum Levels {
    /// Integers of so many bits (2, 3, 4 or 8), from 0 on, minus the zero point.
    Integers {
        /// Bits of a code.
        bits: u32,
    },
    /// Sixteen numbers by code; there is no zero point. Most often [`NF4`] or [`FP4`].
    Table([f32; 16]),
}

/// Which code means 0, where codes are integers.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Zeros {
    /// The same in all groups: 128 for symmetric int8, 8 for symmetric int4. Ignored for tables.
    Same(u16),
    /// One for each scale, `[out, groups]`.
    Each(Array2<u16>),
}

/// Which inputs share a scale.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Groups {
    /// Runs of so many inputs; the last may be shorter. As long as a row, or longer, is one scale a row.
    Runs(usize),
    /// The group of each input (GPTQ's `g_idx`, where columns were quantized in another order).
    Index(Vec<u32>),
}

/// A weight `[out, in]` in few bits.
#[derive(Debug, Clone, PartialEq)]
pub struct Quantized {
    codes: Array2<u8>,
    scales: Array2<f32>,
    zeros: Zeros,
    levels: Levels,
    groups: Groups,
    outlier_threshold: Option<f32>,
}

impl Quantized {
    /// Puts a weight together: codes `[out, in]`, scales `[out, groups]`.
    ///
    /// ```
    /// use opt_backend::{ndarray::array, quant::{Groups, Levels, Quantized, Zeros}};
    ///
    /// let weight = Quantized::new(
    ///     array![[0, 8, 15, 9]],
    ///     array![[0.5, 0.25]],
    ///     Zeros::Same(8),
    ///     Levels::Integers { bits: 4 },
    ///     Groups::Runs(2),
    /// )?;
    /// assert_eq!(weight.dequantize(), array![[-4.0, 0.0, 1.75, 0.25]]);
    /// # Ok::<(), opt_backend::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`crate::ErrorKind::Shape`] if the parts do not fit each other, a code is not below the number of levels, a zero
    /// point is above it, or a scale is not finite.
    pub fn new(
        codes: Array2<u8>,
        scales: Array2<f32>,
        zeros: Zeros,
        levels: Levels,
        groups: Groups,
    ) -> Result<Self> {
        let fail = |message: String| Err(Error::shape("quantized weight", message));
        let (out, input) = codes.dim();
        let count = match levels {
            Levels::Integers { bits: bits @ (2 | 3 | 4 | 8) } => 1_usize << bits,
            Levels::Integers { bits } => {
                return fail(format!("expected codes of 2, 3, 4 or 8 bits, found {bits}"));
            }
            Levels::Table(_) => 16,
        };
        if let Some(code) = codes.iter().find(|code| usize::from(**code) >= count) {
            return fail(format!("expected codes below {count}, found {code}"));
        }
        let expected = match &groups {
            Groups::Runs(0) => return fail("expected groups of at least one input, found 0".to_owned()),
            Groups::Runs(size) => input.div_ceil(*size),
            Groups::Index(index) if index.len() != input => {
                return fail(format!("expected the groups of {input} inputs, found {}", index.len()));
            }
            // Groups that no input belongs to are allowed.
            Groups::Index(index) => scales.ncols().max(index.iter().max().map_or(0, |g| *g as usize + 1)),
        };
        if scales.dim() != (out, expected) {
            return fail(format!("expected scales [{out}, {expected}], found {:?}", scales.shape()));
        }
        if let Some(scale) = scales.iter().find(|scale| !scale.is_finite()) {
            return fail(format!("expected finite scales, found {scale}"));
        }
        if let Zeros::Each(zeros) = &zeros
            && zeros.dim() != scales.dim()
        {
            return fail(format!("expected zero points {:?}, found {:?}", scales.shape(), zeros.shape()));
        }
        // GPTQ's files go one past the largest code.
        let too_large = match &zeros {
            Zeros::Same(zero) => Some(zero).filter(|zero| usize::from(**zero) > count),
            Zeros::Each(zeros) => zeros.iter().find(|zero| usize::from(**zero) > count),
        };
        if let (Some(zero), Levels::Integers { .. }) = (too_large, levels) {
            return fail(format!("expected zero points of at most {count}, found {zero}"));
        }
        Ok(Self { codes, scales, zeros, levels, groups, outlier_threshold: None })
    }

    /// Asks backends that quantize activations too to keep those whose magnitude is at least `threshold` as they are
    /// (LLM.int8, arXiv 2208.07339; 6.0 there).
    #[must_use]
    pub fn keep_outliers(mut self, threshold: f32) -> Self {
        self.outlier_threshold = Some(threshold);
        self
    }

    /// `[out, in]`.
    pub fn shape(&self) -> [usize; 2] {
        self.codes.dim().into()
    }

    /// The codes, `[out, in]`.
    pub fn codes(&self) -> &Array2<u8> {
        &self.codes
    }

    /// The scales, `[out, groups]`.
    pub fn scales(&self) -> &Array2<f32> {
        &self.scales
    }

    /// The zero points.
    pub fn zeros(&self) -> &Zeros {
        &self.zeros
    }

    /// What codes stand for.
    pub fn levels(&self) -> Levels {
        self.levels
    }

    /// Which inputs share a scale.
    pub fn groups(&self) -> &Groups {
        &self.groups
    }

    /// Activations from this magnitude on are not to be quantized.
    pub fn outlier_threshold(&self) -> Option<f32> {
        self.outlier_threshold
    }

    /// The group of an input.
    fn group(&self, input: usize) -> usize {
        match &self.groups {
            Groups::Runs(size) => input / size,
            Groups::Index(index) => index[input] as usize,
        }
    }

    /// Writes row `out` of the weight, as many elements as it has inputs.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn dequantize_row(&self, out: usize, row: &mut [f32]) {
        for (input, (value, &code)) in row.iter_mut().zip(self.codes.row(out)).enumerate() {
            let group = self.group(input);
            let level = match self.levels {
                Levels::Table(table) => table[usize::from(code)],
                Levels::Integers { .. } => {
                    let zero = match &self.zeros {
                        Zeros::Same(zero) => *zero,
                        Zeros::Each(zeros) => zeros[[out, group]],
                    };
                    f32::from(code) - f32::from(zero)
                }
            };
            *value = self.scales[[out, group]] * level;
        }
    }

    /// The weight in f32: what a backend computes with, whatever it holds.
    pub fn dequantize(&self) -> Array2<f32> {
        let mut weight = Array2::zeros(self.codes.dim());
        for (out, mut row) in weight.outer_iter_mut().enumerate() {
            if let Some(row) = row.as_slice_mut() {
                self.dequantize_row(out, row);
            }
        }
        weight
    }
}
