//! `opt eval`.

mod results;
mod tasks;

use crate::{
    args::RunArgs,
    out::{Failure, Out},
    progress::{Console, duration},
};
use clap::{ArgGroup, Args};
use opt_core::tokenizer::Bos;
use opt_eval::{Asker, PerplexityOptions, Tasks, perplexity};
use serde_json::json;
use std::{
    fs,
    num::NonZeroUsize,
    path::{Path, PathBuf},
    time::Instant,
};

const HELP: &str = "\
Examples:
  opt eval --list
  opt eval --tasks lambada_openai,hellaswag --data DIR --limit 100
  opt eval --tasks mmlu --num-fewshot 5 --data DIR --output mmlu.json
  opt eval --tasks piqa --data DIR --quantize int8 --compare f32.json
  opt eval --perplexity wiki.test.raw --window 2048
  opt eval --tasks mine --tasks-file mine.toml --data rows.jsonl
  opt eval --tasks piqa,piqa_plain --phrasings --vary-shots 0,2 --data DIR \\
    --tasks-file mine.toml

Data:
  --data names a folder with the data sets' files as the hub has them
  (DIR/piqa/validation-00000-of-00001.parquet), or plainer ones
  (DIR/piqa.jsonl, DIR/mmlu/test/anatomy_test.csv), or one file.
Output:
  A table on stdout, with --json the report instead: results in the layout
  of lm-evaluation-harness. --output writes the report, and with
  --log-samples one file of samples a task beside it. While it is not done
  there is a journal beside it, with which --resume goes on.";

/// Evaluate a model on tasks, as lm-evaluation-harness does, or measure its perplexity on a text.
#[derive(Debug, Args)]
#[command(after_help = HELP, group(ArgGroup::new("what").required(true).args(["tasks", "perplexity", "list"])))]
pub(crate) struct Eval {
    /// Evaluate on these tasks and groups of tasks, comma-separated.
    #[arg(long, value_name = "A,B", value_delimiter = ',', requires = "data", help_heading = "Tasks")]
    tasks: Vec<String>,
    /// List the tasks and end.
    #[arg(long, help_heading = "Tasks")]
    list: bool,
    /// Read further tasks from this file of TOML.
    #[arg(long, value_name = "FILE.toml", help_heading = "Tasks")]
    tasks_file: Vec<PathBuf>,
    /// Take the rows of tasks from this folder, or from this file.
    #[arg(long, value_name = "DIR", help_heading = "Tasks")]
    data: Option<PathBuf>,
    /// Put K examples before each prompt. [default: the task's own number, mostly 0]
    #[arg(long, requires = "tasks", value_name = "K", help_heading = "Tasks")]
    num_fewshot: Option<usize>,
    /// Draw examples with this seed.
    #[arg(long, value_name = "N", default_value_t = 1234, help_heading = "Tasks")]
    fewshot_seed: u64,
    /// Take the first K rows as examples instead of drawing them.
    #[arg(long, requires = "tasks", help_heading = "Tasks")]
    fewshot_first: bool,
    /// Evaluate on the first N rows of each task only.
    #[arg(
        long,
        requires = "tasks",
        requires = "tasks",
        requires = "tasks",
        value_name = "N",
        help_heading = "Tasks"
    )]
    limit: Option<NonZeroUsize>,
    /// Evaluate once with each of these numbers of examples, and tell the spread.
    #[arg(
        long,
        value_name = "K,K",
        value_delimiter = ',',
        conflicts_with = "num_fewshot",
        help_heading = "Tasks"
    )]
    vary_shots: Vec<u64>,
    /// Evaluate once with examples drawn by each of these seeds, and tell the spread.
    #[arg(
        long,
        value_name = "N,N",
        value_delimiter = ',',
        conflicts_with = "fewshot_seed",
        help_heading = "Tasks"
    )]
    vary_seeds: Vec<u64>,
    /// Evaluate once with the examples in each of the orders that these seeds draw, and tell the spread.
    #[arg(long, requires = "tasks", value_name = "N,N", value_delimiter = ',', help_heading = "Tasks")]
    vary_orders: Vec<u64>,
    /// Take the tasks for phrasings of one, and tell the spread.
    #[arg(long, requires = "tasks", help_heading = "Tasks")]
    phrasings: bool,
    /// Make at most N tokens of text a row. [default: the task's, mostly 256]
    #[arg(long, requires = "tasks", value_name = "N", help_heading = "Tasks")]
    max_gen_toks: Option<NonZeroUsize>,
    /// Estimate standard errors that have no formula from N resamples; 0 leaves them out.
    #[arg(long, value_name = "N", default_value_t = 100_000, help_heading = "Tasks")]
    bootstrap_iters: usize,

    /// Measure the perplexity of this text.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["tasks", "list"], help_heading = "Perplexity")]
    perplexity: Option<PathBuf>,
    /// Predict it in windows of N tokens. [default: 2048 or the context, if that is shorter]
    #[arg(long, value_name = "N", requires = "perplexity", help_heading = "Perplexity")]
    window: Option<usize>,
    /// Begin a window every N tokens, so that they overlap. [default: the window]
    #[arg(long, value_name = "N", requires = "perplexity", help_heading = "Perplexity")]
    stride: Option<usize>,

    /// Do not put the beginning-of-text token before texts, as lm-evaluation-harness did until 0.4.9.
    #[arg(long, conflicts_with = "bos", help_heading = "Input")]
    no_bos: bool,
    /// Put it before texts, whatever the tokenizer's files say. [default: what they say]
    #[arg(long, help_heading = "Input")]
    bos: bool,
    /// Run each request by itself, also where several begin with the same tokens.
    #[arg(long, requires = "tasks", help_heading = "Run")]
    no_share: bool,

    /// Write the report to this file.
    #[arg(long, value_name = "FILE.json", help_heading = "Output")]
    output: Option<PathBuf>,
    /// Write what was asked and answered of each row, beside the report.
    #[arg(long, requires_all = ["output", "tasks"], help_heading = "Output")]
    log_samples: bool,
    /// Go on where an evaluation with the same --output was ended.
    #[arg(long, requires_all = ["output", "tasks"], help_heading = "Output")]
    resume: bool,
    /// Compare with the published results of the model's size, or with another report.
    #[arg(long, value_name = "published|RESULTS.json", requires = "tasks", help_heading = "Output")]
    compare: Option<String>,
    /// Draw the scores into this file.
    #[arg(long, value_name = "FILE.svg", requires = "tasks", help_heading = "Output")]
    plot: Option<PathBuf>,

    #[command(flatten)]
    run: RunArgs,
}

