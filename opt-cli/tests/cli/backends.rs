//! `--backend`: the same file, the same text.

use super::*;

/// The backends of this build that this machine can run.
fn usable() -> Vec<String> {
    let listed = run(opt().args(["backends", "--json"])).json();
    let mut usable = Vec::new();
    for backend in listed {
        let name = backend["name"].as_str().expect("a name").to_owned();
        match backend["error"].as_str() {
            None => usable.push(name),
            // One line that says why, and what to do.
            Some(why) => {
                assert!(why.len() > 20 && !why.contains('\n'), "{why}");
                let _ = writeln!(std::io::stderr(), "skipped: {name}: {why}");
            }
        }
    }
    assert!(usable.iter().any(|name| name == "cpu"));
    usable
}

#[test]
fn every_backend_says_the_same() {
    let calls: [&[&str]; 4] = [
        &["The river", "--max-new-tokens", "40"],
        &["The old house stood", "My dear sir,", "--num-beams", "3", "--max-new-tokens", "20"],
        &[
            "She opened the door and",
            "--do-sample",
            "--top-p",
            "0.9",
            "--seed",
            "7",
            "--max-new-tokens",
            "30",
        ],
        &["London", "--penalty-alpha", "0.6", "--top-k", "4", "--max-new-tokens", "12"],
    ];
    for call in calls {
        let on = |backend: &str| {
            let lines = run(opt().args(["generate", "--json", "--backend", backend]).args(call)).json();
            let texts = lines.iter().map(|line| line["sequences"][0]["text"].clone());
            texts.collect::<Vec<_>>()
        };
        let expected = on("cpu");
        for backend in usable() {
            assert_eq!(on(&backend), expected, "{backend}: {call:?}");
        }
    }
}

#[test]
fn each_backend_scores_and_measures() {
    let mut input = tempfile::NamedTempFile::new().expect("a file");
    writeln!(input, "{{\"text\": \"The river ran quietly by the old house.\"}}").expect("writing");
    let score = |backend: &str| {
        let lines =
            run(opt().args(["score", "--json", "--backend", backend, "--input"]).arg(input.path())).json();
        numbers(&lines[0]["logprobs"])
    };
    let expected = score("cpu");
    for backend in usable() {
        close(&score(&backend), &expected, &backend);
        let bench = ["bench", "--json", "--prompt-tokens", "8", "--gen-tokens", "4", "--batch", "1"];
        let line = run(opt().args(bench).args(["--backend", &backend])).json().remove(0);
        assert_eq!(line["backend"], backend.as_str());
        if backend == "wgpu" {
            for key in ["dispatches", "submissions", "device_mb"] {
                assert!(line[key].as_f64() > Some(0.0), "{key}: {line}");
            }
        }
    }
}

#[test]
fn devices_that_are_not_there() {
    for backend in usable() {
        let args = ["generate", "--backend", &backend, "--device", "abacus:7", "The river"];
        // The CPU backend has no devices to choose from: naming one is wrong usage.
        let code = if backend == "cpu" { 2 } else { 1 };
        run(opt().args(args)).refused(code, &[&backend, "abacus:7"]);
    }
}

#[test]
fn threads_that_have_no_effect_are_told() {
    for backend in usable() {
        let args =
            ["generate", "--backend", &backend, "--threads", "1", "--max-new-tokens", "2", "The river"];
        let ran = run(opt().args(args)).done();
        assert_eq!(
            ran.stderr.contains("--threads has no effect"),
            backend == "wgpu",
            "{backend}: {}",
            ran.stderr
        );
    }
}
