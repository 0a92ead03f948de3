//! Runs the built command: what it prints, and how it ends.

mod adapters;
mod backends;
mod bench;
mod checkpoints;
mod distill;
mod embed;
mod ends;
mod eval;
#[cfg(target_os = "linux")]
mod full_disk;
mod generate;
mod quantize;
mod refusals;
mod score;
mod serve;
mod tasks;
mod tune;

use serde_json::Value;
use std::{
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

/// The repository.
fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// A file of the fixtures made by transformers.
fn fixture(path: &str) -> PathBuf {
    root().join("opt-core/tests/fixtures").join(path)
}

/// A tiny model without tokenizer.
fn tiny(name: &str) -> PathBuf {
    fixture("models").join(name)
}

fn fixture_json(path: &str) -> Value {
    let text = std::fs::read_to_string(fixture(path)).expect(path);
    serde_json::from_str(&text).expect(path)
}

/// The command, run in the repository with nothing on stdin and nothing in the environment that it looks at.
fn opt() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_opt"));
    command.current_dir(root()).env_remove("OPT_MODEL").env_remove("RUST_LOG").stdin(Stdio::null());
    command
}

/// The backends that this build was made without.
fn absent_backends() -> Vec<&'static str> {
    let listed = run(opt().args(["backends", "--json"])).json();
    let absent = |name: &&str| listed.iter().all(|backend| backend["name"] != *name);
    ["cpu", "tch", "candle", "wgpu"].into_iter().filter(absent).collect()
}

/// What a run left behind.
struct Ran {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

fn run(command: &mut Command) -> Ran {
    Ran::from(command.output().expect("the command starts"))
}

fn run_with_stdin(command: &mut Command, stdin: &[u8]) -> Ran {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the command starts");
    child.stdin.take().expect("a pipe").write_all(stdin).expect("it reads its input");
    Ran::from(child.wait_with_output().expect("the command ends"))
}

impl From<Output> for Ran {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code(),
            stdout: String::from_utf8(output.stdout).expect("stdout is UTF-8"),
            stderr: String::from_utf8(output.stderr).expect("stderr is UTF-8"),
        }
    }
}

impl Ran {
    /// That it did its work.
    #[track_caller]
    fn done(self) -> Self {
        assert_eq!(self.code, Some(0), "{}", self.stderr);
        self
    }

    /// The lines of JSON that stdout consists of.
    #[track_caller]
    fn json(self) -> Vec<Value> {
        let ran = self.done();
        ran.stdout.lines().map(|line| serde_json::from_str(line).expect("a line of JSON")).collect()
    }

    /// That it ended with `code` and one line that has all of `parts`, and printed nothing.
    #[track_caller]
    fn refused(self, code: i32, parts: &[&str]) {
        assert_eq!((self.code, &self.stdout[..]), (Some(code), ""), "{}", self.stderr);
        let first = self.stderr.lines().next().unwrap_or_default();
        assert!(first.starts_with("error: "), "{}", self.stderr);
        parts
            .iter()
            .for_each(|part| assert!(self.stderr.contains(part), "{part:?} is not in {}", self.stderr));
        assert!(!self.stderr.contains("panicked"), "{}", self.stderr);
        // Usage errors of the parser show the usage as well.
        if code == 1 || !self.stderr.contains("--help") {
            assert_eq!(self.stderr.lines().count(), 1, "{}", self.stderr);
        }
    }
}

fn ids(value: &Value) -> Vec<u64> {
    value.as_array().expect("a list").iter().map(|id| id.as_u64().expect("an id")).collect()
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().expect("a list").iter().map(|v| v.as_f64().expect("a number")).collect()
}

#[track_caller]
fn close(found: &[f64], expected: &[f64], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (found, expected) in found.iter().zip(expected) {
        assert!(
            (found - expected).abs() <= 1e-4 * expected.abs().max(1.0),
            "{what}: {found} is not {expected}"
        );
    }
}

fn keys(value: &Value) -> Vec<&str> {
    let mut keys: Vec<&str> = value.as_object().expect("an object").keys().map(String::as_str).collect();
    keys.sort_unstable();
    keys
}
