//! How fast all cores together read memory: the limit of decoding. Prints one JSON line.
//!
//!     cargo run --release -p opt-benches --bin bandwidth

use std::{hint::black_box, sync::Barrier, thread, time::Instant};

/// Numbers each thread reads: more than any cache holds.
const NUMBERS: usize = 32 << 20;
const RUNS: usize = 7;

fn main() {
    let threads = thread::available_parallelism().map_or(1, |n| n.get());
    let barrier = Barrier::new(threads);
    // The threads read the same memory area each, a run at a time; the slowest ends a run.
    let read = || {
        let numbers: Vec<u64> = (0..NUMBERS as u64).collect();
        let mut seconds = Vec::new();
        for _ in 0..RUNS {
            barrier.wait();
            let started = Instant::now();
            // Several chains, so that additions do not limit the reading.
            let mut sums = [0_u64; 32];
            for chunk in numbers.chunks_exact(sums.len()) {
                sums.iter_mut().zip(chunk).for_each(|(sum, x)| *sum = sum.wrapping_add(*x));
            }
            black_box(sums);
            barrier.wait();
            seconds.push(started.elapsed().as_secs_f64());
        }
        seconds
    };
    let best = thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(read)).collect();
        let seconds: Vec<Vec<f64>> = workers.into_iter().filter_map(|worker| worker.join().ok()).collect();
        let slowest = |run: usize| seconds.iter().filter_map(|s| s.get(run)).fold(0.0, |a: f64, b| a.max(*b));
        (1..RUNS).map(slowest).fold(f64::INFINITY, f64::min)
    });
    let bytes = (threads * NUMBERS * size_of::<u64>()) as f64;
    println!("{{\"threads\": {threads}, \"gb_s\": {:.2}}}", bytes / best * 1e-9);
}
