//! Starting the backend.

use crate::{
    Wgpu,
    adapter::{self, Adapter},
    cache::Stores,
    fault::{Fault, one_line},
    gpu::Gpu,
    kernels::Extras,
    weights::DTYPES,
};
use opt_backend::{Error, ErrorKind, Info, Result};
use std::sync::Arc;

/// Dispatches after which work is handed to the device though nothing is read yet.
const SUBMIT_EVERY: u32 = 128;

/// How to start the backend.
///
/// ```no_run
/// use opt_backend::Backend;
///
/// let backend = opt_backend_wgpu::Wgpu::builder().device("llvmpipe").build()?;
/// println!("{}", backend.info().device);
/// # Ok::<(), opt_backend::Error>(())
/// ```
#[derive(Debug, Clone, Default)]
pub struct Builder {
    device: Option<String>,
    default_limits: bool,
    max_binding: Option<u64>,
    subgroups: Option<bool>,
    f16: Option<bool>,
    memory: Option<u64>,
    submit_every: Option<u32>,
    software: Option<bool>,
}

impl Builder {
    /// Chooses an adapter: digits are its index in [`crate::adapters`], anything else is its name or a part of it.
    /// Without, a discrete GPU is preferred to an integrated one, and any GPU to software.
    #[must_use]
    pub fn device(mut self, device: impl Into<String>) -> Self {
        self.device = Some(device.into());
        self
    }

    /// Asks for no more than the limits every WebGPU device has, rather than for all the adapter has.
    #[must_use]
    pub fn default_limits(mut self) -> Self {
        self.default_limits = true;
        self
    }

    /// Lowers the most bytes that one buffer may have: weights, caches and activations beyond it are split. For tests,
    /// mostly.
    #[must_use]
    pub fn max_binding(mut self, bytes: u64) -> Self {
        self.max_binding = Some(bytes);
        self
    }

    /// Whether kernels may use subgroup operations and native f16, where the adapter has them; by default they do.
    #[must_use]
    pub fn features(mut self, subgroups: bool, f16: bool) -> Self {
        self.subgroups = Some(subgroups);
        self.f16 = Some(f16);
        self
    }

    /// Caps the bytes of device memory that are held at once. WebGPU does not say how much memory there is; with this
    /// [`opt_backend::ErrorKind::OutOfMemory`] comes before the device's own limit.
    #[must_use]
    pub fn memory(mut self, bytes: u64) -> Self {
        self.memory = Some(bytes);
        self
    }

    /// Hands work to the device after so many dispatches, though nothing is read yet; 128 unless said otherwise.
    #[must_use]
    pub fn submit_every(mut self, dispatches: u32) -> Self {
        self.submit_every = Some(dispatches);
        self
    }

    /// Whether kernels are chosen for a CPU in the guise of a GPU (few cores, dear barriers) or for a GPU; the adapter
    /// says what it is unless it is told here. For tests of both on either.
    #[must_use]
    pub fn software(mut self, software: bool) -> Self {
        self.software = Some(software);
        self
    }

    /// Starts it, blocking until it is there.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] if there is no adapter (saying what to install), none of that name (listing those
    /// there are), or it lacks what is asked of it.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn build(self) -> Result<Wgpu> {
        opt_backend::block_on(self.build_async())
    }

    /// Starts it.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] if there is no adapter (saying what to install), none of that name (listing those
    /// there are), or it lacks what is asked of it.
    pub async fn build_async(self) -> Result<Wgpu> {
        let instance = adapter::instance();
        let (adapter, handle, adapters) = adapter::choose(&instance, self.device.as_deref()).await?;
        let offered = handle.features();
        let mut features = wgpu::Features::empty();
        for (feature, wanted) in
            [(wgpu::Features::SUBGROUP, self.subgroups), (wgpu::Features::SHADER_F16, self.f16)]
        {
            // wgpu offers no subgroups in browsers.
            if wanted.unwrap_or(true) && offered.contains(feature) {
                features |= feature;
            }
        }
        let mut limits = if self.default_limits { wgpu::Limits::default() } else { handle.limits() };
        if let Some(bytes) = self.max_binding {
            let bytes = bytes / 4 * 4;
            limits.max_storage_buffer_binding_size = limits.max_storage_buffer_binding_size.min(bytes);
        }
        let (device, queue) = handle
            .request_device(&wgpu::DeviceDescriptor {
                label: Some("opt"),
                required_features: features,
                required_limits: limits,
                experimental_features: wgpu::ExperimentalFeatures::disabled(),
                memory_hints: wgpu::MemoryHints::Performance,
                trace: wgpu::Trace::Off,
            })
            .await
            .map_err(|error| {
                let why = one_line(error);
                Error::new(ErrorKind::Unsupported, "wgpu", format_args!("adapter {adapter}: {why}"))
            })?;

        // Before the first use of the device: without a handler wgpu panics on errors.
        let fault = Arc::new(Fault::new(adapter.name.clone()));
        let handler = Arc::clone(&fault);
        device.on_uncaptured_error(Arc::new(move |error: wgpu::Error| handler.raise_wgpu(&error)));
        let handler = Arc::clone(&fault);
        device.set_device_lost_callback(move |reason, message| {
            let why = if message.is_empty() { format!("{reason:?}") } else { one_line(message) };
            let what = format!("adapter {} was lost ({why}); start the backend anew", handler.adapter());
            handler.raise(ErrorKind::DeviceLost, what);
        });

        let extras = Extras {
            subgroups: features.contains(wgpu::Features::SUBGROUP),
            f16: features.contains(wgpu::Features::SHADER_F16),
        };
        let software = self.software.unwrap_or(adapter.kind == "CPU");
        let submit_every = self.submit_every.unwrap_or(SUBMIT_EVERY);
        let gpu = Gpu::new(device, queue, extras, software, fault, self.memory, submit_every);
        Ok(Wgpu { gpu: Arc::new(gpu), stores: Arc::new(Stores::default()), adapter, adapters })
    }
}

impl Wgpu {
    pub(crate) fn describe(&self) -> Info {
        let Adapter { name, api, kind, driver, .. } = &self.adapter;
        let (gpu, limits) = (&self.gpu, &self.gpu.limits);
        let mut info = Info::new("wgpu", name.clone());
        info.dtypes = DTYPES.to_vec();
        info.max_binding = Some(gpu.max_binding());
        info.memory = match gpu.memory {
            Some(cap) => Some(cap.saturating_sub(gpu.counters.counts().device_bytes)),
            // A software adapter computes in main memory; of others WebGPU says nothing.
            None if *kind == "CPU" && !cfg!(target_arch = "wasm32") => opt_backend::host_memory(),
            None => None,
        };
        let yes = |holds: bool| if holds { "yes" } else { "no" }.to_owned();
        // A browser has one, which is named already.
        let adapters =
            if cfg!(target_arch = "wasm32") { String::new() } else { adapter::enumerate(&self.adapters) };
        info.details = [
            ("api", api.clone()),
            ("kind", (*kind).to_owned()),
            ("driver", driver.clone()),
            ("subgroups", yes(gpu.extras.subgroups)),
            ("f16", yes(gpu.extras.f16)),
            ("max buffer", format!("{} MiB", limits.max_buffer_size >> 20)),
            ("workgroup memory", format!("{} KiB", limits.max_compute_workgroup_storage_size >> 10)),
            ("adapters", adapters),
        ]
        .into_iter()
        .filter(|(_, value)| !value.is_empty())
        .map(|(name, value)| (name.to_owned(), value))
        .collect();
        info
    }
}
