//! Distillation: a student of half the teacher's layers, with the teacher's help and without, over the same steps.
//!
//! ```text
//! cargo run --release -p opt-examples --example distill -- NOVEL.txt 200
//! ```

use opt_core::{
    Load, Result,
    checkpoint::Checkpoint,
    tokenizer::Tokenizer,
    tuning::{
        DistillOptions, Event, Example, Method, TrainOptions, Trainer, Tuner,
        data::{DataOptions, Dataset},
        student_of,
    },
};
use std::{ops::ControlFlow, path::PathBuf};

fn main() -> Result<()> {
    let path = opt_examples::model();
    let mut args = std::env::args().skip(1);
    let text = args.next().map(PathBuf::from);
    let steps = args.next().and_then(|steps| steps.parse().ok()).unwrap_or(8);

    let teacher = || Checkpoint::open(&path);
    let half = teacher()?.config().num_hidden_layers / 2;
    let tokenizer = Tokenizer::from_dir(&path)?;
    let options = DataOptions::new(teacher()?.config(), Some(tokenizer.clone())).seq_len(128);
    let data = match &text {
        Some(text) => Dataset::read(&[text], &options, None)?,
        // Too little to learn much from, and enough to see it run.
        None => {
            let lines = include_str!("distill.rs").lines().filter(|line| line.len() > 40);
            let ids = lines.map(|line| tokenizer.encode(line, options.bos).map(Example::new));
            Dataset::new(ids.collect::<Result<Vec<_>>>()?, &options)?
        }
    };
    let [data, held_out] = data.split(0.1, 7)?;

    for (name, distill) in
        [("alone", None), ("with its teacher", Some(DistillOptions::default().temperature(2.0)))]
    {
        let (student, files) = student_of(&teacher()?, half)?;
        let mut tuner = Tuner::from_checkpoint(student, Method::full(), Load::default())?.files(files);
        if let Some(distill) = distill {
            tuner = tuner.distill(teacher()?, distill)?;
        }
        let output = std::env::temp_dir().join(format!("opt-student-{}", std::process::id()));
        let settings = TrainOptions::default().max_steps(steps).lr(5e-4).eval_steps(steps / 2).save_limit(1);
        let report = Trainer::new(tuner, data.clone(), settings)
            .eval(held_out.clone())
            .callback(|event| {
                if let Event::Evaluated { step, loss, .. } = event {
                    println!("  step {step}: held-out cross-entropy {loss:.4}");
                }
                ControlFlow::Continue(())
            })
            .run(&output)?;
        let best = report.best.map_or(f64::NAN, |(loss, _)| loss);
        println!("{half} layers, {name}: {best:.4} after {} steps", report.steps);
        let _ = std::fs::remove_dir_all(&output);
    }
    Ok(())
}
