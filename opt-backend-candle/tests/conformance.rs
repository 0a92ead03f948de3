//! The suite every backend must pass, on each way of computing.
//!
//! `OPT_TEST_DEVICE` names the device (`cuda:0`, `metal`); the CPU if it is not set. This file needs nothing but
//! the device, so that the program built from it (`cargo test -p opt-backend-candle --features cuda --test
//! conformance --no-run`) can be carried to a machine that has one.

use opt_backend::{
    DType, Op,
    conformance::{Suite, Tolerance},
};
use opt_backend_candle::{Builder, Candle, Compute};

fn device() -> String {
    std::env::var("OPT_TEST_DEVICE").unwrap_or_else(|_| "cpu".to_owned())
}

fn on_cpu() -> bool {
    device() == "cpu"
}

fn suite(builder: Builder) -> Suite<Candle> {
    let builder = builder.device(device());
    // One value for the whole run: a device is opened once.
    let make = move || builder.clone().build().expect("the device of OPT_TEST_DEVICE");
    // Everything is an override but looking at attention weights.
    let overridden: Vec<Op> = Op::ALL.into_iter().filter(|op| *op != Op::AttentionWeights).collect();
    Suite::new(make).no_defaults(&overridden).reads_per_step(1)
}

/// On the CPU activations and sums are f32 whatever the weights are held in.
#[test]
fn cpu() {
    if !on_cpu() {
        println!("skipped: OPT_TEST_DEVICE is {}, which computes by candle's own ops", device());
        return;
    }
    for threads in [1, 3] {
        let suite = suite(Candle::builder().threads(threads));
        println!("{threads} threads: {}", suite.quantized_tolerance(Tolerance::INT16_ACTIVATIONS).run());
    }
}

/// Training on the CPU's own loops.
#[test]
fn training() {
    if !on_cpu() {
        println!("skipped: OPT_TEST_DEVICE is {}, which computes by candle's own ops", device());
        return;
    }
    for threads in [1, 3] {
        println!("{threads} threads: {}", suite(Candle::builder().threads(threads)).train());
    }
}

/// Training by candle's own ops.
#[test]
fn plain_training() {
    let suite = suite(Candle::builder().plain(true)).dtypes(&[DType::F32]);
    let suite = if on_cpu() { suite } else { suite.tolerance(Tolerance::GPU_F32) };
    println!("{}", suite.train());
}

/// Quantized weights, activations in f32, as exact as dense weights, and rounded to int8.
#[test]
fn quantized_weights_alone() {
    if !on_cpu() {
        println!("skipped: OPT_TEST_DEVICE is {}, where all activations are f32", device());
        return;
    }
    for threads in [1, 3] {
        let only = |compute| suite(Candle::builder().threads(threads).compute(compute)).only(&["quantized"]);
        println!("{threads} threads: {}", only(Compute::F32).run());
        let int8 = only(Compute::Int8).quantized_tolerance(Tolerance::INT8_ACTIVATIONS);
        println!("{threads} threads, int8: {}", int8.run());
    }
}

/// candle's own ops, which is how GPUs compute, with f32 weights.
#[test]
fn plain_f32() {
    let suite = suite(Candle::builder().plain(true)).dtypes(&[DType::F32]);
    // CUDA and Metal leave exp and division a few units in the last place.
    let suite = if on_cpu() { suite } else { suite.tolerance(Tolerance::GPU_F32) };
    println!("{}", suite.run());
}

/// With f16 weights: products take their input in f16.
#[test]
fn plain_f16() {
    plain_half(DType::F16);
}

/// With bf16 weights: products take their input in bf16.
#[test]
fn plain_bf16() {
    plain_half(DType::BF16);
}

fn plain_half(dtype: DType) {
    let suite = suite(Candle::builder().plain(true)).dtypes(&[dtype]).activations(dtype);
    println!("{}", suite.run());
}
