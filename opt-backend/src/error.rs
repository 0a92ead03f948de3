use std::fmt;

/// What a backend's operations return.
pub type Result<T> = std::result::Result<T, Error>;

/// Why an operation of a backend failed. The fields stay private so that context can grow; ask [`Error::kind`].
#[derive(Debug, thiserror::Error)]
#[error("{op}: {message}")]
pub struct Error {
    kind: ErrorKind,
    op: &'static str,
    message: String,
}

/// The classes of failure a caller may want to tell apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// Operands whose shapes, or an index that, do not fit each other.
    Shape,
    /// The device ran out of memory.
    OutOfMemory,
    /// The device was lost; this backend value is of no further use.
    DeviceLost,
    /// Something this backend, device or build cannot do.
    Unsupported,
    /// Any other failure of the device or its driver.
    Device,
}

impl Error {
    /// An error of `kind` in operation `op`; `message` says what was expected and what was found.
    pub fn new(kind: ErrorKind, op: &'static str, message: impl fmt::Display) -> Self {
        Self { kind, op, message: message.to_string() }
    }

    /// Operands do not fit: `message` says what was expected and found.
    pub fn shape(op: &'static str, message: impl fmt::Display) -> Self {
        Self::new(ErrorKind::Shape, op, message)
    }

    /// The class of this failure.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The operation that failed, as named in [`crate::Backend`].
    pub fn op(&self) -> &'static str {
        self.op
    }
}
