//! Full fine-tuning on texts of one's own: data, a schedule, evaluation, a callback; the result is a model directory.

use opt_core::{
    Load, Opt, Result,
    generation::GenerationConfig,
    tokenizer::Tokenizer,
    tuning::{
        Event, Example, Method, TrainOptions, Trainer, Tuner,
        data::{DataOptions, Dataset},
    },
};
use std::ops::ControlFlow;

fn main() -> Result<()> {
    let model = opt_examples::model();
    let tuner = Tuner::load(&model, Method::full(), Load::default())?;
    println!("{} parameters are trained", tuner.trainable());

    // Or `Dataset::open("letters.txt", &options)`, or a .jsonl file of prompts and completions.
    let tokenizer = Tokenizer::from_dir(&model)?;
    let options = DataOptions::new(tuner.config(), Some(tokenizer.clone())).seq_len(64);
    let prompt = tokenizer.encode("Question: What lies behind the hill?\nAnswer:", options.bos)?;
    let answer = tokenizer.encode(" The sea, and nothing but the sea.", opt_core::tokenizer::Bos::Never)?;
    let ids = [&prompt[..], &answer[..]].concat();
    let examples = (0..4).map(|_| Example::completion(ids.clone(), prompt.len()));
    let data = Dataset::new(examples, &options)?;

    let output = std::env::temp_dir().join(format!("opt-tuned-{}", std::process::id()));
    let settings = TrainOptions::default().max_steps(8).batch_size(2).lr(3e-4).warmup_steps(2).save_limit(1);
    let report = Trainer::new(tuner, data, settings)
        .callback(|event| {
            if let Event::Step(step) = event {
                println!("step {}: loss {:.3}", step.step, step.loss);
            }
            ControlFlow::Continue(())
        })
        .run(&output)?;
    println!("{} steps, {} targets", report.steps, report.tokens);

    let tuned = Opt::open(&output)?;
    let settings = GenerationConfig::default().max_new_tokens(9);
    println!("{}", tuned.generate("Question: What lies behind the hill?\nAnswer:", &settings)?.text());
    let _ = std::fs::remove_dir_all(&output);
    Ok(())
}
