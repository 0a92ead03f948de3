//! A classifier: a head on top of the model and LoRA beside it, trained together; what comes out names classes.

use opt_core::{
    Load, Result,
    adapter::LoraConfig,
    heads::{Head, SequenceClassifier, Task},
    tokenizer::{Bos, Tokenizer},
    tuning::{
        Example, Goal, Method, TrainOptions, Trainer, Tuner,
        data::{DataOptions, Dataset, Reads},
    },
};

const LINES: [(&str, &str); 6] = [
    ("The ship sailed over the sea.", "sea"),
    ("The horse ran along the road.", "land"),
    ("A wave broke over the sail.", "sea"),
    ("A farmer walked behind his plough.", "land"),
    ("The sailor looked at the waves.", "sea"),
    ("The house stood on a hill.", "land"),
];

fn main() -> Result<()> {
    let model = opt_examples::model();
    let task = Task::one_of(["land", "sea"])?;
    let tuner = Tuner::load(&model, Method::adapter(LoraConfig::default(), 1), Load::default())?;
    let head = Head::new(task.clone(), tuner.config(), 1);
    let tuner = tuner.head(head)?;

    // Or `Dataset::open("reviews.jsonl", &options)`, with lines such as {"text": "...", "label": "sea"}.
    let tokenizer = Tokenizer::from_dir(&model)?;
    let options = DataOptions::new(tuner.config(), Some(tokenizer.clone())).reads(Reads::Head(task.clone()));
    let class = |label: &str| task.labels().iter().position(|name| name == label).unwrap_or(0) as u32;
    let example = |(text, label): &(&str, &str)| {
        Ok(Example::with(tokenizer.encode(text, Bos::Model)?, Goal::Class(class(label))))
    };
    let examples: Vec<Example> = LINES.iter().map(example).collect::<Result<_>>()?;
    let data = Dataset::new(examples, &options)?;

    let output = std::env::temp_dir().join(format!("opt-classifier-{}", std::process::id()));
    let settings = TrainOptions::default().max_steps(16).batch_size(3).lr(5e-3).save_limit(1);
    let report = Trainer::new(tuner, data, settings).run(&output)?;
    println!("{} steps, last loss {:.3}", report.steps, report.loss.unwrap_or_default());

    let classifier = SequenceClassifier::adapted(&model, &output, Load::default())?;
    for text in ["The sailor looked at the waves.", "The house stood on a hill."] {
        let found = classifier.classify(text)?;
        println!("{text} -> {} ({:.2})", found[0].label, found[0].score);
    }
    let _ = std::fs::remove_dir_all(&output);
    Ok(())
}
