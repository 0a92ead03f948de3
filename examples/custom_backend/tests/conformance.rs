//! The suite every backend must pass, on a wrapper of two backends: one that overrides every op, and one that lives on
//! default bodies.

use custom_backend::Counting;
use opt_backend::{
    Backend, Op, Reference,
    conformance::{Suite, Tolerance},
};
use opt_core::backends::Cpu;

#[test]
fn around_the_cpu() {
    let cpu = || Cpu::builder().threads(2).build().expect("the CPU");
    let rounds = cpu().simd().bf16_dot();
    let make = move || Counting::new(cpu());
    let overridden: Vec<Op> = Op::RUN.into_iter().filter(|op| *op != Op::AttentionWeights).collect();
    // A method that is not forwarded would show here as a call of its default body.
    let suite = Suite::new(make).no_defaults(&overridden).reads_per_step(1);
    let suite = suite.quantized_tolerance(Tolerance::INT16_ACTIVATIONS).bf16_activations(rounds);
    println!("{}", suite.run());
}

#[test]
fn around_the_reference() {
    println!("{}", Suite::new(|| Counting::new(Reference::new())).quick().run());
}

/// Methods with default bodies that are no ops of their own are not counted by the backend's counters.
#[test]
fn nothing_is_left_to_default_bodies() {
    use opt_backend::{CacheDType, CacheSpec, ndarray::Array2};

    let b = Counting::new(Reference::new());
    let tally = b.tally();
    let x = Array2::ones((2, 4));
    let spec = CacheSpec { layers: 1, heads: 2, head_dim: 2, dtype: CacheDType::F32, capacity_hint: 0 };
    let mut cache = b.new_cache(spec).expect("a cache");
    b.cache_seed(&mut cache, 0, x.view(), x.view()).expect("a seed");
    assert_eq!(
        (tally.of("cache_seed").calls, tally.of("cache_append").calls, tally.of("upload").calls),
        (1, 0, 0)
    );
    let tensor = b.upload(x.view()).expect("an upload");
    assert_eq!(b.block_on(b.read_owned(tensor)).expect("a read"), x);
    assert_eq!((tally.of("read_owned").calls, tally.of("read").calls, tally.of("block_on").calls), (1, 0, 1));
    tally.reset();
    assert_eq!(tally.of("upload").calls, 0);
}
