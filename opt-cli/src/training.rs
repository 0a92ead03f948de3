//! What `opt tune` and `opt distill` share: data, steps, and what is told meanwhile.

use crate::{
    args::ShowArgs,
    out::{Failure, Out, bytes},
    plot,
    progress::{Console, duration},
};
use clap::{Args, ValueEnum};
use opt_core::{
    ErrorKind,
    config::OptConfig,
    tokenizer::Tokenizer,
    tuning::{
        Event, Optimizer, TrainOptions, Trainer, Tuner,
        data::{DataOptions, Dataset, Documents, Reads},
        schedule::Schedule,
    },
};
use serde_json::json;
use std::{
    ops::ControlFlow,
    path::{Path, PathBuf},
};

/// Flags of every subcommand that trains.
#[derive(Debug, Args)]
pub(crate) struct TrainArgs {
    /// Learn from this file.
    #[arg(long, value_name = "FILE.{txt,jsonl}", help_heading = "Data")]
    pub(crate) data: PathBuf,
    /// Write the result and what leads to it into this directory, which must not exist or be empty.
    #[arg(long, value_name = "DIR", help_heading = "Output")]
    output: PathBuf,
    /// Evaluate on this file; the best model is the result.
    #[arg(long, value_name = "FILE.{txt,jsonl}", help_heading = "Data")]
    eval_data: Option<PathBuf>,
    /// Hold this share of the examples out to evaluate on.
    #[arg(long, value_name = "SHARE", conflicts_with = "eval_data", help_heading = "Data")]
    eval_split: Option<f64>,
    /// Tokens of a block of text, and the most that an example has. [default: min(512, context)]
    #[arg(long, value_name = "N", help_heading = "Data")]
    seq_len: Option<usize>,
    /// Cut the lines of a .jsonl file into blocks too.
    #[arg(long, help_heading = "Data")]
    pack: bool,
    /// Cut off the end of examples that are too long, which is an error otherwise.
    #[arg(long, help_heading = "Data")]
    truncate_data: bool,
    /// What a document of a .txt file is: each begins with the beginning-of-text token.
    #[arg(long, value_name = "WHAT", default_value = "file", help_heading = "Data")]
    documents: DocumentsName,

    /// Pass over the data so often. [default: 3]
    #[arg(long, value_name = "N", conflicts_with = "max_steps", help_heading = "Steps")]
    epochs: Option<u64>,
    /// Make so many steps.
    #[arg(long, value_name = "N", help_heading = "Steps")]
    max_steps: Option<u64>,
    /// Examples that are run at once.
    #[arg(long, value_name = "N", default_value_t = 8, help_heading = "Steps")]
    batch_size: usize,
    /// Batches that make up a step.
    #[arg(long, value_name = "N", default_value_t = 1, help_heading = "Steps")]
    grad_accum: usize,
    /// Highest learning rate. [default: of tune 5e-5 for full, 3e-4 for lora, 1e-2 for prefix and prompt; of distill
    /// 5e-4]
    #[arg(long, value_name = "RATE", help_heading = "Steps")]
    lr: Option<f64>,
    /// How the learning rate moves after the warm-up: constant, constant_with_warmup, linear, cosine,
    /// cosine_with_min_lr, polynomial, inverse_sqrt.
    #[arg(long, value_name = "NAME", default_value = "linear", value_parser = schedule, help_heading = "Steps")]
    schedule: Schedule,
    /// Steps over which the learning rate rises from 0.
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = "Steps")]
    warmup_steps: u64,
    /// How parameters follow their gradients: adamw, adamw8bit (whose moments take a third of the memory)
    /// or sgd.
    #[arg(long, value_name = "NAME", default_value = "adamw", value_parser = optimizer, help_heading = "Steps")]
    optimizer: Optimizer,
    /// Decays of AdamW's first and second moment. [default: 0.9,0.999]
    #[arg(long, value_name = "B1,B2", value_parser = betas, help_heading = "Steps")]
    betas: Option<(f32, f32)>,
    /// Decay of matrices; biases and LayerNorms have none.
    #[arg(long, value_name = "X", default_value_t = 0.0, help_heading = "Steps")]
    weight_decay: f32,
    /// Scale gradients down to this norm where theirs is larger; 0 for never.
    #[arg(long, value_name = "NORM", default_value_t = 1.0, help_heading = "Steps")]
    clip: f32,
    /// Share of the target's probability that is spread over all tokens.
    #[arg(long, value_name = "X", default_value_t = 0.0, help_heading = "Steps")]
    label_smoothing: f32,
    /// Keep only the states between layers, and compute the rest again: less memory, a third more time.
    #[arg(long, help_heading = "Steps")]
    gradient_checkpointing: bool,
    /// Seed the order of examples, dropout and new parameters.
    #[arg(long, value_name = "N", default_value_t = 42, help_heading = "Steps")]
    pub(crate) seed: u64,

    /// Evaluate every N steps. [default: each epoch]
    #[arg(long, value_name = "N", help_heading = "Output")]
    eval_steps: Option<u64>,
    /// Save every N steps. [default: each epoch]
    #[arg(long, value_name = "N", help_heading = "Output")]
    save_steps: Option<u64>,
    /// Keep so many checkpoints beside the best.
    #[arg(long, value_name = "N", default_value_t = 2, help_heading = "Output")]
    save_limit: usize,
    /// End after N evaluations that were no better than the best.
    #[arg(long, value_name = "N", help_heading = "Output")]
    patience: Option<u64>,
    /// Go on with a training that was stopped, as if it had not been.
    #[arg(long, help_heading = "Output")]
    resume: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum DocumentsName {
    /// The whole file.
    File,
    /// What stands between blank lines.
    Paragraphs,
    /// Each line.
    Lines,
}

