//! The suite every backend must pass, at every instruction set of this machine.

use opt_backend::conformance::Suite;
use opt_backend_cpu::{Cpu, SimdLevel};

#[test]
fn conformance() {
    for level in SimdLevel::ALL.into_iter().filter(|level| level.is_available()) {
        let make = move || Cpu::builder().threads(2).simd(Some(level)).build().expect("the level is there");
        println!("{level}: {}", Suite::new(make).run());
    }
}
