//! What an evaluation gave: scores of tasks and groups, and how they came about, in the layout in which
//! lm-evaluation-harness (0.4.13) writes its `results_*.json`.
//!
//! ```
//! use opt_eval::report::{Bos, GroupResult, MetricResult, Report, RunInfo, TaskResult};
//!
//! let mut info = RunInfo::new("facebook/opt-125m");
//! info.bos = Some(Bos::With);
//! let mut report = Report::new(info);
//! for (name, value, size) in [("mmlu_anatomy", 0.5, 20), ("mmlu_virology", 0.25, 60)] {
//!     let mut task = TaskResult::new(name, size);
//!     task.metrics.push(MetricResult::new("acc", value).stderr(0.05).higher_is_better(true));
//!     report.add_task(task);
//! }
//! report.add_group(GroupResult::new("mmlu", ["mmlu_anatomy", "mmlu_virology"]).mean_of("acc"));
//! let mmlu = report.score("mmlu", "acc", "none").map(|score| score.value);
//! assert_eq!(mmlu, Some((0.5 * 20.0 + 0.25 * 60.0) / 80.0));
//! println!("{}", report.markdown());
//! ```

mod file;
mod group;
mod scores;
mod table;

pub(crate) use file::without_nan;
pub use file::write_whole;
pub(crate) use table::{markdown_table, number};

pub use group::{GroupMetric, GroupResult};
pub use scores::{Score, Scores};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

/// The filter of metrics that no filter was named for.
pub const NO_FILTER: &str = "none";

/// Whether a text that is scored begins with the model's first token (OPT: `</s>`, id 2).
///
/// OPT was trained with it, and its scores are lower without; tables of published scores are of both kinds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Bos {
    /// Every text begins with it: what OPT's tokenizer does, and the harness since it leaves that to the tokenizer.
    With,
    /// No text but the empty one begins with it: the harness up to 0.3.
    Without,
}

impl std::fmt::Display for Bos {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::With => "with BOS",
            Self::Without => "without BOS",
        })
    }
}

/// What was run and how: the part of a report that is known before the first task.
///
/// [`RunInfo::new`] has the harness' defaults: 100,000 bootstrap replicates, seeds 0 and 1234.
#[derive(Debug, Clone, PartialEq, Default)]
#[non_exhaustive]
pub struct RunInfo {
    /// The model's name or folder.
    pub model_name: String,
    /// Further settings of the model as `name=value`, joined by commas; `pretrained=` the name unless given.
    pub model_args: Option<String>,
    /// Number of parameters.
    pub num_parameters: Option<u64>,
    /// Number format in which was computed, such as `f32`.
    pub dtype: Option<String>,
    /// Prompts run at once.
    pub batch_size: Option<String>,
    /// Where it ran, in the harness' word (`cpu`, `cuda:0`).
    pub device: Option<String>,
    /// Only so many documents of each task; below 1, that part of them.
    pub limit: Option<f64>,
    /// Replicates of bootstrapped standard errors.
    pub bootstrap_iters: usize,
    /// Settings of generation that replaced the tasks'.
    pub gen_kwargs: Option<Value>,
    /// Seed of Python's `random`.
    pub random_seed: Option<u64>,
    /// Seed of numpy.
    pub numpy_seed: Option<u64>,
    /// Seed of torch.
    pub torch_seed: Option<u64>,
    /// Seed of the few-shot examples.
    pub fewshot_seed: Option<u64>,
    /// Longest sequence, tokens.
    pub max_length: Option<usize>,
    /// The padding token and its id.
    pub pad_token: Option<(String, u32)>,
    /// The token that ends a text, and its id.
    pub eos_token: Option<(String, u32)>,
    /// The token that begins a text, and its id.
    pub bos_token: Option<(String, u32)>,
    /// Whether texts began with the model's first token.
    pub bos: Option<Bos>,
    /// The backend: `cpu`, `wgpu`, `candle`, `tch`.
    pub backend: Option<String>,
    /// How the weights were held, such as `f32`, `int8`, `int4 g128`.
    pub weights: Option<String>,
    /// The adapter beside the model.
    pub adapter: Option<String>,
    /// Width of the hidden states, by which the published sizes are recognised.
    pub hidden_size: Option<usize>,
    /// Number of layers, by which the published sizes are recognised.
    pub num_hidden_layers: Option<usize>,
    /// When it began, in seconds since 1970; now unless given.
    pub date: Option<f64>,
}

