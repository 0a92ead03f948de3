//! Weights in few bits: rounding to nearest, GPTQ, and what they cost in accuracy.
//!
//! [`QuantSpec`] says what numbers become. [`Load::quantize`](crate::Load::quantize) rounds while a model is loaded;
//! [`quantize_weights`] (feature `quantize` for GPTQ) makes the weights of a whole model once, to be written
//! ([`write_quantized`](crate::checkpoint::write_quantized)) or run through [`Load::replace`](crate::Load::replace). [`compare`] and [`layer_errors`] say what was lost.

mod calibration;
mod compare;
mod errors;
mod float4;
#[cfg(feature = "quantize")]
mod gptq;
mod gram;
mod holding;
mod model;
mod round;
mod rows;
mod spec;
mod walk;
#[cfg(feature = "quantize")]
mod work;

pub use calibration::calibration_sequences;
#[cfg(not(target_arch = "wasm32"))]
pub use compare::compare;
pub use compare::{Comparison, compare_async};
pub use errors::{LayerError, layer_errors};
#[cfg(feature = "quantize")]
pub use gptq::{GptqOptions, gptq};
pub use gram::Gram;
pub(crate) use holding::{Held, Holding};
pub use model::{Method, QuantizeOptions, quantize_weights};
pub use spec::{QuantFormat, QuantSpec, TableFormat};
pub(crate) use walk::WalkJob;
#[cfg(feature = "quantize")]
pub use work::remove_work;

use half::f16;
use opt_backend::quant::{Levels, Quantized, Zeros};
use std::collections::BTreeMap;

/// Quantized weights by canonical name, such as `layers.0.fc1.weight`.
pub type QuantizedWeights = BTreeMap<String, Quantized>;

/// Bytes of a weight whose codes and zero points are packed, its scales in f16 where that holds them exactly.
pub fn packed_bytes(weight: &Quantized) -> u64 {
    let [out, inputs] = weight.shape().map(|n| n as u64);
    let bits = match weight.levels() {
        Levels::Integers { bits } => u64::from(bits),
        _ => 4,
    };
    let packed = |count: u64| count.saturating_mul(bits).div_ceil(8);
    let scales = weight.scales();
    let half = scales.iter().all(|scale| f16::from_f32(*scale).to_f32() == *scale);
    let zeros = match weight.zeros() {
        Zeros::Each(zeros) => packed(zeros.len() as u64),
        _ => 0,
    };
    packed(out.saturating_mul(inputs)) + scales.len() as u64 * if half { 2 } else { 4 } + zeros
}
