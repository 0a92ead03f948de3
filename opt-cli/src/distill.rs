//! `opt distill`.

use crate::{
    args::{Format, PlaceArgs, ShowArgs},
    model,
    out::Failure,
    progress::Console,
    training::{TrainArgs, tokenizer},
};
use clap::Args;
use opt_core::{
    Load,
    checkpoint::Checkpoint,
    tokenizer::Tokenizer,
    tuning::{DistillOptions, Method, OutputOptions, TeacherOutputs, Tuner, data::Reads, student_of},
};
use std::path::{Path, PathBuf};

const HELP: &str = "\
Examples:
  opt distill --teacher opt-1.3b --student opt-125m --data texts.txt --output student
  opt distill --teacher models/opt-novels --student-layers 3 --data novel.txt --output half
  opt distill --teacher opt-1.3b --student opt-350m --alpha-hidden 0.1 --data texts.txt --output student

Each step's loss is alpha-ce * cross-entropy + alpha-kd * T^2 KL(teacher,
student) + alpha-hidden * mean squared difference of hidden states + alpha-cos *
(1 - cosine of the last hidden states), a mean over the target tokens.
Evaluation is of the cross-entropy alone. Data and OUTPUT are as `opt tune full`
has them.";

/// Let a student learn from a teacher with the same tokenizer, of whichever shapes.
#[derive(Debug, Args)]
#[command(after_help = HELP, mut_arg("model", |model| model.hide(true)))]
pub(crate) struct Distill {
    /// Learn from this model: a directory, a weights file or a hub id.
    #[arg(long, value_name = "MODEL", help_heading = "Method")]
    teacher: PathBuf,
    /// Train this model: a directory, a weights file or a hub id.
    #[arg(
        long,
        value_name = "MODEL",
        required_unless_present = "student_layers",
        conflicts_with = "student_layers",
        help_heading = "Method"
    )]
    student: Option<PathBuf>,
    /// Train a model that begins as the teacher with N of its layers: the first, the last, and evenly between.
    #[arg(long, value_name = "N", help_heading = "Method")]
    student_layers: Option<usize>,
    /// Divide the logits of both by this in the soft targets.
    #[arg(long, value_name = "T", default_value_t = DistillOptions::default().temperature, help_heading = "Method")]
    temperature: f32,
    /// Weight of the cross-entropy of the targets.
    #[arg(long, value_name = "X", default_value_t = DistillOptions::default().alpha_ce, help_heading = "Method")]
    alpha_ce: f32,
    /// Weight of the soft targets.
    #[arg(long, value_name = "X", default_value_t = DistillOptions::default().alpha_kd, help_heading = "Method")]
    alpha_kd: f32,
    /// Weight of the difference of states after layers of the same relative depth.
    #[arg(long, value_name = "X", default_value_t = DistillOptions::default().alpha_hidden, help_heading = "Method")]
    alpha_hidden: f32,
    /// Weight of the angle between the last hidden states.
    #[arg(long, value_name = "X", default_value_t = DistillOptions::default().alpha_cos, help_heading = "Method")]
    alpha_cos: f32,

    /// Learn from what the teacher made of the data before, in this file; if it is not there, write it first. Hidden
    /// states are not kept, and of each target only the largest logits.
    #[arg(long, value_name = "FILE", help_heading = "Method")]
    teacher_outputs: Option<PathBuf>,
    /// Logits of a target that --teacher-outputs keeps; the rest of the probability is spread evenly over the rest of
    /// the tokens. [default: 64]
    #[arg(long, value_name = "K", requires = "teacher_outputs", help_heading = "Method")]
    teacher_top_k: Option<usize>,

    #[command(flatten)]
    train: TrainArgs,
    #[command(flatten)]
    place: PlaceArgs,
    /// Hold the teacher's weights, and multiply by the student's, in this number format.
    #[arg(long, value_name = "FORMAT", default_value = "f32", help_heading = "Model")]
    dtype: Format,
    #[command(flatten)]
    show: ShowArgs,
}

