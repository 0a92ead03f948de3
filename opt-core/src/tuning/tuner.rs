use super::{
    DistillOptions, Example, Learn, Optimizer,
    start::{Artifact, adapter},
    weights::Plan,
};
use crate::{
    CancelToken, Error, ErrorKind, Load, Result,
    adapter::{Adapter, AdapterConfig},
    backends::{self, BackendOptions},
    checkpoint::{Checkpoint, model_files},
    config::OptConfig,
    quantize::Holding,
};
use ndarray::Array2;
use opt_backend::{Counts, DType, Info};
use std::{collections::BTreeMap, path::Path, sync::Arc};

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
    /// How it is distilled, and from a teacher of which shape.
    distilled: Option<(DistillOptions, OptConfig)>,
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
        let learner = backend.learn(&checkpoint, &load.holding, plan, &cancel)?;
        let artifact = match &method {
            Method::Full(_) => Self::model_artifact(checkpoint, &*learner)?,
            Method::New(adapter, _) => Artifact::Adapter(adapter.clone(), config.clone()),
            Method::Continue(adapter) => {
                Artifact::Adapter(Box::new(adapter.config().clone()), config.clone())
            }
        };
        Ok(Self { learner, config, method, artifact, holding: load.holding, cancel, distilled: None })
    }

    fn model_artifact(checkpoint: Checkpoint, learner: &dyn Learn) -> Result<Artifact> {
        let whole = learner.shapes().len() == checkpoint.config().tensor_shapes().len();
        let files = model_files(&checkpoint, whole.then_some(DType::F32))?;
        Ok(Artifact::Model(Arc::new(checkpoint), files))
    }

    /// Puts these files beside the weights of a whole model, in the place of those of the model it was made from: for
    /// one that was made from nothing. An adapter has none.
    #[must_use]
    pub fn files(mut self, files: super::SideFiles) -> Self {
        if let Artifact::Model(_, all) = &mut self.artifact {
            for (name, contents) in files {
                all.retain(|(known, _)| *known != name);
                all.push((name, contents));
            }
        }
        self
    }

    /// Lets what follows learn from a teacher's outputs too: steps and gradients are of the losses that
    /// [`DistillOptions`] lists, while [`Tuner::loss`] stays the cross-entropy. The teacher can have any shape of the
    /// student's vocabulary; it is held as [`Tuner::load`] was told to hold what is not trained, on the same backend,
    /// and nothing is dropped in it.
    ///
    /// ```
    /// use opt_core::{Load, checkpoint::Checkpoint};
    /// use opt_core::tuning::{DistillOptions, Example, Method, StepOptions, Tuner, student_of};
    ///
    /// let teacher = Checkpoint::open("../models/opt-novels")?;
    /// let (student, files) = student_of(&teacher, 2)?;
    /// let tuner = Tuner::from_checkpoint(student, Method::full(), Load::default())?.files(files);
    /// let mut tuner = tuner.distill(teacher, DistillOptions::default())?;
    /// let step = tuner.step(&[&[Example::new(vec![2, 100, 200, 300])]], StepOptions::default())?;
    /// assert!(step.loss > 0.0);
    /// # Ok::<(), opt_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`ErrorKind::Option`] for options out of range, another vocabulary, and a student that has a teacher already;
    /// those of [`crate::Opt::load`] for the teacher.
    pub fn distill(mut self, teacher: Checkpoint, options: DistillOptions) -> Result<Self> {
        options.validate()?;
        let fail = |message: String| Err(Error::new(ErrorKind::Option, message));
        if self.distilled.is_some() {
            return fail("expected a student without a teacher, found one that has one".to_owned());
        }
        let (own, found) = (self.config.vocab_size, teacher.config().vocab_size);
        if own != found {
            return fail(format!(
                "teacher: expected the student's vocabulary of {own} tokens, found {found}"
            ));
        }
        let place = |e: Error| e.at("teacher");
        teacher.validate().map_err(place)?;
        self.holding.check(&teacher).map_err(place)?;
        self.learner.distill(&teacher, &self.holding, options, &self.cancel)?;
        self.distilled = Some((options, teacher.config().clone()));
        Ok(self)
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

    /// The number of targets, of which there must be some.
    fn targets<'a>(&self, examples: impl Iterator<Item = &'a Example>) -> Result<usize> {
        let mut targets = 0;
        for example in examples {
            crate::engine::check_vocabulary(example.ids(), self.config.vocab_size)?;
            targets += example.targets().count();
        }
        match targets {
            0 => Err(Error::new(ErrorKind::Prompt, "expected at least one target to learn, found none")),
            targets => Ok(targets),
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
            Artifact::Adapter(config, model) => adapter(config, model, &*self.learner),
            Artifact::Model(..) => {
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

    /// What must be the same for a training to be resumed.
    pub(super) fn settings(&self) -> serde_json::Value {
        let mut settings = match &self.method {
            Method::Full(full) => serde_json::json!({ "full": { "layers": full.layers } }),
            Method::New(adapter, seed) => serde_json::json!({ "new": adapter.to_json(), "seed": seed }),
            Method::Continue(adapter) => serde_json::json!({ "continue": adapter.config().to_json() }),
        };
        if let (Some((options, teacher)), Some(settings)) = (&self.distilled, settings.as_object_mut()) {
            settings
                .insert("distill".to_owned(), serde_json::json!({ "options": options, "teacher": teacher }));
        }
        settings
    }
}
