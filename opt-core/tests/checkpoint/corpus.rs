//! Replays what the fuzzer found: every input must be answered, quickly, and be large only if the file is.

use opt_core::checkpoint::fuzzing;
use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

fn replay(target: &str, run: impl Fn(&[u8]) -> bool) {
    let directory: PathBuf = [env!("CARGO_MANIFEST_DIR"), "..", "fuzz", "corpus", target].iter().collect();
    if !Path::new(&directory).exists() {
        // The packaged crate comes without the corpora.
        eprintln!("skipped: no {}", directory.display());
        return;
    }
    let (mut count, mut accepted) = (0, 0);
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let bytes = fs::read(&path).unwrap();
        let start = Instant::now();
        accepted += usize::from(run(&bytes));
        fuzzing::checkpoint(&bytes);
        assert!(start.elapsed() < Duration::from_secs(2), "{} took {:?}", path.display(), start.elapsed());
        count += 1;
    }
    assert!(count >= 200, "{target}: expected at least 200 inputs, found {count}");
    // A corpus of nothing but refusals never gets past the first check.
    assert!(accepted > 0 && accepted < count, "{target}: {accepted} of {count} accepted");
}

#[test]
fn safetensors() {
    replay("safetensors", fuzzing::safetensors);
}

#[test]
fn index() {
    replay("index", fuzzing::index);
}

#[test]
fn pickle() {
    replay("pickle", fuzzing::pickle);
}

#[test]
fn flax() {
    replay("flax", fuzzing::flax);
}
