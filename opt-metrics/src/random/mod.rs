//! Random numbers as Python and NumPy draw them, so that samples can be made again.

mod mersenne;
mod numpy;
mod python;

pub use numpy::NumpyRandom;
pub use python::PythonRandom;

use crate::{Error, Result};

/// An empty list with space for `k` indices.
fn room(k: usize) -> Result<Vec<usize>> {
    let mut list = Vec::new();
    list.try_reserve_exact(k).map_err(|_| Error::option("number of draws", k, "what fits into memory"))?;
    Ok(list)
}
