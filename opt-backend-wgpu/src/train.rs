//! [`Train`] for [`Wgpu`].

use crate::Wgpu;
use opt_backend::Train;

impl Train for Wgpu {}
