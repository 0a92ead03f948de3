mod teacher;

use super::{
    ContrastOptions, Example, Goal, Learn, Optimizer, Pooling, Recall, TrainOptions, TrainingMemory,
    contrast,
    contrast::{check_pooling, ranks},
    data::Dataset,
    head,
    start::{self, Artifact, adapter},
    weights::Plan,
};
use crate::{
    CancelToken, Error, ErrorKind, Load, Result,
    adapter::{Adapter, AdapterConfig},
    backends::{self, BackendOptions},
    checkpoint::{Checkpoint, model_files},
    config::OptConfig,
    heads::{Head, Task},
    quantize::Holding,
};
use ndarray::{Array2, Axis};
use opt_backend::{Counts, DType, Info};
use std::{collections::BTreeMap, path::Path, sync::Arc};
use teacher::Teacher;

/// What is trained.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Method {
    /// The weights themselves.
    Full(Full),
    /// A new adapter, whose random parameters are of this seed.
    New(Box<AdapterConfig>, u64),
    /// An adapter that is there, trained further.
    Continue(Box<Adapter>),
}

/// Which of a model's weights are trained.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Full {
    /// Only these layers, and nothing outside of layers; all of the model if none.
    pub layers: Option<Vec<usize>>,
}

impl Method {
    /// All weights.
    pub fn full() -> Self {
        Self::Full(Full::default())
    }

    /// The weights of these layers.
    pub fn layers(layers: impl IntoIterator<Item = usize>) -> Self {
        Self::Full(Full { layers: Some(layers.into_iter().collect()) })
    }

    /// A new adapter: LoRA, prefix or prompt tuning.
    ///
    /// ```
    /// use opt_core::{adapter::LoraConfig, tuning::Method};
    /// let method = Method::adapter(LoraConfig::default(), 42);
    /// ```
    pub fn adapter(config: impl Into<AdapterConfig>, seed: u64) -> Self {
        Self::New(Box::new(config.into()), seed)
    }

    /// An adapter that is there, trained further.
    pub fn further(adapter: Adapter) -> Self {
        Self::Continue(Box::new(adapter))
    }
}

/// How one step is made; see [`Tuner::step`].
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct StepOptions {
    /// How parameters follow their gradients.
    pub optimizer: Optimizer,
    /// Learning rate.
    pub lr: f32,
    /// Decay of matrices; biases and LayerNorms have none.
    pub weight_decay: f32,
    /// Gradients whose norm is larger are scaled down to it.
    pub clip: Option<f32>,
    /// ε of the loss (1 - ε) · nll + ε · mean(-log p).
    pub label_smoothing: f32,
    /// Which step this is, from 1.
    pub step: u64,
    /// Seeds dropout and layerdrop; nothing is dropped without.
    pub seed: Option<u64>,
    /// Keeps only the states between layers, and computes the rest again.
    pub gradient_checkpointing: bool,
}

impl Default for StepOptions {
    fn default() -> Self {
        Self {
            optimizer: Optimizer::default(),
            lr: 5e-5,
            weight_decay: 0.0,
            clip: Some(1.0),
            label_smoothing: 0.0,
            step: 1,
            seed: None,
            gradient_checkpointing: false,
        }
    }
}

/// What a step came to.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct StepResult {
    /// Mean loss of the targets before the step, in nats.
    pub loss: f32,
    /// Norm of all gradients together, before clipping.
    pub grad_norm: f32,
}

/// A model that is being trained: gradients and steps, and nothing about data, schedules or files; see
/// [`super::Trainer`] for these.
///
/// ```
/// use opt_core::{Load, tuning::{Example, Method, StepOptions, Tuner}};
///
/// let mut tuner = Tuner::load("../models/opt-novels", Method::layers([0]), Load::default())?;
/// let examples = [Example::new(vec![2, 100, 200, 300])];
/// let before = tuner.step(&[&examples], StepOptions::default())?.loss;
/// let after = tuner.loss(&examples)?;
/// assert!(after < f64::from(before));
/// # Ok::<(), opt_core::Error>(())
/// ```
pub struct Tuner {
    learner: Box<dyn Learn>,
    config: OptConfig,
    method: Method,
    artifact: Artifact,
    /// How models are loaded.
    holding: Holding,
    cancel: CancelToken,
    /// Bytes of each of the model's weights as they are held where they are not trained.
    held: BTreeMap<String, u64>,
    purpose: Purpose,
}

