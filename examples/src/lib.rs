//! Short programs to copy from: each file in `examples/` is one. Run one with
//! `cargo run --release -p opt-examples --example five_lines`.
//!
//! The library has no default model; these programs find the small one of the repository with [`model`].

use std::path::PathBuf;

/// The model that the examples run on: `OPT_MODEL`, then `models/opt-novels` here, then the same in the repository that
/// the program was built in.
pub fn model() -> PathBuf {
    const NAME: &str = "models/opt-novels";
    if let Some(path) = std::env::var_os("OPT_MODEL").filter(|path| !path.is_empty()) {
        return path.into();
    }
    let here = PathBuf::from(NAME);
    if here.exists() { here } else { PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/..")).join(NAME) }
}
