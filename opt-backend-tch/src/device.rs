//! Devices by name, and what LibTorch finds on this machine.

use crate::{
    Tch, Tensor,
    tensor::{read, upload},
    weights::Dense,
};
use opt_backend::{
    DType, Error, ErrorKind, HostMatrix, Result,
    ndarray::{Array2, Ix2},
};
use std::{ffi::OsStr, sync::OnceLock};
use tch::{Cuda, Device, Kind, utils};

const OP: &str = "tch";

/// The LibTorch that this crate is made for, as (major, minor).
const VERSION: [u8; 2] = [2, 13];

/// The device called `name`, if it is there.
pub(crate) fn named(name: &str) -> Result<Device> {
    let device = match (name, name.strip_prefix("cuda:")) {
        ("cpu", _) => Some(Device::Cpu),
        ("cuda", _) => Some(Device::Cuda(0)),
        ("mps", _) => Some(Device::Mps),
        (_, Some(index)) if index.bytes().all(|b| b.is_ascii_digit()) => index.parse().ok().map(Device::Cuda),
        _ => None,
    };
    let Some(device) = device else {
        return Err(unsupported(format!(
            "unknown device {name:?}; expected cpu, cuda, cuda:N or mps; here are {}",
            available().join(", ")
        )));
    };
    check(device)?;
    Ok(device)
}

/// Fails unless the device is there.
pub(crate) fn check(device: Device) -> Result<()> {
    let here = match device {
        Device::Cpu => true,
        Device::Cuda(index) => index < cuda_devices(),
        Device::Mps => utils::has_mps(),
        Device::Vulkan => false,
    };
    if here {
        return Ok(());
    }
    let reason = match device {
        Device::Cuda(_) if cuda_devices() > 0 => "",
        Device::Cuda(_) if load_cuda() => "; LibTorch has CUDA, but finds no driver or no GPU",
        Device::Cuda(_) => "; this LibTorch is a build without CUDA",
        _ => "",
    };
    Err(unsupported(format!(
        "device {} is not there; expected one of {}{reason}",
        name(device),
        available().join(", ")
    )))
}

/// The name of a device, as users write it.
pub(crate) fn name(device: Device) -> String {
    match device {
        Device::Cpu => "cpu".to_owned(),
        Device::Cuda(index) => format!("cuda:{index}"),
        Device::Mps => "mps".to_owned(),
        Device::Vulkan => "vulkan".to_owned(),
    }
}

fn available() -> Vec<String> {
    let cuda = (0..cuda_devices()).map(|i| name(Device::Cuda(i)));
    let mps = utils::has_mps().then(|| name(Device::Mps));
    [name(Device::Cpu)].into_iter().chain(cuda).chain(mps).collect()
}

/// CUDA devices that LibTorch finds.
fn cuda_devices() -> usize {
    if load_cuda() { usize::try_from(Cuda::device_count()).unwrap_or(0) } else { 0 }
}

/// Loads LibTorch's CUDA part; says whether there is one.
///
/// Linkers leave a library out whose functions a program does not call by name, and LibTorch then knows no CUDA. It
/// asks once and keeps the answer, so this comes before any other question about CUDA.
fn load_cuda() -> bool {
    static LOADED: OnceLock<bool> = OnceLock::new();
    *LOADED.get_or_init(|| {
        let name = libloading::library_filename("torch_cuda");
        // SAFETY: the library belongs to the LibTorch that is loaded already; what it does on loading is to register
        // its kernels there. It is never unloaded.
        let loaded = unsafe { load(&name) };
        loaded.is_ok_and(|library| {
            std::mem::forget(library);
            utils::has_cudart()
        })
    })
}

#[cfg(unix)]
unsafe fn load(name: &OsStr) -> std::result::Result<libloading::os::unix::Library, libloading::Error> {
    use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_LAZY};
    // SAFETY: the caller's promise.
    unsafe { Library::open(Some(name), RTLD_LAZY | RTLD_GLOBAL) }
}

#[cfg(not(unix))]
unsafe fn load(name: &OsStr) -> std::result::Result<libloading::Library, libloading::Error> {
    // SAFETY: the caller's promise.
    unsafe { libloading::Library::new(name) }
}

