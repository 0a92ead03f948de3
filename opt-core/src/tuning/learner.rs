//! A model that is being trained, on one backend.

use super::{
    ContrastOptions, DistillOptions, Example, Pooling, StepOptions, StepResult, contrast,
    distill::{Distill, Teaching},
    head::TrainedHead,
    optimizer::{Memory, Optimizer, misfit, remembered},
    tape::{Taped, Var},
    weights::Plan,
};
use crate::{
    CancelToken, Decoder, Error, ErrorKind, Result,
    checkpoint::Checkpoint,
    config::OptConfig,
    decoder::{At, Inside},
    generation::Random,
    heads::Head,
    quantize::Holding,
};
use ndarray::{Array2, ArrayView2};
use opt_backend::{Backend, Info, Smoothing, Span, Train};
use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

/// How a pass runs, beside what it is about.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Pass {
    /// One over the number of targets of the whole step.
    pub(crate) scale: f32,
    pub(crate) label_smoothing: f32,
    /// Seeds dropout and layerdrop; nothing is dropped without.
    pub(crate) seed: Option<u64>,
    /// Keeps only the states between layers, and computes what is inside again for the gradient.
    pub(crate) checkpointing: bool,
}

impl Pass {
    /// Micro-batch number `micro` of a step, `scale` being one over the targets of all of them.
    fn new(scale: f32, options: &StepOptions, micro: u64) -> Self {
        Self {
            scale,
            label_smoothing: options.label_smoothing,
            seed: options.seed.map(|seed| seed.wrapping_add(micro << 40)),
            checkpointing: options.gradient_checkpointing,
        }
    }
}

/// A model that is being trained, whatever it runs on.
pub(crate) trait Learn: Send {
    fn info(&self) -> Info;

    fn counters(&self) -> &opt_backend::Counters;

    /// Names and shapes of what is trained.
    fn shapes(&self) -> Vec<(String, [usize; 2])>;

    /// Reads a parameter.
    fn value(&self, name: &str) -> Result<Array2<f32>>;

    /// Reads what the optimizer remembers of a parameter: nothing before the first step.
    fn memory(&self, name: &str) -> Result<Vec<Array2<f32>>>;

    /// Whether [`Learn::memory`] gives nothing.
    fn memory_is_empty(&self, name: &str) -> bool;

