//! Distillation: losses that draw a student's outputs and hidden states towards a teacher's.
//!
//! The teacher runs on the backend below the tape, so that nothing of it is recorded and nothing of it has a gradient;
//! its logits and states stay where they were computed.

use super::{
    Example, TeacherOutputs,
    learner::{Forward, Pass, wanted_rows},
    tape::{Taped, Var},
    weights::ParamId,
};
use crate::{
    CancelToken, Decoder, Error, ErrorKind, Result,
    checkpoint::Checkpoint,
    config::OptConfig,
    decoder::{At, Inside},
    quantize::Holding,
};
use ndarray::Array2;
use opt_backend::{Backend, DType, Layout, Smoothing, Span, Train};
use serde::{Deserialize, Serialize};

/// Where a projection's name begins: it is trained with the student, and no part of it.
const PROJECTION: &str = "distill.";

/// Whether a trained tensor belongs to a distillation rather than to what comes out of it.
pub(super) fn is_projection(name: &str) -> bool {
    name.starts_with(PROJECTION)
}

/// How much of which loss a student learns from. All are means over the target tokens, in nats where they are of
/// probabilities:
///
/// `alpha_ce` · cross-entropy + `alpha_kd` · T² KL(teacher ‖ student) + `alpha_hidden` · MSE of states after layers
/// + `alpha_cos` · (1 - cosine of the last hidden states).
///
/// ```
/// use opt_core::tuning::DistillOptions;
///
/// let options = DistillOptions::default().temperature(3.0).alpha_hidden(0.1);
/// options.validate()?;
/// assert_eq!((options.alpha_ce, options.alpha_kd), (0.5, 0.5));
/// # Ok::<(), opt_core::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct DistillOptions {
    /// T, by which both models' logits are divided before they become probabilities.
    pub temperature: f32,
    /// Of the cross-entropy of the targets themselves, with label smoothing if that is asked for.
    pub alpha_ce: f32,
    /// Of T² KL(softmax(teacher / T) ‖ softmax(student / T)), as in DistilBERT's trainer.
    pub alpha_kd: f32,
    /// Of the mean squared difference of states after matched layers, over elements and layers. The state after layer
    /// m of a student of S layers (from 1) is compared with that after layer m · T / S (rounded) of a teacher of T
    /// layers, as in TinyBERT. Where widths differ, the student's states pass through a matrix
    /// `[teacher_width, student_width]`, one for all layers, that is learned beside the student and starts as ones on
    /// its diagonal.
    pub alpha_hidden: f32,
    /// Of 1 - cosine of what both LM heads see, `[targets, word_embed_proj_dim]`; where these widths differ, through a
    /// learned matrix of its own.
    pub alpha_cos: f32,
}

impl Default for DistillOptions {
    fn default() -> Self {
        Self { temperature: 2.0, alpha_ce: 0.5, alpha_kd: 0.5, alpha_hidden: 0.0, alpha_cos: 0.0 }
    }
}

macro_rules! setters {
    ($($name:ident),*) => {$(
        #[doc = concat!("Sets [`DistillOptions::", stringify!($name), "`].")]
        #[must_use]
        pub fn $name(self, $name: f32) -> Self {
            Self { $name, ..self }
        }
    )*};
}

impl DistillOptions {
    setters! { temperature, alpha_ce, alpha_kd, alpha_hidden, alpha_cos }

    /// # Errors
    /// [`ErrorKind::Option`] for the first option out of its range, and if nothing is left to learn from.
    pub fn validate(&self) -> Result<()> {
        let fail = |message: String| Err(Error::new(ErrorKind::Option, message));
        if !(self.temperature.is_finite() && self.temperature > 0.0) {
            return fail(format!("temperature: expected a number above 0, found {}", self.temperature));
        }
        let alphas = [
            ("alpha_ce", self.alpha_ce),
            ("alpha_kd", self.alpha_kd),
            ("alpha_hidden", self.alpha_hidden),
            ("alpha_cos", self.alpha_cos),
        ];
        if let Some((name, found)) = alphas.iter().find(|(_, alpha)| !(alpha.is_finite() && *alpha >= 0.0)) {
            return fail(format!("{name}: expected a number of at least 0, found {found}"));
        }
        if alphas.iter().all(|(_, alpha)| *alpha == 0.0) {
            return fail("alpha_ce, alpha_kd, alpha_hidden, alpha_cos: expected one above 0".to_owned());
        }
        Ok(())
    }

