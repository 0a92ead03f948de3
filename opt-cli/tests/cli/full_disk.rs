//! A disk that is full: what a training had saved stays whole, and one line says what could not be written.
//!
//! Instead of a full disk files have a largest size (RLIMIT_FSIZE); writing more is an error of the same kind.

use super::{opt, run, tiny};
use serde_json::json;
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

/// The files of a directory, by their paths in it.
fn files(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut all = BTreeMap::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let name = PathBuf::from(path.file_name().unwrap());
        if path.is_dir() {
            all.extend(files(&path).into_iter().map(|(file, bytes)| (name.join(file), bytes)));
        } else {
            all.insert(name, fs::read(&path).unwrap());
        }
    }
    all
}

/// The same command, whose files can have `blocks` of 512 bytes (of 1024 in some shells) and no more.
fn limited(command: &Command, blocks: u64) -> Command {
    let mut limited = Command::new("sh");
    // The signal that such a write is answered with would end the process without a word.
    let script = format!("trap '' XFSZ; ulimit -f {blocks}; exec \"$@\"");
    limited.args(["-c", &script, "sh"]).arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => limited.env(name, value),
            None => limited.env_remove(name),
        };
    }
    if let Some(dir) = command.get_current_dir() {
        limited.current_dir(dir);
    }
    limited
}

#[test]
fn a_save_that_fails_leaves_the_last_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let line =
        |i: u32| json!({ "ids": (0..9).map(|j| 3 + (i * 7 + j) % 70).collect::<Vec<u32>>() }).to_string();
    let data = dir.path().join("data.jsonl");
    fs::write(&data, (0..12).map(line).collect::<Vec<_>>().join("\n")).unwrap();
    let output = dir.path().join("out");
    for method in ["tune", "distill"] {
        let train = || {
            let mut command = opt();
            match method {
                "tune" => command.args(["tune", "full", "--model"]).arg(tiny("shape_125m")),
                _ => command.args(["distill", "--student-layers", "2", "--teacher"]).arg(tiny("shape_350m")),
            };
            command.args(["--quiet", "--batch-size", "4", "--max-steps", "6", "--save-steps", "2"]);
            command.args(["--save-limit", "9", "--data"]).arg(&data).arg("--output").arg(&output);
            command
        };
        run(&mut train()).done();
        let through = files(&output);
        for step in [4, 6] {
            fs::remove_dir_all(output.join(format!("checkpoint-{step}"))).unwrap();
        }
        let kept = files(&output.join("checkpoint-2"));
        let size = kept[Path::new("optimizer.safetensors")].len() as u64;
        let mut command = train();
        command.arg("--resume");
        let ran = run(&mut limited(&command, size / 4 / 512));
        let failed = output.join("checkpoint-4");
        assert_eq!((ran.code, &ran.stdout[..]), (Some(1), ""), "{}", ran.stderr);
        assert_eq!(ran.stderr.lines().count(), 1, "{}", ran.stderr);
        for part in [&format!("error: {}: not saved: ", failed.display()), "File too large"] {
            assert!(ran.stderr.contains(part), "expected {part:?} in {}", ran.stderr);
        }
        // Nothing is half there, and what there was is as it was.
        assert!(!failed.exists());
        let hidden = |entry: fs::DirEntry| entry.file_name().to_string_lossy().starts_with('.');
        assert!(!fs::read_dir(&output).unwrap().any(|entry| hidden(entry.unwrap())));
        assert!(files(&output.join("checkpoint-2")) == kept, "checkpoint-2 has changed");
        // With room again it goes on to the same end.
        run(&mut command).done();
        for (name, bytes) in files(&output) {
            let is_weights = name.extension().is_some_and(|extension| extension == "safetensors");
            assert!(!is_weights || bytes == through[&name], "{method}: {} differs", name.display());
        }
        fs::remove_dir_all(&output).unwrap();
    }
}