    /// Sets a parameter, and what the optimizer remembers of it, if anything.
    fn restore(
        &mut self,
        name: &str,
        value: ArrayView2<'_, f32>,
        optimizer: Optimizer,
        memory: &[ArrayView2<'_, f32>],
    ) -> Result<()>;

    /// Lets steps and gradients be those of a distillation from a teacher, which is held as `holding` says.
    fn distill(
        &mut self,
        teacher: Teaching<'_>,
        holding: &Holding,
        options: DistillOptions,
        cancel: &CancelToken,
    ) -> Result<()>;

    /// Lets steps, gradients and evaluations be those of a head, which is trained too.
    fn head(&mut self, head: &Head) -> Result<()>;

    /// Lets steps, gradients and evaluations be those of pairs of texts.
    fn contrast(&mut self, options: ContrastOptions);

    /// One vector `[sequences, word_embed_proj_dim]` for each sequence, nothing being dropped.
    fn embed(&mut self, sequences: &[&[u32]], pooling: Pooling) -> Result<Array2<f32>>;

    /// Loss times `scale`, and its gradients by the parameters' names, over one batch.
    fn gradients(
        &mut self,
        examples: &[Example],
        scale: f32,
        options: &StepOptions,
    ) -> Result<(f32, BTreeMap<String, Array2<f32>>)>;

    /// One step over some micro-batches; `scale` is one over the targets of all of them.
    fn step(&mut self, micro_batches: &[&[Example]], scale: f32, options: &StepOptions)
    -> Result<StepResult>;

    /// The sum of the losses of all targets, in nats, nothing being dropped. With a teacher, that of the targets
    /// themselves.
    fn evaluate(&mut self, examples: &[Example]) -> Result<f64>;
}

pub(crate) struct Learner<B: Train> {
    taped: Taped<B>,
    decoder: Arc<Decoder<Taped<B>>>,
    config: OptConfig,
    memory: HashMap<String, Memory<B::Tensor>>,
    /// Positions in front of the tokens' own: those of a trained prefix.
    offset: usize,
    objective: Objective<B>,
}

/// What is learned.
enum Objective<B: Backend> {
    /// To predict tokens.
    Tokens,
    /// That, and what a teacher makes of them.
    Teacher(Box<Distill<B>>),
    /// What a head is to say.
    Head(TrainedHead),
    /// Which texts belong together.
    Pairs(ContrastOptions),
}

/// What the decoder made of some sequences, in the rows that were wanted.
struct Rows<B: Backend> {
    /// The state after each layer, `[rows, hidden_size]`, where that was asked for.
    states: Vec<Var<B>>,
    /// What the LM head sees, `[rows, word_embed_proj_dim]`.
    last: Var<B>,
}

/// What a pass came to, in the rows that predict a target.
pub(super) struct Forward<B: Backend> {
    /// `[targets, vocab_size]`.
    pub(super) logits: Var<B>,
    pub(super) targets: Vec<u32>,
    /// The state after each layer, `[targets, hidden_size]`, where that was asked for.
    pub(super) states: Vec<Var<B>>,
    /// What the LM head sees, `[targets, word_embed_proj_dim]`.
    pub(super) last: Var<B>,
}

/// The rows that predict a target, where each example is at the end of its span, and these targets.
pub(super) fn wanted_rows(examples: &[Example], spans: &[Span]) -> (Vec<usize>, Vec<u32>) {
    let mut rows = Vec::new();
    let mut targets = Vec::new();
    for (example, span) in examples.iter().zip(spans) {
        let first = span.start + span.len - example.ids().len();
        for (i, target) in example.targets() {
            rows.push(first + i - 1);
            targets.push(target);
        }
    }
    (rows, targets)
}

/// The tokens of each example.
fn own_tokens(examples: &[Example]) -> Vec<&[u32]> {
    examples.iter().map(Example::ids).collect()
}

/// The rows of the sequences' own tokens, where each is at the end of its span.
fn own_rows(sequences: &[&[u32]], spans: &[Span]) -> Vec<usize> {
    let ends = spans.iter().map(|span| span.start + span.len);
    ends.zip(sequences).flat_map(|(end, ids)| end - ids.len()..end).collect()
}

impl<B: Train> Learner<B> {
    /// Takes a checkpoint over: what is trained in f32, the rest as `holding` says.
    pub(crate) fn load(
        backend: B,
        checkpoint: &Checkpoint,
        holding: &Holding,
        plan: Plan,
        cancel: &CancelToken,
    ) -> Result<Self> {
        let config = checkpoint.config().clone();
        let offset = plan.prefix_len(config.num_hidden_layers);
        let taped = Taped::new(Arc::new(backend), plan);
        let mut taken = |name: &str| {
            taped.taking(name);
            cancel.check("loading")
        };
        let decoder = Decoder::load(&taped, checkpoint, holding, 0..config.num_hidden_layers, &mut taken)?;
        taped.take_tokens(config.num_hidden_layers)?;
        let objective = Objective::Tokens;
        Ok(Self { taped, decoder: Arc::new(decoder), config, memory: HashMap::new(), offset, objective })
    }

    /// Runs sequences; `wanted` says of which rows, given the spans, the results are wanted. With `keeps_states`, what
    /// is after each layer is handed out.
    fn run(
        &self,
        sequences: &[&[u32]],
        wanted: impl FnOnce(&[Span]) -> Vec<usize>,
        pass: Pass,
        keeps_states: bool,
    ) -> Result<Rows<B>> {
        let taped = &self.taped;
        let ids = sequences.concat();
        let spans = Span::lay_out(sequences.iter().map(|ids| ids.len()));
        let embedded = self.decoder.embed(taped, &ids)?;
        let (embedded, wide) = taped.with_prompt(embedded, &spans)?;
        let longest = self.config.max_position_embeddings;
        if let Some(span) = wide.iter().find(|span| span.len + self.offset > longest) {
            let message = format_args!(
                "expected at most {longest} positions (the context), found {}",
                span.len + self.offset
            );
            return Err(Error::new(ErrorKind::Prompt, message));
        }
        let positions: Vec<u32> = wide
            .iter()
            .flat_map(|span| self.offset..self.offset + span.len)
            .map(|position| position as u32)
            .collect();
        // Only rows that are wanted go through the last steps.
        let rows = wanted(&wide);
        let of_wanted = |h: &Var<B>| {
            if rows.len() < positions.len() { taped.take_rows(h, &rows) } else { Ok(h.clone()) }
        };
        let mut h = self.decoder.start(taped, embedded, &positions)?;
        let mut states = Vec::new();
        for index in 0..self.config.num_hidden_layers {
            if !self.is_dropped(index, pass) {
                h = self.layer(index, h, &wide, pass.checkpointing)?;
            }
            if keeps_states {
                states.push(of_wanted(&h)?);
            }
        }
        let last = self.decoder.finish(taped, of_wanted(&h)?)?;
        Ok(Rows { states, last })
    }

