use super::{
    Example, Recall, StepOptions, TrainOptions, Tuner,
    data::{Batches, Dataset},
    schedule::LearningRate,
    store::{Artifact, Log, State, Store},
};
use crate::{CancelToken, Error, ErrorKind, Result, generation::Random};
use serde_json::{Value, json};
use std::{
    ops::ControlFlow,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// What a training tells while it runs.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Event {
    /// A step was made.
    Step(StepReport),
    /// The model was evaluated.
    Evaluated {
        /// After so many steps.
        step: u64,
        /// Mean over the targets, in nats.
        loss: f64,
        /// Whether there was no better one before.
        best: bool,
        /// Of a training for search, how well passages are found among all of the evaluation's.
        recall: Option<Recall>,
    },
    /// A checkpoint was written.
    Saved {
        /// After so many steps.
        step: u64,
        /// Its directory.
        path: PathBuf,
    },
}

/// One step of a training.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct StepReport {
    /// Its number, from 1.
    pub step: u64,
    /// Steps in all.
    pub steps: u64,
    /// Passes over the data so far.
    pub epoch: f64,
    /// Mean over the targets, in nats.
    pub loss: f32,
    /// Learning rate.
    pub lr: f64,
    /// Norm of all gradients together, before clipping.
    pub grad_norm: f32,
    /// Target tokens of this step; examples where the goal is another.
    pub tokens: u64,
    /// Tokens that were run a second, over this step.
    pub tokens_per_second: f64,
    /// Time that is left at the pace so far.
    pub left: Duration,
}

/// What a training came to.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct TrainReport {
    /// Steps that were made.
    pub steps: u64,
    /// Loss of the last step, in nats.
    pub loss: Option<f32>,
    /// Loss of the best evaluation, in nats, and its step.
    pub best: Option<(f64, u64)>,
    /// Whether it ended early, since evaluations were no better any more.
    pub stopped_early: bool,
    /// Target tokens learned from; examples where the goal is another.
    pub tokens: u64,
    /// Where the result lies.
    pub output: PathBuf,
    /// The lines of the log.
    pub log: Vec<Value>,
}

type Callback<'a> = Box<dyn FnMut(&Event) -> ControlFlow<()> + 'a>;

/// Trains a model on data: schedule, evaluation, checkpoints, log.
pub struct Trainer<'a> {
    tuner: Tuner,
    options: TrainOptions,
    data: Dataset,
    eval: Option<Dataset>,
    callbacks: Vec<Callback<'a>>,
    cancel: CancelToken,
    resume: bool,
}

impl<'a> Trainer<'a> {
    /// A training of `tuner` on `data`, in another order each epoch.
    pub fn new(tuner: Tuner, data: Dataset, options: TrainOptions) -> Self {
        Self {
            tuner,
            options,
            data,
            eval: None,
            callbacks: Vec::new(),
            cancel: CancelToken::new(),
            resume: false,
        }
    }

    /// Evaluates on this; the best model is the result.
    #[must_use]
    pub fn eval(mut self, data: Dataset) -> Self {
        self.eval = Some(data);
        self
    }

    /// Tells `callback` what happens; it can end the training, which is saved then.
    #[must_use]
    pub fn callback(mut self, callback: impl FnMut(&Event) -> ControlFlow<()> + 'a) -> Self {
        self.callbacks.push(Box::new(callback));
        self
    }

    /// Lets `cancel` end the training after the step it is in; it is saved then.
    #[must_use]
    pub fn cancel(mut self, cancel: CancelToken) -> Self {
        self.cancel = cancel;
        self
    }

    /// Goes on from the last checkpoint in the output directory, as if the training had never stopped. Where there is
    /// none, it starts.
    #[must_use]
    pub fn resume(mut self, resume: bool) -> Self {
        self.resume = resume;
        self
    }

    /// Trains, and writes result, log and checkpoints to `output`.
    ///
    /// # Errors
    /// [`ErrorKind::Option`] for options out of range, an output directory that holds something else, and settings that
    /// are not those of the training to be resumed; [`ErrorKind::Prompt`] for data that cannot be run;
    /// [`ErrorKind::Diverged`] for a loss that is no number; [`ErrorKind::Cancelled`]; [`ErrorKind::Io`] where something
    /// cannot be written, in which case the checkpoints so far are left.
    pub fn run(mut self, output: impl AsRef<Path>) -> Result<TrainReport> {
        self.options.validate()?;
        let plan = Steps::new(&self.options, &self.data)?;
        self.tuner.check_data(&self.data)?;
        let settings = json!({
            "options": self.options, "method": self.tuner.settings(), "data": about(&self.data),
            "eval": self.eval.as_ref().map(about), "trainable": self.tuner.trainable(),
        });
        let store = Store::open(output.as_ref(), &settings, self.resume)?;
        let last = if self.resume { store.steps()?.last().copied() } else { None };
        let state = match last {
            Some(step) => store.restore(step, self.tuner.learner(), self.options.optimizer)?,
            None => State::default(),
        };
        // Where nothing was saved nothing is kept: it begins anew.
        let log = store.log(last)?;
        let mut run = Run { trainer: self, plan, store, state, log, began: Instant::now(), first: 0 };
        run.first = run.state.step;
        run.go()
    }
}

