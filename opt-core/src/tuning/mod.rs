//! Fine-tuning.

mod backend;
mod ops;
mod tape;
#[cfg(test)]
mod tests;
mod weights;
