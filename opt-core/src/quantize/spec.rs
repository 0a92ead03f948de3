use super::{float4, round};
use crate::{
    Error, ErrorKind, Result,
    config::{OptConfig, is_linear},
};
use opt_backend::{HostMatrix, quant::Quantized};
use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr};

/// The number formats that weights can be quantized to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum QuantFormat {
    /// Integers of 8 bits.
    Int8,
    /// Integers of 4 bits.
    Int4,
    /// Integers of 3 bits.
    Int3,
    /// Integers of 2 bits.
    Int2,
    /// 4-bit NormalFloat (QLoRA, arXiv 2305.14314).
    Nf4,
    /// The 4-bit float of bitsandbytes.
    Fp4,
}

impl QuantFormat {
    const ALL: [Self; 6] = [Self::Int8, Self::Int4, Self::Int3, Self::Int2, Self::Nf4, Self::Fp4];

    /// Bits of a code.
    pub fn bits(self) -> u32 {
        match self {
            Self::Int8 => 8,
            Self::Int4 | Self::Nf4 | Self::Fp4 => 4,
            Self::Int3 => 3,
            Self::Int2 => 2,
        }
    }

    /// Whether codes are integers, and not numbers of a table of levels.
    pub fn is_integer(self) -> bool {
        !matches!(self, Self::Nf4 | Self::Fp4)
    }

    /// Integers of so many bits.
    ///
    /// # Errors
    /// [`ErrorKind::Option`] for others than 2, 3, 4 and 8.
    pub fn integer(bits: u32) -> Result<Self> {
        let found = Self::ALL.into_iter().find(|format| format.is_integer() && format.bits() == bits);
        found.ok_or_else(|| {
            Error::new(ErrorKind::Option, format_args!("expected codes of 2, 3, 4 or 8 bits, found {bits}"))
        })
    }

    fn name(self) -> &'static str {
        match self {
            Self::Int8 => "int8",
            Self::Int4 => "int4",
            Self::Int3 => "int3",
            Self::Int2 => "int2",
            Self::Nf4 => "nf4",
            Self::Fp4 => "fp4",
        }
    }
}

impl fmt::Display for QuantFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for QuantFormat {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|format| format.name() == text).ok_or_else(|| {
            let names = Self::ALL.map(Self::name).join(", ");
            let message = format_args!("quantization format: expected one of {names}, found {text:?}");
            Error::new(ErrorKind::Option, message)
        })
    }
}

/// What happens to the token table (and to an LM head that is not tied to it).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum TableFormat {
    /// Symmetric int8, in groups as the linears have where those are int8 too, else of 32.
    Int8,
    /// It stays as it is.
    Keep,
}

/// How weights are quantized: those of the six linears of each decoder layer, and by choice the token table.
///
/// `project_in`, `project_out` and the position table stay as they are, as GPTQ and bitsandbytes leave them.
///
/// ```
/// use opt_core::{Load, Opt, quantize::QuantSpec};
///
/// let load = Load::default().quantize(QuantSpec::int4().group_size(64).zero_points(true));
/// let opt = Opt::load("../models/opt-novels", load)?;
/// # Ok::<(), opt_core::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct QuantSpec {
    /// What codes are.
    pub format: QuantFormat,
    /// Inputs that share a scale, a divisor of each linear's inputs; `None` is one scale a row.
    pub group_size: Option<usize>,
    /// A zero point beside each scale, so that codes span from the least to the largest weight of a group; without,
    /// codes lie symmetrically around 0. Integers only.
    pub zero_points: bool,
    /// Rounds the scales of nf4 and fp4 to what bitsandbytes' double quantization leaves of them in 8 bits. This is for
    /// results like its; scales are held and written in f32 all the same.
    pub double_quant: bool,
    /// What happens to the token table.
    pub table: TableFormat,
    /// Where activations are quantized too, those of at least this magnitude are kept as they are, and multiplied by
    /// weights in f32 (LLM.int8, arXiv 2208.07339: 6.0). For models of some billions of parameters, whose activations
    /// have outliers. Int8 only; `None` keeps none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outlier_threshold: Option<f32>,
}

impl QuantSpec {
    /// The defaults of a format: integers symmetric in groups of 32 with the token table in int8; nf4 and fp4 in blocks
    /// of 64 with the token table as it is, as bitsandbytes has them.
    pub fn new(format: QuantFormat) -> Self {
        let integer = format.is_integer();
        Self {
            format,
            group_size: Some(if integer { 32 } else { 64 }),
            zero_points: false,
            double_quant: false,
            table: if integer { TableFormat::Int8 } else { TableFormat::Keep },
            outlier_threshold: None,
        }
    }

    /// [`QuantFormat::Int8`], symmetric, groups of 32, the token table as well.
    pub fn int8() -> Self {
        Self::new(QuantFormat::Int8)
    }

    /// [`QuantFormat::Int4`], symmetric, groups of 32, the token table in int8.
    pub fn int4() -> Self {
        Self::new(QuantFormat::Int4)
    }

    /// [`QuantFormat::Nf4`], blocks of 64, the token table as it is.
    pub fn nf4() -> Self {
        Self::new(QuantFormat::Nf4)
    }

    /// Sets [`QuantSpec::group_size`].
    #[must_use]
    pub fn group_size(self, inputs: usize) -> Self {
        Self { group_size: Some(inputs), ..self }
    }

    /// One scale a row.
    #[must_use]
    pub fn per_row(self) -> Self {
        Self { group_size: None, ..self }
    }

    /// Sets [`QuantSpec::zero_points`].
    #[must_use]
    pub fn zero_points(self, zero_points: bool) -> Self {
        Self { zero_points, ..self }
    }