impl RunInfo {
    /// A run of a model, with the harness' defaults for the rest.
    pub fn new(model_name: impl Into<String>) -> Self {
        Self {
            model_name: model_name.into(),
            bootstrap_iters: 100_000,
            random_seed: Some(0),
            numpy_seed: Some(1234),
            torch_seed: Some(1234),
            fewshot_seed: Some(1234),
            ..Self::default()
        }
    }
}

/// One metric of a task.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct MetricResult {
    /// The metric, such as `acc_norm`.
    pub name: String,
    /// The filter its answers went through; [`NO_FILTER`] for most.
    pub filter: String,
    /// Its value over all documents.
    pub value: f64,
    /// Standard error of the value, if the metric has one.
    pub stderr: Option<f64>,
    /// Whether more is better; none where the metric does not say.
    pub higher_is_better: Option<bool>,
}

impl MetricResult {
    /// A metric without filter, standard error and direction.
    pub fn new(name: impl Into<String>, value: f64) -> Self {
        Self { name: name.into(), filter: NO_FILTER.to_owned(), value, stderr: None, higher_is_better: None }
    }

    /// Sets the filter.
    #[must_use]
    pub fn filter(mut self, filter: impl Into<String>) -> Self {
        self.filter = filter.into();
        self
    }

    /// Sets the standard error.
    #[must_use]
    pub fn stderr(mut self, stderr: f64) -> Self {
        self.stderr = Some(stderr);
        self
    }

    /// Sets whether more is better.
    #[must_use]
    pub fn higher_is_better(mut self, higher: bool) -> Self {
        self.higher_is_better = Some(higher);
        self
    }
}

/// What one task gave.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct TaskResult {
    /// The task's name.
    pub name: String,
    /// What tables call it; the name unless given.
    pub alias: Option<String>,
    /// Groups whose list of tasks it is in.
    pub groups: Vec<String>,
    /// Version of the task's definition: a number or a word.
    pub version: Value,
    /// Examples before each question.
    pub num_fewshot: usize,
    /// The metrics.
    pub metrics: Vec<MetricResult>,
    /// Documents the task has.
    pub original: usize,
    /// Documents that were evaluated.
    pub effective: usize,
    /// Prompts that were longer than the model's context and lost their beginning.
    pub truncated: usize,
    /// The task's definition as it was used.
    pub config: Value,
    /// Hash over the hashes of the samples.
    pub task_hash: Option<String>,
}

impl TaskResult {
    /// A task all of whose documents were evaluated, zero-shot, with no metrics yet.
    pub fn new(name: impl Into<String>, documents: usize) -> Self {
        Self {
            name: name.into(),
            alias: None,
            groups: Vec::new(),
            version: json!(1.0),
            num_fewshot: 0,
            metrics: Vec::new(),
            original: documents,
            effective: documents,
            truncated: 0,
            config: Value::Null,
            task_hash: None,
        }
    }
}

/// Documents of a task.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct SampleCount {
    /// Documents the task has.
    pub original: usize,
    /// Documents that were evaluated.
    pub effective: usize,
}

