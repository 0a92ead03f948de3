//! Writes a checkpoint of random bf16 weights in a shape of OPT: speed does not depend on the values.
//!
//!     cargo run --release -p opt-benches --bin random_model -- OUT_DIR [CONFIG.json]
//!
//! Without a config.json it is the shape of facebook/opt-125m.

use opt_benches::{opt_125m, random_file};
use opt_core::config::OptConfig;
use std::{error::Error, fs, path::PathBuf};

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args_os().skip(1);
    let out = PathBuf::from(arguments.next().ok_or("usage: random_model OUT_DIR [CONFIG.json]")?);
    let config = match arguments.next() {
        Some(file) => OptConfig::from_json(&fs::read_to_string(file)?)?,
        None => opt_125m()?,
    };
    fs::create_dir_all(&out)?;
    fs::write(out.join("config.json"), serde_json::to_string_pretty(&config)?)?;
    fs::write(out.join("model.safetensors"), random_file(&config))?;
    Ok(())
}
