//! Which adapter the tests use.

use opt_backend_wgpu::{Builder, Wgpu};

/// A builder for the adapter that `OPT_TEST_DEVICE` names, or the best one; `None`, said so, if there is no adapter.
///
/// # Panics
/// If there is none and `OPT_REQUIRE_BACKENDS` is set.
#[allow(dead_code)] // not every test file needs it
pub(crate) fn builder() -> Option<Builder> {
    let mut builder = Wgpu::builder();
    if let Ok(adapter) = std::env::var("OPT_TEST_DEVICE") {
        builder = builder.device(adapter);
    }
    match builder.clone().build() {
        Ok(_) => Some(builder),
        Err(error) if std::env::var_os("OPT_REQUIRE_BACKENDS").is_some() => {
            panic!("OPT_REQUIRE_BACKENDS is set: {error}")
        }
        Err(error) => {
            println!("skipped: no WebGPU adapter ({error})");
            None
        }
    }
}

#[allow(dead_code, unreachable_pub, missing_docs)] // the benchmark of examples/step.rs includes it as well
pub(crate) mod model;
