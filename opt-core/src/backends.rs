//! The backends of this build. The only place that names them.

use crate::{
    CancelToken, Error, ErrorKind, ProgressFn, Result, checkpoint::Checkpoint, engine::Engine,
    opt::EngineMaker,
};
use opt_backend::{DType, Info};
use std::sync::Arc;

#[cfg(feature = "cpu")]
pub use opt_backend_cpu::Cpu;

/// The names that [`choose`] knows, the default first.
pub const NAMES: [&str; 4] = ["cpu", "tch", "candle", "wgpu"];

/// What a backend is told when it is chosen by name.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct BackendOptions {
    /// The backend's own name of a device, such as `cuda:0`.
    pub device: Option<String>,
    /// Threads that compute; `None` for all cores.
    pub threads: Option<usize>,
}

/// A backend of this build, as a value that [`crate::Load::with`] takes.
pub struct Chosen(pub(crate) EngineMaker);

/// What a backend of this build found on this machine, or why it cannot be used here.
pub type Listing = (&'static str, Result<Info>);

/// The backend named `name`, ready to load a model on.
///
/// # Errors
/// [`ErrorKind::Unsupported`] for one that is not compiled in (naming the feature), [`ErrorKind::Option`] for an
/// unknown name or device, [`ErrorKind::Backend`] if it does not start.
pub fn choose(name: &str, options: &BackendOptions) -> Result<Chosen> {
    let _ = options; // unused in a build without backends
    match name {
        #[cfg(feature = "cpu")]
        "cpu" => {
            let cpu = cpu(options)?;
            Ok(Chosen(Box::new(move |checkpoint, dtype, cancel, progress| {
                engine_on(cpu, checkpoint, dtype, cancel, progress)
            })))
        }
        _ if NAMES.contains(&name) => {
            let message = format!("backend {name} is not part of this build; enable the feature `{name}`");
            Err(Error::new(ErrorKind::Unsupported, message))
        }
        _ => {
            let message = format!("unknown backend {name:?}; expected one of {}", NAMES.join(", "));
            Err(Error::new(ErrorKind::Option, message))
        }
    }
}

/// The backends compiled in, each with what it found.
pub fn list(options: &BackendOptions) -> Vec<Listing> {
    let _ = options;
    vec![
        #[cfg(feature = "cpu")]
        ("cpu", cpu(options).map(|cpu| opt_backend::Backend::info(&cpu))),
    ]
}

#[cfg(feature = "cpu")]
fn cpu(options: &BackendOptions) -> Result<Cpu> {
    if let Some(device) = options.device.as_deref().filter(|device| *device != "cpu") {
        let message = format!("backend cpu: expected no device or \"cpu\", found {device:?}");
        return Err(Error::new(ErrorKind::Option, message));
    }
    if options.threads == Some(0) {
        return Err(Error::new(ErrorKind::Option, "threads: expected at least 1, found 0"));
    }
    let mut builder = Cpu::builder();
    if let Some(threads) = options.threads {
        builder = builder.threads(threads);
    }
    Ok(builder.build()?)
}

pub(crate) fn engine_on<B: opt_backend::Backend>(
    backend: B,
    checkpoint: &Checkpoint,
    dtype: DType,
    cancel: Option<&CancelToken>,
    progress: Option<&mut ProgressFn<'_>>,
) -> Result<Arc<dyn Engine>> {
    Ok(Arc::new(crate::engine::LocalEngine::load(backend, checkpoint, dtype, cancel, progress)?))
}
