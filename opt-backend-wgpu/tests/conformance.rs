//! The suite every backend must pass, with all the adapter has and with no more than any WebGPU device has.
//!
//! There are no guard zones around buffers: a kernel sees a buffer only through a binding of exactly the bytes it may
//! use, and WebGPU keeps every access within its binding.
//!
//! `OPT_TEST_DEVICE` names the adapter; `OPT_QUICK_TESTS` leaves out the long cases.

mod common;

use opt_backend::{
    Op,
    conformance::{Suite, Tolerance},
};
use opt_backend_wgpu::Builder;

fn run(what: &str, builder: Builder, quick: bool) {
    let suite = Suite::new(move || builder.clone().build().expect("the adapter was there a moment ago"));
    let overridden: Vec<Op> = Op::RUN.into_iter().filter(|op| *op != Op::AttentionWeights).collect();
    let mut suite = suite.tolerance(Tolerance::GPU_F32).no_defaults(&overridden).reads_per_step(1);
    if quick || std::env::var_os("OPT_QUICK_TESTS").is_some() {
        suite = suite.quick();
    }
    println!("{what}: {}", suite.run());
}

#[test]
fn all_that_the_adapter_has() {
    if let Some(builder) = common::builder() {
        run("all that the adapter has", builder, false);
    }
}

/// The kernels for GPUs, also where the adapter is none.
#[test]
fn all_that_the_adapter_has_as_on_a_gpu() {
    if let Some(builder) = common::builder() {
        run("all that the adapter has, as on a GPU", builder.software(false), false);
    }
}

#[test]
fn default_limits_without_subgroups_and_f16() {
    if let Some(builder) = common::builder() {
        let builder = builder.default_limits().features(false, false).software(false);
        run("default limits, no subgroups, no f16, as on a GPU", builder, false);
    }
}

/// The kernels for software adapters, wherever this runs.
#[test]
fn default_limits_as_on_a_software_adapter() {
    if let Some(builder) = common::builder() {
        let builder = builder.default_limits().features(false, false).software(true);
        run("default limits, no subgroups, no f16, as on a software adapter", builder, true);
    }
}

/// The ops of training, all of them on the device.
#[test]
fn training() {
    let Some(builder) = common::builder() else { return };
    let tight = builder.clone().default_limits().features(false, false).software(false);
    for (what, builder) in [("all that the adapter has", builder), ("default limits", tight)] {
        let suite = Suite::new(move || builder.clone().build().expect("the adapter was there a moment ago"));
        let mut suite = suite.tolerance(Tolerance::GPU_F32).no_defaults(&Op::TRAIN);
        if std::env::var_os("OPT_QUICK_TESTS").is_some() {
            suite = suite.quick();
        }
        println!("training, {what}: {}", suite.train());
    }
}

/// With bindings so small that much lies in several buffers.
#[test]
fn training_split_by_small_bindings() {
    let Some(builder) = common::builder() else { return };
    // Sixteen of the widest rows just fit, and the longest sequence.
    let builder = builder.max_binding(100 << 10);
    let suite = Suite::new(move || builder.clone().build().expect("the adapter was there a moment ago"));
    println!("training, 100 KiB a binding: {}", suite.tolerance(Tolerance::GPU_F32).quick().train());
}