    /// Runs examples whose tokens are to be predicted.
    fn forward(&self, examples: &[Example], pass: Pass, keeps_states: bool) -> Result<Forward<B>> {
        let mut targets = Vec::new();
        let wanted = |spans: &[Span]| {
            let (rows, found) = wanted_rows(examples, spans);
            targets = found;
            rows
        };
        let Rows { states, last } = self.run(&own_tokens(examples), wanted, pass, keeps_states)?;
        let logits = self.taped.logits(&last, self.decoder.head())?;
        Ok(Forward { logits, targets, states, last })
    }

    fn layer(&self, index: usize, h: Var<B>, spans: &[Span], checkpointing: bool) -> Result<Var<B>> {
        let (decoder, spans) = (self.decoder.clone(), spans.to_vec());
        let run = move |taped: &Taped<B>, h: Var<B>| {
            let at = At { style: decoder.style, index, spans: &spans, wanted: None };
            let inside = Inside { attentions: None, inputs: None };
            match decoder.layers.get(index) {
                Some(layer) => layer.forward(taped, h, at, None, inside),
                None => Ok(h),
            }
        };
        if checkpointing { self.taped.checkpoint(h, run) } else { run(&self.taped, h) }
    }

    fn is_dropped(&self, layer: usize, pass: Pass) -> bool {
        match pass.seed {
            Some(seed) if self.config.layerdrop > 0.0 => {
                Random::new(seed, 1).at(layer as u64) < self.config.layerdrop
            }
            _ => false,
        }
    }

    /// Runs forward and backward: the gradients are added to what the parameters have; the loss is left where it is.
    fn forward_backward(&self, examples: &[Example], pass: Pass) -> Result<B::Tensor> {
        let taped = &self.taped;
        let loss = match &self.objective {
            Objective::Teacher(distill) => {
                // First, so that what the teacher needs meanwhile is free again when the student runs.
                let taught = distill.teach(&taped.backend, examples)?;
                taped.record(pass.seed);
                let forward = self.forward(examples, pass, distill.compares_states())?;
                distill.losses(taped, forward, taught, pass)?
            }
            _ => {
                taped.record(pass.seed);
                self.losses(examples, pass)?
            }
        };
        taped.backward()?;
        Ok(loss)
    }

    /// The loss `[1, 1]` of what is to be learned from the examples alone; a recording tape is told where its gradients
    /// start.
    fn losses(&self, examples: &[Example], pass: Pass) -> Result<B::Tensor> {
        match &self.objective {
            Objective::Tokens | Objective::Teacher(_) => {
                let Forward { logits, targets, .. } = self.forward(examples, pass, false)?;
                self.token_losses(logits, &targets, pass)
            }
            Objective::Head(head) => {
                let wanted = |spans: &[Span]| head.rows(examples, spans);
                let Rows { last, .. } = self.run(&own_tokens(examples), wanted, pass, false)?;
                let outputs = head.apply(&self.taped, &last)?;
                self.taped.host_loss(&outputs, pass.scale, |outputs| head.loss(outputs, examples))
            }
            Objective::Pairs(options) => self.pair_losses(examples, *options, pass),
        }
    }

    fn token_losses(&self, logits: Var<B>, targets: &[u32], pass: Pass) -> Result<B::Tensor> {
        let smoothing = Smoothing { scale: pass.scale, epsilon: pass.label_smoothing };
        let node = logits.node;
        let logits = self.taped.owned(logits)?;
        let [loss, gradient] = self.taped.backend.cross_entropy(logits, targets, smoothing)?;
        self.taped.start_from(node, gradient);
        Ok(loss)
    }

