//! [`Train`] for [`Tch`].

use crate::Tch;
use opt_backend::Train;

impl Train for Tch {}
