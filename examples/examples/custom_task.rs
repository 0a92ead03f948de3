//! A task of your own, as data; and how much its score depends on the wording.
//!
//!     cargo run --release --example custom_task

use opt_core::Opt;
use opt_eval::{EvalOptions, Tasks, evaluate, sensitivity};
use std::{error::Error, fs, ops::ControlFlow};

const TASKS: &str = r#"
[[task]]
name = "endings"
text = "{{beginning}}"
choices = "endings"
gold = "right"
metrics = ["acc", "acc_norm", "brier_score"]

[[task]]
name = "endings_asked"
like = "endings"
text = "How does this go on? {{beginning}}"
"#;

const ROWS: &str = r#"
{"beginning": "She put on her hat and", "endings": ["went out", "out of the"], "right": 0}
{"beginning": "The sun rose over the", "endings": ["hills", "sang"], "right": 0}
{"beginning": "He opened the book and began to", "endings": ["read", "horse"], "right": 0}
{"beginning": "They sat down at the", "endings": ["quickly", "table"], "right": 1}
"#;

fn main() -> Result<(), Box<dyn Error>> {
    let folder = tempfile::tempdir()?;
    for name in ["endings", "endings_asked"] {
        fs::write(folder.path().join(format!("{name}.jsonl")), ROWS)?;
    }
    let opt = Opt::open(opt_examples::model())?;
    let mut tasks = Tasks::builtin();
    tasks.add(TASKS)?;
    let mut reports = Vec::new();
    for name in ["endings", "endings_asked"] {
        let found =
            evaluate(&opt, &tasks.select(&[name])?, folder.path(), &EvalOptions::default(), &mut |_| {
                ControlFlow::Continue(())
            })?;
        println!("{}", found.report.markdown());
        reports.push((name, found.report));
    }
    let labelled: Vec<_> = reports.iter().map(|(name, report)| (*name, report)).collect();
    println!("{}", sensitivity::spread(&labelled, None)?.markdown());
    Ok(())
}
