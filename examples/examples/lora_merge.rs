//! LoRA on a sentence, merged into a whole model: the result needs no adapter beside it, here or in transformers, and
//! says the same.

use opt_core::{
    Load, Opt, Result,
    adapter::{LoraConfig, MergeOptions, Names, merge},
    checkpoint::Checkpoint,
    generation::GenerationConfig,
    tokenizer::{Bos, Tokenizer},
    tuning::{Example, Method, StepOptions, Tuner},
};

const PROMPT: &str = "Behind the hill there lies";
const TEXT: &str = " the sea, and nothing but the sea.";

fn main() -> Result<()> {
    let model = opt_examples::model();
    let tokenizer = Tokenizer::from_dir(&model)?;
    let prompt = tokenizer.encode(PROMPT, Bos::Model)?;
    let text = tokenizer.encode(TEXT, Bos::Never)?;
    let examples = [Example::completion([&prompt[..], &text[..]].concat(), prompt.len())];

    let mut lora = LoraConfig::default();
    lora.target_modules = Names::Pattern(Names::ALL_LINEAR.to_owned());
    let mut tuner = Tuner::load(&model, Method::adapter(lora, 42), Load::default())?;
    let mut options = StepOptions::default();
    options.lr = 1e-2;
    for step in 1..=12 {
        options.step = step;
        println!("step {step}: loss {:.3}", tuner.step(&[&examples], options)?.loss);
    }
    let adapter = tuner.adapter()?.named("hill");

    // Beside the model, which stays as it is.
    let settings = GenerationConfig::default().max_new_tokens(text.len());
    let opt = Opt::load(&model, Load::default().adapter(adapter.clone()))?;
    println!("plain:   {PROMPT}{}", opt.generate(PROMPT, &settings)?.text());
    println!("adapted: {PROMPT}{}", opt.adapted("hill")?.generate(PROMPT, &settings)?.text());

    // In it: a directory in Hugging Face layout. `opt merge` does the same.
    let output = std::env::temp_dir().join(format!("opt-merged-{}", std::process::id()));
    let written = merge(&Checkpoint::open(&model)?, &adapter, &output, MergeOptions::default())?;
    println!("merged:  {PROMPT}{}", Opt::open(&output)?.generate(PROMPT, &settings)?.text());
    println!("{} tensors in {} bytes", written.tensors, written.bytes);
    let _ = std::fs::remove_dir_all(&output);
    Ok(())
}
