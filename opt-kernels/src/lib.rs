//! What backends compute with where tensors lie in host memory: SIMD chosen at run time, a thread pool, and products
//! with packed weights, dense or quantized.
//!
//! The embedded backend is built on all of it; those of LibTorch and candle take their quantized products from here
//! when they run on the CPU. It is an internal crate: what it offers changes with what they need.
//!
//! | module | what |
//! |---|---|
//! | [`simd`] | vector types per instruction set, exponential and activations |
//! | [`pool`] | threads, parallel regions |
//! | [`memory`], [`pack`] | aligned buffers, weights as column panels |
//! | [`tile`], `gemm` | the register tile, products of rows and panels |
//! | [`matmul`] | products of plain matrices, and with transposed packed weights: what training needs |
//! | `bf16` | products with weights and activations of bf16 |
//! | [`quant`] | products with quantized weights and activations |
//! | [`output`], [`product`] | what happens to products; the one entrance to all of them |
//! | [`gradient`] | gradients and optimizers over slices |
//! | [`host`], [`rows`] | quantized weights of backends whose tensors belong to a library: in main memory, on its devices |

// An internal crate: what a name says by itself is not said again.
#![allow(missing_docs)]

mod bf16;
mod gemm;
pub mod gradient;
pub mod host;
pub mod matmul;
pub mod memory;
pub mod output;
pub mod pack;
pub mod pool;
pub mod product;
pub mod quant;
pub mod rows;
pub mod simd;
pub mod spare;
pub mod tile;

pub use quant::Compute;

/// What kernels run on.
#[derive(Clone, Copy)]
pub struct Machine<'a> {
    /// Threads.
    pub pool: &'a pool::Pool,
    /// Zones around buffers, for tests.
    pub guards: &'a memory::Guards,
    /// The instruction set.
    pub level: simd::SimdLevel,
    /// How products with quantized weights and those of bf16 are computed.
    pub compute: Compute,
}

impl Machine<'_> {
    /// Whether weights of bf16 are multiplied by dot products of bf16, for which activations are rounded to bf16.
    pub fn multiplies_bf16(self) -> bool {
        self.level.bf16_dot() && self.compute != Compute::F32
    }
}
