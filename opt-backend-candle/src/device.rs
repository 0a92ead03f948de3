//! Names of devices, as users write them.

use crate::error::convert;
use candle_core::{Device, DeviceLocation};
use opt_backend::{Error, ErrorKind, Result};
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Opens the device called `name`.
pub(crate) fn open(name: &str) -> Result<Device> {
    let unknown = || {
        let message =
            format_args!("expected cpu, cuda, cuda:N, metal or metal:N as a device, found {name:?}");
        Error::new(ErrorKind::Unsupported, "candle", message)
    };
    let (kind, number) = name.split_once(':').unwrap_or((name, "0"));
    // As `parse`, but without signs.
    let number = number.bytes().all(|b| b.is_ascii_digit()).then(|| number.parse().ok()).flatten();
    let number: usize = number.ok_or_else(unknown)?;
    match kind {
        "cpu" if name == "cpu" => Ok(Device::Cpu),
        "cuda" if candle_core::utils::cuda_is_available() => start(name, || Device::new_cuda(number)),
        "metal" if candle_core::utils::metal_is_available() => start(name, || Device::new_metal(number)),
        "cuda" | "metal" => {
            let message = format_args!(
                "device {name}: this build has no support for it; enable the feature `{kind}` of opt-backend-candle"
            );
            Err(Error::new(ErrorKind::Unsupported, "candle", message))
        }
        _ => Err(unknown()),
    }
}

/// Opens a device of a driver. A number past the last device and a missing driver are panics in places.
fn start(name: &str, open: impl FnOnce() -> candle_core::Result<Device>) -> Result<Device> {
    let absent = |why: &str| {
        Error::new(ErrorKind::Device, "candle", format_args!("device {name} cannot be used here: {why}"))
    };
    match catch_unwind(AssertUnwindSafe(open)) {
        Ok(Ok(device)) => Ok(device),
        Ok(Err(error)) => {
            let error = convert("candle", error).to_string();
            Err(absent(error.strip_prefix("candle: ").unwrap_or(&error)))
        }
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no such device");
            Err(absent(text.lines().next().unwrap_or_default()))
        }
    }
}

/// The name that opens the device.
pub(crate) fn name(device: &Device) -> String {
    match device.location() {
        DeviceLocation::Cpu => "cpu".to_owned(),
        DeviceLocation::Cuda { gpu_id } => format!("cuda:{gpu_id}"),
        DeviceLocation::Metal { gpu_id } => format!("metal:{gpu_id}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_are_none_are_refused() {
        let names =
            ["", "CPU", "cpu:0", "cuda:", "cuda:-1", "cuda:+1", "cuda:0:1", "gpu", "metal:x", ":", "cuda 0"];
        for bad in names {
            let error = open(bad).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Unsupported, "{bad}");
            assert!(error.to_string().contains(&format!("found {bad:?}")), "{error}");
        }
        assert!(open("cpu").unwrap().is_cpu());
    }

    #[test]
    fn what_is_not_compiled_in_names_its_feature() {
        for (name, feature, there) in [
            ("cuda:0", "`cuda`", cfg!(feature = "cuda")),
            ("cuda", "`cuda`", cfg!(feature = "cuda")),
            ("metal:3", "`metal`", cfg!(feature = "metal")),
        ] {
            if !there {
                let error = open(name).unwrap_err();
                assert_eq!(error.kind(), ErrorKind::Unsupported);
                assert!(error.to_string().contains(feature) && error.to_string().contains(name), "{error}");
            }
        }
    }

    #[test]
    fn a_device_that_is_not_there_is_an_error() {
        let error =
            start("metal:9", || panic!("swap_remove index (is 9) should be < len (is 0)")).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Device);
        assert!(error.to_string().contains("metal:9 cannot be used here: swap_remove"), "{error}");
        let open = || Err(candle_core::Error::Msg("CUDA_ERROR_INVALID_DEVICE\nat main.rs".to_owned()));
        let error = start("cuda:9", open).unwrap_err();
        let expected = "candle: device cuda:9 cannot be used here: CUDA_ERROR_INVALID_DEVICE";
        assert_eq!(error.to_string(), expected);
    }
}
