//! Evaluates a model on a task: some questions with choices, written here, in the place of a data set's files.
//!
//!     cargo run --release --example evaluate

use opt_core::Opt;
use opt_eval::{EvalOptions, Tasks, evaluate};
use std::{error::Error, fs, ops::ControlFlow};

const ROWS: &str = r#"
{"goal": "To see in the dark", "sol1": "light a lamp", "sol2": "close the eyes", "label": 0}
{"goal": "To cross the river", "sol1": "burn the boat", "sol2": "take the boat", "label": 1}
{"goal": "To keep warm", "sol1": "sit by the fire", "sol2": "sit in the snow", "label": 0}
{"goal": "To open the door", "sol1": "turn the key", "sol2": "paint the key", "label": 0}
"#;

fn main() -> Result<(), Box<dyn Error>> {
    let folder = tempfile::tempdir()?;
    fs::write(folder.path().join("piqa.jsonl"), ROWS)?;

    let opt = Opt::open(opt_examples::model())?;
    let tasks = Tasks::builtin().select(&["piqa"])?;
    let mut options = EvalOptions::default();
    options.task.num_fewshot = Some(1);
    let found = evaluate(&opt, &tasks, folder.path(), &options, &mut |at| {
        eprintln!("{}: {} of {}", at.item, at.done, at.total);
        ControlFlow::Continue(())
    })?;
    println!("{}", found.report.markdown());
    Ok(())
}
