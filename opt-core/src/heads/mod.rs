//! Heads of models that answer with something else than tokens: classes, numbers, or where in a text an answer stands.
//!
//! Files are those of transformers' `OPTForSequenceClassification` (`score.weight`) and `OPTForQuestionAnswering`
//! (`qa_outputs.weight` and `.bias`): the decoder's, a matrix on top of what its LM head would see, and names of classes
//! in config.json. [`SequenceClassifier`] and [`QuestionAnswerer`] run them;
//! [`Tuner::head`](crate::tuning::Tuner::head) trains them, the whole model or an adapter with its head.
//!
//! ```
//! use opt_core::{Load, heads::{Head, SequenceClassifier, Task}, tuning::{Example, Goal, Method, StepOptions, Tuner}};
//!
//! let model = "../models/opt-novels";
//! let tuner = Tuner::load(model, Method::adapter(opt_core::adapter::LoraConfig::default(), 1), Load::default())?;
//! let head = Head::new(Task::one_of(["sea", "land"])?, tuner.config(), 1);
//! let mut tuner = tuner.head(head)?;
//! let sea = Example::with(vec![2, 100, 200, 300], Goal::Class(0));
//! tuner.step(&[&[sea]], StepOptions::default())?;
//! # let dir = tempfile::tempdir().unwrap();
//! # let output = dir.path();
//! tuner.save(output)?;
//!
//! let classifier = SequenceClassifier::adapted(model, output, Load::default())?;
//! println!("{:?}", classifier.classify("The ship sailed at dawn.")?);
//! # Ok::<(), opt_core::Error>(())
//! ```

mod answer;
mod classify;
mod task;

pub(crate) use answer::Asked;
pub use answer::{Answer, AnswerOptions, QuestionAnswerer};
pub use classify::{Prediction, SequenceClassifier};
pub(crate) use classify::{last_token, sigmoid};
pub use task::Task;

use crate::{
    CancelToken, Error, ErrorKind, Load, Opt, Result,
    adapter::{Adapter, PREFIX},
    checkpoint::Checkpoint,
    config::OptConfig,
    engine::{Forward, Hidden, Sequence},
    generation::Random,
    tuning::Draws,
};
use ndarray::{Array1, Array2, ArrayD, ArrayView2};
use std::path::Path;

/// The file beside an adapter that says what its head is for, in the keys of config.json: PEFT has no place for it.
pub(crate) const HEAD_CONFIG: &str = "head_config.json";

/// A linear on top of a decoder, and what its outputs mean.
#[derive(Debug, Clone, PartialEq)]
pub struct Head {
    task: Task,
    /// `[outputs, word_embed_proj_dim]`.
    weight: Array2<f32>,
    /// `[outputs]`, for answers.
    bias: Option<Array1<f32>>,
}

impl Head {
    /// A new head for a model of this shape, as transformers begins it: normal with the config's `init_std`, a bias of
    /// 0.
    pub fn new(task: Task, model: &OptConfig, seed: u64) -> Self {
        let shape = [task.outputs(), model.word_embed_proj_dim];
        let weight = Draws(Random::new(seed, 5)).normal(shape, model.init_std);
        let bias = task.has_bias().then(|| Array1::zeros(task.outputs()));
        Self { task, weight, bias }
    }

    /// The head of a checkpoint whose config.json names one of transformers' two classes with a head; `None` for
    /// others, and for checkpoints in memory, whose config has no such names.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] for classes that cannot be meant, [`ErrorKind::NotFound`] and [`ErrorKind::Checkpoint`]
    /// for a head that is missing or has another shape.
    pub fn of(checkpoint: &Checkpoint) -> Result<Option<Self>> {
        let Some(task) = Task::from_config(&checkpoint.config_json()?)? else { return Ok(None) };
        let shape = [task.outputs(), checkpoint.config().word_embed_proj_dim];
        let [weight, bias] = task.tensors();
        let weight = checkpoint.tensor(weight, &shape)?.matrix()?.to_f32();
        let bias = match task.has_bias() {
            true => Some(checkpoint.tensor(bias, &shape[..1])?.vector()?.to_f32()),
            false => None,
        };
        Self { task, weight, bias }.checked().map(Some)
    }

