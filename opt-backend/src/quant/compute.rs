use std::{fmt, str::FromStr};

/// How backends that compute on the host multiply by weights that are held in few bits. On devices activations stay as
/// they are.
///
/// It is about quantized weights, and about those of bf16 where the CPU backend finds fast instructions for dot
/// products of bf16 (AVX512-BF16, but on Intel's processors): there activations are rounded to bf16 too, as LibTorch
/// does, unless this says [`Compute::F32`]. Products with weights of f32 and f16 are computed in f32 whatever this says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum Compute {
    /// Activations are quantized to 15 bits and a sign, per row and run of 32 inputs; sums of 32 products are exact. As
    /// good as f32, and where memory limits as fast as int8. Where levels are no integers (NF4, FP4) it is f32.
    #[default]
    Int16,
    /// Activations are quantized to int8, per row and run of 32 inputs; sums of 32 products are exact.
    Int8,
    /// Activations stay f32, those that meet weights of bf16 included.
    F32,
}

impl fmt::Display for Compute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Compute::Int16 => "int16",
            Compute::Int8 => "int8",
            Compute::F32 => "f32",
        })
    }
}

impl FromStr for Compute {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "int16" => Ok(Compute::Int16),
            "int8" => Ok(Compute::Int8),
            "f32" => Ok(Compute::F32),
            _ => Err(format!("unknown arithmetic {name:?}; expected int16, int8 or f32")),
        }
    }
}
