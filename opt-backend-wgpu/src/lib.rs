//! The WebGPU backend: OPT in WGSL compute shaders through [`wgpu`], on Vulkan, Metal and Direct3D 12 and in browsers.
//!
//! ```no_run
//! use opt_backend::{Backend, DType, HostMatrix, Then, ndarray::array};
//! use opt_backend_wgpu::Wgpu;
//!
//! let backend = Wgpu::new()?;
//! let weight = array![[3.0, 4.0], [5.0, -6.0]];
//! let linear = backend.new_linear(HostMatrix::F32(weight.view()), None, DType::F16)?;
//! let x = backend.upload(array![[1.0, 2.0]].view())?;
//! let y = backend.linear(&x, &linear, Then::Nothing)?;
//! assert_eq!(backend.block_on(backend.read(&y))?, array![[11.0, -7.0]]);
//! # Ok::<(), opt_backend::Error>(())
//! ```
//!
//! In a browser, where nothing can be waited for, a backend is started with [`Builder::build_async`] and results are
//! awaited.
//!
//! # How it works
//!
//! - Activations are f32. Weights are held as f32, f16 or bf16 and widened where they are used; sums are in f32.
//! - Quantized weights stay packed and are expanded inside the kernels that use them.
//! - An op records a dispatch into an encoder that is open already, and returns. What is recorded goes to the device
//!   when something is read: once a token when decoding. Bind groups, pipelines and buffers are kept for the next step.
//! - Everything works at the limits that any WebGPU device has, without subgroups and without f16, and uses more
//!   where the adapter has it. Weights and activations larger than a binding are split by rows; a grid of more
//!   workgroups than a dimension has becomes two-dimensional.
//! - Caches of one shape share their memory, in pages, so that one dispatch attends for a whole batch.
//! - Errors of the device are values. If it is lost, or something failed that cannot be undone, every later op fails
//!   with the same error; a new backend must be started then.

mod adapter;
mod attention;
mod backend;
mod builder;
mod cache;
mod fault;
mod gpu;
mod head;
mod kernels;
mod packed;
mod pool;
mod product;
mod readback;
mod recorder;
mod rowwise;
mod template;
mod tensor;
mod train;
mod unpack;
mod weights;

pub use adapter::{Adapter, adapters_async};
pub use builder::Builder;
pub use cache::Cache;
pub use tensor::Tensor;
pub use weights::{Linear, Norm, Table};

#[cfg(not(target_arch = "wasm32"))]
pub use adapter::adapters;

use std::sync::Arc;

/// The backend: one adapter, its memory and its queue.
///
/// It may be used from many threads at once; what they ask for goes through one queue.
pub struct Wgpu {
    gpu: Arc<gpu::Gpu>,
    stores: Arc<cache::Stores>,
    adapter: Adapter,
    /// All that this machine had when the backend was started.
    adapters: Vec<Adapter>,
}

impl std::fmt::Debug for Wgpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Wgpu").field("adapter", &self.adapter).finish_non_exhaustive()
    }
}

impl Wgpu {
    /// The best adapter of this machine with all it has to offer.
    ///
    /// # Errors
    /// [`opt_backend::ErrorKind::Unsupported`] if there is none.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn new() -> opt_backend::Result<Self> {
        Self::builder().build()
    }

    /// Says how to start.
    pub fn builder() -> Builder {
        Builder::default()
    }

    /// Destroys the device, as its loss would: every op from here on fails. For tests of what happens then.
    #[doc(hidden)]
    pub fn lose_device(&self) {
        self.gpu.device.destroy();
        self.gpu.wait();
    }
}

/// Users share backends and what they made between threads.
#[cfg(not(target_arch = "wasm32"))]
const _: () = {
    const fn shared<T: Send + Sync>() {}
    shared::<Wgpu>();
    shared::<Tensor>();
    shared::<Linear>();
    shared::<Norm>();
    shared::<Table>();
    shared::<Cache>();
};
