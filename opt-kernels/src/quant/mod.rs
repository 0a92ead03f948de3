//! Products with quantized weights.
//!
//! Weights stay packed in memory: four or eight bits a code, in panels that kernels stream. How they are multiplied is
//! a choice ([`Compute`]). In f32, a block of codes is widened in the first cache and goes through the same register
//! tile as any weight. In int8, activations are quantized as well, per row and run of 32, and sixteen or more products
//! of bytes are added up by one instruction. In int16, they are two such bytes, the second for what the first leaves.
//!
//! What decoding one token costs, OPT-125m's shape (85.1 M weights in the layers, 38.6 M in the LM head): 2 x 123.7 M
//! operations in any format, and in bytes read: f32 495 MB, bf16 247 MB, int8 in groups of 32 with f16 scales 131 MB,
//! int4 89 MB with the table at int8, 70 MB with all of it at int4. At 30 GB/s that is 60, 121, 228, 337 and 430 tokens
//! a second at most; all is memory as long as a core handles 15 GB/s of codes.

mod activations;
mod codes;
mod kernel;

pub use codes::Codes;
pub(crate) use kernel::multiply;
pub use opt_backend::quant::Compute;

/// What one unit of an activation's first byte is in units of the second, where there are two.
pub(crate) const FINE: i32 = 254;
/// Inputs that share the scale of an activation.
pub(crate) const RUN: usize = 32;
