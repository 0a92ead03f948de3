//! `opt tune`.

use crate::{
    args::{ModelArgs, ShowArgs},
    model,
    out::{Failure, Out, bytes},
    progress::{Console, duration},
};
use clap::{Args, ValueEnum};
use opt_core::{
    ErrorKind, Load,
    adapter::{Adapter, AdapterConfig, AdapterMethod, Bias, LoraConfig, Names, PrefixConfig, PromptConfig},
    checkpoint::Checkpoint,
    config::OptConfig,
    tokenizer::Tokenizer,
    tuning::{
        Event, Method, Optimizer, TrainOptions, Trainer, Tuner,
        data::{DataOptions, Dataset, Documents},
        new_model,
        schedule::Schedule,
        train_tokenizer,
    },
};
use serde_json::json;
use std::{
    fs,
    ops::ControlFlow,
    path::{Path, PathBuf},
};

const HELP: &str = "\
Examples:
  opt tune full --data letters.txt --output tuned
  opt tune lora --data pairs.jsonl --eval-data held-out.jsonl --output adapter
  opt tune lora --data letters.txt --output adapter --resume

Data: a .txt file is cut into blocks of --seq-len tokens; lines of a .jsonl
file are {\"text\": \"...\"}, {\"prompt\": \"...\", \"completion\": \"...\"} (learned is the
completion only) or {\"ids\": [...]}.
OUTPUT holds the result, checkpoints that can be used and resumed, and the log
of every step as log.jsonl. Ctrl-C ends after the step it is in and saves.";

/// Adapt a model to texts: its weights (full) or an adapter beside them.
#[derive(Debug, Args)]
#[command(after_help = HELP)]
pub(crate) struct Tune {
    /// What is trained.
    #[arg(value_name = "METHOD")]
    method: MethodName,
    /// Learn from this file.
    #[arg(long, value_name = "FILE.{txt,jsonl}", help_heading = "Data")]
    data: PathBuf,
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
    /// Highest learning rate. [default: 5e-5 for full, 3e-4 for lora, 1e-2 for prefix and prompt]
    #[arg(long, value_name = "RATE", help_heading = "Steps")]
    lr: Option<f64>,
    /// How the learning rate moves after the warm-up: constant, constant_with_warmup, linear, cosine,
    /// cosine_with_min_lr, polynomial, inverse_sqrt.
    #[arg(long, value_name = "NAME", default_value = "linear", value_parser = schedule, help_heading = "Steps")]
    schedule: Schedule,
    /// Steps over which the learning rate rises from 0.
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = "Steps")]
    warmup_steps: u64,
    /// How parameters follow their gradients: adamw or sgd.
    #[arg(long, value_name = "NAME", default_value = "adamw", value_parser = optimizer, help_heading = "Steps")]
    optimizer: Optimizer,
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
    seed: u64,

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

    /// full: train only these layers.
    #[arg(long, value_name = "N,...", value_delimiter = ',', help_heading = "Method")]
    layers: Option<Vec<usize>>,
    /// full: train a new model of this shape, with a tokenizer learned from the data unless --model names one.
    #[arg(long, value_name = "CONFIG.json", help_heading = "Method")]
    from_scratch: Option<PathBuf>,
    /// lora: the rank. [default: 8]
    #[arg(long, value_name = "R", help_heading = "Method")]
    rank: Option<usize>,
    /// lora: alpha; the term is scaled by alpha / rank. [default: 16]
    #[arg(long, value_name = "X", help_heading = "Method")]
    alpha: Option<f64>,
    /// lora: the modules that are adapted: ends of their names, \"all-linear\", or one regular expression. [default:
    /// q_proj,v_proj]
    #[arg(long, value_name = "NAME,...", help_heading = "Method")]
    target_modules: Option<String>,
    /// lora: dropout in front of the term.
    #[arg(long, value_name = "P", help_heading = "Method")]
    lora_dropout: Option<f64>,
    /// lora: scale by alpha / √rank.
    #[arg(long, help_heading = "Method")]
    rslora: bool,
    /// lora: train the lengths of the weights' rows apart from their directions (DoRA).
    #[arg(long, help_heading = "Method")]
    dora: bool,
    /// lora: which biases are trained too. [default: none]
    #[arg(long, value_name = "WHICH", help_heading = "Method")]
    bias: Option<BiasName>,
    /// lora: modules that are trained whole and saved beside the adapter.
    #[arg(long, value_name = "NAME,...", value_delimiter = ',', help_heading = "Method")]
    modules_to_save: Vec<String>,
    /// prefix, prompt: how many virtual tokens there are. [default: 20]
    #[arg(long, value_name = "N", help_heading = "Method")]
    virtual_tokens: Option<usize>,
    /// prefix: train a small network that makes the prefix.
    #[arg(long, help_heading = "Method")]
    prefix_projection: bool,
    /// prompt: what the embeddings start as. [default: random, or text with --init-text]
    #[arg(long, value_name = "HOW", help_heading = "Method")]
    init: Option<InitName>,
    /// prompt: start as the embeddings of this text.
    #[arg(long, value_name = "TEXT", help_heading = "Method")]
    init_text: Option<String>,
    /// Train this adapter further, in the place of a new one.
    #[arg(long, value_name = "DIR", help_heading = "Method")]
    adapter: Option<PathBuf>,

    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    show: ShowArgs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum MethodName {
    /// The weights themselves.
    Full,
    /// Low-rank terms beside weights (arXiv 2106.09685).
    Lora,
    /// Keys and values in front of the first token, in every layer (arXiv 2101.00190).
    Prefix,
    /// Embeddings in front of the first token (arXiv 2104.08691).
    Prompt,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum BiasName {
    /// None.
    None,
    /// All of the model's.
    All,
    /// Those of the adapted modules.
    LoraOnly,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum InitName {
    /// Normally distributed numbers.
    Random,
    /// Embeddings of random tokens.
    SampleVocab,
    /// Embeddings of the tokens of --init-text.
    Text,
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

/// `--target-modules`: a list, or one pattern.
fn names(text: &str) -> Names {
    let is_name = |c: char| c.is_ascii_alphanumeric() || "_.,".contains(c);
    match text.eq_ignore_ascii_case(Names::ALL_LINEAR) || !text.chars().all(is_name) {
        true => Names::Pattern(text.to_owned()),
        false => Names::list(text.split(',')),
    }
}

/// The tokenizer of a model, if it has one.
fn tokenizer(model: &Path) -> Result<Option<Tokenizer>, Failure> {
    let dir = if model.is_dir() { model } else { model.parent().unwrap_or(Path::new("")) };
    match Tokenizer::from_dir(dir) {
        Ok(tokenizer) => Ok(Some(tokenizer)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// What a training starts from.
struct Start {
    checkpoint: Checkpoint,
    tokenizer: Option<Tokenizer>,
    /// Of a new model: what stands beside its weights.
    files: Vec<(String, Vec<u8>)>,
}

impl Tune {
    pub(crate) fn run(&self) -> Result<(), Failure> {
        let console = Console::new(self.show);
        let options = self.options();
        options.validate()?;
        let backend = self.model.place.choose()?;
        let path = match &self.from_scratch {
            Some(config) => config.clone(),
            None => model::find(self.model.place.model.as_deref(), &console)?,
        };
        let method = self.method(&path)?;
        let Start { checkpoint, tokenizer, files } = match &self.from_scratch {
            Some(config) => self.scratch(config, &console)?,
            None => Start {
                checkpoint: Checkpoint::open(&path)?,
                tokenizer: tokenizer(&path)?,
                files: Vec::new(),
            },
        };
        let config = checkpoint.config().clone();
        let [data, eval] = self.read(&config, tokenizer, &console)?;
        let Some(data) = data else { return Err(Failure::usage("--data: expected a file")) };
        let mut load = Load::with(backend).dtype(self.model.dtype.into()).cancel(console.cancel.clone());
        if let Some(format) = self.model.quantize {
            load = load.quantize(format.spec());
        }
        let tuner = Tuner::from_checkpoint(checkpoint, method, load)?.files(files);
        let all: u64 =
            config.tensor_shapes().iter().map(|(_, shape)| shape.iter().product::<usize>() as u64).sum();
        let trained = tuner.trainable() as u64;
        console.say(&format!(
            "{trained} parameters are trained, {:.3} % of {all}; {} examples with {} targets",
            100.0 * trained as f64 / all as f64,
            data.len(),
            data.targets()
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
                        if self.show.json {
                            failed = failed.take().or(out.json(&json!({
                                "step": step.step, "loss": step.loss, "lr": step.lr, "grad_norm": step.grad_norm,
                                "tokens_per_second": speed,
                            })).err());
                        }
                    }
                    Event::Evaluated { step, loss, best } => {
                        let note = if *best { ", the best so far" } else { "" };
                        bar.say(&console, &format!("step {step}: evaluation loss {loss:.4}{note}"));
                        if self.show.json {
                            failed = failed.take().or(out.json(&json!({ "step": step, "eval_loss": loss })).err());
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
        let best = report.best.map(|(loss, step)| json!({ "loss": loss, "step": step }));
        if self.show.json {
            return out.json(&json!({
                "output": report.output, "steps": report.steps, "loss": report.loss, "best": best,
                "trainable": trained, "stopped_early": report.stopped_early, "tokens": report.tokens,
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

    /// A new model, and the tokenizer of --model or one that is learned from the data.
    fn scratch(&self, config: &Path, console: &Console) -> Result<Start, Failure> {
        let text = fs::read_to_string(config)
            .map_err(|e| Failure::failed(format!("--from-scratch {}: {e}", config.display())))?;
        let config = OptConfig::from_json(&text).map_err(|e| e.at(config.display()))?;
        let (tokenizer, mut files) = match &self.model.place.model {
            Some(name) => {
                let dir = model::find(Some(name), console)?;
                let kept = [
                    "tokenizer.json",
                    "vocab.json",
                    "merges.txt",
                    "tokenizer_config.json",
                    "special_tokens_map.json",
                ];
                let files =
                    kept.iter().filter_map(|name| Some(((*name).to_owned(), fs::read(dir.join(name)).ok()?)));
                (tokenizer(&dir)?, files.collect())
            }
            None => {
                console.say("learning a tokenizer from the data");
                let context = config.max_position_embeddings;
                let (tokenizer, files) = train_tokenizer(&[&self.data], config.vocab_size, context)?;
                (Some(tokenizer), files)
            }
        };
        files.push(("config.json".to_owned(), text.into_bytes()));
        Ok(Start { checkpoint: new_model(&config, self.seed)?, tokenizer, files })
    }

    fn options(&self) -> TrainOptions {
        let options = TrainOptions::default()
            .max_steps(self.max_steps)
            .batch_size(self.batch_size)
            .grad_accum(self.grad_accum)
            .schedule(self.schedule)
            .warmup_steps(self.warmup_steps)
            .optimizer(self.optimizer)
            .weight_decay(self.weight_decay)
            .clip((self.clip != 0.0).then_some(self.clip))
            .label_smoothing(self.label_smoothing)
            .gradient_checkpointing(self.gradient_checkpointing)
            .seed(self.seed)
            .eval_steps(self.eval_steps)
            .save_steps(self.save_steps)
            .save_limit(self.save_limit)
            .patience(self.patience)
            .lr(self.lr.unwrap_or(match self.method {
                MethodName::Full => 5e-5,
                MethodName::Lora => 3e-4,
                MethodName::Prefix | MethodName::Prompt => 1e-2,
            }));
        match self.epochs {
            Some(epochs) => options.epochs(epochs),
            None => options,
        }
    }

    fn method(&self, model: &Path) -> Result<Method, Failure> {
        self.check_flags()?;
        let base = model.display().to_string();
        if let Some(directory) = &self.adapter {
            return Ok(Method::further(Adapter::open(directory)?));
        }
        let config = match self.method {
            MethodName::Full => {
                return Ok(match &self.layers {
                    None => Method::full(),
                    Some(layers) => Method::layers(layers.iter().copied()),
                });
            }
            MethodName::Lora => {
                let mut lora = LoraConfig::default();
                lora.r = self.rank.unwrap_or(8);
                lora.lora_alpha = self.alpha.unwrap_or(16.0);
                lora.lora_dropout = self.lora_dropout.unwrap_or(0.0);
                lora.use_rslora = self.rslora;
                lora.use_dora = self.dora;
                lora.bias = match self.bias {
                    None | Some(BiasName::None) => Bias::None,
                    Some(BiasName::All) => Bias::All,
                    Some(BiasName::LoraOnly) => Bias::LoraOnly,
                };
                if let Some(targets) = &self.target_modules {
                    lora.target_modules = names(targets);
                }
                AdapterConfig::new(AdapterMethod::Lora(lora)).save(self.modules_to_save.iter())
            }
            MethodName::Prefix => {
                let mut prefix = PrefixConfig::default();
                prefix.sizes.num_virtual_tokens = self.virtual_tokens.unwrap_or(20);
                prefix.prefix_projection = self.prefix_projection;
                AdapterConfig::new(AdapterMethod::Prefix(prefix))
            }
            MethodName::Prompt => {
                let mut prompt = PromptConfig::default();
                prompt.sizes.num_virtual_tokens = self.virtual_tokens.unwrap_or(20);
                prompt.prompt_tuning_init = match (self.init, &self.init_text) {
                    (Some(InitName::Random), _) | (None, None) => "RANDOM",
                    (Some(InitName::SampleVocab), _) => "SAMPLE_VOCAB",
                    (Some(InitName::Text), _) | (None, Some(_)) => "TEXT",
                }
                .to_owned();
                prompt.prompt_tuning_init_text.clone_from(&self.init_text);
                AdapterConfig::new(AdapterMethod::Prompt(prompt))
            }
        };
        Ok(Method::adapter(config.base(base), self.seed))
    }

    /// Flags of one method that were given with another.
    fn check_flags(&self) -> Result<(), Failure> {
        use MethodName::{Full, Lora, Prefix, Prompt};
        let flags: [(&str, bool, &[MethodName]); 15] = [
            ("--layers", self.layers.is_some(), &[Full]),
            ("--from-scratch", self.from_scratch.is_some(), &[Full]),
            ("--rank", self.rank.is_some(), &[Lora]),
            ("--alpha", self.alpha.is_some(), &[Lora]),
            ("--target-modules", self.target_modules.is_some(), &[Lora]),
            ("--lora-dropout", self.lora_dropout.is_some(), &[Lora]),
            ("--rslora", self.rslora, &[Lora]),
            ("--dora", self.dora, &[Lora]),
            ("--bias", self.bias.is_some(), &[Lora]),
            ("--modules-to-save", !self.modules_to_save.is_empty(), &[Lora]),
            ("--virtual-tokens", self.virtual_tokens.is_some(), &[Prefix, Prompt]),
            ("--prefix-projection", self.prefix_projection, &[Prefix]),
            ("--init", self.init.is_some(), &[Prompt]),
            ("--init-text", self.init_text.is_some(), &[Prompt]),
            ("--adapter", self.adapter.is_some(), &[Lora, Prefix, Prompt]),
        ];
        let wrong = flags.iter().find(|(_, given, methods)| *given && !methods.contains(&self.method));
        if let Some((flag, _, methods)) = wrong {
            let names: Vec<String> = methods.iter().map(|m| format!("{m:?}").to_lowercase()).collect();
            return Err(Failure::usage(format!("{flag} belongs to opt tune {}", names.join(" and "))));
        }
        if self.init == Some(InitName::Text) && self.init_text.is_none() {
            return Err(Failure::usage("--init text: expected --init-text beside it"));
        }
        Ok(())
    }

    /// What is learned from, and what is evaluated on.
    fn read(
        &self,
        config: &OptConfig,
        tokenizer: Option<Tokenizer>,
        console: &Console,
    ) -> Result<[Option<Dataset>; 2], Failure> {
        let seq_len = self.seq_len.unwrap_or(config.max_position_embeddings.min(512));
        let options = DataOptions::new(config, tokenizer)
            .seq_len(seq_len)
            .pack(self.pack)
            .truncate(self.truncate_data)
            .documents(self.documents.into())
            .cancel(console.cancel.clone());
        let bar = console.byte_bar("reading");
        let read = |path: &PathBuf| {
            let mut progress = |at: opt_core::Progress<'_>| bar.show(at);
            Dataset::read(&[path], &options, Some(&mut progress))
        };
        let data = read(&self.data)?;
        Ok(match (&self.eval_data, self.eval_split) {
            (Some(path), _) => [Some(data), Some(read(path)?)],
            (None, Some(share)) => data.split(share, self.seed)?.map(Some),
            (None, None) => [Some(data), None],
        })
    }
}
