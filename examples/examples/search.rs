//! Tuning for search: queries are drawn towards the passages that answer them, while the model goes on reading;
//! recall before and after.

use opt_core::{
    Load, Result,
    adapter::LoraConfig,
    tokenizer::{Bos, Tokenizer},
    tuning::{
        ContrastOptions, Event, Example, Goal, Method, Pooling, TrainOptions, Trainer, Tuner,
        data::{DataOptions, Dataset, Reads},
    },
};
use std::ops::ControlFlow;

const PAIRS: [(&str, &str); 6] = [
    ("where ships lie", "The harbour was full of masts."),
    ("what is baked at dawn", "A loaf stood on the table."),
    ("who rules the land", "The king sat upon his throne."),
    ("how a horse is steered", "She took the reins in her hands."),
    ("when the day ends", "The sun sank behind the hills."),
    ("what falls in winter", "Snow lay deep on every roof."),
];

fn main() -> Result<()> {
    let model = opt_examples::model();
    let lora = LoraConfig::default();
    let tuner = Tuner::load(&model, Method::adapter(lora, 1), Load::default())?;
    let options = ContrastOptions::default().pooling(Pooling::Mean).lm(0.1);
    let tuner = tuner.contrast(options)?;

    // Or `Dataset::open("pairs.jsonl", &options)`, with lines such as {"query": "...", "passage": "..."}.
    let tokenizer = Tokenizer::from_dir(&model)?;
    let pair = |(query, passage): &(&str, &str)| {
        let passage = tokenizer.encode(passage, Bos::Model)?;
        Ok(Example::with(tokenizer.encode(query, Bos::Model)?, Goal::Passage(passage)))
    };
    let pairs: Vec<Example> = PAIRS.iter().map(pair).collect::<Result<_>>()?;
    let reads = DataOptions::new(tuner.config(), Some(tokenizer.clone())).reads(Reads::Pairs);
    let data = Dataset::new(pairs, &reads)?;

    let output = std::env::temp_dir().join(format!("opt-search-{}", std::process::id()));
    let settings = TrainOptions::default().max_steps(12).batch_size(6).lr(5e-3).eval_steps(12).save_limit(1);
    // What it was trained on, for the sake of a short example; one's own evaluation has other pairs.
    Trainer::new(tuner, data.clone(), settings)
        .eval(data)
        .callback(|event| {
            if let Event::Evaluated { step, recall: Some(recall), .. } = event {
                println!("step {step}: recall at 1 is {:.2}", recall.at_1);
            }
            ControlFlow::Continue(())
        })
        .run(&output)?;
    let _ = std::fs::remove_dir_all(&output);
    Ok(())
}
