//! Training: full fine-tuning, adapters, heads, search, models from nothing, distillation.
//!
//! [`Tuner`] is a model with what is trained of it ([`Method`]): it gives losses and gradients, and makes steps.
//! [`Trainer`] does what is around that: data ([`data`]), the learning rate ([`schedule`]), evaluation, checkpoints that
//! can be resumed exactly, a log.
//!
//! ```no_run
//! use opt_core::{Load, adapter::LoraConfig, tokenizer::Tokenizer};
//! use opt_core::tuning::{Method, TrainOptions, Trainer, Tuner, data::{DataOptions, Dataset}};
//!
//! let tuner = Tuner::load("opt-125m", Method::adapter(LoraConfig::default(), 42), Load::default())?;
//! let options = DataOptions::new(tuner.config(), Some(Tokenizer::from_dir("opt-125m")?)).seq_len(256);
//! let [data, held_out] = Dataset::open("letters.txt", &options)?.split(0.1, 42)?;
//! let options = TrainOptions::default().lr(3e-4).batch_size(4).warmup_steps(20);
//! let report = Trainer::new(tuner, data, options).eval(held_out).run("my-adapter")?;
//! println!("{:?}", report.best);
//! # Ok::<(), opt_core::Error>(())
//! ```
//!
//! Gradients are taken by a tape around the backend, on which the decoder runs as it does without.

mod backend;
mod contrast;
pub mod data;
mod distill;
mod example;
mod head;
mod learner;
mod memory;
mod ops;
mod optimizer;
mod options;
mod outputs;
pub mod schedule;
mod scratch;
mod start;
mod store;
mod student;
mod tape;
mod trainer;
mod tuner;
mod weights;

pub use crate::embedding::Pooling;
pub use contrast::{ContrastOptions, Recall, recall};
pub use distill::DistillOptions;
pub use example::{Example, Goal};
pub(crate) use learner::{Learn, Learner};
pub use memory::TrainingMemory;
pub use optimizer::Optimizer;
pub use options::TrainOptions;
pub use outputs::{OutputOptions, TeacherOutputs};
pub use schedule::Schedule;
pub use scratch::{SideFiles, new_model, train_tokenizer};
pub(crate) use start::Draws;
pub use student::{student_layers, student_of};
pub use trainer::{Event, StepReport, TrainReport, Trainer};
pub use tuner::{Full, Method, StepOptions, StepResult, Tuner};
pub(crate) use weights::Plan;
