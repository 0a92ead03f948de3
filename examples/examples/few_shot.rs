//! A few-shot prompt: an instruction, examples, a query. What does not fit into the context is left out, whole examples
//! at a time. (The small model was trained on novels and has no gift for this; larger ones do.)

use opt_core::{Opt, Result, generation::GenerationConfig, prompt::PromptBuilder};

fn main() -> Result<()> {
    let opt = Opt::open(opt_examples::model())?;
    let new_tokens = 4;
    let context = opt.config().max_position_embeddings;
    let prompt = PromptBuilder::new("He laughed and danced.")
        .instruction("Say whether the person is glad or sad.")
        .example("She wept all night.", "sad")
        .example("They sang in the sun.", "glad")
        .example("His dog had died.", "sad")
        .build(opt.require_tokenizer()?, context - new_tokens)?;
    if !prompt.dropped.is_empty() {
        println!("(left out: examples {:?})", prompt.dropped);
    }
    // The end of a line is the end of an answer.
    let settings = GenerationConfig::default().max_new_tokens(new_tokens).stop_strings(["\n"]);
    let answer = opt.generate(prompt.ids, &settings)?;
    println!("{}{}", prompt.text, answer.text());
    Ok(())
}