impl From<DocumentsName> for Documents {
    fn from(name: DocumentsName) -> Self {
        match name {
            DocumentsName::File => Documents::File,
            DocumentsName::Paragraphs => Documents::Paragraphs,
            DocumentsName::Lines => Documents::Lines,
        }
    }
}

fn schedule(name: &str) -> Result<Schedule, String> {
    name.parse().map_err(|e: opt_core::Error| e.to_string())
}

fn optimizer(name: &str) -> Result<Optimizer, String> {
    name.parse().map_err(|e: opt_core::Error| e.to_string())
}

fn betas(text: &str) -> Result<(f32, f32), String> {
    let decay = |x: &str| x.trim().parse().ok().filter(|x: &f32| (0.0..1.0).contains(x));
    text.split_once(',')
        .and_then(|(first, second)| Some((decay(first)?, decay(second)?)))
        .ok_or_else(|| "expected two numbers from 0 to below 1 with a comma between, as 0.9,0.999".into())
}

/// The tokenizer of a model, if it has one.
pub(crate) fn tokenizer(model: &Path) -> Result<Option<Tokenizer>, Failure> {
    let dir = if model.is_dir() { model } else { model.parent().unwrap_or(Path::new("")) };
    match Tokenizer::from_dir(dir) {
        Ok(tokenizer) => Ok(Some(tokenizer)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error.into()),
    }
}

impl TrainArgs {
    /// How the training runs, at this learning rate unless a flag says another.
    pub(crate) fn options(&self, lr: f64) -> Result<TrainOptions, Failure> {
        let options = TrainOptions::default()
            .max_steps(self.max_steps)
            .batch_size(self.batch_size)
            .grad_accum(self.grad_accum)
            .schedule(self.schedule)
            .warmup_steps(self.warmup_steps)
            .optimizer(self.optimizer()?)
            .weight_decay(self.weight_decay)
            .clip((self.clip != 0.0).then_some(self.clip))
            .label_smoothing(self.label_smoothing)
            .gradient_checkpointing(self.gradient_checkpointing)
            .seed(self.seed)
            .eval_steps(self.eval_steps)
            .save_steps(self.save_steps)
            .save_limit(self.save_limit)
            .patience(self.patience)
            .lr(self.lr.unwrap_or(lr));
        Ok(match self.epochs {
            Some(epochs) => options.epochs(epochs),
            None => options,
        })
    }

    fn optimizer(&self) -> Result<Optimizer, Failure> {
        let mut optimizer = self.optimizer;
        match (&mut optimizer, self.betas) {
            (_, None) => {}
            (
                Optimizer::AdamW { beta1, beta2, .. } | Optimizer::AdamW8bit { beta1, beta2, .. },
                Some(betas),
            ) => (*beta1, *beta2) = betas,
            _ => return Err(Failure::usage("--betas belongs to --optimizer adamw and adamw8bit")),
        }
        Ok(optimizer)
    }

    /// The most tokens that an example has.
    fn seq_len(&self, config: &OptConfig) -> usize {
        self.seq_len.unwrap_or(config.max_position_embeddings.min(512))
    }