    /// Sets [`QuantSpec::double_quant`].
    #[must_use]
    pub fn double_quant(self, double_quant: bool) -> Self {
        Self { double_quant, ..self }
    }

    /// Sets [`QuantSpec::table`].
    #[must_use]
    pub fn table(self, table: TableFormat) -> Self {
        Self { table, ..self }
    }

    /// Sets [`QuantSpec::outlier_threshold`].
    #[must_use]
    pub fn outlier_threshold(self, threshold: f32) -> Self {
        Self { outlier_threshold: Some(threshold), ..self }
    }

    /// Checks that the choices fit each other.
    ///
    /// # Errors
    /// [`ErrorKind::Option`] for groups of 0, zero points with nf4 or fp4, double quantization with integers, and an
    /// outlier threshold that is not positive or not with int8.
    pub fn validate(&self) -> Result<()> {
        let fail = |message: String| Err(Error::new(ErrorKind::Option, message));
        let format = self.format;
        if self.group_size == Some(0) {
            return fail("group size: expected at least 1, found 0".to_owned());
        }
        if self.zero_points && !format.is_integer() {
            return fail(format!("zero points: expected an integer format, found {format}"));
        }
        if self.double_quant && format.is_integer() {
            return fail(format!("double quantization: expected nf4 or fp4, found {format}"));
        }
        if let Some(threshold) = self.outlier_threshold
            && (format != QuantFormat::Int8 || !threshold.is_finite() || threshold <= 0.0)
        {
            return fail(format!(
                "outlier threshold: expected a positive number and int8, found {threshold} and {format}"
            ));
        }
        Ok(())
    }

    /// Checks that this can be done to a model of this shape.
    ///
    /// # Errors
    /// Those of [`QuantSpec::validate`]; [`ErrorKind::Option`] naming the first tensor whose rows groups do not divide.
    pub fn check(&self, config: &OptConfig) -> Result<()> {
        self.validate()?;
        for (name, shape) in config.tensor_shapes() {
            if let (Some(spec), [_, inputs]) = (self.of_tensor(&name), &shape[..]) {
                spec.groups(*inputs).map_err(|e| e.at(format_args!("tensor {name}")))?;
            }
        }
        Ok(())
    }

    /// What is to be done to the tensor of this canonical name; nothing if it stays as it is.
    pub fn of_tensor(&self, name: &str) -> Option<Self> {
        if is_linear(name) {
            return Some(*self);
        }
        let table = matches!(name, "embed_tokens.weight" | "lm_head.weight");
        (table && self.table == TableFormat::Int8).then(|| {
            let same = self.format == QuantFormat::Int8;
            if same { Self { group_size: self.group_size, ..Self::int8() } } else { Self::int8() }
        })
    }

    /// Inputs that share a scale in rows of `inputs`.
    ///
    /// # Errors
    /// [`ErrorKind::Option`] if groups do not divide rows.
    pub(crate) fn groups(&self, inputs: usize) -> Result<usize> {
        match self.group_size {
            None => Ok(inputs.max(1)),
            Some(size) if size > 0 && inputs.is_multiple_of(size) => Ok(size),
            Some(size) => {
                let message = format_args!(
                    "expected a group size that divides the {inputs} inputs of a row, found {size}"
                );
                Err(Error::new(ErrorKind::Option, message))
            }
        }
    }

    /// Quantizes a weight `[out, in]` by rounding each element to the nearest code; `name` is for messages.
    ///
    /// Integers with zero points: scale = (max - min) / (2^bits - 1) over a group's weights and 0, zero point
    /// round(-min / scale), as GPTQ's quantizer. Symmetric int8: scale = max |w| / 127 around 128. Symmetric integers of
    /// fewer bits: of three usual scales, each group takes the one with the least squared error: max |w| over the
    /// largest positive code, the signed largest weight over the least negative code (GGML's q4_0), and
    /// 2 max |w| / (2^bits - 1) (GPTQ's). Scales are rounded to f16 before codes are chosen (to 2^-20 at least), unless one
    /// of the tensor's is too large for f16, or all are below its normal numbers: then they stay in f32. nf4 and fp4: scale = max |w|, in f32, and the nearest level.
    ///
    /// # Errors
    /// [`ErrorKind::Option`] if groups do not divide rows, [`ErrorKind::Checkpoint`] for a weight that is not finite.
    pub fn quantize(&self, name: &str, weight: HostMatrix<'_>) -> Result<Quantized> {
        let quantize = || {
            self.validate()?;
            if self.format.is_integer() {
                let quantized = round::quantize(self, weight)?;
                Ok(match self.outlier_threshold {
                    Some(threshold) => quantized.keep_outliers(threshold),
                    None => quantized,
                })
            } else {
                float4::quantize(self, weight)
            }
        };
        quantize().map_err(|e| e.at(format_args!("tensor {name}")))
    }

    /// Bytes of a weight `[out, in]` held so: packed codes, scales in f16 (nf4 and fp4: f32), packed zero points.
    pub fn bytes(&self, [out, inputs]: [usize; 2]) -> u64 {
        let [out, inputs] = [out as u64, inputs as u64];
        let bits = u64::from(self.format.bits());
        let packed = |count: u64| count.saturating_mul(bits).div_ceil(8);
        let groups = inputs.div_ceil(self.group_size.map_or(inputs, |size| size as u64).max(1));
        let scales = out.saturating_mul(groups);
        let scale_bytes = scales.saturating_mul(if self.format.is_integer() { 2 } else { 4 });
        let zeros = if self.zero_points { packed(scales) } else { 0 };
        packed(out.saturating_mul(inputs)) + scale_bytes + zeros
    }
}
