//! Compares a model with itself in 4 bits on the same rows: what it costs, and how sure that is.
//!
//!     cargo run --release --example compare_quantizations

use opt_core::{Load, Opt, quantize::QuantSpec};
use opt_eval::{EvalOptions, Tasks, compare, evaluate, samples::SampleValues};
use std::{error::Error, fs, ops::ControlFlow};

fn main() -> Result<(), Box<dyn Error>> {
    let folder = tempfile::tempdir()?;
    // LAMBADA's format: the last word is to be predicted.
    let lines = [
        "He took her by the hand",
        "She looked at him and shook her head",
        "They walked along the road until they came to a house",
        "The old man sat by the fire and said not a word",
        "It was the first time in his life",
        "In the morning the sun was in the sky",
    ];
    let rows: String = lines.iter().map(|text| format!("{{\"text\": \"{text}\"}}\n")).collect();
    fs::write(folder.path().join("lambada_openai.jsonl"), rows)?;

    let tasks = Tasks::builtin().select(&["lambada_openai"])?;
    let mut options = EvalOptions::default();
    options.keep_samples = true;
    options.bootstrap_iters = 1000;
    let mut runs = Vec::new();
    for (name, load) in [("f32", Load::default()), ("int4", Load::default().quantize(QuantSpec::int4()))] {
        let opt = Opt::load(opt_examples::model(), load)?;
        options.model_name = format!("opt-novels, {name}");
        let found = evaluate(&opt, &tasks, folder.path(), &options, &mut |_| ControlFlow::Continue(()))?;
        let mut values = SampleValues::new();
        for (task, samples) in &found.samples {
            samples.iter().for_each(|sample| values.add(task, sample));
        }
        runs.push((found.report, values));
    }
    let [(first, first_values), (second, second_values)] = &runs[..] else { return Ok(()) };
    let values = Some((first_values, second_values));
    println!("{}", compare::runs(first, second, values, &compare::Options::default())?.markdown());
    Ok(())
}
