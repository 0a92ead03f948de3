//! The suite every backend must pass, at every instruction set of this machine.

use opt_backend::{
    DType, Op,
    conformance::{Suite, Tolerance},
};
use opt_backend_cpu::{Compute, Cpu, SimdLevel};

/// Whether `OPT_QUICK_TESTS` is set, as for emulated machines, which take a minute for what others do in a second.
fn quick() -> bool {
    std::env::var_os("OPT_QUICK_TESTS").is_some()
}

fn suite(make: impl Fn() -> Cpu + 'static) -> Suite<Cpu> {
    let suite = Suite::new(make);
    if quick() { suite.quick() } else { suite }
}

fn faults(cpu: &Cpu) -> Result<(), String> {
    match cpu.guard_faults() {
        faults if faults.is_empty() => Ok(()),
        faults => Err(faults.join("; ")),
    }
}

/// The level that has the most: its kernels are those of the levels below it where they have no use for more.
fn last() -> SimdLevel {
    SimdLevel::ALL.into_iter().rfind(|level| level.is_available()).expect("scalar is everywhere")
}

/// What to test: everything this machine has; the last alone if it is to be quick.
fn levels() -> Vec<SimdLevel> {
    let levels = SimdLevel::ALL.into_iter().filter(|level| level.is_available());
    levels.filter(|&level| !quick() || level == last()).collect()
}

#[test]
fn conformance() {
    for level in levels() {
        let make = move || Cpu::builder().threads(2).simd(Some(level)).build().expect("the level is there");
        let suite =
            suite(make).quantized_tolerance(Tolerance::INT16_ACTIVATIONS).bf16_activations(level.bf16_dot());
        println!("{level}: {}", suite.run());
    }
}

/// The ops of training, none of them by a default body, and nothing is written outside buffers.
#[test]
fn training() {
    for level in levels() {
        let cpu = Cpu::builder().threads(2).simd(Some(level));
        for guarded in [false, true] {
            // The guarded run has all but the largest cases, which the last level is enough for.
            if !guarded && level != last() {
                continue;
            }
            let cpu = cpu.clone().guarded(guarded);
            let make = move || cpu.clone().build().expect("the level is there");
            let mut suite = suite(make)
                .quantized_tolerance(Tolerance::INT16_ACTIVATIONS)
                .bf16_activations(level.bf16_dot())
                .no_defaults(&Op::TRAIN);
            if guarded {
                suite = suite.quick().guards(faults);
            }
            println!("{level}: {}", suite.train());
        }
    }
}

/// Where the default rounds activations for weights of bf16, they need not be: then all is as exact as with f32.
#[test]
fn bf16_weights_with_activations_in_f32() {
    for level in SimdLevel::ALL.into_iter().filter(|level| level.is_available() && level.bf16_dot()) {
        let cpu = Cpu::builder().threads(2).simd(Some(level)).compute(Compute::F32);
        let make = move || cpu.clone().build().expect("the level is there");
        let suite = suite(make).dtypes(&[DType::BF16]).quick();
        let only = ["new_linear", "gather", "linear", "qkv", "logits", "log_probs", "model", "deterministic"];
        println!("{level}: {}", suite.only(&only).run());
    }
}

/// Quantized weights on every level there is, however quick tests are to be: with activations in f32, as exact as dense
/// weights, and rounded.
#[test]
fn quantized_weights() {
    for level in SimdLevel::ALL.into_iter().filter(|level| level.is_available()) {
        for (compute, tolerance) in [
            (Compute::F32, Tolerance::of(DType::F32)),
            (Compute::Int16, Tolerance::INT16_ACTIVATIONS),
            (Compute::Int8, Tolerance::INT8_ACTIVATIONS),
        ] {
            let cpu = Cpu::builder().threads(2).simd(Some(level)).compute(compute);
            let make = move || cpu.clone().build().expect("the level is there");
            let suite = suite(make).only(&["quantized"]).quantized_tolerance(tolerance);
            println!("{level}, {compute}: {}", suite.run());
        }
    }
}

/// The same with guard zones around every buffer that kernels write to.
#[test]
fn nothing_is_written_outside_buffers() {
    for level in levels() {
        let cpu = Cpu::builder().threads(2).simd(Some(level)).guarded(true);
        let make = move || cpu.clone().build().expect("the level is there");
        println!(
            "{level}, guarded: {}",
            suite(make)
                .quantized_tolerance(Tolerance::INT16_ACTIVATIONS)
                .bf16_activations(level.bf16_dot())
                .quick()
                .guards(faults)
                .run()
        );
    }
}