    /// [`DistillOptions::validate`], and whether what a [`super::TeacherOutputs`] holds is enough.
    ///
    /// # Errors
    /// [`ErrorKind::Option`].
    pub fn validate_without_states(&self) -> Result<()> {
        self.validate()?;
        let of_states = [("alpha_hidden", self.alpha_hidden), ("alpha_cos", self.alpha_cos)];
        match of_states.iter().find(|(_, alpha)| *alpha > 0.0) {
            None => Ok(()),
            Some((name, alpha)) => {
                let message = format_args!(
                    "{name}: expected 0, as a teacher's outputs hold no hidden states, found {alpha}"
                );
                Err(Error::new(ErrorKind::Option, message))
            }
        }
    }
}

/// What a student is to learn from.
#[derive(Clone, Copy)]
pub(crate) enum Teaching<'a> {
    Model(&'a Checkpoint),
    Outputs(&'a TeacherOutputs),
}

/// A teacher that is run, or what it was run for once.
enum Teacher<B: Backend> {
    Model(Box<Decoder<B>>, OptConfig),
    Outputs(TeacherOutputs),
}

/// A teacher, and what is wanted of it.
pub(super) struct Distill<B: Backend> {
    options: DistillOptions,
    teacher: Teacher<B>,
    /// By the student's layer, the teacher's layer whose result its own is compared with.
    matched: Vec<usize>,
    /// From the student's hidden width to the teacher's.
    hidden: Option<ParamId>,
    /// From the width of the student's last hidden state to that of the teacher's.
    last: Option<ParamId>,
}

/// What the teacher made of a batch, in the rows that predict a target.
pub(super) struct Taught<B: Backend> {
    /// `[targets, vocab_size]`.
    logits: Option<B::Tensor>,
    /// The state after each layer that is matched, `[targets, hidden_size]`.
    states: Vec<Option<B::Tensor>>,
    /// What the LM head sees, `[targets, word_embed_proj_dim]`; outputs that were written hold none.
    last: Option<B::Tensor>,
}

impl<B: Train> Distill<B> {
    /// Takes a teacher over, beside a student of this shape that `taped` holds.
    pub(super) fn load(
        taped: &Taped<B>,
        student: &OptConfig,
        teacher: Teaching<'_>,
        holding: &Holding,
        options: DistillOptions,
        cancel: &CancelToken,
    ) -> Result<Self> {
        let teacher = match teacher {
            Teaching::Model(teacher) => teacher,
            Teaching::Outputs(outputs) => {
                let teacher = Teacher::Outputs(outputs.clone());
                return Ok(Self { options, teacher, matched: Vec::new(), hidden: None, last: None });
            }
        };
        let config = teacher.config().clone();
        let layers = config.num_hidden_layers;
        let mut taken = |_: &str| cancel.check("loading");
        let decoder = Decoder::load(&*taped.backend, teacher, holding, 0..layers, &mut taken)?;
        // Both widths come from models that know nothing of each other's axes: a part of the identity is as good a
        // start as any rotation of it, and needs no seed.
        let projection = |name: &str, wanted: bool, [rows, width]: [usize; 2]| {
            let differs = wanted && rows != width;
            let start = Array2::from_shape_fn((rows, width), |(i, j)| if i == j { 1.0 } else { 0.0 });
            differs.then(|| taped.new_param(format!("{PROJECTION}{name}"), start.view())).transpose()
        };
        let hidden =
            projection("hidden", options.alpha_hidden > 0.0, [config.hidden_size, student.hidden_size])?;
        let last = projection(
            "last",
            options.alpha_cos > 0.0,
            [config.word_embed_proj_dim, student.word_embed_proj_dim],
        )?;
        let matched = match options.alpha_hidden > 0.0 {
            true => matched(layers, student.num_hidden_layers),
            false => Vec::new(),
        };
        let teacher = Teacher::Model(Box::new(decoder), config);
        Ok(Self { options, teacher, matched, hidden, last })
    }

    /// Whether states after layers are compared.
    pub(super) fn compares_states(&self) -> bool {
        !self.matched.is_empty()
    }

    /// Runs the teacher, or looks up what it made of these examples.
    pub(super) fn teach(&self, b: &B, examples: &[Example]) -> Result<Taught<B>> {
        let (teacher, config) = match &self.teacher {
            Teacher::Model(teacher, config) => (teacher, config),
            Teacher::Outputs(outputs) => {
                let logits = match self.options.alpha_kd > 0.0 {
                    true => Some(b.upload(outputs.logits(examples)?.view())?),
                    false => None,
                };
                return Ok(Taught { logits, states: Vec::new(), last: None });
            }
        };
        let longest = config.max_position_embeddings;
        if let Some(example) = examples.iter().find(|example| example.ids().len() > longest) {
            let message = format_args!(
                "expected at most {longest} tokens (the teacher's context), found {}",
                example.ids().len()
            );
            return Err(Error::new(ErrorKind::Prompt, message));
        }
        let ids: Vec<u32> = examples.iter().flat_map(|example| example.ids()).copied().collect();
        let spans = Span::lay_out(examples.iter().map(|example| example.ids().len()));
        let positions: Vec<u32> =
            spans.iter().flat_map(|span| 0..span.len).map(|position| position as u32).collect();
        let (rows, _) = wanted_rows(examples, &spans);
        let mut h = teacher.start(b, teacher.embed(b, &ids)?, &positions)?;
        let mut states = Vec::new();
        for (index, layer) in teacher.layers.iter().enumerate() {
            let is_last = index + 1 == teacher.layers.len();
            let wanted = is_last.then_some(&rows[..]);
            let at = At { style: teacher.style, index, spans: &spans, wanted };
            h = layer.forward(b, h, at, None, Inside { attentions: None, inputs: None })?;
            states.push(match (self.matched.contains(&index), is_last) {
                (false, _) => None,
                (true, false) => Some(b.take_rows(&h, &rows)?),
                (true, true) => Some(b.copy(&h)?),
            });
        }
        let last = teacher.finish(b, h)?;
        let logits = (self.options.alpha_kd > 0.0).then(|| b.logits(&last, teacher.head())).transpose()?;
        Ok(Taught { logits, states, last: Some(last) })
    }

    /// The loss `[1, 1]` of a student's pass; the tape is told where its gradients start.
    pub(super) fn losses(
        &self,
        taped: &Taped<B>,
        student: Forward<B>,
        taught: Taught<B>,
        pass: Pass,
    ) -> Result<B::Tensor> {
        let b = &*taped.backend;
        let Forward { logits, targets, states, last } = student;
        let DistillOptions { temperature, alpha_ce, alpha_kd, alpha_hidden, alpha_cos } = self.options;
        let mut losses = Vec::new();
        let node = logits.node;
        if alpha_ce > 0.0 {
            let smoothing = Smoothing { scale: pass.scale * alpha_ce, epsilon: pass.label_smoothing };
            let own = if alpha_kd > 0.0 { b.copy(&logits.value)? } else { taped.owned(logits.clone())? };
            let [loss, gradient] = b.cross_entropy(own, &targets, smoothing)?;
            taped.start_from(node, gradient);
            losses.push(loss);
        }
        if let Some(teacher) = &taught.logits {
            let [loss, gradient] =
                b.soft_targets(taped.owned(logits)?, teacher, temperature, pass.scale * alpha_kd)?;
            taped.start_from(node, gradient);
            losses.push(loss);
        }
        let pairs = self.matched.len() as f32;
        for (state, layer) in states.iter().zip(&self.matched) {
            if let Some(Some(teacher)) = taught.states.get(*layer) {
                let scale = pass.scale * alpha_hidden / pairs;
                losses.push(squared_difference(
                    taped,
                    &projected(taped, state, self.hidden)?,
                    teacher,
                    scale,
                )?);
            }
        }
        if let Some(teacher) = taught.last.as_ref().filter(|_| alpha_cos > 0.0) {
            let last = projected(taped, &last, self.last)?;
            losses.push(cosine(taped, &last, teacher, pass.scale * alpha_cos)?);
        }
        let mut losses = losses.into_iter();
        let Some(mut total) = losses.next() else {
            return Err(Error::new(ErrorKind::Option, "a distillation without a loss"));
        };
        for loss in losses {
            total = b.add(total, &loss)?;
        }
        Ok(total)
    }
}

/// By the student's layer, the teacher's that it is compared with: the last with the last, the others as deep in
/// proportion.
fn matched(teacher: usize, student: usize) -> Vec<usize> {
    let layer = |m: usize| ((2 * m * teacher + student) / (2 * student)).clamp(1, teacher.max(1)) - 1;
    (1..=student).map(layer).collect()
}

fn projected<B: Train>(taped: &Taped<B>, x: &Var<B>, projection: Option<ParamId>) -> Result<Var<B>> {
    Ok(match projection {
        Some(id) => taped.wired_times_param(x, id)?,
        None => x.clone(),
    })
}

/// `scale` times the sum over rows of the mean squared difference, `[1, 1]`.
fn squared_difference<B: Train>(
    taped: &Taped<B>,
    student: &Var<B>,
    teacher: &B::Tensor,
    scale: f32,
) -> Result<B::Tensor> {
    let b = &*taped.backend;
    let scale = scale / b.shape(teacher)[1] as f32;
    let difference = b.add(b.scale(b.copy(teacher)?, -1.0)?, &student.value)?;
    let loss = b.scale(b.sum_squares(&[&difference])?, scale)?;
    taped.start_from(student.node, b.scale(difference, 2.0 * scale)?);
    Ok(loss)
}

/// `scale` times the sum over rows of 1 - cosine, `[1, 1]`.
///
/// No backend divides rows by their lengths; so three numbers a row are read, and two come back.
fn cosine<B: Train>(
    taped: &Taped<B>,
    student: &Var<B>,
    teacher: &B::Tensor,
    scale: f32,
) -> Result<B::Tensor> {
    let b = &*taped.backend;
    let [rows, width] = b.shape(teacher);
    let ones = b.upload(Array2::ones((1, width)).view())?;
    let dots = |x: &B::Tensor, y: &B::Tensor| {
        let products = b.mul(b.copy(x)?, y)?;
        b.matmul(&products, &ones, Layout::TimesTransposed, DType::F32, None)
    };
    let student_value = &*student.value;
    let all = b.concat(&[
        &dots(student_value, teacher)?,
        &dots(student_value, student_value)?,
        &dots(teacher, teacher)?,
    ])?;
    let all: Vec<f64> = b.block_on(b.read_owned(all))?.iter().map(|&v| f64::from(v)).collect();
    let of = |part: usize| all.iter().copied().skip(part * rows).take(rows);
    // d cos / d student = teacher / (|student| |teacher|) - cos · student / |student|²
    let (mut loss, mut of_teacher, mut of_student) = (0.0, Vec::new(), Vec::new());
    let scale = f64::from(scale);
    for ((dot, own), other) in of(0).zip(of(1)).zip(of(2)) {
        let (own, other) = (own.max(f64::from(f32::MIN_POSITIVE)), other.max(f64::from(f32::MIN_POSITIVE)));
        let lengths = (own * other).sqrt();
        let cosine = dot / lengths;
        loss += scale * (1.0 - cosine);
        of_teacher.push((-scale / lengths) as f32);
        of_student.push((scale * cosine / own) as f32);
    }
    let times = |x: &B::Tensor, factors: Vec<f32>| -> Result<B::Tensor> {
        let column = b.upload(ndarray::Array1::from(factors).insert_axis(ndarray::Axis(1)).view())?;
        let spread = b.matmul(&column, &ones, Layout::Times, DType::F32, None)?;
        Ok(b.mul(spread, x)?)
    };
    let gradient = b.add(times(teacher, of_teacher)?, &times(student_value, of_student)?)?;
    taped.start_from(student.node, gradient);
    Ok(b.upload(Array2::from_elem((1, 1), loss as f32).view())?)
}

#[cfg(test)]
mod tests {
    use super::matched;

    #[test]
    fn layers_are_matched_in_proportion() {
        assert_eq!(matched(12, 6), [1, 3, 5, 7, 9, 11]);
        assert_eq!(matched(6, 6), [0, 1, 2, 3, 4, 5]);
        assert_eq!(matched(2, 3), [0, 0, 1]);
        assert_eq!(matched(7, 1), [6]);
    }
}