/// What is learned.
enum Purpose {
    Tokens,
    /// That, and what a teacher makes of them.
    Teacher(Box<Teacher>),
    Head(Task),
    Pairs(ContrastOptions),
}

impl Tuner {
    /// Opens a model to train it: a directory in Hugging Face layout, or a single weights file beside its config.json.
    ///
    /// What is trained is held in f32. Products with it, and how the rest is held, are as `load` says: bf16 is mixed
    /// precision, with master weights in f32.
    ///
    /// # Errors
    /// Those of [`crate::Opt::load`]; [`ErrorKind::Option`] for a method that does not fit the model;
    /// [`ErrorKind::Unsupported`] for weights that are quantized and were to be trained themselves.
    pub fn load(path: impl AsRef<Path>, method: Method, load: Load<'_>) -> Result<Self> {
        Self::from_checkpoint(Checkpoint::open(path.as_ref())?, method, load)
    }

    /// Trains a checkpoint at hand; see [`Tuner::load`].
    ///
    /// # Errors
    /// Those of [`Tuner::load`].
    pub fn from_checkpoint(checkpoint: Checkpoint, method: Method, load: Load<'_>) -> Result<Self> {
        checkpoint.validate()?;
        load.holding.check(&checkpoint)?;
        let config = checkpoint.config().clone();
        let plan = Plan::new(&method, &checkpoint, load.holding.dtype)?;
        let backend = match load.engine {
            Some(backend) => backend,
            None => backends::choose(backends::NAMES[0], &BackendOptions::default())?.0,
        };
        let cancel = load.cancel.unwrap_or_default();
        let held = load.holding.sizes(&checkpoint);
        let learner = backend.learn(&checkpoint, &load.holding, plan, &cancel)?;
        let artifact = match &method {
            Method::Full(_) => Self::model_artifact(checkpoint, &*learner)?,
            Method::New(adapter, _) => {
                Artifact::Adapter { config: adapter.clone(), model: config.clone(), head: None }
            }
            Method::Continue(adapter) => {
                let adapter = Box::new(start::without_head(adapter.config()));
                Artifact::Adapter { config: adapter, model: config.clone(), head: None }
            }
        };
        let purpose = Purpose::Tokens;
        Ok(Self { learner, config, method, artifact, holding: load.holding, cancel, held, purpose })
    }

    fn model_artifact(checkpoint: Checkpoint, learner: &dyn Learn) -> Result<Artifact> {
        let whole = learner.shapes().len() == checkpoint.config().tensor_shapes().len();
        let files = model_files(&checkpoint, whole.then_some(DType::F32))?;
        Ok(Artifact::Model { base: Arc::new(checkpoint), files, head: None })
    }

    /// Puts these files beside the weights of a whole model, in the place of those of the model it was made from: for
    /// one that was made from nothing. An adapter has none.
    #[must_use]
    pub fn files(mut self, files: super::SideFiles) -> Self {
        if let Artifact::Model { files: all, .. } = &mut self.artifact {
            for (name, contents) in files {
                all.retain(|(known, _)| *known != name);
                all.push((name, contents));
            }
        }
        self
    }

    fn still_free(&self) -> Result<()> {
        let found = match self.purpose {
            Purpose::Tokens => return Ok(()),
            Purpose::Teacher(..) => "a teacher",
            Purpose::Head(_) => "a head",
            Purpose::Pairs(_) => "pairs of texts",
        };
        let message =
            format_args!("expected a model with nothing to learn from yet, found one that has {found}");
        Err(Error::new(ErrorKind::Option, message))
    }