    /// The head that was trained beside an adapter, which lies in `directory`, for this model. What its outputs mean
    /// is said by the file `head_config.json` that is written beside the adapter here; without one, as beside PEFT's,
    /// by the model's own config.json, and else classes are called `LABEL_0` and so on, as in transformers.
    ///
    /// # Errors
    /// As [`Head::of`]; [`ErrorKind::NotFound`] for an adapter without a head.
    pub fn beside(adapter: &Adapter, directory: impl AsRef<Path>, model: &Checkpoint) -> Result<Self> {
        let file = directory.as_ref().join(HEAD_CONFIG);
        let named = match std::fs::read_to_string(&file) {
            Ok(text) => Task::from_config(&text).map_err(|e| e.at(file.display()))?,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => None,
            Err(e) => {
                return Err(Error::because(ErrorKind::Io, format_args!("cannot read {}", file.display()), e));
            }
        };
        let find = |name: &str| adapter.tensors().get(&format!("{PREFIX}{name}"));
        let place = |e: Error| e.at(format_args!("adapter {:?}", adapter.name()));
        let width = model.config().word_embed_proj_dim;
        let answers = || adapter.config().task_type.as_deref() == Some("QUESTION_ANS");
        let task = match named {
            Some(task) => task,
            None if answers() => Task::Answer,
            None => match (Task::from_config(&model.config_json()?)?, find("score.weight")) {
                (Some(task), _) if task != Task::Answer => task,
                (_, Some(weight)) => match weight.shape() {
                    &[outputs, found] if found == width => Task::unnamed(outputs)?,
                    found => {
                        let message =
                            format_args!("tensor score.weight: expected [classes, {width}], found {found:?}");
                        return Err(place(Error::new(ErrorKind::Checkpoint, message)));
                    }
                },
                (_, None) => return Err(place(missing("score.weight"))),
            },
        };
        let shape = [task.outputs(), width];
        let [weight, bias] = task.tensors();
        let weight =
            find(weight).ok_or_else(|| missing(weight)).and_then(|found| shaped(found, weight, &shape));
        let bias = task.has_bias().then(|| {
            find(bias).ok_or_else(|| missing(bias)).and_then(|found| shaped(found, bias, &shape[..1]))
        });
        Self { weight: weight.map_err(place)?, bias: bias.transpose().map_err(place)?, task }
            .checked()
            .map_err(place)
    }

    fn checked(self) -> Result<Self> {
        let [weight, bias] = self.task.tensors();
        let weights = self.weight.iter().map(|value| (weight, *value));
        let biases = self.bias.iter().flatten().map(|value| (bias, *value));
        match weights.chain(biases).find(|(_, value)| !value.is_finite()) {
            None => Ok(self),
            Some((name, found)) => {
                let message = format_args!("tensor {name}: expected finite numbers, found {found}");
                Err(Error::new(ErrorKind::Checkpoint, message))
            }
        }
    }

    /// What the outputs mean.
    pub fn task(&self) -> &Task {
        &self.task
    }

    /// `[outputs, word_embed_proj_dim]`.
    pub fn weight(&self) -> ArrayView2<'_, f32> {
        self.weight.view()
    }

    /// `[outputs]`, where there is one.
    pub fn bias(&self) -> Option<&Array1<f32>> {
        self.bias.as_ref()
    }

    /// Outputs `[rows, outputs]` of rows `[rows, word_embed_proj_dim]` of last hidden states.
    pub fn apply(&self, rows: ArrayView2<'_, f32>) -> Array2<f32> {
        let out = rows.dot(&self.weight.t());
        match &self.bias {
            Some(bias) => out + bias,
            None => out,
        }
    }
}

fn missing(name: &str) -> Error {
    Error::new(ErrorKind::NotFound, format_args!("expected a head ({name}), found none"))
}

/// A tensor of an adapter that must have this shape.
fn shaped<D: ndarray::Dimension>(
    tensor: &ArrayD<f32>,
    name: &str,
    shape: &[usize],
) -> Result<ndarray::Array<f32, D>> {
    let fits = tensor.shape() == shape;
    let fitting = if fits { tensor.clone().into_dimensionality().ok() } else { None };
    fitting.ok_or_else(|| {
        let found = tensor.shape();
        Error::new(
            ErrorKind::Checkpoint,
            format_args!("tensor {name}: expected shape {shape:?}, found {found:?}"),
        )
    })
}

/// A model with its head.
struct Headed {
    opt: Opt,
    head: Head,
    /// That of the loading: it ends predictions too.
    cancel: CancelToken,
}

impl Headed {
    fn load(path: &Path, load: Load<'_>, expected: &str) -> Result<Self> {
        let Some(head) = Head::of(&Checkpoint::open(path)?)? else {
            let message = format_args!("{}: expected a model {expected}, found one without", path.display());
            return Err(Error::new(ErrorKind::Config, message));
        };
        let cancel = load.cancel.clone().unwrap_or_default();
        Ok(Self { opt: Opt::load(path, load)?, head, cancel })
    }

    fn adapted(path: &Path, adapter: &Path, load: Load<'_>) -> Result<Self> {
        let opened = Adapter::open(adapter)?;
        let head = Head::beside(&opened, adapter, &Checkpoint::open(path)?)?;
        let name = opened.name().to_owned();
        let cancel = load.cancel.clone().unwrap_or_default();
        Ok(Self { opt: Opt::load(path, load.adapter(opened))?.adapted(&name)?, head, cancel })
    }

    /// What the LM head would see `[tokens, word_embed_proj_dim]`, of each sequence.
    fn last_hidden(&self, sequences: &[&[u32]]) -> Result<Vec<Array2<f32>>> {
        let adapter = self.opt.adapter();
        let sequence = |ids| Sequence { hidden: Hidden::Last, adapter, ..Sequence::new(ids) };
        let sequences = sequences.iter().map(|&ids| sequence(ids)).collect();
        let outputs = self.opt.engine().forward_blocking(Forward {
            sequences,
            cancel: Some(&self.cancel),
            watch: None,
        })?;
        Ok(outputs.into_iter().map(|mut output| output.hidden.pop().unwrap_or_default()).collect())
    }

    fn wrong_task(&self, expected: &str) -> Error {
        let message =
            format_args!("expected a head for {expected}, found one for {}", self.head.task.about());
        Error::new(ErrorKind::Config, message)
    }
}
