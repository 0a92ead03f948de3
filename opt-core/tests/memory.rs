//! Peak memory of loading and running a model of OPT-125m's size: never two copies of it.
//!
//! Runs with `OPT_BIG_TESTS=1`, since it writes a file of 500 MB into the temporary directory.
#![cfg(target_os = "linux")]

use opt_core::{
    DType, Load, Opt,
    config::OptConfig,
    generation::{GenerationConfig, Random},
};
use std::{
    fs,
    io::{BufWriter, Write},
    path::Path,
    process::Command,
};

/// Tells the process that measures itself which model to load, and as what.
const MODEL: &str = "OPT_MEMORY_TEST_MODEL";
const AS: &str = "OPT_MEMORY_TEST_DTYPE";

const ALLOWED: f64 = 150e6;

const DTYPES: [(&str, DType, usize); 3] =
    [("f32", DType::F32, 4), ("bf16", DType::BF16, 2), ("f16", DType::F16, 2)];

#[test]
fn peak_is_weights_and_150_mb() {
    if std::env::var_os(MODEL).is_some() {
        return run_and_report();
    }
    if std::env::var("OPT_BIG_TESTS").as_deref() != Ok("1") {
        let _ = writeln!(
            std::io::stderr(),
            "skipped: set OPT_BIG_TESTS=1 to measure memory with a model of 500 MB"
        );
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let numbers = write_model(dir.path());
    assert!(numbers > 125_000_000);
    for (name, _, size) in DTYPES {
        let mut child = Command::new(std::env::current_exe().unwrap());
        child.args(["--exact", "peak_is_weights_and_150_mb", "--nocapture"]);
        let output = child.env(MODEL, dir.path()).env(AS, name).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success(), "{name}: {text}{}", String::from_utf8_lossy(&output.stderr));
        let number = |what: &str| {
            let line = text.lines().find_map(|line| line.split_once(what)).unwrap().1;
            line.trim().parse::<f64>().unwrap() * 1024.0
        };
        let (loaded, peak, held) = (number("loaded kB:"), number("peak kB:"), (numbers * size) as f64);
        eprintln!(
            "{name}: weights {:.0} MB, peak {:.0} MB while loading, {:.0} MB in all: {:.0} MB above the weights",
            held / 1e6,
            loaded / 1e6,
            peak / 1e6,
            (peak - held) / 1e6
        );
        assert!(peak <= held + ALLOWED, "{name}: peak {peak:.0} bytes, weights {held:.0} bytes");
    }
}

/// In the process that measures itself: 32 tokens of prompt, 64 new ones.
fn run_and_report() {
    let name = std::env::var(AS).unwrap();
    let dtype = DTYPES.iter().find(|(known, ..)| *known == name).unwrap().1;
    let opt = Opt::load(std::env::var_os(MODEL).unwrap(), Load::default().dtype(dtype)).unwrap();
    println!("loaded kB: {}", high_water());
    let prompt: Vec<u32> = (100..132).collect();
    let settings = GenerationConfig::default().max_new_tokens(64).eos_token_id([]);
    let found = opt.generate(prompt, &settings).unwrap();
    assert_eq!(found.ids().len(), 64);
    println!("peak kB: {}", high_water());
}

fn high_water() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches("kB").trim().parse().unwrap()
}

/// Writes a model of OPT-125m's shape with random f32 weights, piece by piece; how many numbers it has.
fn write_model(dir: &Path) -> usize {
    let config = r#"{"model_type": "opt"}"#;
    let shapes = OptConfig::from_json(config).unwrap().tensor_shapes();
    let mut header = serde_json::Map::new();
    let mut end = 0;
    for (name, shape) in &shapes {
        let start = end;
        end += 4 * shape.iter().product::<usize>();
        let entry = serde_json::json!({"dtype": "F32", "shape": shape, "data_offsets": [start, end]});
        header.insert(format!("model.decoder.{name}"), entry);
    }
    let header = serde_json::Value::Object(header).to_string();
    let header = format!("{header:width$}", width = header.len().next_multiple_of(8));
    fs::write(dir.join("config.json"), config).unwrap();
    let mut file = BufWriter::new(fs::File::create(dir.join("model.safetensors")).unwrap());
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    // The same few random numbers over and over: what they are does not matter here.
    let mut random = Random::new(1, 0);
    let some: Vec<u8> =
        (0..1 << 16).flat_map(|_| ((random.uniform() - 0.5) as f32 * 0.06).to_le_bytes()).collect();
    let mut left = end;
    while left > 0 {
        let piece = &some[..left.min(some.len())];
        file.write_all(piece).unwrap();
        left -= piece.len();
    }
    file.flush().unwrap();
    end / 4
}
