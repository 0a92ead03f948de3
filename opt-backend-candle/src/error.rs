//! candle's errors as ours: one line, and a kind.

use opt_backend::{Error, ErrorKind};

/// The error `error` of candle in operation `op`.
pub(crate) fn convert(op: &'static str, error: candle_core::Error) -> Error {
    let error = innermost(error);
    let kind = kind(&error);
    Error::new(kind, op, one_line(&error.to_string()))
}

/// candle wraps errors in backtraces (when RUST_BACKTRACE is set), contexts and paths.
fn innermost(error: candle_core::Error) -> candle_core::Error {
    use candle_core::Error as E;
    match error {
        E::WithBacktrace { inner, .. } | E::Context { inner, .. } | E::WithPath { inner, .. } => {
            innermost(*inner)
        }
        other => other,
    }
}

fn kind(error: &candle_core::Error) -> ErrorKind {
    use candle_core::Error as E;
    match error {
        E::UnexpectedShape { .. }
        | E::UnexpectedNumberOfDims { .. }
        | E::ShapeMismatch { .. }
        | E::ShapeMismatchBinaryOp { .. }
        | E::ShapeMismatchCat { .. }
        | E::DimOutOfRange { .. }
        | E::NarrowInvalidArgs { .. }
        | E::InvalidIndex { .. }
        | E::BroadcastIncompatibleShapes { .. } => ErrorKind::Shape,
        E::UnsupportedDTypeForOp(..) | E::NotCompiledWithCudaSupport | E::NotCompiledWithMetalSupport => {
            ErrorKind::Unsupported
        }
        other => driver_kind(&other.to_string()),
    }
}

/// The kind of a driver's error, of which there is only the text (CUDA's names, Metal's messages).
fn driver_kind(text: &str) -> ErrorKind {
    const OUT_OF_MEMORY: [&str; 4] =
        ["OUT_OF_MEMORY", "out of memory", "ALLOC_FAILED", "FailedToCreateResource"];
    // After these a CUDA context fails every further call.
    const LOST: [&str; 7] = [
        "ILLEGAL_ADDRESS",
        "LAUNCH_FAILED",
        "LAUNCH_TIMEOUT",
        "ECC_UNCORRECTABLE",
        "CONTEXT_IS_DESTROYED",
        "HARDWARE_STACK_ERROR",
        "DEVICE_UNAVAILABLE",
    ];
    let names = |names: &[&str]| names.iter().any(|name| text.contains(name));
    match () {
        () if names(&OUT_OF_MEMORY) => ErrorKind::OutOfMemory,
        () if names(&LOST) => ErrorKind::DeviceLost,
        () => ErrorKind::Device,
    }
}

fn one_line(text: &str) -> String {
    text.lines().map(str::trim).find(|line| !line.is_empty()).unwrap_or("unknown error").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Tensor};

    #[test]
    fn candles_errors_are_one_line_and_have_a_kind() {
        let zeros = |shape| Tensor::zeros(shape, candle_core::DType::F32, &Device::Cpu).unwrap();
        let error = zeros((2, 3)).matmul(&zeros((2, 3))).unwrap_err();
        let wrapped = error.context("first\nsecond").with_path("/some/file");
        let error = convert("linear", wrapped);
        assert_eq!(error.kind(), ErrorKind::Shape);
        assert!(!error.to_string().contains(['\n', '/']), "{error}");

        for (text, kind) in [
            ("DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")", ErrorKind::OutOfMemory),
            ("DriverError(CUDA_ERROR_ILLEGAL_ADDRESS, \"...\")", ErrorKind::DeviceLost),
            ("something else\n   0: candle_core::backtrace", ErrorKind::Device),
        ] {
            let inner = Box::new(candle_core::Error::Msg(text.to_owned()));
            let backtrace = Box::new(std::backtrace::Backtrace::force_capture());
            let error = convert("linear", candle_core::Error::WithBacktrace { inner, backtrace });
            assert_eq!(error.kind(), kind);
            let expected = text.lines().next().unwrap_or_default();
            assert_eq!(error.to_string(), format!("linear: {expected}"));
        }
        assert_eq!(one_line(""), "unknown error");
    }
}