    /// Trains a head on top, beside what is trained of the model: a new one ([`Head::new`]), or one that is there
    /// ([`Head::of`], [`Head::beside`]). The loss is that of transformers' classes, a mean over the examples, whose
    /// goals are what the head's [`Task`] asks for. What is saved is a model of these classes, or an adapter with its
    /// head that PEFT loads as one of its task type.
    ///
    /// A step reads what the head says beside the loss.
    ///
    /// # Errors
    /// [`ErrorKind::Option`] for a head of another width, and a model that learns from something else already;
    /// [`ErrorKind::Unsupported`] with prefix and prompt tuning; [`ErrorKind::Backend`].
    pub fn head(mut self, head: Head) -> Result<Self> {
        self.still_free()?;
        let (expected, found) = (self.config.word_embed_proj_dim, head.weight().ncols());
        if expected != found {
            let message = format_args!("head: expected a width of {expected}, found {found}");
            return Err(Error::new(ErrorKind::Option, message));
        }
        self.artifact.put_on(head.task())?;
        self.learner.head(&head)?;
        self.purpose = Purpose::Head(head.task().clone());
        Ok(self)
    }

    /// Trains the model for search: texts are to lie close to the passages that belong to them ([`Goal::Passage`]), as
    /// [`ContrastOptions`] says. The loss is a mean over the pairs; the passages of a micro-batch are each other's
    /// negatives.
    ///
    /// ```
    /// use opt_core::{Load, tuning::{ContrastOptions, Example, Goal, Method, StepOptions, Tuner}};
    ///
    /// let tuner = Tuner::load("../models/opt-novels", Method::layers([5]), Load::default())?;
    /// let mut tuner = tuner.contrast(ContrastOptions::default())?;
    /// let pair = |query, passage| Example::with(vec![2, query], Goal::Passage(vec![2, passage, 7]));
    /// let pairs = [pair(100, 200), pair(300, 400)];
    /// let before = tuner.step(&[&pairs], StepOptions::default())?.loss;
    /// assert!(tuner.loss(&pairs)? < f64::from(before));
    /// # Ok::<(), opt_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`ErrorKind::Option`] for options out of range, and a model that learns from something else already.
    pub fn contrast(mut self, options: ContrastOptions) -> Result<Self> {
        options.validate()?;
        self.still_free()?;
        self.learner.contrast(options);
        self.purpose = Purpose::Pairs(options);
        Ok(self)
    }

    /// One vector for each sequence of token ids, `[sequences, word_embed_proj_dim]`, as the model stands; the sequences
    /// are one batch.
    ///
    /// # Errors
    /// [`ErrorKind::Prompt`] for a sequence that is empty or too long, and ids outside the vocabulary;
    /// [`ErrorKind::Option`] for a pooling that is no weighted sum; [`ErrorKind::Backend`].
    pub fn embed(&mut self, sequences: &[&[u32]], pooling: Pooling) -> Result<Array2<f32>> {
        check_pooling(pooling)?;
        for ids in sequences {
            crate::engine::check_vocabulary(ids, self.config.vocab_size)?;
            if ids.is_empty() {
                return Err(Error::new(ErrorKind::Prompt, "expected at least one token, found none"));
            }
        }
        self.learner.embed(sequences, pooling)
    }

    /// Whether it is trained for search.
    pub(super) fn learns_pairs(&self) -> bool {
        matches!(self.purpose, Purpose::Pairs(_))
    }

    /// Whether its loss is that of tokens alone.
    pub(super) fn learns_tokens(&self) -> bool {
        matches!(self.purpose, Purpose::Tokens | Purpose::Teacher(..))
    }

