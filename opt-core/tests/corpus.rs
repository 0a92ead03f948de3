//! Replays what the fuzzer found: every input of `fuzz/corpus` must be answered, and quickly.

use opt_core::{checkpoint, generation, tokenizer};
use std::io::Write;
use std::{
    fs,
    path::PathBuf,
    time::{Duration, Instant},
};

/// Runs every input of a target, which says whether it accepted it.
fn replay(target: &str, run: impl Fn(&[u8]) -> bool) {
    let folder: PathBuf = [env!("CARGO_MANIFEST_DIR"), "..", "fuzz", "corpus", target].iter().collect();
    if !folder.exists() {
        // The packaged crate comes without the corpora.
        let _ = writeln!(std::io::stderr(), "skipped: no {}", folder.display());
        return;
    }
    let (mut count, mut accepted) = (0, 0);
    for entry in fs::read_dir(&folder).unwrap() {
        let path = entry.unwrap().path();
        let bytes = fs::read(&path).unwrap();
        assert!(bytes.len() <= 4096, "{} has {} bytes", path.display(), bytes.len());
        let start = Instant::now();
        accepted += usize::from(run(&bytes));
        assert!(start.elapsed() < Duration::from_secs(2), "{} took {:?}", path.display(), start.elapsed());
        count += 1;
    }
    assert!(count >= 200, "{target}: expected at least 200 inputs, found {count}");
    eprintln!("{target}: {accepted} of {count} accepted");
    // A corpus of nothing but refusals never gets past the first check.
    assert!(accepted > 20 && accepted < count, "{target}: {accepted} of {count} accepted");
}

/// Files of tensors are also opened as whole checkpoints, which must say no or be complete.
fn replay_checkpoint(target: &str, run: fn(&[u8]) -> bool) {
    replay(target, |bytes| {
        checkpoint::fuzzing::checkpoint(bytes);
        run(bytes)
    });
}

#[test]
fn safetensors() {
    replay_checkpoint("safetensors", checkpoint::fuzzing::safetensors);
}

#[test]
fn index() {
    replay("index", checkpoint::fuzzing::index);
}

#[test]
fn pickle() {
    replay_checkpoint("pickle", checkpoint::fuzzing::pickle);
}

#[test]
fn flax() {
    replay_checkpoint("flax", checkpoint::fuzzing::flax);
}

#[test]
fn config() {
    replay("config", generation::fuzzing::config);
}

#[test]
fn generation_config() {
    replay("generation_config", generation::fuzzing::generation_config);
}

#[test]
fn tokenizer() {
    replay("tokenizer", tokenizer::fuzz);
}
