//! The candle backend of opt-rs: CPU, CUDA and Metal through [candle-core](https://docs.rs/candle-core).
//!
//! Tensors, weights and KV caches are candle tensors on the device that is chosen by name ([`Candle::builder`]) or
//! handed in ([`Candle::on`]). Activations are f32 on every device; weights are held as f32, f16 or bf16, quantized ones
//! as their codes.
//!
//! - **CPU.** What costs time is done here, on the memory of candle's tensors: products (see `cpu/product.rs` for what
//!   candle's lack; with MKL or Accelerate f32 products of many rows are candle's), attention over the cache,
//!   LayerNorm, and what follows the logits. Products with quantized weights come from the crate `opt-kernels`, which
//!   the embedded backend is built on too ([`Builder::compute`]).
//! - **CUDA, Metal.** candle's own ops. A product with 16-bit weights takes its input in their format, since candle
//!   multiplies only equals; everything between products stays f32. Quantized weights are expanded to f32 for each
//!   product, 8 MiB at a time: what they save there is memory, not time.
//!
//! # Features
//! `cuda`, `metal`, `mkl` and `accelerate` are candle's, passed on. A program that uses opt-core turns them on by
//! naming this crate beside it; Cargo builds it once with the features of both:
//!
//! ```toml
//! [dependencies]
//! opt-core = { version = "0.1", features = ["candle"] }
//! opt-backend-candle = { version = "0.1", features = ["cuda"] }
//! ```
//!
//! The `opt` command with them:
//!
//! ```text
//! cargo build --release -p opt-cli -p opt-backend-candle --features opt-cli/candle,opt-backend-candle/cuda
//! ```
//!
//! # Example
//! ```
//! use opt_backend::{Backend, DType, HostMatrix, Then, ndarray::array};
//! use opt_backend_candle::Candle;
//!
//! let candle = Candle::builder().device("cpu").threads(2).build()?;
//! let weight = array![[1.0_f32, 2.0], [3.0, 4.0], [5.0, 6.0]];
//! let linear = candle.new_linear(HostMatrix::F32(weight.view()), None, DType::F32)?;
//! let x = candle.upload(array![[1.0, 10.0]].view())?;
//! let y = candle.linear(&x, &linear, Then::Nothing)?;
//! assert_eq!(candle.block_on(candle.read(&y))?, array![[21.0, 43.0, 65.0]]);
//! # Ok::<(), opt_backend::Error>(())
//! ```
//!
//! | module | what |
//! |---|---|
//! | `device` | names of devices |
//! | `weights`, `quant`, `cache` | what the device holds |
//! | `plain` | every op as candle's own |
//! | `cpu` | every op on the CPU, fused |
//! | `backend`, `train` | the [`opt_backend::Backend`] and [`opt_backend::Train`] implementations: checks, then one of the two above |

mod backend;
mod cache;
mod cpu;
mod device;
mod error;
mod host;
mod plain;
mod quant;
mod train;
mod weights;

pub use backend::Tensor;
pub use cache::Cache;
/// The crate whose devices [`Candle::on`] takes.
pub use candle_core;
pub use opt_kernels::Compute;
pub use weights::{Linear, Norm, Table};

use candle_core::Device;
use cpu::Kernels;
use opt_backend::{Counters, Error, ErrorKind, Result};
use plain::Plain;

/// Threads a [`Candle`] may be built with at most; beyond it a number is a mistake.
const MAX_THREADS: usize = 1024;

/// A device of candle as a backend.
///
/// One value may be used from many threads at once, and any number of values may share a device. On the CPU it owns
/// its threads; they end when it is dropped.
#[derive(Debug)]
pub struct Candle {
    device: Device,
    name: String,
    way: Way,
    counters: Counters,
}

/// How ops are computed.
#[derive(Debug)]
enum Way {
    /// On the memory of candle's CPU tensors.
    Cpu(Kernels),
    /// As candle's own ops.
    Plain(Plain),
}

/// How to start a [`Candle`].
///
/// ```
/// use opt_backend::{Backend, ErrorKind};
/// use opt_backend_candle::Candle;
///
/// assert_eq!(Candle::builder().threads(1).build()?.info().threads, 1);
/// let error = Candle::builder().device("tpu").build().unwrap_err();
/// assert_eq!(error.kind(), ErrorKind::Unsupported);
/// # Ok::<(), opt_backend::Error>(())
/// ```
#[derive(Debug, Clone, Default)]
pub struct Builder {
    device: Option<String>,
    threads: Option<usize>,
    plain: bool,
    compute: Compute,
}

impl Candle {
    /// The CPU, with as many threads as candle takes: `RAYON_NUM_THREADS`, or one a physical core.
    ///
    /// # Errors
    /// [`ErrorKind::Device`] if threads cannot be started.
    pub fn new() -> Result<Self> {
        Self::builder().build()
    }

    /// Settings to build one with.
    pub fn builder() -> Builder {
        Builder::default()
    }

    /// A device that candle has opened.
    ///
    /// # Errors
    /// [`ErrorKind::Device`] if threads cannot be started.
    pub fn on(device: Device) -> Result<Self> {
        Builder::default().start(device)
    }

    /// The device.
    pub fn device(&self) -> &Device {
        &self.device
    }
}

impl Builder {
    /// The device by name: `cpu` (the default), `cuda` or `cuda:1`, `metal` or `metal:1`.
    #[must_use]
    pub fn device(mut self, device: impl Into<String>) -> Self {
        self.device = Some(device.into());
        self
    }

    /// Threads that compute on the CPU. Other devices have none to choose.
    #[must_use]
    pub fn threads(mut self, threads: usize) -> Self {
        self.threads = Some(threads);
        self
    }

    /// How products with quantized weights are computed on the CPU; [`Compute::Int16`] unless said otherwise. Other
    /// devices compute them in f32.
    #[must_use]
    pub fn compute(mut self, compute: Compute) -> Self {
        self.compute = compute;
        self
    }

    /// For tests: candle's own ops on the CPU too, which is how other devices compute.
    #[doc(hidden)]
    #[must_use]
    pub fn plain(mut self, plain: bool) -> Self {
        self.plain = plain;
        self
    }

    /// Opens the device.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] for a name that is none, a device that this build has no support for (naming the
    /// feature) or a number of threads that cannot be; [`ErrorKind::Device`] if the device is not there.
    pub fn build(self) -> Result<Candle> {
        let device = device::open(self.device.as_deref().unwrap_or("cpu"))?;
        self.start(device)
    }

    fn start(self, device: Device) -> Result<Candle> {
        let threads = self.threads.unwrap_or_else(candle_core::utils::get_num_threads);
        if !(1..=MAX_THREADS).contains(&threads) {
            let message = format_args!("expected 1 to {MAX_THREADS} threads, found {threads}");
            return Err(Error::new(ErrorKind::Unsupported, "candle", message));
        }
        let way = match device {
            Device::Cpu if !self.plain => Way::Cpu(Kernels::new(threads, self.compute)?),
            _ => Way::Plain(Plain::new(&device)),
        };
        Ok(Candle { name: device::name(&device), device, way, counters: Counters::default() })
    }
}

const _: () = {
    const fn users_may_share<T: Send + Sync>() {}
    users_may_share::<Candle>();
    users_may_share::<Tensor>();
    users_may_share::<Linear>();
    users_may_share::<Norm>();
    users_may_share::<Table>();
    users_may_share::<Cache>();
};
