//! The embedded backend of opt-rs: pure Rust on the CPU, nothing to install.
//!
//! Weights are held as f32, f16 or bf16, activations are f32, and every product is accumulated in f32. SIMD kernels
//! (AVX-512, AVX2, NEON, scalar) are chosen at run time, threads belong to the [`Cpu`] value, and nothing is global.
//! Where the CPU has fast dot products of bf16 (AVX512-BF16, but on Intel's processors), activations are rounded to bf16
//! as they meet weights of bf16, unless they are to stay f32 ([`CpuBuilder::compute`]).
//!
//! Results are deterministic in the strong sense: a row's result is bit-equal whatever batch, chunk of a prompt and
//! thread count it is computed with. They may differ in the last bits between instruction sets.
//!
//! | module | what |
//! |---|---|
//! | `cache`, `attention` | KV cache in blocks, causal attention |
//! | `norm`, `vocab` | LayerNorm, what is done with logits |
//! | `grad`, `train` | gradients, losses and optimizers; the [`opt_backend::Train`] implementation |
//! | `backend` | the [`opt_backend::Backend`] implementation: checks, then the above |
//!
//! Instruction sets, threads and the products themselves are in the crate `opt-kernels`.
//!
//! ```
//! use opt_backend::{Backend, DType, HostMatrix, Then, ndarray::array};
//! use opt_backend_cpu::Cpu;
//!
//! let cpu = Cpu::new()?;
//! let weight = array![[1.0_f32, 2.0], [3.0, 4.0], [5.0, 6.0]];
//! let linear = cpu.new_linear(HostMatrix::F32(weight.view()), None, DType::F32)?;
//! let x = cpu.upload(array![[1.0, 10.0]].view())?;
//! let y = cpu.linear(&x, &linear, Then::Nothing)?;
//! assert_eq!(cpu.block_on(cpu.read(&y))?, array![[21.0, 43.0, 65.0]]);
//! # Ok::<(), opt_backend::Error>(())
//! ```

mod attention;
mod backend;
mod cache;
mod grad;
mod norm;
mod train;
mod vocab;

pub use backend::{Linear, Table, Tensor};
pub use cache::Cache;
pub use norm::Norm;
pub use opt_kernels::{Compute, simd::SimdLevel};

use opt_backend::{Counters, Error, ErrorKind, Result};
use opt_kernels::{
    memory::Guards,
    pool::{self, Pool},
    spare::Keep,
};
use std::sync::OnceLock;

/// Threads a [`Cpu`] may be built with at most; beyond it a number is a mistake.
const MAX_THREADS: usize = 1024;

/// The CPU of this machine as a backend.
///
/// It owns its threads; they end when it is dropped. One value may be used from many threads at once: a computation
/// that finds the pool busy runs on its caller's thread.
#[derive(Debug)]
pub struct Cpu {
    pool: Pool,
    level: SimdLevel,
    compute: Compute,
    guards: Guards,
    counters: Counters,
    /// Once something was trained: the next step needs the same buffers again.
    training: OnceLock<Keep>,
}

/// Settings of a [`Cpu`].
///
/// ```
/// use opt_backend_cpu::{Cpu, SimdLevel};
///
/// let cpu = Cpu::builder().threads(2).simd(Some(SimdLevel::Scalar)).build()?;
/// assert_eq!((cpu.threads(), cpu.simd()), (2, SimdLevel::Scalar));
/// # Ok::<(), opt_backend::Error>(())
/// ```
#[derive(Debug, Clone, Default)]
pub struct CpuBuilder {
    threads: Option<usize>,
    simd: Option<SimdLevel>,
    compute: Compute,
    guarded: bool,
}

impl Cpu {
    /// With the fastest instruction set and one thread per physical core that this process may use.
    ///
    /// The environment variables `OPT_CPU_THREADS` (a number) and `OPT_CPU_SIMD` (a [`SimdLevel`] by name)
    /// override that.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] if a variable asks for what is not there, [`ErrorKind::Device`] if threads cannot
    /// be started.
    pub fn new() -> Result<Self> {
        Self::builder().build()
    }

    /// Settings to build one with.
    pub fn builder() -> CpuBuilder {
        CpuBuilder::default()
    }

    /// Threads that compute, the caller's included.
    pub fn threads(&self) -> usize {
        self.pool.threads()
    }

    /// The instruction set in use.
    pub fn simd(&self) -> SimdLevel {
        self.level
    }

    /// Writes outside a buffer that were found since the last call, if this was built with
    /// [`CpuBuilder::guarded`]. A buffer is looked at when it is dropped or read by value.
    #[doc(hidden)]
    pub fn guard_faults(&self) -> Vec<String> {
        self.guards.take()
    }
}

impl CpuBuilder {
    /// Threads that compute, the caller's included. Overrides `OPT_CPU_THREADS`.
    pub fn threads(mut self, threads: usize) -> Self {
        self.threads = Some(threads);
        self
    }

    /// The instruction set; `None` is `OPT_CPU_SIMD` or else the fastest.
    pub fn simd(mut self, level: Option<SimdLevel>) -> Self {
        self.simd = level;
        self
    }

    /// How products with quantized weights are computed; [`Compute::Int16`] unless said otherwise. With [`Compute::F32`],
    /// activations are not rounded for weights of bf16 either.
    pub fn compute(mut self, compute: Compute) -> Self {
        self.compute = compute;
        self
    }

    /// For tests: guard zones around the buffers that kernels write to. Readbacks then copy.
    #[doc(hidden)]
    pub fn guarded(mut self, guarded: bool) -> Self {
        self.guarded = guarded;
        self
    }

    /// Starts the threads.
    ///
    /// # Errors
    /// As [`Cpu::new`].
    pub fn build(self) -> Result<Cpu> {
        let threads = match self.threads {
            Some(threads) => threads,
            None => match variable("OPT_CPU_THREADS") {
                Some(value) => value.parse().map_err(|_| {
                    unsupported(format!("OPT_CPU_THREADS: expected a number, found {value:?}"))
                })?,
                None => pool::usable_cores(),
            },
        };
        if !(1..=MAX_THREADS).contains(&threads) {
            return Err(unsupported(format!("expected 1 to {MAX_THREADS} threads, found {threads}")));
        }
        let level = match self.simd {
            Some(level) => level,
            None => match variable("OPT_CPU_SIMD") {
                Some(name) => name.parse().map_err(|e| unsupported(format!("OPT_CPU_SIMD: {e}")))?,
                None => SimdLevel::best(),
            },
        };
        if !level.is_available() {
            return Err(unsupported(format!(
                "this machine lacks {level}; its best is {}",
                SimdLevel::best()
            )));
        }
        let guards = Guards::new(self.guarded);
        Ok(Cpu {
            pool: Pool::new(threads)?,
            level,
            compute: self.compute,
            guards,
            training: OnceLock::new(),
            counters: Counters::default(),
        })
    }
}

/// An environment variable that is set and not empty.
fn variable(name: &str) -> Option<String> {
    std::env::var_os(name).map(|value| value.to_string_lossy().into_owned()).filter(|value| !value.is_empty())
}

fn unsupported(message: String) -> Error {
    Error::new(ErrorKind::Unsupported, "cpu", message)
}

const _: () = {
    const fn users_may_share<T: Send + Sync>() {}
    users_may_share::<Cpu>();
    users_may_share::<Tensor>();
    users_may_share::<Linear>();
    users_may_share::<Norm>();
    users_may_share::<Table>();
    users_may_share::<Cache>();
};
