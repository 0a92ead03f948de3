//! `opt tune`.

use crate::{
    args::{ModelArgs, ShowArgs},
    model,
    out::Failure,
    progress::Console,
    training::{TrainArgs, tokenizer},
};
use clap::{Args, ValueEnum};
use opt_core::{
    ErrorKind, Load,
    adapter::{Adapter, AdapterConfig, AdapterMethod, Bias, LoraConfig, Names, PrefixConfig, PromptConfig},
    checkpoint::Checkpoint,
    config::OptConfig,
    heads::{Head, Task},
    tokenizer::Tokenizer,
    tuning::{
        ContrastOptions, Method, Pooling, TrainOptions, Tuner,
        data::{Reads, classes},
        new_model, train_tokenizer,
    },
};
use std::{
    fs,
    path::{Path, PathBuf},
};

const HELP: &str = "\
Examples:
  opt tune full --data letters.txt --output tuned
  opt tune lora --data pairs.jsonl --eval-data held-out.jsonl --output adapter
  opt tune lora --data letters.txt --output adapter --resume
  opt tune lora --task classify --data reviews.jsonl --output classifier

Data: a .txt file is cut into blocks of --seq-len tokens; lines of a .jsonl
file are {\"text\": \"...\"}, {\"prompt\": \"...\", \"completion\": \"...\"} (learned is the
completion only) or {\"ids\": [...]}. Other tasks have lines of their own:
{\"text\": \"...\", \"label\": ...}, {\"question\", \"context\", \"answer\"}, or
{\"query\": \"...\", \"passage\": \"...\"}.
OUTPUT holds the result, checkpoints that can be used and resumed, and the log
of every step as log.jsonl. Ctrl-C ends after the step it is in and saves.";

/// What `--adapter` means here.
const ADAPTER: &str = "Train this adapter further, in the place of a new one";

/// Adapt a model to texts: its weights (full) or an adapter beside them.
#[derive(Debug, Args)]
#[command(after_help = HELP, mut_arg("adapter", |adapter| adapter.help(ADAPTER).help_heading("Method")))]
pub(crate) struct Tune {
    /// What is trained.
    #[arg(value_name = "METHOD")]
    method: MethodName,
    #[command(flatten)]
    train: TrainArgs,

    /// What is learned: tokens (language); with a head that is saved too, one class of a text (classify), any of some
    /// classes (multi-label), a number (regress) or where an answer stands (answer); or which texts belong together
    /// (search).
    #[arg(long, value_name = "WHAT", default_value = "language", help_heading = "Task")]
    task: TaskName,
    /// classify, multi-label, regress: the names of the outputs. [default: the names in the data, or one number]
    #[arg(long, value_name = "NAME,...", value_delimiter = ',', help_heading = "Task")]
    classes: Vec<String>,
    /// search: what cosines are divided by. [default: 0.05]
    #[arg(long, value_name = "T", help_heading = "Task")]
    temperature: Option<f32>,
    /// search: how much the tokens of the texts count. [default: 0.1]
    #[arg(long, value_name = "X", help_heading = "Task")]
    lm_weight: Option<f32>,
    /// search: how a text becomes one vector. [default: mean]
    #[arg(long, value_name = "HOW", help_heading = "Task")]
    pooling: Option<PoolingName>,
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
    /// lora: give the terms biases of their own.
    #[arg(long, help_heading = "Method", conflicts_with = "dora")]
    lora_bias: bool,
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
enum TaskName {
    /// To predict tokens.
    Language,
    /// One of some classes.
    Classify,
    /// Any of some classes.
    MultiLabel,
    /// Numbers.
    Regress,
    /// Where in a text the answer to a question stands.
    Answer,
    /// Which texts belong together.
    Search,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum PoolingName {
    /// All tokens alike.
    Mean,
    /// Later tokens count more.
    WeightedMean,
    /// The last token.
    LastToken,
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

/// `--target-modules`: a list, or one pattern.
fn names(text: &str) -> Names {
    let is_name = |c: char| c.is_ascii_alphanumeric() || "_.,".contains(c);
    match text.eq_ignore_ascii_case(Names::ALL_LINEAR) || !text.chars().all(is_name) {
        true => Names::Pattern(text.to_owned()),
        false => Names::list(text.split(',')),
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
        let options = self.options()?;
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
        let head = self.head(&checkpoint)?;
        let reads = match (&head, self.task) {
            (Some(head), _) => Reads::Head(head.task().clone()),
            (None, TaskName::Search) => Reads::Pairs,
            (None, _) => Reads::Language,
        };
        let (data, eval) = self.train.read(&config, tokenizer, reads, &console)?;
        let mut load = Load::with(backend).dtype(self.model.dtype.into()).cancel(console.cancel.clone());
        if let Some(format) = self.model.quantize {
            load = load.quantize(format.spec());
        }
        let mut tuner = Tuner::from_checkpoint(checkpoint, method, load)?.files(files);
        if let Some(head) = head {
            tuner = tuner.head(head)?;
        }
        if self.task == TaskName::Search {
            tuner = tuner.contrast(self.contrast())?;
        }
        self.train.run(tuner, data, eval, options, &console, self.show)
    }

    /// The head that is trained: that of the model or the adapter if it is for this task, else a new one.
    fn head(&self, model: &Checkpoint) -> Result<Option<Head>, Failure> {
        let classes = || match &self.classes[..] {
            [] => Ok(classes(&[&self.train.data])?),
            names => Ok::<Vec<String>, Failure>(names.to_vec()),
        };
        let names =
            |names: &[String]| if names.is_empty() { vec!["LABEL_0".to_owned()] } else { names.to_vec() };
        let known = match (self.task, &self.model.adapter) {
            (TaskName::Language | TaskName::Search, _) => return Ok(None),
            (_, Some(adapter)) => match Head::beside(&Adapter::open(adapter)?, adapter, model) {
                // One that was trained for tokens so far.
                Err(error) if error.kind() == ErrorKind::NotFound => None,
                head => Some(head?),
            },
            (_, None) => Head::of(model)?,
        };
        let is_meant = |task: &Task| {
            let kind = match self.task {
                TaskName::Classify => matches!(task, Task::OneOf(_)),
                TaskName::MultiLabel => matches!(task, Task::AnyOf(_)),
                TaskName::Regress => matches!(task, Task::Numbers(_)),
                TaskName::Answer => matches!(task, Task::Answer),
                TaskName::Language | TaskName::Search => false,
            };
            kind && (self.classes.is_empty() || self.classes == task.labels())
        };
        if let Some(head) = known.filter(|head| is_meant(head.task())) {
            return Ok(Some(head));
        }
        let task = match self.task {
            TaskName::Classify => Task::one_of(classes()?)?,
            TaskName::MultiLabel => Task::any_of(classes()?)?,
            TaskName::Regress => Task::numbers(names(&self.classes))?,
            TaskName::Answer | TaskName::Language | TaskName::Search => Task::Answer,
        };
        Ok(Some(Head::new(task, model.config(), self.train.seed)))
    }

    fn contrast(&self) -> ContrastOptions {
        let mut options = ContrastOptions::default();
        options.temperature = self.temperature.unwrap_or(options.temperature);
        options.lm = self.lm_weight.unwrap_or(options.lm);
        options.pooling = match self.pooling {
            None | Some(PoolingName::Mean) => Pooling::Mean,
            Some(PoolingName::WeightedMean) => Pooling::WeightedMean,
            Some(PoolingName::LastToken) => Pooling::LastToken,
        };
        options
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
                let (tokenizer, files) = train_tokenizer(&[&self.train.data], config.vocab_size, context)?;
                (Some(tokenizer), files)
            }
        };
        files.push(("config.json".to_owned(), text.into_bytes()));
        Ok(Start { checkpoint: new_model(&config, self.train.seed)?, tokenizer, files })
    }

    fn options(&self) -> Result<TrainOptions, Failure> {
        self.train.options(match self.method {
            MethodName::Full => 5e-5,
            MethodName::Lora => 3e-4,
            MethodName::Prefix | MethodName::Prompt => 1e-2,
        })
    }

    fn method(&self, model: &Path) -> Result<Method, Failure> {
        self.check_flags()?;
        let base = model.display().to_string();
        if let Some(directory) = &self.model.adapter {
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
                lora.lora_bias = self.lora_bias;
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
        Ok(Method::adapter(config.base(base), self.train.seed))
    }

    /// Flags of one method that were given with another.
    fn check_flags(&self) -> Result<(), Failure> {
        use MethodName::{Full, Lora, Prefix, Prompt};
        let flags: [(&str, bool, &[MethodName]); 16] = [
            ("--layers", self.layers.is_some(), &[Full]),
            ("--from-scratch", self.from_scratch.is_some(), &[Full]),
            ("--rank", self.rank.is_some(), &[Lora]),
            ("--alpha", self.alpha.is_some(), &[Lora]),
            ("--target-modules", self.target_modules.is_some(), &[Lora]),
            ("--lora-dropout", self.lora_dropout.is_some(), &[Lora]),
            ("--rslora", self.rslora, &[Lora]),
            ("--dora", self.dora, &[Lora]),
            ("--lora-bias", self.lora_bias, &[Lora]),
            ("--bias", self.bias.is_some(), &[Lora]),
            ("--modules-to-save", !self.modules_to_save.is_empty(), &[Lora]),
            ("--virtual-tokens", self.virtual_tokens.is_some(), &[Prefix, Prompt]),
            ("--prefix-projection", self.prefix_projection, &[Prefix]),
            ("--init", self.init.is_some(), &[Prompt]),
            ("--init-text", self.init_text.is_some(), &[Prompt]),
            ("--adapter", self.model.adapter.is_some(), &[Lora, Prefix, Prompt]),
        ];
        let wrong = flags.iter().find(|(_, given, methods)| *given && !methods.contains(&self.method));
        if let Some((flag, _, methods)) = wrong {
            let names: Vec<String> = methods.iter().map(|m| format!("{m:?}").to_lowercase()).collect();
            return Err(Failure::usage(format!("{flag} belongs to opt tune {}", names.join(" and "))));
        }
        if self.task != TaskName::Language
            && let Some(flag) = self.train.of_language()
        {
            return Err(Failure::usage(format!("{flag} belongs to --task language")));
        }
        use TaskName::{Classify, MultiLabel, Regress, Search};
        let flags: [(&str, bool, &[TaskName]); 4] = [
            ("--classes", !self.classes.is_empty(), &[Classify, MultiLabel, Regress]),
            ("--temperature", self.temperature.is_some(), &[Search]),
            ("--lm-weight", self.lm_weight.is_some(), &[Search]),
            ("--pooling", self.pooling.is_some(), &[Search]),
        ];
        if let Some((flag, _, _)) =
            flags.iter().find(|(_, given, tasks)| *given && !tasks.contains(&self.task))
        {
            return Err(Failure::usage(format!("{flag} belongs to another --task than this one")));
        }
        if self.init == Some(InitName::Text) && self.init_text.is_none() {
            return Err(Failure::usage("--init text: expected --init-text beside it"));
        }
        Ok(())
    }
}
