//! Learning from a teacher beside the text.

use super::{Purpose, Tuner};
use crate::{
    Error, ErrorKind, Result,
    checkpoint::Checkpoint,
    config::OptConfig,
    tuning::{
        DistillOptions, TeacherOutputs, TrainOptions, TrainingMemory, data::Dataset, distill::Teaching,
    },
};

/// What is known of a teacher beside its weights.
pub(super) struct Teacher {
    options: DistillOptions,
    kind: Kind,
}

enum Kind {
    /// It is run. `weights` tells its weights from others, `bytes` is what they take.
    Model { config: Box<OptConfig>, weights: String, bytes: u64 },
    /// It was run.
    Outputs(TeacherOutputs),
}

impl Tuner {
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
        self.still_free()?;
        self.check_vocabulary(teacher.config().vocab_size)?;
        let place = |e: Error| e.at("teacher");
        teacher.validate().map_err(place)?;
        self.holding.check(&teacher).map_err(place)?;
        let weights = teacher.fingerprint().map_err(place)?;
        self.learner.distill(Teaching::Model(&teacher), &self.holding, options, &self.cancel)?;
        let bytes = self.holding.total_bytes(&teacher);
        let kind = Kind::Model { config: Box::new(teacher.config().clone()), weights, bytes };
        self.purpose = Purpose::Teacher(Box::new(Teacher { options, kind }));
        Ok(self)
    }

    /// [`Tuner::distill`] from what a teacher made of the same examples before; see [`TeacherOutputs`].
    ///
    /// # Errors
    /// [`ErrorKind::Option`] as [`Tuner::distill`], for another temperature than the outputs were written for, and for
    /// `alpha_hidden` or `alpha_cos` above 0, since states are not kept. An example that the teacher has not seen is an
    /// error of the step that it is in; a [`crate::tuning::Trainer`] looks at all of them before the first.
    pub fn distill_from(mut self, outputs: TeacherOutputs, options: DistillOptions) -> Result<Self> {
        options.validate()?;
        self.still_free()?;
        self.check_vocabulary(outputs.vocab_size())?;
        options.validate_without_states()?;
        let (own, found) = (outputs.temperature(), options.temperature);
        if own != found {
            let message = format_args!(
                "temperature: expected {own}, which the teacher's outputs were written for, found {found}"
            );
            return Err(Error::new(ErrorKind::Option, message));
        }
        self.learner.distill(Teaching::Outputs(&outputs), &self.holding, options, &self.cancel)?;
        self.purpose = Purpose::Teacher(Box::new(Teacher { options, kind: Kind::Outputs(outputs) }));
        Ok(self)
    }

    /// Whether it can learn from a teacher of so many tokens.
    fn check_vocabulary(&self, found: usize) -> Result<()> {
        match self.config.vocab_size {
            own if own == found => Ok(()),
            own => {
                let message =
                    format_args!("teacher: expected the student's vocabulary of {own} tokens, found {found}");
                Err(Error::new(ErrorKind::Option, message))
            }
        }
    }
}

impl Teacher {
    /// What a training takes that takes `own` without a teacher.
    pub(super) fn memory(
        &self,
        own: TrainingMemory,
        student: &OptConfig,
        options: &TrainOptions,
        seq_len: usize,
    ) -> TrainingMemory {
        let rows = options.batch_size.saturating_mul(seq_len) as u64;
        match &self.kind {
            Kind::Model { config, bytes, .. } => {
                own.with_teacher((config, *bytes), self.options, student, options, rows)
            }
            Kind::Outputs(_) => own.with_outputs(student.vocab_size, self.options, rows),
        }
    }

    /// What a resumed training must have in common with the one it goes on with.
    pub(super) fn settings(&self) -> serde_json::Value {
        match &self.kind {
            Kind::Model { config, weights, .. } => serde_json::json!({
                "options": self.options, "teacher": config, "teacher_weights": weights,
            }),
            Kind::Outputs(outputs) => {
                serde_json::json!({ "options": self.options, "outputs": outputs.settings() })
            }
        }
    }

    /// Whether it can teach all of this.
    pub(super) fn check(&self, data: &Dataset) -> Result<()> {
        match &self.kind {
            Kind::Model { .. } => Ok(()),
            Kind::Outputs(outputs) => outputs.check(data),
        }
    }
}
