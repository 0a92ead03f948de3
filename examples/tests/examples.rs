//! Runs every example. `cargo test` builds them beside this test; `cargo test -p opt-examples` is enough.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

/// Folder of the built examples: target/PROFILE/examples, beside the deps/ that this test lies in.
fn built() -> PathBuf {
    let test = std::env::current_exe().expect("this test has a path");
    let profile = test.ancestors().nth(2).expect("it lies in target/PROFILE/deps");
    profile.join("examples")
}

/// What an example prints.
fn output(name: &str) -> String {
    let program = built().join(format!("{name}{}", std::env::consts::EXE_SUFFIX));
    assert!(program.exists(), "{} is not built: run cargo test -p opt-examples", program.display());
    let ran = Command::new(program).env_remove("OPT_MODEL").output().expect("it starts");
    assert!(ran.status.success(), "{name}: {}", String::from_utf8_lossy(&ran.stderr));
    String::from_utf8(ran.stdout).expect("text")
}

#[test]
fn five_lines() {
    let text = output("five_lines");
    assert!(text.starts_with("The old house stood") && text.len() > 60, "{text}");
}

#[test]
fn streaming() {
    let text = output("streaming");
    assert!(text.starts_with("The river") && text.contains("\nThe sea"), "{text}");
}

#[test]
fn batch() {
    let text = output("batch");
    assert_eq!(text.matches("She opened the letter").count(), 2, "{text}");
    assert!(text.starts_with("The old house stood") && text.contains("[Length]"), "{text}");
}

#[test]
fn few_shot() {
    let text = output("few_shot");
    assert!(text.contains("Input: He laughed and danced.\nOutput:"), "{text}");
}

#[test]
fn beam_search() {
    let text = output("beam_search");
    let scores: Vec<f32> = text.lines().filter_map(|line| line.split(' ').next()?.parse().ok()).collect();
    assert!(scores.len() == 3 && scores.is_sorted_by(|a, b| a >= b), "{text}");
}

#[test]
fn logits() {
    let text = output("logits");
    assert!(text.contains("door") && text.contains("log p(fish)"), "{text}");
}

#[test]
fn custom_processor() {
    let text = output("custom_processor");
    let text = text.trim_end();
    assert!(text.starts_with("A man in a black hat") && text.len() > 30, "{text}");
    assert!(!text.contains(['e', 'E']), "{text}");
}

#[test]
fn constrained() {
    let text = output("constrained");
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 4, "{text}");
    for line in &lines[..3] {
        let person: serde_json::Value = serde_json::from_str(line).expect("JSON");
        assert!(
            person["name"].is_string() && (18..=90).contains(&person["age"].as_u64().expect("an age")),
            "{line}"
        );
    }
    assert!(lines[3].contains(" o'clock in the "), "{text}");
}

#[test]
fn async_tokio() {
    let text = output("async_tokio");
    assert!(text.starts_with("The river") && text.contains("\nThe house"), "{text}");
}

#[test]
fn session() {
    let text = output("session");
    assert_eq!(text.matches("It was a dark and stormy night. Suddenly").count(), 2, "{text}");
    assert!(text.contains("It was a dark and stormy night. The captain"), "{text}");
}

/// None is forgotten here.
#[test]
fn all_are_run() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let test = std::fs::read_to_string(here.join("tests/examples.rs")).expect("this file");
    for file in std::fs::read_dir(here.join("examples")).expect("the examples") {
        let path = file.expect("a file").path();
        let name = path.file_stem().expect("a name").to_string_lossy().into_owned();
        assert!(test.contains(&format!("output(\"{name}\")")), "{name} is not run by this test");
    }
}

#[test]
fn tune() {
    let text = output("tune");
    assert!(text.contains(" parameters are trained"), "{text}");
    let losses: Vec<f32> = text
        .lines()
        .filter_map(|line| line.strip_prefix("step ")?.split("loss ").nth(1)?.parse().ok())
        .collect();
    assert!(losses.len() == 8 && losses[7] < losses[0] - 1.0, "{text}");
}

#[test]
fn qlora() {
    let text = output("qlora");
    let losses: Vec<f32> =
        text.lines().filter_map(|line| line.split("loss ").nth(1)?.split(',').next()?.parse().ok()).collect();
    assert!(losses.len() == 5 && losses[4] < losses[0], "{text}");
    assert!(text.ends_with("saved: true\n"), "{text}");
}

#[test]
fn distill() {
    let text = output("distill");
    let lines: Vec<&str> = text.lines().filter(|line| line.starts_with("3 layers, ")).collect();
    assert!(lines.len() == 2 && lines.iter().all(|line| line.ends_with(" after 8 steps")), "{text}");
}

#[test]
fn classify() {
    let text = output("classify");
    assert!(text.contains("waves. -> sea (") && text.contains("hill. -> land ("), "{text}");
}

#[test]
fn search() {
    let text = output("search");
    let recall: Vec<f32> = text.lines().filter_map(|line| line.rsplit(' ').next()?.parse().ok()).collect();
    assert!(recall.len() == 2 && recall[0] < recall[1], "{text}");
}

#[test]
fn embed() {
    let text = output("embed");
    let hits: Vec<f32> =
        text.lines().filter_map(|line| line.strip_prefix("  ")?.split(' ').next()?.parse().ok()).collect();
    assert!(hits.len() == 4 && hits[..3].is_sorted_by(|a, b| a >= b), "{text}");
    assert!(text.contains("The vessel put to sea.") && text.contains("\nThe captain"), "{text}");
}

#[test]
fn evaluate() {
    let text = output("evaluate");
    assert!(text.contains("|piqa ") && text.contains("acc_norm"), "{text}");
}

#[test]
fn custom_task() {
    let text = output("custom_task");
    assert!(
        text.contains("|endings") && text.contains("endings_asked") && text.contains("brier_score"),
        "{text}"
    );
}

#[test]
fn compare_quantizations() {
    let text = output("compare_quantizations");
    assert!(text.contains("lambada_openai") && text.contains("perplexity"), "{text}");
}

#[test]
fn lora_merge() {
    let text = output("lora_merge");
    let said =
        |who: &str| text.lines().find_map(|line| line.strip_prefix(who)).unwrap_or_default().trim_start();
    assert_eq!(said("adapted:"), "Behind the hill there lies the sea, and nothing but the sea.", "{text}");
    assert_eq!(said("merged:"), said("adapted:"), "{text}");
    assert_ne!(said("plain:"), said("adapted:"), "{text}");
}

#[test]
fn switch_adapters() {
    let text = output("switch_adapters");
    let said = |who: &str| text.lines().find_map(|line| line.strip_prefix(who)).unwrap_or_default();
    // The first line that begins so is that of the batch.
    let sailor = ": Behind the hill there lies the sea, and nothing but the sea.";
    assert_eq!((said("sailor"), said("sailor alone")), (sailor, sailor), "{text}");
    assert_eq!(said("miner"), ": Behind the hill there lies a mine, and in it there is gold.", "{text}");
    let nobody = said("nobody");
    assert!(nobody.starts_with(": Behind the hill") && nobody != sailor, "{text}");
}