    /// A flag that means nothing where other things than tokens are learned.
    pub(crate) fn of_language(&self) -> Option<&'static str> {
        let given = [
            ("--label-smoothing", self.label_smoothing != 0.0),
            ("--pack", self.pack),
            ("--documents", self.documents != DocumentsName::File),
        ];
        given.into_iter().find_map(|(flag, given)| given.then_some(flag))
    }

    /// What is learned from, and what is evaluated on.
    pub(crate) fn read(
        &self,
        config: &OptConfig,
        tokenizer: Option<Tokenizer>,
        reads: Reads,
        console: &Console,
    ) -> Result<(Dataset, Option<Dataset>), Failure> {
        let seq_len = self.seq_len(config);
        let options = DataOptions::new(config, tokenizer)
            .seq_len(seq_len)
            .pack(self.pack)
            .truncate(self.truncate_data)
            .documents(self.documents.into())
            .reads(reads)
            .cancel(console.cancel.clone());
        let bar = console.byte_bar("reading");
        let read = |path: &PathBuf| {
            let mut progress = |at: opt_core::Progress<'_>| bar.show(at);
            Dataset::read(&[path], &options, Some(&mut progress))
        };
        let data = read(&self.data)?;
        Ok(match (&self.eval_data, self.eval_split) {
            (Some(path), _) => (data, Some(read(path)?)),
            (None, Some(share)) => {
                let [data, eval] = data.split(share, self.seed)?;
                (data, Some(eval))
            }
            (None, None) => (data, None),
        })
    }

    /// Trains, tells how it goes, and says what came out.
    pub(crate) fn run(
        &self,
        tuner: Tuner,
        data: Dataset,
        eval: Option<Dataset>,
        options: TrainOptions,
        console: &Console,
        show: ShowArgs,
    ) -> Result<(), Failure> {
        let shapes = tuner.config().tensor_shapes();
        let all: u64 = shapes.iter().map(|(_, shape)| shape.iter().product::<usize>() as u64).sum();
        let trained = tuner.trainable() as u64;
        console.say(&format!(
            "{trained} parameters are trained, {:.3} % of {all}; {} examples with {} targets",
            100.0 * trained as f64 / all as f64,
            data.len(),
            data.targets()
        ));
        let memory = tuner.memory(&options, self.seq_len(tuner.config()))?;
        console.say(&format!(
            "up to about {} of memory: {} for weights, {} for gradients, {} for the optimizer, {} for activations",
            bytes(memory.total()),
            bytes(memory.weights),
            bytes(memory.gradients),
            bytes(memory.optimizer),
            bytes(memory.activations)
        ));
        console.catch_interrupts();

        let mut out = Out::new();
        let bar = console.steps("training");
        let mut failed = None;
        let cancel = console.cancel.clone();
        let mut trainer = Trainer::new(tuner, data, options).cancel(cancel).resume(self.resume);
        if let Some(eval) = eval {
            trainer = trainer.eval(eval);
        }
        let report = trainer
            .callback(|event| {
                match event {
                    Event::Step(step) => {
                        let left = duration(step.left);
                        let speed = step.tokens_per_second;
                        bar.at(step.step, step.steps, &format!("loss {:.4}, {speed:.0} tokens/s, {left} left", step.loss));
                        if show.json {
                            failed = failed.take().or(out.json(&json!({
                                "step": step.step, "loss": step.loss, "lr": step.lr, "grad_norm": step.grad_norm,
                                "tokens_per_second": speed,
                            })).err());
                        }
                    }
                    Event::Evaluated { step, loss, best, recall } => {
                        let found = recall.map(|recall| {
                            format!(", recall {:.3} at 1 and {:.3} at 10", recall.at_1, recall.at_10)
                        });
                        let note = if *best { ", the best so far" } else { "" };
                        let found = found.unwrap_or_default();
                        bar.say(console, &format!("step {step}: evaluation loss {loss:.4}{found}{note}"));
                        if show.json {
                            let mut line = json!({ "step": step, "eval_loss": loss });
                            if let Some(recall) = recall {
                                line["recall_at_1"] = recall.at_1.into();
                                line["recall_at_10"] = recall.at_10.into();
                            }
                            failed = failed.take().or(out.json(&line).err());
                        }
                    }
                    _ => {}
                }
                if failed.is_some() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            })
            .run(&self.output);
        bar.hide();
        if let Some(failure) = failed {
            return Err(failure);
        }
        let report = report?;
        if let Err(problem) = plot::draw(&report.output.join("loss.svg"), &report.log) {
            console.warn(&problem);
        }
        let best = report.best.map(|(loss, step)| json!({ "loss": loss, "step": step }));
        if show.json {
            return out.json(&json!({
                "output": report.output, "steps": report.steps, "loss": report.loss, "best": best,
                "trainable": trained, "stopped_early": report.stopped_early, "tokens": report.tokens,
                "memory": {
                    "weights": memory.weights, "gradients": memory.gradients, "optimizer": memory.optimizer,
                    "activations": memory.activations, "total": memory.total(),
                },
            }));
        }
        let size = std::fs::read_dir(&report.output)
            .map(|entries| {
                entries
                    .flatten()
                    .filter_map(|e| e.metadata().ok())
                    .filter(|m| m.is_file())
                    .map(|m| m.len())
                    .sum()
            })
            .unwrap_or(0);
        let loss = match (report.best, report.loss) {
            (Some((loss, step)), _) => format!("; best evaluation loss {loss:.4} after step {step}"),
            (None, Some(loss)) => format!("; last loss {loss:.4}"),
            (None, None) => String::new(),
        };
        out.line(&format!("{}: {} after {} steps{loss}", report.output.display(), bytes(size), report.steps))
    }
}
