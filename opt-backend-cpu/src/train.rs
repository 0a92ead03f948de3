//! [`Train`] for [`Cpu`]: arguments are checked here, once; kernels below may rely on them.

use crate::Cpu;
use opt_backend::Train;

impl Train for Cpu {}
