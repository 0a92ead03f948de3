//! Generates a line on the CPU backend, watched, and prints what it took.
//!
//!     cargo run --release -p custom-backend

use custom_backend::Counting;
use opt_core::{Load, Opt, backends::Cpu, generation::GenerationConfig};
use std::{error::Error, path::PathBuf};

fn main() -> Result<(), Box<dyn Error>> {
    let backend = Counting::new(Cpu::new()?);
    let tally = backend.tally();
    let opt = Opt::load(model(), Load::on(backend))?;
    tally.reset();
    let settings = GenerationConfig::default().max_new_tokens(40);
    println!("The old house stood{}\n", opt.generate("The old house stood", &settings)?.text());
    print!("{tally}");
    Ok(())
}

/// `OPT_MODEL`, or the small model of the repository that this was built in.
fn model() -> PathBuf {
    let here = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/opt-novels");
    std::env::var_os("OPT_MODEL").map_or_else(|| here.into(), PathBuf::from)
}