    /// How well, as the model stands, the passage of each pair is found among all passages of `data`, which are run
    /// `batch` pairs at a time. All vectors are held: two of `word_embed_proj_dim` numbers a pair.
    ///
    /// # Errors
    /// [`ErrorKind::Option`] for a model that is not trained for search; [`ErrorKind::Prompt`] for examples that are no
    /// pairs; [`ErrorKind::Io`]; [`ErrorKind::Backend`].
    pub fn recall(&mut self, data: &Dataset, batch: usize) -> Result<Recall> {
        let Purpose::Pairs(ContrastOptions { pooling, .. }) = self.purpose else {
            return Err(Error::new(ErrorKind::Option, "recall: expected a model that is trained for search"));
        };
        let (mut queries, mut passages) = (Vec::new(), Vec::new());
        for examples in data.batches(batch) {
            let examples = examples?;
            examples.iter().try_for_each(|example| self.check(example))?;
            let vectors = self.learner.embed(&contrast::sequences(&examples), pooling)?;
            let (first, second) = vectors.view().split_at(Axis(0), examples.len());
            queries.extend(first.iter().copied());
            passages.extend(second.iter().copied());
        }
        let width = self.config.word_embed_proj_dim;
        let rows = |values: Vec<f32>| {
            Array2::from_shape_vec((values.len() / width, width), values).unwrap_or_default()
        };
        let (queries, passages) = (rows(queries), rows(passages));
        Ok(Recall::of(&ranks(queries.view(), passages.view())))
    }

    /// The model's shape.
    pub fn config(&self) -> &OptConfig {
        &self.config
    }

    /// What the backend found on this machine.
    pub fn info(&self) -> Info {
        self.learner.info()
    }

    /// What was transferred, and what default bodies were called, so far.
    pub fn counts(&self) -> Counts {
        self.learner.counters().counts()
    }

    /// Names and shapes of what is trained; vectors are `[1, width]`.
    pub fn parameters(&self) -> Vec<(String, [usize; 2])> {
        self.learner.shapes()
    }

    /// How many numbers are trained.
    pub fn trainable(&self) -> usize {
        self.learner.shapes().iter().map(|(_, [rows, width])| rows * width).sum()
    }

    /// What a training takes in memory, of examples of at most `seq_len` tokens, a teacher's part included; see
    /// [`TrainingMemory`] for how it is reckoned.
    ///
    /// ```
    /// use opt_core::{Load, tuning::{Method, TrainOptions, Tuner}};
    ///
    /// let tuner = Tuner::load("../models/opt-novels", Method::full(), Load::default())?;
    /// let memory = tuner.memory(&TrainOptions::default(), 128)?;
    /// assert_eq!(memory.gradients, 4 * tuner.trainable() as u64);
    /// # Ok::<(), opt_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// Those of [`TrainingMemory::of`], which a model that was loaded does not give.
    pub fn memory(&self, options: &TrainOptions, seq_len: usize) -> Result<TrainingMemory> {
        let held = |name: &str, _: &[usize]| self.held.get(name).copied().unwrap_or_default();
        let (config, dtype) = (&self.config, self.holding.dtype);
        // Pairs are two texts, each as long as an example may be.
        let texts = if self.learns_pairs() { 2 } else { 1 };
        let batch = options.batch_size.saturating_mul(texts);
        let rows = options.clone().batch_size(batch);
        let own = TrainingMemory::with(config, &self.method, dtype, &held, &rows, seq_len)?;
        Ok(match &self.purpose {
            Purpose::Teacher(teacher) => teacher.memory(own, config, options, seq_len),
            // A head is small beside what is below it.
            _ => own,
        })
    }

    /// One step over a batch that is taken in pieces: gradients are summed over `micro_batches`, each target counting
    /// alike, and then the parameters are moved.
    ///
    /// # Errors
    /// [`ErrorKind::Prompt`] for examples that cannot be run or hold no target; [`ErrorKind::Backend`].
    pub fn step(&mut self, micro_batches: &[&[Example]], options: StepOptions) -> Result<StepResult> {
        let targets = self.targets(micro_batches.iter().flat_map(|examples| examples.iter()))?;
        self.learner.step(micro_batches, (targets as f32).recip(), &options)
    }

    /// Mean loss of all targets, in nats, with label smoothing, and its gradients by the parameters' names.
    ///
    /// # Errors
    /// As [`Tuner::step`].
    pub fn gradients(
        &mut self,
        examples: &[Example],
        options: StepOptions,
    ) -> Result<(f32, BTreeMap<String, Array2<f32>>)> {
        let targets = self.targets(examples.iter())?;
        self.learner.gradients(examples, (targets as f32).recip(), &options)
    }

