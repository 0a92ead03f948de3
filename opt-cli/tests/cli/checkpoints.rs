//! `opt convert`, `opt inspect`, `opt backends`.

use super::*;

fn greedy(model: &Path) -> Value {
    let mut command = opt();
    command.args(["generate", "--json", "-q", "--prompts", "-", "--model"]).arg(model);
    run_with_stdin(&mut command, b"{\"ids\": [2, 7, 11]}\n").json().remove(0)["sequences"][0]["ids"].clone()
}

#[test]
fn a_model_survives_every_form() {
    let dir = tempfile::tempdir().expect("a directory");
    let at = |name: &str| dir.path().join(name);
    let convert = |input: &Path, output: &Path, more: &[&str]| {
        run(opt().args(["convert", "--quiet"]).arg(input).arg(output).args(more)).done().stdout
    };
    let original = tiny("untied");
    let expected = greedy(&original);
    let shards = convert(&original, &at("shards"), &["--shard-size", "20kB"]);
    assert!(shards.lines().filter(|line| line.ends_with(".safetensors")).count() > 1, "{shards}");
    shards.lines().for_each(|file| assert!(Path::new(file).exists(), "{file}"));
    assert_eq!(greedy(&at("shards")), expected);
    convert(&at("shards"), &at("pickle"), &["--format", "pickle"]);
    assert!(at("pickle/pytorch_model.bin").exists());
    assert_eq!(greedy(&at("pickle")), expected);
    std::fs::create_dir(at("single")).expect("a directory");
    convert(&at("pickle"), &at("single/model.safetensors"), &["--dtype", "f32"]);
    assert_eq!(greedy(&at("single")), expected);

    let before = std::fs::read(at("pickle/config.json")).expect("a file");
    let again = run(opt().arg("convert").arg(&original).arg(at("pickle")));
    assert!(matches!(again.code, Some(1 | 2)), "{}", again.stderr);
    assert_eq!(std::fs::read(at("pickle/config.json")).expect("a file"), before);
    let missing = run(opt().arg("convert").arg(at("missing")).arg(at("out")));
    missing.refused(1, &["missing"]);
    assert!(!at("out").exists());
    run(opt().args(["convert", "a", "b", "--shard-size", "big"])).refused(2, &["500MB"]);
}

#[test]
fn json_of_a_conversion() {
    let dir = tempfile::tempdir().expect("a directory");
    let done = run(opt().args(["convert", "--json"]).arg(tiny("pre_ln")).arg(dir.path().join("out"))).json();
    assert_eq!(keys(&done[0]), ["bytes", "files", "tensors"]);
}

#[test]
fn an_inspection_says_what_it_takes() {
    let found = run(opt().args(["inspect", "--json"])).json().remove(0);
    // From the model's own README: 6,967,808 parameters.
    assert_eq!(found["parameters"], 6_967_808);
    assert_eq!(found["config"]["num_hidden_layers"], 6);
    assert_eq!(found["tensors"].as_array().map(Vec::len), Some(100));
    let f32_need =
        found["memory"].as_array().expect("needs").iter().find(|need| need["dtype"] == "f32").expect("f32");
    assert_eq!(f32_need["weights"], 4 * 6_967_808);
    // 2 (keys, values) x 6 layers x 256 wide x 4 bytes.
    assert_eq!(f32_need["cache_per_token"], 2 * 6 * 256 * 4);
    assert_eq!(found["backends"][0]["name"], "cpu");

    let text = run(opt().args(["inspect", "models/opt-novels", "--tensors"])).done().stdout;
    for part in ["parameters    6967808", "512 tokens", "fc1.weight", "f16", "27.9 MB", "backend cpu"] {
        assert!(text.contains(part), "{part:?} is not in {text}");
    }
    assert_eq!(run(opt().args(["inspect", "--model", "models/opt-novels", "--tensors"])).done().stdout, text);
}

#[test]
fn an_inspection_fails_for_what_cannot_run() {
    let dir = tempfile::tempdir().expect("a directory");
    let at = |name: &str| dir.path().join(name);
    std::fs::copy(tiny("pre_ln").join("model.safetensors"), at("model.safetensors")).expect("a copy");
    let config = std::fs::read_to_string(tiny("pre_ln").join("config.json")).expect("a config");
    std::fs::write(at("config.json"), config.replace("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 3"))
        .expect("a file");
    let ran = run(opt().arg("inspect").arg(dir.path()));
    assert_eq!(ran.code, Some(1));
    assert!(ran.stderr.starts_with("error: ") && ran.stderr.lines().count() == 1, "{}", ran.stderr);
    assert!(ran.stdout.contains("fault"), "{}", ran.stdout);
}

#[test]
fn backends_are_listed() {
    let text = run(opt().args(["backends", "--threads", "1"])).done().stdout;
    let cpu = text.lines().find(|line| line.starts_with("cpu: ")).expect("the CPU");
    for part in ["1 threads", "f32", "bf16", "f16"] {
        assert!(cpu.contains(part), "{part:?} is not in {cpu}");
    }
    let json = run(opt().args(["backends", "--json"])).json();
    assert_eq!(json.len(), text.lines().count());
    assert_eq!(json[0]["name"], "cpu");
    assert!(json[0]["threads"].as_u64() > Some(0) && json[0]["dtypes"].is_array());
}