    fn pair_losses(&self, examples: &[Example], options: ContrastOptions, pass: Pass) -> Result<B::Tensor> {
        let taped = &self.taped;
        let sequences = contrast::sequences(examples);
        let last = self.run(&sequences, |spans| own_rows(&sequences, spans), pass, false)?.last;
        let spans = Span::lay_out(sequences.iter().map(|ids| ids.len()));
        let vectors = contrast::pooled(taped, &last, options.pooling, &sequences, &spans)?;
        let of_pairs = taped.host_loss(&vectors, pass.scale, |vectors| {
            contrast::info_nce(vectors, examples, options.temperature)
        })?;
        let followed = spans.iter().flat_map(|span| span.start + 1..span.start + span.len);
        let rows: Vec<usize> = followed.map(|row| row - 1).collect();
        if options.lm == 0.0 || rows.is_empty() {
            return Ok(of_pairs);
        }
        let targets: Vec<u32> = sequences.iter().flat_map(|ids| ids.iter().skip(1)).copied().collect();
        let logits = taped.logits(&taped.take_rows(&last, &rows)?, self.decoder.head())?;
        // A mean over the tokens, which counts as often as there are pairs.
        let scale = pass.scale * options.lm * examples.len() as f32 / rows.len() as f32;
        let of_tokens = self.token_losses(logits, &targets, Pass { scale, ..pass })?;
        Ok(taped.backend.add(of_pairs, &of_tokens)?)
    }

    /// Drops what a step that failed half-way has left.
    fn forget_gradients(&mut self) {
        self.taped.state_mut().params.iter_mut().for_each(|param| param.gradient = None);
    }

    fn params(&self) -> Vec<(String, Arc<B::Tensor>)> {
        self.taped.state().params.iter().map(|param| (param.name.clone(), param.value.clone())).collect()
    }
}

impl<B: Train> Learn for Learner<B> {
    fn info(&self) -> Info {
        self.taped.info()
    }

    fn counters(&self) -> &opt_backend::Counters {
        self.taped.counters()
    }

    fn shapes(&self) -> Vec<(String, [usize; 2])> {
        let shape = |(name, value): (String, Arc<B::Tensor>)| (name, self.taped.backend.shape(&value));
        self.params().into_iter().map(shape).collect()
    }

    fn value(&self, name: &str) -> Result<Array2<f32>> {
        let backend = &self.taped.backend;
        let found = self.params().into_iter().find(|(known, _)| known == name);
        let Some((_, value)) = found else {
            let message = format_args!("tensor {name}: nothing of this name is trained");
            return Err(Error::new(ErrorKind::NotFound, message));
        };
        Ok(backend.block_on(backend.read(&value))?)
    }

    fn memory(&self, name: &str) -> Result<Vec<Array2<f32>>> {
        match self.memory.get(name) {
            Some(memory) => Ok(memory.read(&*self.taped.backend)?),
            None => Ok(Vec::new()),
        }
    }

    fn memory_is_empty(&self, name: &str) -> bool {
        !self.memory.contains_key(name)
    }

