//! Losses of heads. A head gives a few numbers a sequence or a token; these are read, and what the loss is, and its
//! gradient, is computed here in f64: no backend needs an op for it.

use super::{
    example::{Example, Goal},
    tape::{Taped, Var},
    weights::ParamId,
};
use crate::{
    Error, ErrorKind, Result,
    heads::{Head, Task, last_token, sigmoid},
};
use ndarray::{Array2, ArrayView1, ArrayView2, Axis, s};
use opt_backend::{Span, Train};

/// A head that is being trained.
pub(super) struct TrainedHead {
    task: Task,
    weight: ParamId,
    bias: Option<ParamId>,
    padding: Option<u32>,
}

impl TrainedHead {
    pub(super) fn take<B: Train>(taped: &Taped<B>, head: &Head, padding: Option<u32>) -> Result<Self> {
        let task = head.task().clone();
        let [weight, bias] = task.tensors();
        let weight = taped.new_param(weight.to_owned(), head.weight())?;
        let bias = head.bias().map(|row| taped.new_param(bias.to_owned(), row.view().insert_axis(Axis(0))));
        Ok(Self { task, weight, bias: bias.transpose()?, padding })
    }

    /// The rows of hidden states it looks at: those of all tokens for answers, else one a sequence. Examples are at
    /// the end of their spans.
    pub(super) fn rows(&self, examples: &[Example], spans: &[Span]) -> Vec<usize> {
        let mut rows = Vec::new();
        for (example, span) in examples.iter().zip(spans) {
            let first = span.start + span.len - example.ids.len();
            match self.task {
                Task::Answer => rows.extend(first..first + example.ids.len()),
                _ => rows.push(first + last_token(&example.ids, self.padding)),
            }
        }
        rows
    }

    /// Outputs `[rows, outputs]` of last hidden states.
    pub(super) fn apply<B: Train>(&self, taped: &Taped<B>, last: &Var<B>) -> Result<Var<B>> {
        let out = taped.wired_times_param(last, self.weight)?;
        Ok(match self.bias {
            Some(bias) => taped.wired_add_param(out, bias)?,
            None => out,
        })
    }

    /// The sum of the examples' losses, and its gradient by the outputs.
    pub(super) fn loss(&self, outputs: ArrayView2<'_, f32>, examples: &[Example]) -> (f64, Array2<f32>) {
        let mut gradient = Array2::zeros(outputs.dim());
        let mut sum = 0.0;
        let mut start = 0;
        for example in examples {
            let rows = start..start + if self.task == Task::Answer { example.ids.len() } else { 1 };
            start = rows.end;
            let (loss, of_rows) = loss_of(outputs.slice(s![rows.clone(), ..]), &example.goal, &self.task);
            sum += loss;
            gradient.slice_mut(s![rows, ..]).assign(&of_rows);
        }
        (sum, gradient)
    }
}

/// The loss of one example, as transformers has it for a batch of this one, and its gradient.
fn loss_of(outputs: ArrayView2<'_, f32>, goal: &Goal, task: &Task) -> (f64, Array2<f32>) {
    let mut gradient = Array2::zeros(outputs.dim());
    let mut loss = 0.0;
    match (goal, task) {
        (Goal::Class(class), _) => {
            (loss, gradient) = row(cross_entropy(outputs.row(0), *class as usize));
        }
        (Goal::Numbers(targets), Task::AnyOf(_)) => {
            // -t log σ(x) - (1 - t) log(1 - σ(x)), without overflow.
            let count = targets.len() as f64;
            for ((d, &x), &t) in gradient.iter_mut().zip(outputs).zip(targets) {
                let (x, t) = (f64::from(x), f64::from(t));
                loss += (x.max(0.0) - x * t + (-x.abs()).exp().ln_1p()) / count;
                *d = ((sigmoid(x) - t) / count) as f32;
            }
        }
        (Goal::Numbers(targets), _) => {
            let count = targets.len() as f64;
            for ((d, &x), &t) in gradient.iter_mut().zip(outputs).zip(targets) {
                let difference = f64::from(x) - f64::from(t);
                loss += difference * difference / count;
                *d = (2.0 * difference / count) as f32;
            }
        }
        (Goal::Answer(places), _) => {
            for (column, place) in places.iter().enumerate() {
                let (of_column, d) = cross_entropy(outputs.column(column), *place);
                loss += of_column / 2.0;
                gradient.column_mut(column).assign(&ndarray::Array1::from(d).mapv(|d| d / 2.0));
            }
        }
        // Refused before: see [`check`].
        (Goal::Tokens(_) | Goal::Passage(_), _) => {}
    }
    (loss, gradient)
}

fn row((loss, gradient): (f64, Vec<f32>)) -> (f64, Array2<f32>) {
    (loss, ndarray::Array1::from(gradient).insert_axis(Axis(0)))
}

/// -log softmax(x)[target], and its gradient.
pub(super) fn cross_entropy(x: ArrayView1<'_, f32>, target: usize) -> (f64, Vec<f32>) {
    let most = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let shifted = || x.iter().map(|&v| f64::from(v - most));
    let sum: f64 = shifted().map(f64::exp).sum();
    let gradient =
        shifted().enumerate().map(|(i, v)| (v.exp() / sum - f64::from(i == target)) as f32).collect();
    (sum.ln() - shifted().nth(target).unwrap_or(0.0), gradient)
}

/// Whether an example is one for this task.
///
/// # Errors
/// [`ErrorKind::Prompt`], saying what was expected.
pub(crate) fn check(ids: &[u32], goal: &Goal, task: &Task) -> Result<()> {
    let outputs = task.outputs();
    let fail = |message: String| Err(Error::new(ErrorKind::Prompt, message));
    match (task, goal) {
        (Task::OneOf(_), Goal::Class(class)) if (*class as usize) < outputs => Ok(()),
        (Task::OneOf(_), Goal::Class(class)) => {
            fail(format!("class: expected a number below {outputs}, found {class}"))
        }
        (Task::AnyOf(_) | Task::Numbers(_), Goal::Numbers(found)) if found.len() != outputs => {
            fail(format!("expected {outputs} numbers, found {}", found.len()))
        }
        (Task::AnyOf(_), Goal::Numbers(found)) => match found.iter().find(|v| !(0.0..=1.0).contains(*v)) {
            Some(wrong) => fail(format!("class: expected a number from 0 to 1, found {wrong}")),
            None => Ok(()),
        },
        (Task::Numbers(_), Goal::Numbers(found)) => match found.iter().find(|v| !v.is_finite()) {
            Some(wrong) => fail(format!("expected finite numbers, found {wrong}")),
            None => Ok(()),
        },
        (Task::Answer, Goal::Answer([first, last])) if first <= last && *last < ids.len() => Ok(()),
        (Task::Answer, Goal::Answer([first, last])) => {
            fail(format!("answer: expected places within {} tokens, found {first} to {last}", ids.len()))
        }
        (_, found) => fail(format!("expected an example for {}, found {}", task.about(), about(found))),
    }
}

fn about(goal: &Goal) -> &'static str {
    match goal {
        Goal::Tokens(_) => "tokens to predict",
        Goal::Class(_) => "a class",
        Goal::Numbers(_) => "numbers",
        Goal::Answer(_) => "an answer",
        Goal::Passage(_) => "a passage",
    }
}