fn unsupported(message: String) -> Error {
    Error::new(ErrorKind::Unsupported, OP, message)
}

/// The version of the LibTorch that is loaded, `[major, minor, patch]`.
fn version() -> [u8; 3] {
    unsafe extern "C" {
        // torch/csrc/inductor/aoti_torch/c/shim.h, part of LibTorch's stable C interface.
        safe fn aoti_torch_abi_version() -> u64;
    }
    let [major, minor, patch, ..] = aoti_torch_abi_version().to_be_bytes();
    [major, minor, patch]
}

pub(crate) fn version_text() -> String {
    version().map(|part| part.to_string()).join(".")
}

/// Fails if the LibTorch that is loaded is another than this crate was made for. (One whose symbols differ does not
/// get this far: then the system says that a symbol is missing.)
pub(crate) fn check_version() -> Result<()> {
    let [major, minor, _] = version();
    if [major, minor] == VERSION {
        return Ok(());
    }
    let [wanted_major, wanted_minor] = VERSION;
    Err(unsupported(format!(
        "expected LibTorch {wanted_major}.{wanted_minor}, found {}; get it with pip install \
         torch=={wanted_major}.{wanted_minor}.0 and put its folder torch/lib first on LD_LIBRARY_PATH",
        version_text()
    )))
}

/// Fails if products of f32 matrices are computed in less, as TF32 or bf16: settings of the process or of the
/// environment may say so, and results would be wrong by a thousandth.
pub(crate) fn check_products_are_f32(tch: &Tch) -> Result<()> {
    const N: usize = 64;
    // 1 + 2⁻²⁰ is an f32, and 1 in a format of 10 or 7 bits.
    let exact = 1.0 + 2f32.powi(-20);
    let identity = Array2::eye(N);
    let linear = Dense::new(tch, HostMatrix::F32(identity.view()), None, DType::F32)?;
    let x = upload::<f32, Ix2>(OP, Array2::from_elem((N, N), exact).view(), tch.device())?;
    let (product, _) = linear.apply(OP, tch, &Tensor::new(x, Kind::Float, [N, N]), false)?;
    if read(OP, &product, N * N)?.iter().all(|found| *found == exact) {
        return Ok(());
    }
    Err(unsupported(format!(
        "products of f32 are not computed in f32 on {} (TF32 or bf16 in their place); unset \
         TORCH_ALLOW_TF32_CUBLAS_OVERRIDE, and leave LibTorch's float32_matmul_precision at highest",
        name(tch.device())
    )))
}

/// Bytes of memory that are free on a CUDA device.
pub(crate) fn cuda_memory(index: usize) -> Option<u64> {
    let index = i32::try_from(index).ok()?;
    if !load_cuda() {
        return None;
    }
    free_on(index)
}

#[cfg(unix)]
fn free_on(index: i32) -> Option<u64> {
    use libloading::os::unix::Library;
    type Device = unsafe extern "C" fn(i32) -> i32;
    type GetDevice = unsafe extern "C" fn(*mut i32) -> i32;
    type Memory = unsafe extern "C" fn(*mut usize, *mut usize) -> i32;
    // LibTorch has loaded the CUDA runtime, and so its functions are among those of the program.
    let program = Library::this();
    // SAFETY: the types are those of CUDA's `cuda_runtime_api.h`; 0 is success. The device that this thread works on
    // is as before afterwards.
    unsafe {
        let get_device = program.get::<GetDevice>(b"cudaGetDevice\0").ok()?;
        let set_device = program.get::<Device>(b"cudaSetDevice\0").ok()?;
        let memory = program.get::<Memory>(b"cudaMemGetInfo\0").ok()?;
        let (mut before, mut free, mut total) = (0, 0, 0);
        if get_device(&mut before) != 0 || set_device(index) != 0 {
            return None;
        }
        let asked = memory(&mut free, &mut total);
        let restored = set_device(before);
        (asked == 0 && restored == 0).then_some(free as u64)
    }
}

#[cfg(not(unix))]
fn free_on(_: i32) -> Option<u64> {
    None
}
