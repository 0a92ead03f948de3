//! The suite every backend must pass, once for each format of weights: this backend computes in the format of its
//! weights.
//!
//! `OPT_TEST_DEVICE` (`cuda:0`, `mps`) runs all of it on another device than the CPU.

use opt_backend::{
    DType, Op,
    conformance::{Suite, Tolerance},
};
use opt_backend_tch::{Builder, Compute, Tch};

/// The device to test, and whether it is the CPU.
fn device() -> (String, bool) {
    let device = std::env::var("OPT_TEST_DEVICE").unwrap_or_else(|_| "cpu".to_owned());
    let cpu = device == "cpu";
    (device, cpu)
}

fn suite(dtype: DType) -> Suite<Tch> {
    suite_of(Tch::builder(), dtype).quantized_tolerance(quantized_tolerance(dtype))
}

fn suite_of(builder: Builder, dtype: DType) -> Suite<Tch> {
    let (device, cpu) = device();
    let make = move || {
        let builder = builder.clone().device(&device);
        if cpu { builder.threads(2) } else { builder }.build().expect("the device is there")
    };
    // Attention weights are for looking: the trait's own body is all there need be.
    let ops: Vec<Op> = Op::ALL.into_iter().filter(|op| *op != Op::AttentionWeights).collect();
    let suite = Suite::new(make).dtypes(&[dtype]).activations(dtype).no_defaults(&ops).reads_per_step(1);
    match dtype {
        DType::F32 if !cpu => suite.tolerance(Tolerance::GPU_F32),
        _ => suite,
    }
}

/// On the CPU activations are rounded unless they are as coarse already.
fn quantized_tolerance(dtype: DType) -> Tolerance {
    match (device().1, dtype) {
        (true, _) => Tolerance::INT16_ACTIVATIONS,
        (false, DType::F32) => Tolerance::GPU_F32,
        (false, _) => Tolerance::of(dtype),
    }
}

/// Quantized weights, activations in f32, as exact as dense weights, and rounded to int8.
#[test]
fn quantized_weights_alone() {
    let only = |compute| suite_of(Tch::builder().compute(compute), DType::F32).only(&["quantized"]);
    println!("{}", only(Compute::F32).run());
    println!("int8: {}", only(Compute::Int8).quantized_tolerance(Tolerance::INT8_ACTIVATIONS).run());
}

/// What other devices do with quantized weights, wherever this runs.
#[test]
fn quantized_weights_expanded() {
    let builder = Tch::builder().plain(true);
    println!("{}", suite_of(builder, DType::F32).only(&["quantized"]).run());
}

#[test]
fn f32() {
    println!("f32: {}", suite(DType::F32).run());
}

/// Training, on the CPU's own loops and as other devices do it.
#[test]
fn training() {
    for (what, builder) in [("loops", Tch::builder()), ("ops", Tch::builder().plain(true))] {
        let suite = suite_of(builder, DType::F32).quantized_tolerance(Tolerance::of(DType::F32));
        println!("{what}: {}", suite.train());
    }
}

#[test]
fn training_in_bf16() {
    println!("bf16: {}", suite(DType::BF16).train());
}

#[test]
fn training_in_f16() {
    println!("f16: {}", suite(DType::F16).train());
}

#[test]
fn bf16() {
    println!("bf16: {}", suite(DType::BF16).run());
}

#[test]
fn f16() {
    println!("f16: {}", suite(DType::F16).run());
}