    fn restore(
        &mut self,
        name: &str,
        value: ArrayView2<'_, f32>,
        optimizer: Optimizer,
        memory: &[ArrayView2<'_, f32>],
    ) -> Result<()> {
        let backend = &self.taped.backend;
        let fail = |message: String| Err(Error::new(ErrorKind::Checkpoint, message));
        let mut state = self.taped.state();
        let Some(param) = state.params.iter_mut().find(|param| param.name == name) else {
            return fail(format!("tensor {name}: nothing of this name is trained"));
        };
        let shape = backend.shape(&param.value);
        let parts = remembered(optimizer, name, shape);
        if !(memory.is_empty() || memory.len() == parts.len()) {
            let names: Vec<&str> = parts.iter().map(|(part, _)| *part).collect();
            return fail(format!("tensor {name}: expected all of {names:?}, found {}", memory.len()));
        }
        let expected = std::iter::once(("value", shape)).chain(parts);
        for ((part, expected), found) in expected.zip(std::iter::once(&value).chain(memory)) {
            let found: [usize; 2] = found.dim().into();
            if found != expected {
                return fail(format!("tensor {name}.{part}: expected shape {expected:?}, found {found:?}"));
            }
        }
        if let Some(found) = misfit(memory) {
            return fail(format!("tensor {name}: expected what an optimizer remembers, found {found}"));
        }
        param.value = Arc::new(backend.upload(value)?);
        if !memory.is_empty() {
            self.memory.insert(name.to_owned(), Memory::given(&**backend, memory)?);
        }
        Ok(())
    }

    fn distill(
        &mut self,
        teacher: Teaching<'_>,
        holding: &Holding,
        options: DistillOptions,
        cancel: &CancelToken,
    ) -> Result<()> {
        let distill = Distill::load(&self.taped, &self.config, teacher, holding, options, cancel)?;
        self.objective = Objective::Teacher(Box::new(distill));
        Ok(())
    }

    fn head(&mut self, head: &Head) -> Result<()> {
        let head = TrainedHead::take(&self.taped, head, self.config.pad_token_id)?;
        self.objective = Objective::Head(head);
        Ok(())
    }

    fn contrast(&mut self, options: ContrastOptions) {
        self.objective = Objective::Pairs(options);
    }

    fn embed(&mut self, sequences: &[&[u32]], pooling: Pooling) -> Result<Array2<f32>> {
        self.taped.evaluate();
        let wanted = |spans: &[Span]| own_rows(sequences, spans);
        let last = self.run(sequences, wanted, Pass::default(), false)?.last;
        let spans = Span::lay_out(sequences.iter().map(|ids| ids.len()));
        let vectors = contrast::pooled(&self.taped, &last, pooling, sequences, &spans)?;
        let backend = &self.taped.backend;
        Ok(backend.block_on(backend.read(&vectors.value))?)
    }

    fn gradients(
        &mut self,
        examples: &[Example],
        scale: f32,
        options: &StepOptions,
    ) -> Result<(f32, BTreeMap<String, Array2<f32>>)> {
        self.forget_gradients();
        let loss = self.forward_backward(examples, Pass::new(scale, options, 0))?;
        let backend = self.taped.backend.clone();
        let loss = backend.block_on(backend.read_owned(loss))?;
        let mut gradients = BTreeMap::new();
        for param in &mut self.taped.state_mut().params {
            if let Some(gradient) = param.gradient.take() {
                gradients.insert(param.name.clone(), backend.block_on(backend.read_owned(gradient))?);
            }
        }
        Ok((loss.iter().sum(), gradients))
    }

    fn step(
        &mut self,
        micro_batches: &[&[Example]],
        scale: f32,
        options: &StepOptions,
    ) -> Result<StepResult> {
        self.forget_gradients();
        let backend = self.taped.backend.clone();
        let mut total: Option<B::Tensor> = None;
        for (micro, examples) in (0..).zip(micro_batches) {
            let loss = self.forward_backward(examples, Pass::new(scale, options, micro))?;
            total = Some(match total {
                Some(total) => backend.add(total, &loss)?,
                None => loss,
            });
        }
        let Some(total) = total else { return Err(Error::new(ErrorKind::Option, "a step without examples")) };
        let params = &mut self.taped.state_mut().params;
        let gradients: Vec<&B::Tensor> = params.iter().filter_map(|p| p.gradient.as_ref()).collect();
        let sum_squares = backend.sum_squares(&gradients)?;
        for param in params {
            if !self.memory.contains_key(&param.name) {
                let fresh =
                    Memory::fresh(&*backend, options.optimizer, &param.name, backend.shape(&param.value))?;
                self.memory.insert(param.name.clone(), fresh);
            }
            if let Some(memory) = self.memory.get_mut(&param.name) {
                memory.step(&*backend, param, &sum_squares, options)?;
            }
        }
        // The one thing read in a step.
        let figures = backend.block_on(backend.read_owned(backend.concat(&[&total, &sum_squares])?))?;
        let mut figures = figures.iter().copied();
        let mut next = || figures.next().unwrap_or(f32::NAN);
        Ok(StepResult { loss: next(), grad_norm: next().sqrt() })
    }

    fn evaluate(&mut self, examples: &[Example]) -> Result<f64> {
        self.taped.evaluate();
        let loss = self.losses(examples, Pass { scale: 1.0, ..Pass::default() })?;
        let backend = &self.taped.backend;
        Ok(backend.block_on(backend.read_owned(loss))?.iter().map(|&v| f64::from(v)).sum())
    }
}