    /// Mean loss of all targets, in nats, nothing being dropped.
    ///
    /// # Errors
    /// As [`Tuner::step`].
    pub fn loss(&mut self, examples: &[Example]) -> Result<f64> {
        let (sum, targets) = self.summed_loss(examples)?;
        Ok(sum / targets as f64)
    }

    /// The sum of the losses of all targets, in nats, nothing being dropped, and their number.
    pub(super) fn summed_loss(&mut self, examples: &[Example]) -> Result<(f64, usize)> {
        let targets = self.targets(examples.iter())?;
        Ok((self.learner.evaluate(examples)?, targets))
    }

    /// What a mean over these examples divides by, which must not be 0.
    fn targets<'a>(&self, examples: impl Iterator<Item = &'a Example>) -> Result<usize> {
        let mut targets = 0;
        for example in examples {
            self.check(example)?;
            targets += example.units();
        }
        match targets {
            0 => Err(Error::new(ErrorKind::Prompt, "expected at least one target to learn, found none")),
            targets => Ok(targets),
        }
    }

    /// Whether an example is one for what is learned.
    fn check(&self, example: &Example) -> Result<()> {
        let vocabulary = |ids: &[u32]| crate::engine::check_vocabulary(ids, self.config.vocab_size);
        vocabulary(example.ids())?;
        match (&self.purpose, example.goal()) {
            (Purpose::Tokens | Purpose::Teacher(..), Goal::Tokens(_)) => Ok(()),
            (Purpose::Head(task), goal) if !example.ids().is_empty() => {
                head::check(example.ids(), goal, task)
            }
            (Purpose::Pairs(_), goal) => {
                contrast::check(example)?;
                if let Goal::Passage(ids) = goal { vocabulary(ids) } else { Ok(()) }
            }
            _ => {
                let message =
                    "expected an example with tokens to predict, found one with another goal or empty";
                Err(Error::new(ErrorKind::Prompt, message))
            }
        }
    }

    /// Writes what was trained into a directory that is there: a whole model, or an adapter.
    ///
    /// # Errors
    /// [`ErrorKind::Io`].
    pub fn save(&self, directory: impl AsRef<Path>) -> Result<()> {
        self.artifact.write(directory.as_ref(), &*self.learner)
    }

    /// What was trained, as an adapter.
    ///
    /// # Errors
    /// [`ErrorKind::Option`] where weights themselves were trained.
    pub fn adapter(&self) -> Result<Adapter> {
        match &self.artifact {
            Artifact::Adapter { config, model, head } => {
                adapter(config, model, head.as_ref(), &*self.learner)
            }
            Artifact::Model { .. } => {
                Err(Error::new(ErrorKind::Option, "expected an adapter, found a whole model"))
            }
        }
    }

    pub(super) fn learner(&mut self) -> &mut dyn Learn {
        &mut *self.learner
    }

    pub(super) fn learner_ref(&self) -> &dyn Learn {
        &*self.learner
    }

    pub(super) fn artifact(&self) -> &Artifact {
        &self.artifact
    }

    /// Whether all of this can be learned, as far as is known before it is.
    pub(super) fn check_data(&self, data: &Dataset) -> Result<()> {
        match &self.purpose {
            Purpose::Teacher(teacher) => teacher.check(data),
            _ => Ok(()),
        }
    }

    /// What must be the same for a training to be resumed.
    pub(super) fn settings(&self) -> serde_json::Value {
        let mut settings = match &self.method {
            Method::Full(full) => serde_json::json!({ "full": { "layers": full.layers } }),
            Method::New(adapter, seed) => serde_json::json!({ "new": adapter.to_json(), "seed": seed }),
            Method::Continue(adapter) => serde_json::json!({ "continue": adapter.config().to_json() }),
        };
        let (key, value) = match &self.purpose {
            Purpose::Tokens => return settings,
            Purpose::Teacher(teacher) => ("distill", teacher.settings()),
            Purpose::Head(task) => ("head", task.config_keys().into()),
            Purpose::Pairs(options) => ("contrast", serde_json::json!(options)),
        };
        if let Some(settings) = settings.as_object_mut() {
            settings.insert(key.to_owned(), value);
        }
        settings
    }
}
