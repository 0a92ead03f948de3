//! Reads the fixtures that transformers made (`tests/fixtures`, described in its README.md) and compares to them.
#![allow(dead_code, unused_imports, unreachable_pub)] // each test file uses its own part

pub mod backend;
pub mod late;
pub mod tiny;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

pub use backend::assert_close;
use ndarray::{Array1, Array2, ArrayD, IxDyn};
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;
use serde::de::DeserializeOwned;

/// A generation configuration as JSON: transformers' field names, and `prefix_rule` ([`PrefixRule`]).
pub type Config = serde_json::Map<String, serde_json::Value>;

/// The folder of the fixtures.
pub fn fixtures() -> PathBuf {
    repository().join("opt-core/tests/fixtures")
}

/// The repository's root; `OPT_TEST_REPOSITORY` where the tests were carried to another machine.
pub fn repository() -> PathBuf {
    let built_in = || Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    std::env::var_os("OPT_TEST_REPOSITORY").map_or_else(built_in, PathBuf::from)
}

/// The folder of the small trained model.
pub fn novels() -> PathBuf {
    repository().join("models/opt-novels")
}

/// `path` inside the test data (`OPT_TEST_DATA`, else ../shared/data beside the repository); where it is absent, says
/// on stderr that the test is skipped.
pub fn test_data(path: &str) -> Option<PathBuf> {
    let root = match std::env::var_os("OPT_TEST_DATA") {
        Some(root) => PathBuf::from(root),
        None => repository().join("../shared/data"),
    };
    let file = root.join(path);
    if !file.exists() {
        backend::skipped(format_args!("{} is not there (set OPT_TEST_DATA)", file.display()));
        return None;
    }
    Some(file)
}

/// Arrays of one safetensors file, as f32.
pub struct Arrays(BTreeMap<String, ArrayD<f32>>);

impl Arrays {
    /// Reads f32 arrays.
    pub fn read(path: impl AsRef<Path>) -> Self {
        let path = path.as_ref();
        let bytes = fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let file = SafeTensors::deserialize(&bytes).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let arrays = file.iter().map(|(name, view)| {
            assert_eq!(view.dtype(), Dtype::F32, "{name}");
            let values = view.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
            let array = ArrayD::from_shape_vec(IxDyn(view.shape()), values.collect()).unwrap();
            (name.to_string(), array)
        });
        Self(arrays.collect())
    }

    /// The array of that name, if there is one.
    pub fn find(&self, name: &str) -> Option<&ArrayD<f32>> {
        self.0.get(name)
    }

    /// The array of that name.
    pub fn get(&self, name: &str) -> &ArrayD<f32> {
        self.find(name).unwrap_or_else(|| panic!("no array {name}"))
    }

    /// The array of that name, as a vector.
    pub fn vector(&self, name: &str) -> Array1<f32> {
        self.get(name).clone().into_dimensionality().unwrap()
    }

    /// The array of that name, as a matrix.
    pub fn matrix(&self, name: &str) -> Array2<f32> {
        self.get(name).clone().into_dimensionality().unwrap()
    }

    /// `PREFIX.hidden.0`, `PREFIX.hidden.1`, ... in order.
    pub fn hidden(&self, prefix: &str) -> Vec<Array2<f32>> {
        (0..)
            .map(|i| format!("{prefix}.hidden.{i}"))
            .take_while(|name| self.0.contains_key(name))
            .map(|name| self.matrix(&name))
            .collect()
    }
}

