//! The LibTorch backend of opt-rs, through [`tch`]: CPU, CUDA and MPS.
//!
//! # LibTorch
//!
//! This crate needs LibTorch **2.13.0**, and no other: tch 0.26 is compiled against its C++ headers. The shortest way
//! is Python's wheel (CUDA included, about 5 GB; it works without a GPU):
//!
//! ```text
//! python3 -m venv torch && torch/bin/pip install torch==2.13.0
//! export PATH=$PWD/torch/bin:$PATH LIBTORCH_USE_PYTORCH=1
//! export LD_LIBRARY_PATH=$(python3 -c 'import torch; print(torch.__path__[0])')/lib
//! cargo run --features tch
//! ```
//!
//! Or unpack the LibTorch archive of <https://pytorch.org/get-started/locally> and set `LIBTORCH` to it. If there is
//! none, or one of another version, the build stops with a message of this crate's build script or of `torch-sys`',
//! whichever runs first; one of another version that is met when the program runs is refused by [`Builder::build`].
//!
//! `LD_LIBRARY_PATH` (macOS: `DYLD_LIBRARY_PATH`, Windows: `PATH`) is needed when a program runs, not when it is
//! built: without it the system says that `libtorch_cpu.so` cannot be opened. A program can carry the folder with it:
//! `RUSTFLAGS="-C link-arg=-Wl,-rpath,/path/to/torch/lib"`. This crate's own tests do so; from here other crates'
//! programs cannot be reached.
//!
//! # What is computed in which format
//!
//! The residual stream, LayerNorm, softmax and attention are f32, whatever the weights are. Products are computed in
//! the format of their weights: their input is rounded to it on the way, and their result is in it until a residual is
//! added or attention widens it. So bf16 and f16 cost the rounding of each linear's input and output, which is what
//! transformers does, and not in addition that of every sum along the residual stream. Weights of f32 are multiplied
//! in f32, never in TF32: [`Builder::build`] checks that.
//!
//! On the CPU (Linux on x86-64) f32 and bf16 weights are packed by oneDNN when they are loaded. That is a factor of
//! two or more for f32 on processors where MKL does not use AVX-512, and for decoding in bf16; a table that serves as
//! LM head is then held twice. f16 weights stream as fast as bf16 at one row, but where the processor has no f16
//! arithmetic prompts are slower than in f32.
//!
//! Quantized weights stay packed. On the CPU their products are computed by the kernels of `opt-kernels`, which the
//! embedded backend is built on too ([`Builder::compute`]), with threads of their own; on other devices they are
//! expanded to f32 for each product, 8 MiB at a time: what they save there is memory, not time. Results are f32.
//!
//! # Training
//!
//! Gradients are added to and parameters are updated in place; a copy is one only once either side is written to. A
//! linear made of an f32 parameter is the parameter's memory, and it is not packed: that would be work for each step.
//! Through packed weights that stay frozen gradients go by their rows, which are held beside from the first on (f32
//! and bf16 weights on the CPU then take twice their size). bf16 is multiplied in bf16 where the processor can, f16 on
//! the CPU always in f32. Losses, norms and optimizers are f32. On the CPU the gradients of norms, dropout and the
//! optimizers are loops over memory with the threads of quantized products; all else is LibTorch's ops.
//!
//! # Caches
//!
//! Caches are written in place and double when they are full. Forks share storage; after a fork one side appends in
//! place and the other copies what it holds, once. Caches that are decoded side by side for some steps move into one
//! storage, so that a step of a batch is one append and one call of the fused attention kernel in each layer.
//!
//! # Threads
//!
//! One value may be used from many threads at once, and several may be at work on one device. LibTorch's CPU threads
//! belong to the thread that calls: each calling thread gets a team of [`Builder::threads`]. A server that calls from
//! eight threads on eight cores is best served by teams of one.
//!
//! # Tests on a GPU
//!
//! `OPT_TEST_DEVICE=cuda:0 cargo test -p opt-backend-tch` runs this crate's tests, the conformance suite among
//! them, on that device.
//!
//! ```no_run
//! use opt_backend::{Backend, DType, HostMatrix, Then, ndarray::array};
//! use opt_backend_tch::Tch;
//!
//! let tch = Tch::builder().device("cpu").threads(2).build()?;
//! let weight = array![[1.0_f32, 2.0], [3.0, 4.0], [5.0, 6.0]];
//! let linear = tch.new_linear(HostMatrix::F32(weight.view()), None, DType::F32)?;
//! let x = tch.upload(array![[1.0, 10.0]].view())?;
//! let y = tch.linear(&x, &linear, Then::Nothing)?;
//! assert_eq!(tch.block_on(tch.read(&y))?, array![[21.0, 43.0, 65.0]]);
//! # Ok::<(), opt_backend::Error>(())
//! ```

