//! Runs the program.

use std::process::Command;

#[test]
fn it_generates_and_prints_a_table() {
    let ran = Command::new(env!("CARGO_BIN_EXE_custom-backend"))
        .env_remove("OPT_MODEL")
        .output()
        .expect("it starts");
    assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
    let text = String::from_utf8(ran.stdout).expect("text");
    assert!(text.starts_with("The old house stood "), "{text}");
    let calls = |op: &str| -> u64 {
        let row = text.lines().find_map(|line| line.strip_prefix(op)?.strip_prefix(' '));
        row.and_then(|row| row.split_whitespace().next()?.parse().ok()).unwrap_or(0)
    };
    // Forty tokens, the first of them from the prompt: one look at the vocabulary and one embedding each.
    assert_eq!((calls("logits"), calls("gather")), (40, 40), "{text}");
    assert!(calls("linear") > calls("attend") && calls("attend") >= 40, "{text}");
}
