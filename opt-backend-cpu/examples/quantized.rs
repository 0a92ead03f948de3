//! Products with weights in int8 and int4, by rows: linears of OPT-125m, which caches may hold, and its head, which they
//! do not.
//!
//! ```text
//! cargo run --release -p opt-backend-cpu --example quantized -- [THREADS]
//! ```
//!
//! Figures are billions of multiplications of a weight and an activation a second, the best of many rounds: what is
//! lost to other work of the machine is not seen.

use opt_backend::{
    Backend, Result, Then,
    ndarray::Array2,
    quant::{Compute, Groups, Levels, Quantized, Zeros},
};
use opt_backend_cpu::Cpu;
use std::time::{Duration, Instant};

/// Numbers that look random.
fn random(shape: [usize; 2], mut state: u32) -> Array2<u32> {
    Array2::from_shape_simple_fn(shape, || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state >> 16
    })
}

fn quantized(shape: [usize; 2], bits: u32) -> Result<Quantized> {
    let codes = random(shape, 1).mapv(|v| (v % (1 << bits)) as u8);
    let scales = Array2::from_elem((shape[0], shape[1] / 32), 1.0 / 1024.0);
    let zeros = Zeros::Same(1 << (bits - 1));
    Quantized::new(codes, scales, zeros, Levels::Integers { bits }, Groups::Runs(32))
}

/// The best of several rounds.
fn best(rounds: usize, mut round: impl FnMut() -> Result<()>) -> Result<Duration> {
    let mut best = Duration::MAX;
    for _ in 0..rounds {
        let start = Instant::now();
        round()?;
        best = best.min(start.elapsed());
    }
    Ok(best)
}

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let threads = std::env::args().nth(1).map_or(Ok(1), |text| text.parse())?;
    let counts = [1, 2, 4, 8, 12, 16, 31, 32, 64, 128, 256, 512];
    for (shape, rounds) in [([3072, 768], 200), ([768, 3072], 200), ([50272, 768], 12)] {
        println!("{shape:?}, threads: {threads}, G/s\n");
        println!("| weights, bytes of an activation | {} |", counts.map(|n| format!("{n} rows")).join(" | "));
        println!("|---|{}", "---|".repeat(counts.len()));
        for bits in [8, 4] {
            for (bytes, compute) in [(2, Compute::Int16), (1, Compute::Int8)] {
                let cpu = Cpu::builder().threads(threads).compute(compute).build()?;
                let linear = cpu.new_quantized_linear(&quantized(shape, bits)?, None)?;
                let mut row = format!("| int{bits}, {bytes} |");
                for rows in counts {
                    let x = random([rows, shape[1]], 3).mapv(|v| v as f32 / 65536.0 - 0.5);
                    let x = cpu.upload(x.view())?;
                    let taken = best(rounds, || cpu.linear(&x, &linear, Then::Nothing).map(drop))?;
                    let products = (rows * shape[0] * shape[1]) as f64 / taken.as_secs_f64() * 1e-9;
                    row += &format!(" {products:.0} |");
                }
                println!("{row}");
            }
        }
        println!();
    }
    Ok(())
}
