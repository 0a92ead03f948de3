//! Tasks as data: what they are, where their rows lie, and how rows become prompts.

mod locate;
mod prompts;
mod registry;
mod spec;

pub use prompts::{Answer, Document, Task, TaskOptions};
pub use registry::{GroupSpec, Selection, Tasks};
pub use spec::{
    Data, Fewshot, Fields, Filter, FilterStep, Generation, MetricSpec, RowShape, Sampler, Splits, TaskKind,
    TaskSpec,
};
