//! The `opt` command.
fn main() {}
