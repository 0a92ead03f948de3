//! Where the model is looked for, and how the command ends when it is not left to finish.

use super::*;
use std::io::Read;

#[test]
fn models_are_looked_for() {
    let dir = tempfile::tempdir().expect("a directory");
    let alone = dir.path().join("opt");
    std::fs::copy(env!("CARGO_BIN_EXE_opt"), &alone).expect("a copy");
    let elsewhere = |set: Option<&Path>| {
        let mut command = Command::new(&alone);
        command.current_dir(dir.path()).env_remove("OPT_MODEL").stdin(Stdio::null());
        set.map(|model| command.env("OPT_MODEL", model));
        run(command.args(["inspect", "--json"]))
    };
    elsewhere(None).refused(1, &["no model", "OPT_MODEL", "models/opt-novels"]);
    let novels = root().join("models/opt-novels").canonicalize().expect("the model");
    assert_eq!(elsewhere(Some(&novels)).json()[0]["parameters"], 6_967_808);
    // Beside the executable.
    let beside = dir.path().join("models/opt-novels");
    std::fs::create_dir_all(&beside).expect("a directory");
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(novels.join(file), beside.join(file)).expect("a copy");
    }
    let away = tempfile::tempdir().expect("a directory");
    let found = run(Command::new(&alone)
        .current_dir(away.path())
        .env_remove("OPT_MODEL")
        .args(["inspect", "--json"]));
    assert_eq!(found.json()[0]["parameters"], 6_967_808);
    assert_eq!(elsewhere(Some(Path::new(""))).json()[0]["parameters"], 6_967_808);
}

/// A long run whose output nobody has read yet.
fn long_run(more: &[&str]) -> std::process::Child {
    let mut command = opt();
    command.args(["generate", "--max-new-tokens", "500", "--eos-token-id", "0", "The river"]).args(more);
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the command starts")
}

#[test]
fn a_closed_pipe_ends_quietly() {
    for more in [&["--json", "--stream"][..], &[]] {
        let mut child = long_run(more);
        let mut some = [0; 4];
        let mut stdout = child.stdout.take().expect("a pipe");
        stdout.read_exact(&mut some).expect("some output");
        drop(stdout);
        let ended = child.wait_with_output().expect("it ends");
        let stderr = String::from_utf8_lossy(&ended.stderr);
        assert_eq!((ended.status.code(), &stderr[..]), (Some(0), ""));
    }
    let mut command = opt();
    command.args(["inspect", "--tensors"]).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("the command starts");
    drop(child.stdout.take());
    let ended = child.wait_with_output().expect("it ends");
    assert_eq!((ended.status.code(), &ended.stderr[..]), (Some(0), &b""[..]));
}

#[cfg(unix)]
#[test]
fn an_interrupt_ends_cleanly() {
    let mut child = long_run(&[]);
    let mut stdout = child.stdout.take().expect("a pipe");
    let mut some = [0; 12];
    stdout.read_exact(&mut some).expect("some output");
    let sent = Command::new("kill").args(["-INT", &child.id().to_string()]).status().expect("kill is there");
    assert!(sent.success());
    let mut rest = String::new();
    stdout.read_to_string(&mut rest).expect("text");
    let ended = child.wait_with_output().expect("it ends");
    assert_eq!(ended.status.code(), Some(130));
    assert_eq!(String::from_utf8_lossy(&ended.stderr), "interrupted\n");
    // What was made stays, and its line is ended.
    assert!(rest.ends_with('\n'), "{rest:?}");
}
