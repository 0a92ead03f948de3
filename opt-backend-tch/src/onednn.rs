//! Products on the CPU with weights in oneDNN's own order.
//!
//! LibTorch's compiler lets oneDNN lay a weight out once and multiply with it from then on. Beside `addmm`, which
//! finds the weight in rows each time, that is worth a factor of two to three for f32 where MKL does not use AVX-512
//! (on AMD) and of two for one row of bf16. tch has no function for it, but the ops are part of LibTorch's C
//! interface (`torch/csrc/inductor/aoti_torch/c/shim.h`, `shim_cpu.h`), whose tensor handles are pointers to
//! `at::Tensor` as tch's are. They are looked up by name: where LibTorch was built without oneDNN, weights stay in rows.

use opt_backend::{Error, ErrorKind, Result};
use std::{
    ffi::{CStr, c_char, c_void},
    ptr,
    sync::OnceLock,
};
use tch::{Kind, Tensor};

/// A tensor handle of LibTorch's C interface: a pointer to an `at::Tensor`.
type Handle = *mut c_void;

/// `aoti_torch_call_dispatcher`: calls an op by name; arguments and results are 64-bit values on a stack.
type CallDispatcher = unsafe extern "C" fn(*const c_char, *const c_char, *mut u64) -> i32;
/// `aoti_torch_new_tensor_handle`: another handle of the same tensor.
type NewHandle = unsafe extern "C" fn(Handle, *mut Handle) -> i32;
/// `aoti_torch_cpu__linear_pointwise`: input, weight, optional bias, the function applied to the result, its numbers
/// and their count, its optional variant, and the result.
type LinearPointwise = unsafe extern "C" fn(
    Handle,
    Handle,
    *mut Handle,
    *const c_char,
    *const *const f64,
    i64,
    *mut *const c_char,
    *mut Handle,
) -> i32;

/// The functions this module calls.
struct Functions {
    call_dispatcher: CallDispatcher,
    new_handle: NewHandle,
    linear_pointwise: LinearPointwise,
    /// C++'s `operator new`.
    allocate: unsafe extern "C" fn(usize) -> *mut c_void,
}

/// Rows that a packed weight is made for. It serves any number; this one is best or near it for 1 to 512.
const ROWS: u64 = 8;
/// Elements of a result from which on its memory is asked for first, so that a lack of it can be told.
const LARGE: usize = 1 << 26;

/// Whether weights of `kind` can be packed on this machine.
pub(crate) fn can_pack(kind: Kind) -> bool {
    let processor = match kind {
        Kind::Float => true,
        Kind::BFloat16 => has_bf16(),
        _ => false,
    };
    processor && functions().is_some()
}

/// What oneDNN needs for bf16.
#[cfg(target_arch = "x86_64")]
pub(crate) fn has_bf16() -> bool {
    use std::arch::is_x86_feature_detected as has;
    has!("avx512bw") && has!("avx512vl") && has!("avx512dq")
}

#[cfg(not(target_arch = "x86_64"))]
pub(crate) fn has_bf16() -> bool {
    false
}

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
fn functions() -> Option<&'static Functions> {
    use libloading::os::unix::Library;

    static FUNCTIONS: OnceLock<Option<Functions>> = OnceLock::new();
    let find = || {
        let program = Library::this();
        // SAFETY: the types are those of the declarations in LibTorch 2.13's shim.h and shim_cpu.h, which this
        // crate's build script and `device::check_version` insist on, and of the C++ standard library's
        // `operator new(size_t)` on 64-bit Linux.
        unsafe {
            Some(Functions {
                call_dispatcher: *program.get(b"aoti_torch_call_dispatcher\0").ok()?,
                new_handle: *program.get(b"aoti_torch_new_tensor_handle\0").ok()?,
                linear_pointwise: *program.get(b"aoti_torch_cpu__linear_pointwise\0").ok()?,
                allocate: *program.get(b"_Znwm\0").ok()?,
            })
        }
    };
    FUNCTIONS.get_or_init(find).as_ref()
}

// Elsewhere nothing was measured, and the wheels differ: Apple's have no oneDNN.
#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
fn functions() -> Option<&'static Functions> {
    static NONE: OnceLock<Option<Functions>> = OnceLock::new();
    NONE.get_or_init(|| None).as_ref()
}

fn missing(op: &'static str) -> Error {
    Error::new(ErrorKind::Unsupported, op, "this LibTorch has no oneDNN")
}

/// `rows`, a weight `[out, in]`, as oneDNN wants it.
pub(crate) fn pack(op: &'static str, rows: &Tensor) -> Result<Tensor> {
    let functions = functions().ok_or_else(|| missing(op))?;
    let failed = || Error::new(ErrorKind::Device, op, "oneDNN did not take a weight over");
    let mut weight = ptr::null_mut();
    // SAFETY: `rows` is a tensor, and lives; the new handle is written or the call fails.
    if unsafe { (functions.new_handle)(handle(rows), &mut weight) } != 0 {
        return Err(failed());
    }
    // SAFETY: this op takes (Tensor, int?) and gives a tensor. A tensor on the stack is a handle that the call takes
    // over; an optional that is there is a pointer to a value from C++'s `new`, which the call frees.
    unsafe {
        let rows_hint = (functions.allocate)(size_of::<u64>()).cast::<u64>();
        if rows_hint.is_null() {
            return Err(failed());
        }
        rows_hint.write(ROWS);
        let mut stack = [weight as u64, rows_hint as u64];
        if (functions.call_dispatcher)(
            c"mkldnn::_reorder_linear_weight".as_ptr(),
            c"".as_ptr(),
            stack.as_mut_ptr(),
        ) != 0
        {
            return Err(failed());
        }
        Ok(Tensor::from_ptr((stack[0] as Handle).cast()))
    }
}

/// `x W^T + b`, and its positive part if `relu`. `x` is `[rows, in]` and contiguous, in the format of the weight.
pub(crate) fn linear(
    op: &'static str,
    x: &Tensor,
    packed: &Tensor,
    bias: Option<&Tensor>,
    relu: bool,
    [rows, outputs]: [usize; 2],
    kind: Kind,
) -> Result<Tensor> {
    let functions = functions().ok_or_else(|| missing(op))?;
    if rows.saturating_mul(outputs) >= LARGE {
        let size = [rows as i64, outputs as i64];
        drop(Tensor::f_empty(size, (kind, tch::Device::Cpu)).map_err(crate::error::torch(op))?);
    }
    let then: &CStr = if relu { c"relu" } else { c"none" };
    let mut bias = bias.map(handle);
    let mut result = ptr::null_mut();
    // SAFETY: all handles are of tensors that live through the call, which reads them; the result is written or the
    // call fails. There are no numbers and no variant.
    let status = unsafe {
        (functions.linear_pointwise)(
            handle(x),
            handle(packed),
            bias.as_mut().map_or(ptr::null_mut(), ptr::from_mut),
            then.as_ptr(),
            ptr::null(),
            0,
            ptr::null_mut(),
            &mut result,
        )
    };
    if status != 0 || result.is_null() {
        return Err(Error::new(ErrorKind::Device, op, "oneDNN's product failed"));
    }
    // SAFETY: the handle of a new tensor, which is the caller's to free; `Tensor` does.
    Ok(unsafe { Tensor::from_ptr(result.cast()) })
}

fn handle(tensor: &Tensor) -> Handle {
    tensor.as_ptr().cast_mut().cast()
}
