//! The suite every backend must pass, at every instruction set of this machine.

use opt_backend::conformance::Suite;
use opt_backend_cpu::{Cpu, SimdLevel};

/// The suite; in quick form if `OPT_QUICK_TESTS` is set, for emulated machines.
fn suite(make: impl Fn() -> Cpu + 'static) -> Suite<Cpu> {
    let suite = Suite::new(make);
    if std::env::var_os("OPT_QUICK_TESTS").is_some() { suite.quick() } else { suite }
}

#[test]
fn conformance() {
    for level in SimdLevel::ALL.into_iter().filter(|level| level.is_available()) {
        let make = move || Cpu::builder().threads(2).simd(Some(level)).build().expect("the level is there");
        println!("{level}: {}", suite(make).run());
    }
}

/// The same with guard zones around every buffer that kernels write to.
#[test]
fn nothing_is_written_outside_buffers() {
    for level in SimdLevel::ALL.into_iter().filter(|level| level.is_available()) {
        let cpu = Cpu::builder().threads(2).simd(Some(level)).guarded(true);
        let make = move || cpu.clone().build().expect("the level is there");
        let guards = |cpu: &Cpu| match cpu.guard_faults() {
            faults if faults.is_empty() => Ok(()),
            faults => Err(faults.join("; ")),
        };
        println!("{level}, guarded: {}", suite(make).quick().guards(guards).run());
    }
}