pub fn json<T: DeserializeOwned>(path: impl AsRef<Path>) -> T {
    let path = path.as_ref();
    let text = fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// A model of `models/` with what it computes.
pub struct Model {
    /// The name of its folder.
    pub name: String,
    /// Its config.json.
    pub config: PathBuf,
    /// Its weights; activation variants use another model's.
    pub weights: PathBuf,
    /// What to run.
    pub meta: ModelMeta,
    /// What comes out.
    pub expected: Arrays,
}

#[derive(Deserialize)]
pub struct ModelMeta {
    pub note: String,
    pub weights: String,
    /// Run each alone; their arrays are `seq0.*`, `seq1.*`, ...
    pub sequences: Vec<Vec<u32>>,
    /// A sequence at explicit positions; its arrays are `positions.*`.
    pub positions: Option<Positions>,
    #[serde(default)]
    pub greedy: Vec<Greedy>,
}

#[derive(Deserialize)]
pub struct Positions {
    pub ids: Vec<u32>,
    /// Before the offset of 2 is added.
    pub position_ids: Vec<usize>,
}

#[derive(Deserialize)]
pub struct Greedy {
    pub prompt: Vec<u32>,
    pub max_new_tokens: usize,
    /// New tokens only.
    pub output: Vec<u32>,
}

/// One model of `models/`.
pub fn model(name: &str) -> Model {
    let folder = fixtures().join("models").join(name);
    let meta: ModelMeta = json(folder.join("expected.json"));
    Model {
        name: name.to_string(),
        config: folder.join("config.json"),
        weights: folder.join(&meta.weights),
        meta,
        expected: Arrays::read(folder.join("expected.safetensors")),
    }
}

/// All models of `models/`, by name.
pub fn models() -> Vec<Model> {
    let mut names: Vec<String> = fs::read_dir(fixtures().join("models"))
        .unwrap()
        .map(|entry| entry.unwrap())
        .filter(|entry| entry.path().join("expected.json").exists())
        .map(|entry| entry.file_name().into_string().unwrap())
        .collect();
    names.sort();
    names.iter().map(|name| model(name)).collect()
}

/// One recorded call of `generate`.
#[derive(Deserialize)]
pub struct Generated {
    pub name: String,
    /// A folder of `models/`, or opt-novels.
    pub model: String,
    pub prompt: Vec<u32>,
    pub config: Config,
    /// New tokens of each returned sequence, up to and with the eos id.
    pub outputs: Vec<Vec<u32>>,
    /// Per sequence: "eos", "length" or "stop". Absent in some files.
    #[serde(default)]
    pub finish: Vec<String>,
    /// Beam search only, one per returned sequence.
    #[serde(default)]
    pub sequences_scores: Vec<f64>,
    /// Beam search only, per returned sequence and token: the running beam the token was added to.
    #[serde(default)]
    pub beam_indices: Vec<Vec<usize>>,
    /// Beam search only: the processed log-probability each token added.
    #[serde(default)]
    pub transition_scores: Vec<Vec<f64>>,
    /// Greedy only, per token: its processed score.
    #[serde(default)]
    pub token_scores: Vec<f64>,
    /// Greedy only, per token: log-softmax of the processed scores at it.
    #[serde(default)]
    pub token_logprobs: Vec<f64>,
    /// Greedy only, per token: its raw logit.
    #[serde(default)]
    pub token_logits: Vec<f64>,
    /// Some greedy cases: the largest entries of each step.
    #[serde(default)]
    pub steps: Vec<Step>,
    /// Texts only: the prompt, the decoded outputs, and the pieces of transformers' own text streamer.
    pub text: Option<String>,
    #[serde(default)]
    pub output_texts: Vec<String>,
    #[serde(default)]
    pub stream: Vec<String>,
    /// Assisted only: the draft model (absent: prompt lookup), its settings, and the rounds.
    pub draft: Option<String>,
    #[serde(default)]
    pub draft_config: Config,
    #[serde(default)]
    pub rounds: Vec<Round>,
}

impl Generated {
    /// The rule of `prefix_allowed_tokens_fn`, where the case has one.
    pub fn prefix_rule(&self) -> Option<PrefixRule> {
        prefix_rule(&self.config)
    }
}

/// The `prefix_rule` of a config.
pub fn prefix_rule(config: &Config) -> Option<PrefixRule> {
    let rule = config.get("prefix_rule")?;
    Some(serde_json::from_value(rule.clone()).unwrap())
}

#[derive(Deserialize)]
pub struct Step {
    /// Of the raw logits.
    pub logits: Top,
    /// Of the processed scores.
    pub scores: Top,
}

/// The largest entries of a row (those of -inf left out) and the log-sum-exp of all of it.
#[derive(Deserialize)]
pub struct Top {
    pub ids: Vec<u32>,
    pub values: Vec<f64>,
    pub lse: f64,
}

/// Length before, candidates, and how many of them transformers took. Where the last candidate taken ends the text,
/// transformers counts one less and lets the target's own token end it.
#[derive(Deserialize)]
pub struct Round(pub usize, pub Vec<u32>, pub usize);

/// Which tokens may follow a prefix: after `ids`, token t iff (a t + last id + number of ids) mod modulus < keep.
#[derive(Deserialize, Clone, Copy)]
pub struct PrefixRule {
    pub a: usize,
    pub modulus: usize,
    pub keep: usize,
}

impl PrefixRule {
    /// The allowed tokens, ascending.
    pub fn allowed(&self, ids: &[u32], vocabulary: usize) -> Vec<u32> {
        let base = ids.last().map_or(0, |id| *id as usize) + ids.len();
        (0..vocabulary).filter(|t| (self.a * t + base) % self.modulus < self.keep).map(|t| t as u32).collect()
    }
}

/// Cases of `generation/FILE.json`: greedy, beam, group_beam, contrastive, assisted; or of `texts/generation.json`.
pub fn generated(file: &str) -> Vec<Generated> {
    match file {
        "texts" => json(fixtures().join("texts/generation.json")),
        _ => json(fixtures().join("generation").join(format!("{file}.json"))),
    }
}

/// Prompts of several lengths in one call; every row equals the same prompt alone.
#[derive(Deserialize)]
pub struct Batch {
    pub name: String,
    pub model: String,
    pub prompts: Vec<Vec<u32>>,
    pub config: Config,
    /// Per prompt, per returned sequence: new tokens.
    pub outputs: Vec<Vec<Vec<u32>>>,
    /// Per prompt, per returned sequence; empty for greedy.
    #[serde(default)]
    pub sequences_scores: Vec<Vec<f64>>,
}

/// Cases of `generation/batch.json`.
pub fn batches() -> Vec<Batch> {
    json(fixtures().join("generation/batch.json"))
}

/// One chain of processors over some steps.
#[derive(Deserialize)]
pub struct Processed {
    pub name: String,
    /// The fields the chain is built from.
    pub config: Config,
    pub prompt: Vec<u32>,
    /// The token appended after each step: step s sees `prompt + picked[..s]`.
    pub picked: Vec<u32>,
}

/// Cases of `processors/cases.json`, and their arrays `NAME.scores` and `NAME.expected` \[steps, vocabulary\].
pub fn processed() -> (Vec<Processed>, Arrays) {
    let folder = fixtures().join("processors");
    (json(folder.join("cases.json")), Arrays::read(folder.join("arrays.safetensors")))
}

/// Perplexity of opt-novels over a held-out novel (test data) and a passage that is part of the fixture.
#[derive(Deserialize)]
pub struct Perplexity {
    pub file: String,
    pub byte_start: usize,
    pub byte_end: usize,
    /// How many tokens the passage has, without BOS; their first and last 16, and their sum.
    pub tokens: usize,
    pub first_ids: Vec<u32>,
    pub last_ids: Vec<u32>,
    pub ids_sum: u64,
    pub window: usize,
    pub windows: Vec<Window>,
    /// Over all windows, without BOS.
    pub nll_sum: f64,
    pub scored: usize,
    pub perplexity: f64,
    pub passage: Passage,
}

#[derive(Deserialize)]
pub struct Window {
    pub start: usize,
    pub tokens: usize,
    /// Of all tokens but the first, given those before in the window.
    pub nll_sum: f64,
    pub scored: usize,
    /// Of the first min(tokens, 511) tokens after a BOS.
    pub bos_nll_sum: f64,
    pub bos_scored: usize,
}

#[derive(Deserialize)]
pub struct Passage {
    pub text: String,
    /// With BOS.
    pub ids: Vec<u32>,
    /// Of each token but the first.
    pub nll: Vec<f64>,
    pub nll_sum: f64,
    pub perplexity: f64,
}

/// `texts/perplexity.json`.
pub fn perplexity() -> Perplexity {
    json(fixtures().join("texts/perplexity.json"))
}

/// The held-out passage of the test data, with its line ends as LF; None (and said so) without the data.
pub fn held_out(of: &Perplexity) -> Option<String> {
    let bytes = fs::read(test_data(&of.file)?).unwrap();
    let text = std::str::from_utf8(&bytes[of.byte_start..of.byte_end]).unwrap();
    Some(text.replace("\r\n", "\n"))
}

/// Logits of opt-novels at every position of a sentence.
#[derive(Deserialize)]
pub struct Logits {
    pub text: String,
    pub ids: Vec<u32>,
    pub positions: Vec<Top>,
}

/// `texts/logits.json` and its arrays: `last_logits` \[vocabulary\] and `last_hidden` \[layers + 1, hidden\] of the
/// last position.
pub fn logits() -> (Logits, Arrays) {
    let folder = fixtures().join("texts");
    (json(folder.join("logits.json")), Arrays::read(folder.join("logits.safetensors")))
}

/// Inputs of the sorting model of the test data.
#[derive(Deserialize)]
pub struct Sorting {
    /// Its folder in the test data.
    pub model: String,
    pub cases: Vec<Sorted>,
}

#[derive(Deserialize)]
pub struct Sorted {
    pub prompt: Vec<u32>,
    pub output: Vec<u32>,
    /// Raw logits of each of the six steps.
    pub logits: Vec<Vec<f64>>,
    pub text: String,
    pub output_text: String,
}

/// `texts/sort.json`.
pub fn sorting() -> Sorting {
    json(fixtures().join("texts/sort.json"))
}

impl Model {
    /// The model on a backend.
    pub fn load(&self, load: opt_core::Load<'_>) -> opt_core::Opt {
        let config = fs::read_to_string(&self.config).unwrap();
        let weights = fs::read(&self.weights).unwrap_or_else(|e| panic!("{}: {e}", self.weights.display()));
        let checkpoint = opt_core::checkpoint::Checkpoint::from_bytes(&config, vec![weights]).unwrap();
        let opt = opt_core::Opt::assemble(&checkpoint, None, None, load);
        opt.unwrap_or_else(|e| panic!("{}: {e}", self.name))
    }

    /// The model on the backend under test.
    pub fn opt(&self) -> opt_core::Opt {
        self.load(backend::load())
    }

    /// The model on the reference bodies of the trait layer.
    pub fn on_reference(&self) -> opt_core::Opt {
        self.load(opt_core::Load::on(opt_backend::Reference::new()))
    }
}

/// The model that a recorded call names, on the backend under test.
pub fn named(name: &str) -> opt_core::Opt {
    match name {
        "opt-novels" => opt_core::Opt::load(novels(), backend::load()).unwrap(),
        name => model(name).opt(),
    }
}

impl Generated {
    /// The recorded configuration as this library reads it.
    pub fn settings(&self) -> opt_core::generation::GenerationConfig {
        settings(&self.config)
    }
}

/// A recorded configuration as this library reads it.
pub fn settings(config: &Config) -> opt_core::generation::GenerationConfig {
    let text = serde_json::to_string(config).unwrap();
    opt_core::generation::GenerationConfig::from_json(&text).unwrap_or_else(|e| panic!("{text}: {e}"))
}