mod activation;
mod attention;
mod backend;
mod cache;
mod device;
mod error;
mod onednn;
mod quant;
mod tensor;
mod train;
mod vocab;
mod weights;

pub use cache::Cache;
pub use opt_kernels::Compute;
pub use tensor::Tensor;
pub use weights::{Linear, Norm, Table};

use opt_backend::{Counters, Error, ErrorKind, Result};
use opt_kernels::host::Host;
use std::sync::OnceLock;
use tch::Device;

/// Threads a [`Tch`] may be built with at most; beyond it a number is a mistake.
const MAX_THREADS: usize = 1024;

/// The number of threads that LibTorch chooses, asked for before any value of this crate has set it: the setting
/// belongs to the calling thread and stays there when the value is gone.
fn default_threads() -> i32 {
    static CHOSEN: OnceLock<i32> = OnceLock::new();
    *CHOSEN.get_or_init(tch::get_num_threads)
}

/// LibTorch on one device.
#[derive(Debug)]
pub struct Tch {
    device: Device,
    /// Threads of one call on the CPU.
    threads: i32,
    /// What quantized weights are multiplied with on the CPU. Its threads start with the first of them.
    host: Host,
    /// Whether quantized weights are expanded by LibTorch's ops on the CPU, too.
    plain: bool,
    /// What ops of the device look up to quantize moments, once they have.
    maps: OnceLock<train::Maps>,
    counters: Counters,
}

/// Settings of a [`Tch`].
#[derive(Debug, Clone, Default)]
pub struct Builder {
    device: Option<String>,
    threads: Option<usize>,
    compute: Compute,
    plain: bool,
}

impl Tch {
    /// On the CPU, with as many threads as LibTorch chooses: one per core, or `OMP_NUM_THREADS`.
    ///
    /// # Errors
    /// As [`Builder::build`].
    pub fn new() -> Result<Self> {
        Self::builder().build()
    }

    /// On the CUDA device `index`.
    ///
    /// # Errors
    /// As [`Builder::build`].
    pub fn cuda(index: usize) -> Result<Self> {
        Self::builder().device(format!("cuda:{index}")).build()
    }

    /// On the GPU of an Apple machine.
    ///
    /// # Errors
    /// As [`Builder::build`].
    pub fn mps() -> Result<Self> {
        Self::builder().device("mps").build()
    }

    /// Settings to build one with.
    pub fn builder() -> Builder {
        Builder::default()
    }

    pub(crate) fn device(&self) -> Device {
        self.device
    }

    /// Whether quantized weights are multiplied by kernels of the CPU.
    pub(crate) fn host_kernels(&self) -> bool {
        self.device == Device::Cpu && !self.plain
    }

    pub(crate) fn maps(&self, op: &'static str) -> Result<&train::Maps> {
        if let Some(maps) = self.maps.get() {
            return Ok(maps);
        }
        let maps = train::Maps::new(self.device).map_err(error::torch(op))?;
        Ok(self.maps.get_or_init(|| maps))
    }
}

impl Builder {
    /// The device: `cpu` (the default), `cuda`, `cuda:N` or `mps`.
    #[must_use]
    pub fn device(mut self, device: impl Into<String>) -> Self {
        self.device = Some(device.into());
        self
    }

    /// Threads that compute one call on the CPU.
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

    /// For tests: quantized weights on the CPU as other devices have them.
    #[doc(hidden)]
    #[must_use]
    pub fn plain(mut self, plain: bool) -> Self {
        self.plain = plain;
        self
    }

    /// Finds the device.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] for a device that is unknown or not there, a number of threads that cannot be, a
    /// LibTorch of another version than 2.13, or one that is set to multiply f32 in less.
    pub fn build(self) -> Result<Tch> {
        device::check_version()?;
        let chosen = default_threads();
        let device = device::named(self.device.as_deref().unwrap_or("cpu"))?;
        let threads = match self.threads {
            None => chosen,
            Some(threads) => match i32::try_from(threads) {
                Ok(found) if (1..=MAX_THREADS).contains(&threads) => found,
                _ => {
                    let message = format_args!("expected 1 to {MAX_THREADS} threads, found {threads}");
                    return Err(Error::new(ErrorKind::Unsupported, "tch", message));
                }
            },
        };
        let host = Host::new(usize::try_from(threads).unwrap_or(1).max(1), self.compute);
        let tch = Tch {
            device,
            threads,
            host,
            plain: self.plain,
            maps: OnceLock::new(),
            counters: Counters::default(),
        };
        {
            let _at_work = tch.at_work();
            device::check_products_are_f32(&tch)?;
        }
        Ok(tch)
    }
}

const _: () = {
    const fn users_may_share<T: Send + Sync>() {}
    users_may_share::<Tch>();
    users_may_share::<Tensor>();
    users_may_share::<Linear>();
    users_may_share::<Norm>();
    users_may_share::<Table>();
    users_may_share::<Cache>();
};
