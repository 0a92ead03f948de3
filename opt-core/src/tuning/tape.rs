//! The tape: what a forward pass did, so that gradients can be taken back through it.
//!
//! [`Taped`] is a [`Backend`](opt_backend::Backend) around another one. The decoder runs on it as on any, and each op
//! that something trainable depends on leaves a [`Step`]: which value it made, and how the gradient of that value
//! becomes those of its operands. Values that no trainable parameter reaches are computed and forgotten.

use super::weights::{Param, ParamId, Plan, Virtual};
use crate::generation::Random;
use ndarray::{Array2, ArrayView2};
use opt_backend::{Backend, Error, ErrorKind, Result, Train};
use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
};

/// A value of a forward pass. Values with a node have a gradient.
pub(crate) struct Var<B: Backend> {
    pub(super) value: Arc<B::Tensor>,
    pub(super) node: Option<usize>,
}

impl<B: Backend> Clone for Var<B> {
    fn clone(&self) -> Self {
        Self { value: self.value.clone(), node: self.node }
    }
}

impl<B: Backend> Var<B> {
    /// A value that nothing trainable reaches.
    pub(super) fn constant(value: B::Tensor) -> Self {
        Self { value: Arc::new(value), node: None }
    }
}

/// Takes the gradient of a step's value, and adds what follows to those of its operands.
type Back<B> = Box<dyn FnOnce(&Taped<B>, <B as Backend>::Tensor, &mut Gradients<B>) -> Result<()> + Send>;

struct Step<B: Train> {
    node: usize,
    back: Back<B>,
}

/// Gradients of values, by node, while they are being summed.
pub(crate) struct Gradients<B: Backend>(HashMap<usize, B::Tensor>);

impl<B: Train> Gradients<B> {
    /// Adds to the gradient of a node: `grow` is given what there is so far, if anything.
    pub(super) fn grow(
        &mut self,
        node: Option<usize>,
        grow: impl FnOnce(Option<B::Tensor>) -> Result<B::Tensor>,
    ) -> Result<()> {
        if let Some(node) = node {
            let sum = grow(self.0.remove(&node))?;
            self.0.insert(node, sum);
        }
        Ok(())
    }

    /// Adds `gradient` to that of a node.
    pub(super) fn add(&mut self, backend: &B, node: Option<usize>, gradient: B::Tensor) -> Result<()> {
        self.grow(node, |sum| match sum {
            Some(sum) => backend.add(sum, &gradient),
            None => Ok(gradient),
        })
    }
}

/// A backend that remembers what it did.
pub(crate) struct Taped<B: Train> {
    pub(super) backend: Arc<B>,
    pub(super) plan: Plan,
    /// Virtual tokens, where the plan has some.
    pub(super) tokens: OnceLock<Virtual>,
    state: Mutex<State<B>>,
}

pub(super) struct State<B: Train> {
    /// The checkpoint's name of what is handed over next; see [`Taped::taking`].
    pub(super) loading: String,
    pub(super) params: Vec<Param<B>>,
    /// Whether steps are kept.
    recording: bool,
    steps: Vec<Step<B>>,
    /// Nodes that losses look at, and the gradients there.
    starts: Vec<(usize, B::Tensor)>,
    nodes: usize,
    /// The seed of this pass's dropout; none where nothing is dropped.
    dropout: Option<u64>,
    /// Masks drawn since.
    drawn: u64,
    /// What the projection of a trained prefix made of it in this pass.
    projected: Option<Var<B>>,
}