/// What opt-rs writes beside the harness' keys, under `opt_eval`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
#[serde(default)]
pub struct Own {
    /// Version of this crate.
    pub version: Option<String>,
    /// Whether texts began with the model's first token.
    pub bos: Option<Bos>,
    /// The backend.
    pub backend: Option<String>,
    /// How the weights were held.
    pub weights: Option<String>,
    /// The adapter beside the model.
    pub adapter: Option<String>,
    /// Width of the hidden states.
    pub hidden_size: Option<usize>,
    /// Number of layers.
    pub num_hidden_layers: Option<usize>,
    /// Truncated prompts of each task.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub truncated: BTreeMap<String, usize>,
    /// What a reader should know, a line each.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

/// Scores of tasks and groups, and how they came about.
///
/// It serializes as the harness' results file; keys this crate has no use for are kept in [`Report::other`].
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Report {
    /// Scores of tasks, and of groups too.
    pub results: BTreeMap<String, Scores>,
    /// Scores of the groups that have any.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub groups: BTreeMap<String, Scores>,
    /// Tasks and groups in each group.
    #[serde(default)]
    pub group_subtasks: BTreeMap<String, Vec<String>>,
    /// Definitions of the tasks.
    #[serde(default)]
    pub configs: BTreeMap<String, Value>,
    /// Versions of the definitions.
    #[serde(default)]
    pub versions: BTreeMap<String, Value>,
    /// Examples before each question.
    #[serde(default, rename = "n-shot")]
    pub n_shot: BTreeMap<String, Value>,
    /// For each task and metric whether more is better.
    #[serde(default)]
    pub higher_is_better: BTreeMap<String, BTreeMap<String, Option<bool>>>,
    /// Documents of each task.
    #[serde(default, rename = "n-samples")]
    pub n_samples: BTreeMap<String, SampleCount>,
    /// Model and settings, with the harness' names.
    #[serde(default)]
    pub config: Map<String, Value>,
    /// When the run began, in seconds since 1970.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub date: Option<f64>,
    /// The model's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model_name: Option<String>,
    /// What opt-rs adds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub opt_eval: Option<Own>,
    /// All other keys of a file.
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

impl Report {
    /// A report without tasks yet.
    pub fn new(info: RunInfo) -> Self {
        let RunInfo { model_name, .. } = &info;
        let arguments = info.model_args.clone().unwrap_or_else(|| format!("pretrained={model_name}"));
        let Value::Object(mut config) = json!({
            "model": "opt-rs",
            "model_args": arguments,
            "batch_size": info.batch_size,
            "batch_sizes": [],
            "device": info.device,
            "use_cache": null,
            "limit": info.limit,
            "bootstrap_iters": info.bootstrap_iters,
            "gen_kwargs": info.gen_kwargs,
            "random_seed": info.random_seed,
            "numpy_seed": info.numpy_seed,
            "torch_seed": info.torch_seed,
            "fewshot_seed": info.fewshot_seed,
        }) else {
            return Self::default();
        };
        if let Some(parameters) = info.num_parameters {
            config.insert("model_num_parameters".into(), parameters.into());
        }
        if let Some(dtype) = &info.dtype {
            config.insert("model_dtype".into(), dtype.as_str().into());
        }
        // The harness has all of these keys, so its readers may ask for them.
        let Value::Object(other) = json!({
            "model_source": "opt-rs",
            "model_name_sanitized": sanitized(model_name),
            "max_length": info.max_length,
            "tokenizer_pad_token": token(info.pad_token.as_ref()),
            "tokenizer_eos_token": token(info.eos_token.as_ref()),
            "tokenizer_bos_token": token(info.bos_token.as_ref()),
            "eot_token_id": info.eos_token.as_ref().map(|(_, id)| id),
            "system_instruction": null,
            "system_instruction_sha": null,
            "fewshot_as_multiturn": false,
            "chat_template": null,
            "chat_template_sha": null,
            "task_hashes": {},
            "total_evaluation_time_seconds": null,
        }) else {
            return Self::default();
        };
        Self {
            config,
            other,
            date: info.date.or_else(now),
            model_name: Some(info.model_name),
            opt_eval: Some(Own {
                version: Some(env!("CARGO_PKG_VERSION").to_owned()),
                bos: info.bos,
                backend: info.backend,
                weights: info.weights,
                adapter: info.adapter,
                hidden_size: info.hidden_size,
                num_hidden_layers: info.num_hidden_layers,
                ..Own::default()
            }),
            ..Self::default()
        }
    }

    /// Adds what a task gave. A task of the same name is replaced.
    pub fn add_task(&mut self, task: TaskResult) {
        let TaskResult { name, .. } = task;
        let directions = task.metrics.iter().map(|m| (m.name.clone(), m.higher_is_better)).collect();
        let mut scores = Scores::new(&name, task.alias.as_deref().unwrap_or(&name));
        scores.sample_len = Some(task.effective);
        scores.metrics = task
            .metrics
            .into_iter()
            .map(|m| Score { metric: m.name, filter: m.filter, value: m.value, stderr: m.stderr })
            .collect();
        scores.sort();
        for group in task.groups {
            let members = self.group_subtasks.entry(group).or_default();
            if !members.contains(&name) {
                members.push(name.clone());
            }
        }
        self.higher_is_better.insert(name.clone(), directions);
        self.configs.insert(name.clone(), task.config);
        self.versions.insert(name.clone(), task.version);
        self.n_shot.insert(name.clone(), task.num_fewshot.into());
        let count = SampleCount { original: task.original, effective: task.effective };
        self.n_samples.insert(name.clone(), count);
        self.own().truncated.insert(name.clone(), task.truncated);
        if let Some(hash) = task.task_hash {
            let hashes = self.other.entry("task_hashes").or_insert_with(|| json!({}));
            if let Value::Object(hashes) = hashes {
                hashes.insert(name.clone(), hash.into());
            }
        }
        self.results.insert(name, scores);
    }

    /// Adds a line that a reader of the report should know.
    pub fn note(&mut self, line: impl Into<String>) {
        self.own().notes.push(line.into());
    }

    /// Records how long all took, in seconds, as the harness does: under `total_evaluation_time_seconds`, as text.
    pub fn set_seconds(&mut self, seconds: f64) {
        self.other.insert("total_evaluation_time_seconds".into(), seconds.to_string().into());
    }

    /// A metric of a task or group.
    pub fn score(&self, task: &str, metric: &str, filter: &str) -> Option<&Score> {
        let scores = self.results.get(task).or_else(|| self.groups.get(task))?;
        scores.metrics.iter().find(|score| score.metric == metric && score.filter == filter)
    }

    /// Examples before each question of a task, if the report says.
    pub fn shots(&self, task: &str) -> Option<u64> {
        self.n_shot.get(task).and_then(Value::as_u64)
    }

    /// Whether more is better for a metric of a task, if the report says.
    pub fn higher_is_better(&self, task: &str, metric: &str) -> Option<bool> {
        self.higher_is_better.get(task)?.get(metric).copied().flatten()
    }

    /// Whether fewer documents were evaluated than a task has: by the counts, or by the limit of the run.
    pub fn limited(&self, task: &str) -> bool {
        match self.n_samples.get(task) {
            Some(count) => count.effective < count.original,
            None => self.config.get("limit").is_some_and(|limit| !limit.is_null()),
        }
    }

    /// Whether texts began with the model's first token, as far as the report tells: in so many words, by
    /// `add_bos_token` among the model's arguments, or by the harness' version. Up to 0.3 they did not; since it
    /// leaves the question to the tokenizer (0.4.13 does), texts for OPT do.
    pub fn bos(&self) -> Option<Bos> {
        if let Some(bos) = self.opt_eval.as_ref().and_then(|own| own.bos) {
            return Some(bos);
        }
        let said = match self.config.get("model_args") {
            Some(Value::String(text)) => text
                .split(',')
                .find_map(|pair| pair.trim().strip_prefix("add_bos_token="))
                .map(|value| value.trim().eq_ignore_ascii_case("true")),
            Some(Value::Object(arguments)) => arguments.get("add_bos_token").and_then(Value::as_bool),
            _ => None,
        };
        if let Some(said) = said {
            return Some(if said { Bos::With } else { Bos::Without });
        }
        // Other models of the harness' do not tokenize, or do it by rules of their own.
        let model = self.config.get("model").and_then(Value::as_str).unwrap_or_default();
        if !["hf", "huggingface", "gpt2"].iter().any(|name| model.starts_with(name)) {
            return None;
        }
        let version = self.other.get("lm_eval_version")?.as_str()?;
        let mut numbers = version.split('.').map(|part| part.parse::<u32>().ok());
        match (numbers.next()??, numbers.next()??, numbers.next().flatten().unwrap_or(0)) {
            (0, 0..=3, _) => Some(Bos::Without),
            (0, 4, 0..13) => None,
            _ => Some(Bos::With),
        }
    }

    /// What the report is of, for headings: the model, and weights, adapter and backend where the report names them.
    pub fn title(&self) -> String {
        let mut title = self.model_name.clone().unwrap_or_else(|| "a model without name".to_owned());
        if let Some(own) = &self.opt_eval {
            let parts: Vec<&str> =
                [&own.weights, &own.adapter, &own.backend].into_iter().filter_map(|p| p.as_deref()).collect();
            if !parts.is_empty() {
                title = format!("{title} ({})", parts.join(", "));
            }
        }
        title
    }

    pub(crate) fn own(&mut self) -> &mut Own {
        self.opt_eval.get_or_insert_default()
    }
}

/// A token as the harness writes it: its text and its id, both as text.
fn token(token: Option<&(String, u32)>) -> [Option<String>; 2] {
    [token.map(|(text, _)| text.clone()), token.map(|(_, id)| id.to_string())]
}

/// The name as the harness makes it fit for a folder.
pub(crate) fn sanitized(name: &str) -> String {
    let bad = |c: char| matches!(c, '"' | '<' | '>' | ':' | '/' | '|' | '\\' | '?' | '*' | '[' | ']');
    let mut out = String::with_capacity(name.len());
    let mut inside = false;
    for c in name.chars() {
        if !bad(c) {
            out.push(c);
        } else if !inside {
            out.push_str("__");
        }
        inside = bad(c);
    }
    out
}

fn now() -> Option<f64> {
    SystemTime::now().duration_since(UNIX_EPOCH).ok().map(|passed| passed.as_secs_f64())
}
