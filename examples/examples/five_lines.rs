//! Text from a model, in five lines.

use opt_core::{Opt, Result, generation::GenerationConfig};

fn main() -> Result<()> {
    let opt = Opt::open(opt_examples::model())?;
    let settings = GenerationConfig::default().max_new_tokens(40);
    println!("The old house stood{}", opt.generate("The old house stood", &settings)?.text());
    Ok(())
}
