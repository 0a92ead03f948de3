//! The adapters of this machine, and the choice of one.

use opt_backend::{Error, ErrorKind, Result};
use std::fmt;

/// What a machine computes on, as WebGPU sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Adapter {
    /// Its place in the list: what [`crate::Builder::device`] takes.
    pub index: usize,
    /// As its driver calls it.
    pub name: String,
    /// What it is reached through: `vulkan`, `metal`, `dx12`, `webgpu`.
    pub api: String,
    /// What it is: `discrete GPU`, `integrated GPU`, `virtual GPU`, `CPU` or `other`.
    pub kind: &'static str,
    /// Its driver and the driver's version.
    pub driver: String,
}

impl fmt::Display for Adapter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} ({}, {})", self.index, self.name, self.api, self.kind)
    }
}

/// The adapters of this machine, in the order of their indices.
pub async fn adapters_async() -> Vec<Adapter> {
    let adapters = found(&instance()).await;
    adapters.iter().enumerate().map(|(index, adapter)| describe(index, &adapter.get_info())).collect()
}

/// The adapters of this machine, in the order of their indices.
#[cfg(not(target_arch = "wasm32"))]
pub fn adapters() -> Vec<Adapter> {
    opt_backend::block_on(adapters_async())
}

pub(crate) fn instance() -> wgpu::Instance {
    let mut descriptor = wgpu::InstanceDescriptor::new_without_display_handle();
    descriptor.backends = wgpu::Backends::PRIMARY;
    // Drivers' own validation finds what wgpu's does, later.
    descriptor.flags = wgpu::InstanceFlags::empty();
    // Some drivers swap rather than refuse; an error is better.
    descriptor.memory_budget_thresholds.for_resource_creation = Some(95);
    wgpu::Instance::new(descriptor)
}

pub(crate) async fn found(instance: &wgpu::Instance) -> Vec<wgpu::Adapter> {
    if cfg!(target_arch = "wasm32") {
        // Browsers hand out one adapter, and only on request.
        let options = wgpu::RequestAdapterOptions {
            power_preference: wgpu::PowerPreference::HighPerformance,
            ..Default::default()
        };
        return instance.request_adapter(&options).await.into_iter().collect();
    }
    let able = |adapter: &wgpu::Adapter| {
        adapter.get_downlevel_capabilities().flags.contains(wgpu::DownlevelFlags::COMPUTE_SHADERS)
    };
    instance.enumerate_adapters(wgpu::Backends::PRIMARY).await.into_iter().filter(able).collect()
}

fn kind(device: wgpu::DeviceType) -> &'static str {
    match device {
        wgpu::DeviceType::DiscreteGpu => "discrete GPU",
        wgpu::DeviceType::IntegratedGpu => "integrated GPU",
        wgpu::DeviceType::VirtualGpu => "virtual GPU",
        wgpu::DeviceType::Cpu => "CPU",
        wgpu::DeviceType::Other => "other",
    }
}

pub(crate) fn describe(index: usize, info: &wgpu::AdapterInfo) -> Adapter {
    let driver = format!("{} {}", info.driver, info.driver_info).trim().to_owned();
    let name = if info.name.is_empty() { "WebGPU".to_owned() } else { info.name.clone() };
    let api = match info.backend {
        wgpu::Backend::BrowserWebGpu => "webgpu".to_owned(),
        backend => backend.to_str().to_owned(),
    };
    Adapter { index, name, api, kind: kind(info.device_type), driver }
}

/// The one called `wanted`: digits are an index, anything else is a name or a part of one. The most capable if none is
/// asked for.
fn select<'a>(list: &'a [Adapter], wanted: Option<&str>) -> Option<&'a Adapter> {
    let Some(wanted) = wanted else {
        let rank = |adapter: &&Adapter| {
            ["discrete GPU", "integrated GPU", "virtual GPU", "other", "CPU"]
                .iter()
                .position(|kind| *kind == adapter.kind)
        };
        return list.iter().min_by_key(rank);
    };
    let wanted = wanted.trim().to_lowercase();
    if wanted.bytes().all(|byte| byte.is_ascii_digit()) {
        // Names hold digits too, those of versions and models: an index that is too large must not find one of them.
        return wanted.parse::<usize>().ok().and_then(|index| list.get(index));
    }
    let exact = || list.iter().find(|adapter| adapter.name.to_lowercase() == wanted);
    let part = || list.iter().find(|adapter| adapter.name.to_lowercase().contains(&wanted));
    exact().or_else(part)
}

/// The adapter called `wanted`, by index or by a part of its name, and its handle; the most capable if none is asked
/// for. With it the list it was chosen from.
pub(crate) async fn choose(
    instance: &wgpu::Instance,
    wanted: Option<&str>,
) -> Result<(Adapter, wgpu::Adapter, Vec<Adapter>)> {
    let refuse = |message: String| Err(Error::new(ErrorKind::Unsupported, "wgpu", message));
    let mut adapters = found(instance).await;
    let list: Vec<Adapter> =
        adapters.iter().enumerate().map(|(index, adapter)| describe(index, &adapter.get_info())).collect();
    if list.is_empty() {
        let advice = if cfg!(target_arch = "wasm32") {
            "this browser offers no WebGPU adapter; use one with WebGPU enabled"
        } else if cfg!(target_os = "linux") {
            "no adapter found; install a Vulkan driver for the GPU, or mesa-vulkan-drivers for a software adapter"
        } else {
            "no adapter found; install a driver for the GPU (Direct3D 12, Metal or Vulkan)"
        };
        return refuse(advice.to_owned());
    }
    match select(&list, wanted).cloned() {
        Some(chosen) => {
            let handle = adapters.swap_remove(chosen.index);
            Ok((chosen, handle, list))
        }
        None => {
            refuse(format!("no adapter {:?}; there are: {}", wanted.unwrap_or_default(), enumerate(&list)))
        }
    }
}

/// The adapters in one line, each with its index.
pub(crate) fn enumerate(list: &[Adapter]) -> String {
    let all: Vec<String> = list.iter().map(ToString::to_string).collect();
    all.join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn adapter(index: usize, name: &str, kind: &'static str) -> Adapter {
        Adapter { index, name: name.into(), api: "vulkan".into(), kind, driver: String::new() }
    }

    #[test]
    fn digits_are_an_index_and_all_else_a_name() {
        let list = [
            adapter(0, "llvmpipe (LLVM 15.0.6, 256 bits)", "CPU"),
            adapter(1, "NVIDIA H100", "discrete GPU"),
            adapter(2, "NVIDIA H100 NVL", "discrete GPU"),
        ];
        let index = |wanted| select(&list, wanted).map(|adapter| adapter.index);
        assert_eq!(index(None), Some(1));
        for (wanted, expected) in [
            ("0", Some(0)),
            (" 2 ", Some(2)),
            ("002", Some(2)),
            ("3", None),
            ("15", None),
            ("100", None),
            ("256", None),
            ("99999999999999999999999", None),
            ("", None),
            ("nvidia h100 nvl", Some(2)),
            ("h100", Some(1)),
            ("LLVM 15", Some(0)),
            ("radeon", None),
        ] {
            assert_eq!(index(Some(wanted)), expected, "{wanted:?}");
        }
    }
}
