//! LibTorch's exceptions as errors of one line.

use opt_backend::{Error, ErrorKind};
use tch::TchError;

/// What a call of LibTorch returns.
pub(crate) type Tried<T> = std::result::Result<T, TchError>;

/// Turns what a call of LibTorch failed with into an error of `op`.
pub(crate) fn torch(op: &'static str) -> impl Fn(TchError) -> Error {
    move |error| {
        let text = error.to_string();
        Error::new(kind(&text), op, line(&text))
    }
}

/// What went wrong, without the file, the backtrace and the advice that LibTorch adds.
fn line(text: &str) -> String {
    let text = text.strip_prefix("Internal torch error: ").unwrap_or(text);
    let first = text.lines().map(str::trim).find(|line| !line.is_empty()).unwrap_or("LibTorch failed");
    // "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: ..."
    let first = match first.strip_prefix("[enforce fail at ").and_then(|rest| rest.split_once(". ")) {
        Some((_, message)) => message,
        None => first,
    };
    first.trim_end_matches('.').to_owned()
}

fn kind(text: &str) -> ErrorKind {
    const MEMORY: [&str; 4] = ["out of memory", "can't allocate memory", "not enough memory", "bad_alloc"];
    // After these CUDA refuses all further work in the process.
    const LOST: [&str; 4] =
        ["illegal memory access", "device-side assert", "unspecified launch failure", "device lost"];
    let has = |any: &[&str]| any.iter().any(|part| text.contains(part));
    if has(&MEMORY) {
        ErrorKind::OutOfMemory
    } else if has(&LOST) {
        ErrorKind::DeviceLost
    } else {
        ErrorKind::Device
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> Error {
        torch("linear")(TchError::Torch(text.to_owned()))
    }

    #[test]
    fn one_line_is_kept() {
        let shapes = "mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)";
        let error =
            of(&format!("{shapes}\nException raised from meta at LinearAlgebra.cpp:190\nframe #0: ..."));
        assert_eq!(error.to_string(), format!("linear: {shapes}"));
        assert_eq!(error.kind(), ErrorKind::Device);
    }

    #[test]
    fn memory_and_loss_are_told_apart() {
        let cpu = "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you \
                   tried to allocate 4000000000000 bytes. Error code 12 (Cannot allocate memory)\n";
        let error = of(cpu);
        assert_eq!(error.kind(), ErrorKind::OutOfMemory);
        assert!(error.to_string().starts_with("linear: DefaultCPUAllocator: can't"), "{error}");
        assert_eq!(of("CUDA out of memory. Tried to allocate 2.00 GiB").kind(), ErrorKind::OutOfMemory);
        assert_eq!(of("CUDA error: an illegal memory access was encountered").kind(), ErrorKind::DeviceLost);
    }
}