impl Eval {
    pub(crate) fn run(&self) -> Result<(), Failure> {
        let console = Console::new(self.run.show);
        let mut tasks = Tasks::builtin();
        for file in &self.tasks_file {
            tasks.add_file(file)?;
        }
        if self.list {
            return self.print_tasks(&tasks);
        }
        match &self.perplexity {
            Some(file) => self.perplexity(file, &console),
            None => {
                let selection = tasks.select(&self.tasks)?;
                self.evaluate(&selection, &console)
            }
        }
    }

    fn bos_rule(&self) -> Bos {
        match (self.no_bos, self.bos) {
            (true, _) => Bos::Never,
            (_, true) => Bos::Always,
            _ => Bos::Model,
        }
    }

    fn print_tasks(&self, tasks: &Tasks) -> Result<(), Failure> {
        let mut out = Out::new();
        for name in tasks.names() {
            let line = match (tasks.get(name), tasks.group(name)) {
                (Some(spec), _) => {
                    let metrics: Vec<&str> = spec.metrics.iter().map(|metric| &metric.metric[..]).collect();
                    json!({ "task": name, "kind": spec.kind, "metrics": metrics })
                }
                (None, Some(group)) => json!({ "group": name, "tasks": group.tasks }),
                (None, None) => continue,
            };
            if self.run.show.json {
                out.json(&line)?;
                continue;
            }
            let words = |key: &str| {
                let list = line.get(key).and_then(serde_json::Value::as_array).into_iter().flatten();
                list.filter_map(serde_json::Value::as_str).collect::<Vec<_>>().join(", ")
            };
            match tasks.get(name) {
                Some(spec) => {
                    out.line(&format!("{name:<36} {:<22} {}", spec.kind.name(), words("metrics")))?
                }
                None => {
                    let count = tasks.group(name).map_or(0, |group| group.tasks.len());
                    out.line(&format!("{name:<36} {:<22} {count} tasks and groups", "group"))?;
                }
            }
        }
        Ok(())
    }

    fn perplexity(&self, file: &Path, console: &Console) -> Result<(), Failure> {
        let text = fs::read(file)
            .map_err(|e| Failure::failed(format!("{}: cannot be read: {e}", file.display())))?;
        let text = String::from_utf8(text).map_err(|e| {
            Failure::failed(format!(
                "{}: expected UTF-8, found something else at byte {}",
                file.display(),
                e.utf8_error().valid_up_to()
            ))
        })?;
        console.catch_interrupts();
        let opt = self.run.model.load(console)?;
        let window = self.window.unwrap_or_else(|| opt.context().min(2048));
        let mut options = PerplexityOptions::new(window);
        options.stride = self.stride;
        let asker = Asker::new(&opt).bos(self.bos_rule()).cancel(console.cancel.clone());
        let bar = console.bar("windows");
        let begun = Instant::now();
        let found =
            perplexity(&asker, &text, options, &mut |at| bar.show(at)).map_err(|e| match e.kind() {
                opt_core::ErrorKind::Prompt => Failure::from(e.at(file.display())),
                _ => Failure::from(e),
            })?;
        drop(bar);
        if let Some(output) = &self.output {
            opt_eval::report::write_whole(output, &json!(found).to_string())?;
        }
        let mut out = Out::new();
        if self.run.show.json {
            return out.json(&found);
        }
        out.line(&format!("perplexity {:.4}, {:.4} bits per byte", found.perplexity, found.bits_per_byte))?;
        let bos = if found.bos { "with" } else { "without" };
        console.say(&format!(
            "{} tokens in {} windows of {}, a new one every {}, {bos} BOS, {}",
            found.tokens,
            found.windows,
            found.window,
            found.stride,
            duration(begun.elapsed())
        ));
        Ok(())
    }
}
