//! Replays what the fuzzer found in config.json and generation_config.json.

use opt_core::generation::fuzzing;
use std::{
    fs,
    path::PathBuf,
    time::{Duration, Instant},
};

fn replay(target: &str, run: fn(&[u8]) -> bool) {
    let folder: PathBuf = [env!("CARGO_MANIFEST_DIR"), "..", "fuzz", "corpus", target].iter().collect();
    let Ok(entries) = fs::read_dir(&folder) else {
        // The packaged crate comes without the corpora.
        eprintln!("skipped: no {}", folder.display());
        return;
    };
    let (mut count, mut accepted) = (0, 0);
    for entry in entries {
        let path = entry.unwrap().path();
        let start = Instant::now();
        accepted += usize::from(run(&fs::read(&path).unwrap()));
        assert!(start.elapsed() < Duration::from_secs(2), "{} took {:?}", path.display(), start.elapsed());
        count += 1;
    }
    assert!(count >= 200, "{target}: expected at least 200 inputs, found {count}");
    assert!(accepted > 20 && accepted < count, "{target}: {accepted} of {count} accepted");
}

#[test]
fn config() {
    replay("config", fuzzing::config);
}

#[test]
fn generation_config() {
    replay("generation_config", fuzzing::generation_config);
}
