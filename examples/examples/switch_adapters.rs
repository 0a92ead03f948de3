//! One model with several adapters beside it: in one batch each request wears its own, or none.

use opt_core::{
    Load, Opt, Request, Result,
    adapter::{Adapter, LoraConfig},
    generation::GenerationConfig,
    tokenizer::{Bos, Tokenizer},
    tuning::{Example, Method, StepOptions, Tuner},
};

const PROMPT: &str = "Behind the hill there lies";

/// An adapter that has learned to go on with this text. `Adapter::open` reads one that PEFT has trained.
fn taught(name: &str, text: &str) -> Result<Adapter> {
    let model = opt_examples::model();
    let tokenizer = Tokenizer::from_dir(&model)?;
    let prompt = tokenizer.encode(PROMPT, Bos::Model)?;
    let ids = [&prompt[..], &tokenizer.encode(text, Bos::Never)?].concat();
    let examples = [Example::completion(ids, prompt.len())];
    let mut tuner = Tuner::load(&model, Method::adapter(LoraConfig::default(), 42), Load::default())?;
    let mut options = StepOptions::default();
    options.lr = 1e-2;
    for step in 1..=20 {
        options.step = step;
        tuner.step(&[&examples], options)?;
    }
    Ok(tuner.adapter()?.named(name))
}

fn main() -> Result<()> {
    // The weights are loaded once, however many adapters there are.
    let load = Load::default()
        .adapter(taught("sailor", " the sea, and nothing but the sea.")?)
        .adapter(taught("miner", " a mine, and in it there is gold.")?);
    let opt = Opt::load(opt_examples::model(), load)?;
    for adapter in opt.adapters() {
        println!("loaded: {}", adapter.name);
    }

    let settings = GenerationConfig::default().max_new_tokens(12).stop_strings(["."]);
    let ask = || Request::new(PROMPT).config(settings.clone());
    let requests = vec![ask().adapter("sailor"), ask(), ask().adapter("miner")];
    for (who, generated) in ["sailor", "nobody", "miner"].into_iter().zip(opt.generate_batch(requests)?) {
        println!("{who}: {PROMPT}{}", generated.text());
    }

    // Or everything with one of them: sessions, scores, logits.
    let sailor = opt.adapted("sailor")?;
    println!("sailor alone: {PROMPT}{}", sailor.generate(PROMPT, &settings)?.text());
    Ok(())
}
