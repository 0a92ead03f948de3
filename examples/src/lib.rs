//! Short programs to copy from: each file in `examples/` is one.