impl<B: Train> Taped<B> {
    pub(crate) fn new(backend: Arc<B>, plan: Plan) -> Self {
        let state = State {
            loading: String::new(),
            params: Vec::new(),
            recording: false,
            steps: Vec::new(),
            starts: Vec::new(),
            nodes: 0,
            dropout: None,
            drawn: 0,
            projected: None,
        };
        Self { backend, plan, tokens: OnceLock::new(), state: Mutex::new(state) }
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State<B>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// [`Taped::state`] of a tape that nobody else has.
    pub(super) fn state_mut(&mut self) -> &mut State<B> {
        self.state.get_mut().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts a pass whose gradients will be taken; with a seed, elements are dropped as the plan says.
    pub(crate) fn record(&self, dropout: Option<u64>) {
        self.begin(true, dropout);
    }

    /// Starts a pass of which nothing is kept.
    pub(crate) fn evaluate(&self) {
        self.begin(false, None);
    }

    fn begin(&self, recording: bool, dropout: Option<u64>) {
        let mut state = self.state();
        state.steps.clear();
        state.starts.clear();
        state.projected = None;
        (state.recording, state.dropout, state.drawn) = (recording, dropout, 0);
    }

    /// Whether a result of `vars` has a gradient.
    pub(super) fn follows(&self, vars: &[&Var<B>]) -> bool {
        self.recording() && vars.iter().any(|var| var.node.is_some())
    }

    pub(super) fn recording(&self) -> bool {
        self.state().recording
    }

    /// A value with a gradient that `back` takes further.
    pub(super) fn step(
        &self,
        value: impl Into<Arc<B::Tensor>>,
        back: impl FnOnce(&Taped<B>, B::Tensor, &mut Gradients<B>) -> Result<()> + Send + 'static,
    ) -> Var<B> {
        let mut state = self.state();
        let node = state.nodes;
        state.nodes += 1;
        state.steps.push(Step { node, back: Box::new(back) });
        Var { value: value.into(), node: Some(node) }
    }

    /// The parameter's value.
    pub(super) fn param(&self, id: ParamId) -> Result<Arc<B::Tensor>> {
        self.state().params.get(id.0).map(|param| param.value.clone()).ok_or_else(unknown)
    }

    /// Adds to the gradient of a parameter, as [`Gradients::grow`] does to that of a value.
    pub(super) fn grow_param(
        &self,
        id: ParamId,
        grow: impl FnOnce(Option<B::Tensor>) -> Result<B::Tensor>,
    ) -> Result<()> {
        let sum = self.state().params.get_mut(id.0).ok_or_else(unknown)?.gradient.take();
        let sum = grow(sum)?;
        if let Some(param) = self.state().params.get_mut(id.0) {
            param.gradient = Some(sum);
        }
        Ok(())
    }

    pub(super) fn add_to_param(&self, id: ParamId, gradient: B::Tensor) -> Result<()> {
        self.grow_param(id, |sum| match sum {
            Some(sum) => self.backend.add(sum, &gradient),
            None => Ok(gradient),
        })
    }

    /// Whether elements are dropped in this pass with the probability `p`.
    pub(super) fn drops(&self, p: f32) -> bool {
        p > 0.0 && self.state().dropout.is_some()
    }

    pub(super) fn projected(&self) -> Option<Var<B>> {
        self.state().projected.clone()
    }

    pub(super) fn keep_projected(&self, value: Var<B>) -> Var<B> {
        self.state().projected = Some(value.clone());
        value
    }

    /// The name of this pass's next dropout mask, if anything is dropped.
    pub(super) fn next_mask(&self) -> Option<u64> {
        let mut state = self.state();
        let seed = state.dropout?;
        state.drawn += 1;
        let uniform = Random::new(seed, 0).at(state.drawn);
        Some((uniform * 2.0_f64.powi(53)) as u64)
    }

    /// Takes the gradients of all parameters, from where [`Taped::start_from`] said. They are added to what the
    /// parameters have.
    ///
    /// # Errors
    /// Those of the ops.
    pub(crate) fn backward(&self) -> Result<()> {
        let mut gradients = Gradients(HashMap::new());
        for (node, gradient) in std::mem::take(&mut self.state().starts) {
            let sum = match gradients.0.remove(&node) {
                Some(sum) => self.backend.add(sum, &gradient)?,
                None => gradient,
            };
            gradients.0.insert(node, sum);
        }
        loop {
            let Some(Step { node, back }) = self.state().steps.pop() else { return Ok(()) };
            // What no loss depends on has no gradient.
            if let Some(gradient) = gradients.0.remove(&node) {
                back(self, gradient, &mut gradients)?;
            }
        }
    }

    /// Runs `body`, and runs it again when its gradient is taken instead of keeping what is inside.
    pub(crate) fn checkpoint(
        &self,
        x: Var<B>,
        body: impl Fn(&Self, Var<B>) -> crate::Result<Var<B>> + Send + 'static,
    ) -> crate::Result<Var<B>> {
        if !self.recording() {
            return body(self, x);
        }
        let drawn = {
            let mut state = self.state();
            state.recording = false;
            state.drawn
        };
        let y = body(self, x.clone());
        self.state().recording = true;
        let y = y?;
        let back = move |taped: &Taped<B>, dy: B::Tensor, gradients: &mut Gradients<B>| {
            // What is inside is recorded now; it lies on top of the steps that are left, below it the one that hands
            // the gradient of its input on.
            let outside = x.node;
            let hand_on = move |taped: &Taped<B>, dx: B::Tensor, gradients: &mut Gradients<B>| {
                gradients.add(&taped.backend, outside, dx)
            };
            let node = {
                let mut state = taped.state();
                let node = state.nodes;
                state.nodes += 1;
                state.steps.push(Step { node, back: Box::new(hand_on) });
                node
            };
            let later = std::mem::replace(&mut taped.state().drawn, drawn);
            let y = body(taped, Var { value: x.value, node: Some(node) });
            taped.state().drawn = later;
            let y = y.map_err(|e| Error::new(ErrorKind::Device, "checkpoint", e))?;
            gradients.add(&taped.backend, y.node, dy)
        };
        Ok(self.step(y.value, back))
    }

    /// `scale` times a loss that is computed here from what is read of `x`, `[1, 1]`; `loss` gives it, and its gradient
    /// of x's shape, from which [`Taped::backward`] then starts.
    pub(super) fn host_loss(
        &self,
        x: &Var<B>,
        scale: f32,
        loss: impl FnOnce(ArrayView2<'_, f32>) -> (f64, Array2<f32>),
    ) -> crate::Result<B::Tensor> {
        let b = &*self.backend;
        let (loss, gradient) = loss(b.block_on(b.read(&x.value))?.view());
        if x.node.is_some() {
            self.start_from(x.node, b.upload((gradient * scale).view())?);
        }
        Ok(b.upload(Array2::from_elem((1, 1), (loss * f64::from(scale)) as f32).view())?)
    }

    /// Lets [`Taped::backward`] start from a node with the gradient that some loss has there.
    pub(crate) fn start_from(&self, node: Option<usize>, gradient: B::Tensor) {
        if let Some(node) = node {
            self.state().starts.push((node, gradient));
        }
    }
}

fn unknown() -> Error {
    Error::shape("tape", "a parameter of another tape")
}
