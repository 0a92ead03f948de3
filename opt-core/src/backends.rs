//! The backends of this build. The only place that names them.

use crate::{Error, ErrorKind, Result, load::MakeEngine};
use opt_backend::Info;
pub use opt_backend::quant::Compute;

#[cfg(feature = "candle")]
pub use opt_backend_candle::Candle;
#[cfg(feature = "cpu")]
pub use opt_backend_cpu::Cpu;
#[cfg(feature = "tch")]
pub use opt_backend_tch::Tch;
#[cfg(feature = "wgpu")]
pub use opt_backend_wgpu::Wgpu;

/// The names that [`choose`] knows, the default first.
pub const NAMES: [&str; 4] = ["cpu", "tch", "candle", "wgpu"];

/// What a backend is told when it is chosen by name.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct BackendOptions {
    /// The backend's own name of a device, such as `cuda:0`.
    pub device: Option<String>,
    /// Threads that compute; `None` for all cores. Without effect where a device computes.
    pub threads: Option<usize>,
    /// How products with quantized weights are computed, where that is a choice; with [`Compute::F32`], activations also
    /// stay as they are where weights are bf16.
    pub compute: Compute,
}

/// A backend of this build, as a value that [`crate::Load::with`] takes.
pub struct Chosen(pub(crate) Box<dyn MakeEngine>);

/// What a backend of this build found on this machine, or why it cannot be used here.
pub type Listing = (&'static str, Result<Info>);

/// The backend named `name`, ready to load a model on. In browsers, where devices must be awaited, start one with its
/// own builder and use [`crate::Load::on`].
///
/// # Errors
/// [`ErrorKind::Unsupported`] for one that is not compiled in (naming the feature), [`ErrorKind::Option`] for an
/// unknown name or for options that no machine could satisfy, [`ErrorKind::Backend`] for a device that is not there and
/// for a backend that does not start.
pub fn choose(name: &str, options: &BackendOptions) -> Result<Chosen> {
    match BACKENDS.iter().find(|backend| backend.name == name) {
        Some(backend) => (backend.choose)(options),
        None if NAMES.contains(&name) => {
            let message = format!("backend {name} is not part of this build; enable the feature `{name}`");
            Err(Error::new(ErrorKind::Unsupported, message))
        }
        None => {
            let message = format!("unknown backend {name:?}; expected one of {}", NAMES.join(", "));
            Err(Error::new(ErrorKind::Option, message))
        }
    }
}

/// The backends compiled in, each with what it found.
pub fn list(options: &BackendOptions) -> Vec<Listing> {
    BACKENDS.iter().map(|backend| (backend.name, (backend.info)(options))).collect()
}

/// A backend of this build, by what it can be asked before it is started.
struct Entry {
    name: &'static str,
    choose: fn(&BackendOptions) -> Result<Chosen>,
    info: fn(&BackendOptions) -> Result<Info>,
}

impl Entry {
    #[allow(unused)] // in a build without backends
    const fn new(
        name: &'static str,
        choose: fn(&BackendOptions) -> Result<Chosen>,
        info: fn(&BackendOptions) -> Result<Info>,
    ) -> Self {
        Self { name, choose, info }
    }
}

/// The entry of a backend that `$start` starts.
#[allow(unused_macros)] // in a build without backends
macro_rules! entry {
    ($name:literal, $start:path) => {
        Entry::new(
            $name,
            |options| Ok(Chosen(Box::new($start(options)?))),
            |options| $start(options).map(|backend| opt_backend::Backend::info(&backend)),
        )
    };
}

const BACKENDS: &[Entry] = &[
    #[cfg(feature = "cpu")]
    entry!("cpu", cpu),
    #[cfg(feature = "tch")]
    entry!("tch", tch),
    #[cfg(feature = "candle")]
    entry!("candle", candle),
    #[cfg(feature = "wgpu")]
    entry!("wgpu", wgpu),
];

#[cfg(feature = "cpu")]
fn cpu(options: &BackendOptions) -> Result<Cpu> {
    if let Some(device) = options.device.as_deref().filter(|device| *device != "cpu") {
        let message = format!("backend cpu: expected no device or \"cpu\", found {device:?}");
        return Err(Error::new(ErrorKind::Option, message));
    }
    let mut builder = Cpu::builder().compute(options.compute);
    if let Some(threads) = threads(options)? {
        builder = builder.threads(threads);
    }
    Ok(builder.build()?)
}

#[cfg(feature = "tch")]
fn tch(options: &BackendOptions) -> Result<Tch> {
    let mut builder = Tch::builder().compute(options.compute);
    if let Some(device) = &options.device {
        builder = builder.device(device);
    }
    if let Some(threads) = threads(options)? {
        builder = builder.threads(threads);
    }
    Ok(builder.build()?)
}

#[cfg(feature = "candle")]
fn candle(options: &BackendOptions) -> Result<Candle> {
    let mut builder = Candle::builder().compute(options.compute);
    if let Some(device) = &options.device {
        builder = builder.device(device);
    }
    if let Some(threads) = threads(options)? {
        builder = builder.threads(threads);
    }
    Ok(builder.build()?)
}

#[cfg(all(feature = "wgpu", not(target_arch = "wasm32")))]
fn wgpu(options: &BackendOptions) -> Result<Wgpu> {
    let mut builder = Wgpu::builder();
    if let Some(device) = &options.device {
        builder = builder.device(device);
    }
    Ok(builder.build()?)
}

/// In a browser starting takes turns of the event loop, which a choice by name cannot wait for.
#[cfg(all(feature = "wgpu", target_arch = "wasm32"))]
fn wgpu(_: &BackendOptions) -> Result<Wgpu> {
    let message = "backend wgpu cannot be waited for on wasm32: build it with Wgpu::builder().build_async() and hand it \
                   to Load::on";
    Err(Error::new(ErrorKind::Unsupported, message))
}

/// The number of threads asked for.
#[allow(unused)] // in a build without backends that have threads
fn threads(options: &BackendOptions) -> Result<Option<usize>> {
    match options.threads {
        Some(0) => Err(Error::new(ErrorKind::Option, "threads: expected at least 1, found 0")),
        threads => Ok(threads),
    }
}
