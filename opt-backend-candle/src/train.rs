//! [`Train`] for [`Candle`].

use crate::Candle;
use opt_backend::Train;

impl Train for Candle {}
