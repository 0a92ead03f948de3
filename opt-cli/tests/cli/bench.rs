//! `opt bench`.

use super::*;

#[test]
fn the_figures_of_the_contract() {
    let mut command = opt();
    command.args([
        "bench",
        "--json",
        "--prompt-tokens",
        "8,16",
        "--gen-tokens",
        "4",
        "--batch",
        "2,1",
        "--model",
    ]);
    let lines = run(command.arg(tiny("pre_ln")).args(["--dtype", "bf16"])).json();
    assert_eq!(lines.len(), 1);
    let expected =
        ["backend", "decode", "device", "first_token_s", "load_s", "peak_rss_mb", "prefill", "weights"];
    assert_eq!(keys(&lines[0]), expected);
    assert_eq!((&lines[0]["backend"], &lines[0]["weights"]), (&"cpu".into(), &"bf16".into()));
    let column = |list: &str, key: &str| -> Vec<f64> {
        lines[0][list]
            .as_array()
            .expect("a list")
            .iter()
            .map(|row| row[key].as_f64().expect("a number"))
            .collect()
    };
    assert_eq!(column("prefill", "tokens"), [8.0, 16.0]);
    assert_eq!(column("decode", "batch"), [2.0, 1.0]);
    assert!(column("prefill", "tok_s").iter().chain(&column("decode", "tok_s")).all(|rate| *rate > 0.0));
    assert!(lines[0]["load_s"].as_f64() > Some(0.0) && lines[0]["first_token_s"].as_f64() > Some(0.0));
    if cfg!(target_os = "linux") {
        assert!(lines[0]["peak_rss_mb"].as_f64() > Some(1.0));
    }
}

#[test]
fn text_for_people_and_limits() {
    let bench =
        |more: &[&str]| run(opt().args(["bench", "--all-logits", "--model"]).arg(tiny("pre_ln")).args(more));
    let text = bench(&["--prompt-tokens", "64", "--gen-tokens", "4", "--batch", "1"]).done().stdout;
    for part in ["load", "first token", "prefill", "(64 tokens)", "decode", "(batch 1)"] {
        assert!(text.contains(part), "{part:?} is not in {text}");
    }
    bench(&["--prompt-tokens", "65"]).refused(2, &["--prompt-tokens", "64"]);
    bench(&["--prompt-tokens", "8", "--gen-tokens", "33"]).refused(2, &["--gen-tokens", "32"]);
    bench(&["--batch", "0"]).refused(2, &["at least 1"]);
}