impl Distill {
    pub(crate) fn run(&self) -> Result<(), Failure> {
        let console = Console::new(self.show);
        if self.place.model.is_some() {
            return Err(Failure::usage(
                "--model belongs to other subcommands; expected --teacher and --student",
            ));
        }
        let options = self.train.options(5e-4)?;
        options.validate()?;
        let distill = DistillOptions::default()
            .temperature(self.temperature)
            .alpha_ce(self.alpha_ce)
            .alpha_kd(self.alpha_kd)
            .alpha_hidden(self.alpha_hidden)
            .alpha_cos(self.alpha_cos);
        match self.teacher_outputs {
            Some(_) => distill.validate_without_states()?,
            None => distill.validate()?,
        }
        let backend = self.place.choose()?;
        let path = model::find(Some(&self.teacher), &console).map_err(|e| e.at("--teacher"))?;
        let teacher = Checkpoint::open(&path)?;
        let mut words = tokenizer(&path)?;
        let (student, files) = match (&self.student, self.student_layers) {
            (_, Some(layers)) => student_of(&teacher, layers)?,
            (student, None) => {
                let path = model::find(student.as_deref(), &console).map_err(|e| e.at("--student"))?;
                let own = tokenizer(&path)?;
                if let (Some(own), Some(words)) = (&own, &words) {
                    check_same(own, words)?;
                }
                words = own.or(words);
                (Checkpoint::open(&path)?, Vec::new())
            }
        };
        // What both can read.
        let mut config = student.config().clone();
        config.max_position_embeddings =
            config.max_position_embeddings.min(teacher.config().max_position_embeddings);
        let load = |backend| Load::with(backend).dtype(self.dtype.into()).cancel(console.cancel.clone());
        let Some(file) = &self.teacher_outputs else {
            let tuner = Tuner::from_checkpoint(student, Method::full(), load(backend))?.files(files);
            let tuner = tuner.distill(teacher, distill)?;
            let (data, eval) = self.train.read(&config, words, Reads::Language, &console)?;
            return self.train.run(tuner, data, eval, options, &console, self.show);
        };
        let (data, eval) = self.train.read(&config, words, Reads::Language, &console)?;
        let (own, found) = (student.config().vocab_size, teacher.config().vocab_size);
        if own != found {
            return Err(Failure::usage(format!(
                "teacher: expected the student's vocabulary of {own} tokens, found {found}"
            )));
        }
        let (outputs, backend) = match file.exists() {
            true => (self.known(file, &teacher)?, backend),
            false => {
                let keep = OutputOptions::default().temperature(self.temperature);
                let keep = self.teacher_top_k.map_or(keep, |k| keep.k(k));
                console.catch_interrupts();
                let bar = console.bar("teaching");
                let mut progress = |at: opt_core::Progress<'_>| bar.show(at);
                let outputs =
                    TeacherOutputs::write(file, &teacher, load(backend), &data, keep, Some(&mut progress))?;
                (outputs, self.place.choose()?)
            }
        };
        let tuner = Tuner::from_checkpoint(student, Method::full(), load(backend))?.files(files);
        let tuner = tuner.distill_from(outputs, distill)?;
        self.train.run(tuner, data, eval, options, &console, self.show)
    }

    /// Outputs that are there, which must be this teacher's.
    fn known(&self, file: &Path, teacher: &Checkpoint) -> Result<TeacherOutputs, Failure> {
        let outputs = TeacherOutputs::open(file)?;
        let place = file.display();
        if !outputs.are_of(teacher)? {
            return Err(Failure::usage(format!(
                "{place}: expected outputs of --teacher, found another model's"
            )));
        }
        match self.teacher_top_k {
            Some(k) if k != outputs.k() => Err(Failure::usage(format!(
                "--teacher-top-k: expected {}, which {place} was written with, found {k}",
                outputs.k()
            ))),
            _ => Ok(outputs),
        }
    }
}

/// Soft targets say something only where both models mean the same by a token.
fn check_same(student: &Tokenizer, teacher: &Tokenizer) -> Result<(), Failure> {
    let tokens = student.vocab_size().max(teacher.vocab_size());
    let differs = |id: &u32| student.id_to_token(*id) != teacher.id_to_token(*id);
    match (0..u32::try_from(tokens).unwrap_or(u32::MAX)).find(differs) {
        None => Ok(()),
        Some(id) => {
            let name =
                |of: &Tokenizer| of.id_to_token(id).map_or("none".to_owned(), |token| format!("{token:?}"));
            Err(Failure::usage(format!(
                "teacher and student: expected the same tokens, found that {id} is {} and {}",
                name(teacher),
                name(student)
            )))
        }
    }
}