/// What tells data from other data, for resuming.
fn about(data: &Dataset) -> Value {
    json!({ "examples": data.len(), "targets": data.targets() })
}

/// How many steps there are, and what each learns from.
struct Steps {
    count: u64,
    batches: Batches,
    rate: LearningRate,
}

impl Steps {
    fn new(options: &TrainOptions, data: &Dataset) -> Result<Self> {
        let batches =
            Batches::new(data.clone(), options.batch_size, options.grad_accum)?.shuffled(options.seed);
        let count = options.max_steps.unwrap_or_else(|| batches.per_epoch().saturating_mul(options.epochs));
        let rate = LearningRate::new(options.schedule, options.lr, options.warmup_steps, count)?;
        Ok(Self { count, batches, rate })
    }

    /// Whether something that happens every `every` steps, or at the end of each epoch, happens after `step`.
    fn is_due(&self, step: u64, every: Option<u64>) -> bool {
        step.is_multiple_of(every.unwrap_or(self.batches.per_epoch()).max(1)) || step == self.count
    }
}

struct Run<'a> {
    trainer: Trainer<'a>,
    plan: Steps,
    store: Store,
    state: State,
    log: Log,
    began: Instant,
    /// Steps that were made before this run.
    first: u64,
}

impl Run<'_> {
    fn go(mut self) -> Result<TrainReport> {
        let mut loss = None;
        let mut stopped_early = false;
        let mut saved = self.state.step;
        if saved == 0
            && let Some(event) = self.before()?
        {
            self.tell(&event);
        }
        while self.state.step < self.plan.count && !stopped_early {
            let report = self.step()?;
            loss = Some(report.loss);
            let mut ends = self.tell(&Event::Step(report));
            let step = self.state.step;
            if self.plan.is_due(step, self.trainer.options.eval_steps) && self.trainer.eval.is_some() {
                let (event, is_best) = self.evaluate()?;
                ends |= self.tell(&event);
                if is_best {
                    // What turned out best must be there at the end.
                    ends |= self.save()?;
                    saved = step;
                }
                stopped_early = self.trainer.options.patience.is_some_and(|most| self.state.stale >= most);
            }
            ends |= self.trainer.cancel.is_cancelled();
            let due = self.plan.is_due(step, self.trainer.options.save_steps) || ends || stopped_early;
            if due && saved != step {
                ends |= self.save()?;
                saved = step;
            }
            if ends && step < self.plan.count {
                let path = self.store.checkpoint(step);
                let message = format_args!(
                    "training was cancelled after step {step}; it can be resumed from {}",
                    path.display()
                );
                return Err(Error::new(ErrorKind::Cancelled, message));
            }
        }
        let best = self.state.best.map_or(self.state.step, |(_, step)| step);
        let from = if self.store.steps()?.contains(&best) { best } else { self.state.step };
        self.store.publish(&self.store.checkpoint(from))?;
        Ok(TrainReport {
            steps: self.state.step,
            loss,
            best: self.state.best,
            stopped_early,
            tokens: self.state.tokens,
            output: self.store.output().to_owned(),
            log: self.log.lines,
        })
    }

    fn tell(&mut self, event: &Event) -> bool {
        let mut ends = false;
        for callback in &mut self.trainer.callbacks {
            ends |= callback(event).is_break();
        }
        ends
    }

    fn step(&mut self) -> Result<StepReport> {
        let began = Instant::now();
        let Trainer { tuner, options, .. } = &mut self.trainer;
        let made = self.state.step;
        let batch = self.plan.batches.step(made)?;
        let micros: Vec<&[Example]> = batch.micro_batches.iter().map(|examples| &examples[..]).collect();
        let lr = self.plan.rate.at(made);
        // The seed of a step is of its number alone, so that resuming finds it again.
        let seed = (Random::new(options.seed, 2).at(made) * 2.0_f64.powi(53)) as u64;
        let step = StepOptions {
            optimizer: options.optimizer,
            lr: lr as f32,
            weight_decay: options.weight_decay,
            clip: options.clip,
            label_smoothing: options.label_smoothing,
            step: made + 1,
            seed: Some(seed),
            gradient_checkpointing: options.gradient_checkpointing,
        };
        let result = tuner.step(&micros, step)?;
        self.finite(made + 1, "loss", f64::from(result.loss))?;
        self.finite(made + 1, "norm of the gradients", f64::from(result.grad_norm))?;
        let tokens = batch.targets() as u64;
        let run: usize = batch.micro_batches.iter().flatten().map(Example::tokens).sum();
        self.state.step += 1;
        self.state.tokens += tokens;
        let done = (self.state.step - self.first) as f64;
        let left = self.began.elapsed().as_secs_f64() / done * (self.plan.count - self.state.step) as f64;
        let report = StepReport {
            step: self.state.step,
            steps: self.plan.count,
            epoch: self.state.step as f64 / self.plan.batches.per_epoch().max(1) as f64,
            loss: result.loss,
            lr,
            grad_norm: result.grad_norm,
            tokens,
            tokens_per_second: run as f64 / began.elapsed().as_secs_f64().max(1e-9),
            left: Duration::try_from_secs_f64(left).unwrap_or_default(),
        };
        self.log.write(json!({
            "step": report.step, "epoch": report.epoch, "loss": report.loss, "lr": report.lr,
            "grad_norm": report.grad_norm, "tokens": tokens, "tokens_per_second": report.tokens_per_second,
        }))?;
        Ok(report)
    }

    /// # Errors
    /// [`ErrorKind::Diverged`], naming what there is to go back to.
    fn finite(&self, step: u64, what: &str, found: f64) -> Result<()> {
        if found.is_finite() {
            return Ok(());
        }
        let good = match self.store.steps()?.last() {
            Some(step) => format!("the last good checkpoint is {}", self.store.checkpoint(*step).display()),
            None => "there is no checkpoint yet".to_owned(),
        };
        let message = format_args!("step {step}: expected a finite {what}, found {found}; {good}");
        Err(Error::new(ErrorKind::Diverged, message))
    }

    /// Where a training for search starts from: that its passages are found must be its doing.
    fn before(&mut self) -> Result<Option<Event>> {
        let Trainer { tuner, eval: Some(_), .. } = &self.trainer else { return Ok(None) };
        if !tuner.learns_pairs() {
            return Ok(None);
        }
        let (loss, recall) = self.figures()?;
        self.log_evaluation(loss, recall)?;
        Ok(Some(Event::Evaluated { step: 0, loss, best: false, recall }))
    }

    /// Mean loss of the evaluation's targets, and how well passages are found where there are such.
    fn figures(&mut self) -> Result<(f64, Option<Recall>)> {
        let Trainer { tuner, options, eval, .. } = &mut self.trainer;
        let (mut sum, mut targets) = (0.0, 0);
        for examples in eval.iter().flat_map(|eval| eval.batches(options.batch_size)) {
            let (of_batch, count) = tuner.summed_loss(&examples?)?;
            sum += of_batch;
            targets += count;
        }
        let recall = match eval {
            Some(eval) if tuner.learns_pairs() => Some(tuner.recall(eval, options.batch_size)?),
            _ => None,
        };
        Ok((sum / targets.max(1) as f64, recall))
    }

    fn log_evaluation(&mut self, loss: f64, recall: Option<Recall>) -> Result<()> {
        let mut line = json!({ "step": self.state.step, "eval_loss": loss });
        if let Some(map) = line.as_object_mut() {
            match recall {
                Some(Recall { at_1, at_10 }) => {
                    map.extend(
                        [("eval_recall_at_1", at_1), ("eval_recall_at_10", at_10)]
                            .map(|(k, v)| (k.to_owned(), json!(v))),
                    );
                }
                None if self.trainer.tuner.learns_tokens() => {
                    map.insert("eval_perplexity".to_owned(), json!(loss.exp()));
                }
                None => {}
            }
        }
        self.log.write(line)
    }

    fn evaluate(&mut self) -> Result<(Event, bool)> {
        let step = self.state.step;
        let (loss, recall) = self.figures()?;
        self.finite(step, "evaluation loss", loss)?;
        let best = self.state.best.is_none_or(|(best, _)| loss < best);
        if best {
            (self.state.best, self.state.stale) = (Some((loss, step)), 0);
        } else {
            self.state.stale += 1;
        }
        self.log_evaluation(loss, recall)?;
        Ok((Event::Evaluated { step, loss, best, recall }, best))
    }

    /// Whether a callback asked to end.
    fn save(&mut self) -> Result<bool> {
        let (optimizer, limit) = (self.trainer.options.optimizer, self.trainer.options.save_limit);
        let artifact = self.trainer.tuner.artifact();
        let write: Artifact<'_> = &|inside, learner| artifact.write(inside, learner);
        let kept = |name: &str| artifact.leaves_out(name);
        let path = self.store.save(&self.state, self.trainer.tuner.learner_ref(), optimizer, write, &kept)?;
        self.store.prune(limit, self.state.best.map(|(_, step)| step))?;
        Ok(self.tell(&Event::Saved { step: self.state.step, path }))
    }
}
