//! The WebGPU backend.

use opt_backend::{Error, ErrorKind, Result};

/// The backend.
pub use opt_backend::Reference as Wgpu;

/// How to start the backend.
#[derive(Debug, Clone, Default)]
pub struct Builder {
    device: Option<String>,
}

impl Builder {
    /// Chooses a device by the backend's own name of it.
    #[must_use]
    pub fn device(mut self, device: impl Into<String>) -> Self {
        self.device = Some(device.into());
        self
    }

    /// Starts it.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`].
    pub fn build(self) -> Result<Wgpu> {
        Err(Error::new(ErrorKind::Unsupported, "wgpu", "this backend is not written yet"))
    }
}
