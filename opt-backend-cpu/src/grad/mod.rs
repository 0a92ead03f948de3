//! Kernels of training: gradients, losses, optimizers.
//!
//! Tasks are cut by sizes alone, each sum is in one order, and partial sums are added up one after the other: results
//! are bit-equal whatever the number of threads.

pub(crate) mod attention;
pub(crate) mod elements;
pub(crate) mod loss;
pub(crate) mod norm;
