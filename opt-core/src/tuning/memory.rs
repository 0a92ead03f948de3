//! How much memory a training takes, told before it is made.

use super::{
    DistillOptions, Method, TrainOptions,
    optimizer::{Optimizer, remembered},
    tuner::Full,
};
use crate::{
    Result,
    adapter::{AdapterConfig, AdapterMethod, LoraConfig, Part, TargetKind},
    config::{OptConfig, held_bytes},
    quantize::QuantSpec,
};
use opt_backend::{Activation, DType};
use serde::Serialize;
use std::collections::BTreeSet;

/// Bytes of a number that is trained, and of one of a state, a gradient or what the optimizer remembers.
const NUMBER: u64 = 4;

/// What a training holds at once while it makes a step, in bytes.
///
/// | | bytes |
/// |---|---|
/// | `weights` | 4 for each number that is trained, 8 for those of an adapter; the others as they are held |
/// | `gradients` | 4 for each number that is trained |
/// | `optimizer` | 8 for each number that is trained with AdamW, 2.7 in eight bits; 4 or none with SGD, with and without momentum |
/// | `activations` | 4 · rows · (layers · kept + max(head, work)) + a copy of the largest weight of a layer |
///
/// rows = batch size · tokens of an example, with those of a prompt. In each row, a layer keeps `8 · hidden + ffn`
/// numbers (with another activation than ReLU `8 · hidden + 2 · ffn`): its input, queries, keys, values, what attention
/// made of them, what is between both blocks, the results of both LayerNorms, and the inside of the feed-forward block.
/// A low-rank term keeps its rank more, with dropout its input too, with DoRA its output; a low-rank term beside fc1, or a
/// trained bias of a frozen one, keeps `ffn` more, and a prefix three more states for each of its tokens. Layers below the
/// first one that is trained keep nothing. head = `2 · hidden + 2 · vocabulary`: two states, logits, which their
/// gradients take the place of, and the copy of these that a product makes on the `cpu` backend; with a low-rank term
/// beside the LM head that term's logits more. work =
/// `max(2 · hidden + ffn, 6 · hidden)`: gradients inside the layer that is being gone back through.
///
/// With gradient checkpointing it is 4 · rows · (layers · hidden + max(head, kept + work)), with all layers.
///
/// This is the most that can be held at once: gradients are all there while the last of several micro-batches
/// (`grad_accum`) is run, and grow while activations go where there is one. Not counted are data, what kernels take for
/// themselves, what an allocator rounds up to, what a backend keeps for the next step, and the attention weights of one
/// layer, which some backends hold (4 · batch · heads · length²).
///
/// ```
/// use opt_core::{DType, config::OptConfig, tuning::{Method, TrainOptions, TrainingMemory}};
///
/// let options = TrainOptions::default().batch_size(8);
/// let config = OptConfig::from_json(r#"{"model_type": "opt"}"#)?; // OPT-125m
/// let memory = TrainingMemory::of(&config, &Method::full(), DType::F32, None, &options, 512)?;
/// assert_eq!(memory.gradients, 4 * config.parameters());
/// assert!(memory.total() < 8_000_000_000);
/// let less = options.gradient_checkpointing(true);
/// let less = TrainingMemory::of(&config, &Method::full(), DType::F32, None, &less, 512)?;
/// assert!(less.activations < memory.activations);
/// # Ok::<(), opt_core::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[non_exhaustive]
pub struct TrainingMemory {
    /// The model, what is trained of it or beside it, and a teacher.
    pub weights: u64,
    /// The gradients of what is trained.
    pub gradients: u64,
    /// What the optimizer remembers.
    pub optimizer: u64,
    /// What the forward pass keeps for the backward pass, and what that needs on its way.
    pub activations: u64,
}

impl TrainingMemory {
    /// What a training of a model of this shape takes, of examples of at most `seq_len` tokens. What is frozen is held in
    /// `dtype`, or packed as `quantize` says; products are in `dtype`.
    ///
    /// Of a training at hand [`super::Tuner::memory`] knows more: weights that were packed in their files, a teacher.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Config`] for an adapter that does not fit the model and an activation that is not known.
    pub fn of(
        config: &OptConfig,
        method: &Method,
        dtype: DType,
        quantize: Option<&QuantSpec>,
        options: &TrainOptions,
        seq_len: usize,
    ) -> Result<Self> {
        let held = |name: &str, shape: &[usize]| match (quantize.and_then(|spec| spec.of_tensor(name)), shape)
        {
            (Some(spec), &[out, inputs]) => spec.bytes([out, inputs]),
            _ => held_bytes(shape, dtype),
        };
        Self::with(config, method, dtype, &held, options, seq_len)
    }

    /// [`TrainingMemory::of`], where `held` says what a frozen tensor of this canonical name and shape takes.
    pub(super) fn with(
        config: &OptConfig,
        method: &Method,
        dtype: DType,
        held: &dyn Fn(&str, &[usize]) -> u64,
        options: &TrainOptions,
        seq_len: usize,
    ) -> Result<Self> {
        let Trained { whole, new, first_layer } = Trained::by(method, config)?;
        // What an adapter starts from stays on the host.
        let (mut weights, mut trained) = (2 * NUMBER * new, new);
        // Of an adapter the most: its tensors are small.
        let mut optimizer = new * remembered_bytes(options.optimizer, "", &[1]);
        let mut shapes = config.tensor_shapes();
        // Of an adapter's, one table for both ends is trained as one of them or as two; what is not trained stays.
        if config.tie_word_embeddings && adapter(method).is_some() {
            let table = vec![config.vocab_size, config.word_embed_proj_dim];
            if whole.contains("lm_head.weight") {
                shapes.push(("lm_head.weight".to_owned(), table));
            } else if whole.contains("embed_tokens.weight") {
                weights += held("embed_tokens.weight", &table);
            }
        }
        for (name, shape) in shapes {
            if whole.contains(&name) {
                let numbers = count(&shape);
                trained += numbers;
                weights += NUMBER * numbers;
                optimizer += remembered_bytes(options.optimizer, &name, &shape);
            } else {
                weights += held(&name, &shape);
            }
        }
        let inside = Inside::of(method, config)?;
        let rows = options.batch_size.saturating_mul(seq_len.saturating_add(inside.prompt)) as u64;
        let (hidden, embed) = (config.hidden_size as u64, config.word_embed_proj_dim as u64);
        let layers = config.num_hidden_layers.saturating_sub(first_layer) as u64;
        // What goes into the projection in front of the layers, and what comes out of the one behind them.
        let (before, behind) = if config.has_projections() { (embed, embed) } else { (0, 0) };
        let head = 2 * hidden + inside.logits * config.vocab_size as u64 + behind;
        let ffn = config.ffn_dim as u64;
        let work = (2 * hidden + ffn).max(6 * hidden);
        let beside = (inside.prefix * 3 * hidden).saturating_mul(options.batch_size as u64);
        let numbers = match options.gradient_checkpointing {
            false => {
                let kept = rows.saturating_mul(before + layers * inside.kept + head.max(work));
                kept.saturating_add(layers.saturating_mul(beside))
            }
            true => {
                let states = config.num_hidden_layers as u64 * hidden;
                let kept = rows.saturating_mul(before + states + head.max(inside.kept + work));
                kept.saturating_add(beside)
            }
        };
        let copied = hidden * ffn.max(hidden) * dtype.size() as u64;
        Ok(Self {
            weights,
            gradients: NUMBER * trained,
            optimizer,
            activations: NUMBER.saturating_mul(numbers.saturating_add(inside.once)).saturating_add(copied),
        })
    }

    /// With a teacher of `weights` bytes beside it, over `rows` rows: what it made of a batch stays until the student's
    /// losses are known, and matrices between states of different widths are trained.
    pub(super) fn with_teacher(
        self,
        teacher: (&OptConfig, u64),
        distill: DistillOptions,
        student: &OptConfig,
        options: &TrainOptions,
        rows: u64,
    ) -> Self {
        let (teacher, weights) = teacher;
        let matrix = |alpha: f32, rows: usize, width: usize| match alpha > 0.0 && rows != width {
            true => (rows * width) as u64,
            false => 0,
        };
        let trained = matrix(distill.alpha_hidden, teacher.hidden_size, student.hidden_size)
            + matrix(distill.alpha_cos, teacher.word_embed_proj_dim, student.word_embed_proj_dim);
        let logits = logits_of(distill) * teacher.vocab_size;
        let states = match distill.alpha_hidden > 0.0 {
            true => student.num_hidden_layers * (teacher.hidden_size + student.hidden_size),
            false => 0,
        };
        let kept = rows.saturating_mul((logits + states + teacher.word_embed_proj_dim) as u64);
        let remembered = remembered_bytes(options.optimizer, "", &[trained as usize]);
        Self {
            weights: self.weights.saturating_add(weights + NUMBER * trained),
            gradients: self.gradients + NUMBER * trained,
            optimizer: self.optimizer + remembered,
            activations: self.activations.saturating_add(NUMBER.saturating_mul(kept)),
        }
    }

    /// With a teacher's outputs for `rows` rows: as logits, on the host too.
    pub(super) fn with_outputs(self, vocab_size: usize, distill: DistillOptions, rows: u64) -> Self {
        let on_host = usize::from(distill.alpha_kd > 0.0);
        let kept = rows.saturating_mul(((logits_of(distill) + on_host) * vocab_size) as u64);
        Self { activations: self.activations.saturating_add(NUMBER.saturating_mul(kept)), ..self }
    }

    /// All of it.
    pub fn total(&self) -> u64 {
        [self.weights, self.gradients, self.optimizer, self.activations]
            .into_iter()
            .fold(0, u64::saturating_add)
    }
}

/// How many times a row's logits are there for a teacher's sake: the teacher's, and a copy of the student's where there
/// are two losses of these.
fn logits_of(distill: DistillOptions) -> usize {
    match (distill.alpha_ce > 0.0, distill.alpha_kd > 0.0) {
        (_, false) => 0,
        (false, true) => 1,
        (true, true) => 2,
    }
}

/// What an optimizer remembers of a tensor, in bytes.
fn remembered_bytes(optimizer: Optimizer, name: &str, shape: &[usize]) -> u64 {
    let shape = match *shape {
        [rows, width] => [rows, width],
        _ => [1, shape.iter().product()],
    };
    remembered(optimizer, name, shape)
        .into_iter()
        .map(|(_, [rows, width])| NUMBER * (rows * width) as u64)
        .sum()
}

fn count(shape: &[usize]) -> u64 {
    shape.iter().map(|&n| n as u64).product()
}

/// The configuration of an adapter that is trained, and whether it is one that is there already.
fn adapter(method: &Method) -> Option<(&AdapterConfig, bool)> {
    match method {
        Method::Full(_) => None,
        Method::New(config, _) => Some((config, false)),
        Method::Continue(adapter) => Some((adapter.config(), true)),
    }
}

/// What a method trains.
struct Trained {
    /// Canonical names of the model's tensors that are trained themselves.
    whole: BTreeSet<String>,
    /// Numbers that are trained beside the model's.
    new: u64,
    /// The first layer whose input has a gradient or that has something trained inside.
    first_layer: usize,
}

impl Trained {
    fn by(method: &Method, config: &OptConfig) -> Result<Self> {
        let names = || config.tensor_shapes().into_iter().map(|(name, _)| name);
        let Some((adapter, is_there)) = adapter(method) else {
            let Method::Full(Full { layers: Some(layers) }) = method else {
                return Ok(Self { whole: names().collect(), new: 0, first_layer: 0 });
            };
            let of = |name: &String| layer_of(name).is_some_and(|layer| layers.contains(&layer));
            let first_layer = layers.iter().copied().min().unwrap_or_default();
            return Ok(Self { whole: names().filter(of).collect(), new: 0, first_layer });
        };
        if let (AdapterMethod::Prefix(prefix), false) = (&adapter.method, is_there)
            && prefix.prefix_projection
        {
            let (tokens, hidden) = (prefix.sizes.num_virtual_tokens as u64, config.hidden_size as u64);
            let inner = prefix.encoder_hidden_size.map_or(hidden, |inner| inner as u64);
            let wide = 2 * config.num_hidden_layers as u64 * hidden;
            let new = tokens * hidden + inner * (hidden + 1) + wide * (inner + 1);
            return Ok(Self { whole: BTreeSet::new(), new, first_layer: 0 });
        }
        let (mut whole, mut new) = (BTreeSet::new(), 0);
        // Virtual tokens are in front of the first layer, or in it.
        let mut first_layer = if adapter.lora().is_some() { config.num_hidden_layers } else { 0 };
        for slot in adapter.slots(config)? {
            let place = match &slot.part {
                Part::A(module) | Part::B(module) | Part::OwnBias(module) | Part::Magnitude(module) => {
                    new += count(&slot.shape);
                    module.clone()
                }
                Part::Virtual => {
                    new += count(&slot.shape);
                    continue;
                }
                Part::Instead(name) => {
                    whole.insert(name.clone());
                    name.clone()
                }
                Part::Copy(_) => continue,
            };
            let behind = |name: &str| {
                ["final_layer_norm", "project_out", "lm_head"].iter().any(|start| name.starts_with(start))
            };
            let reaches =
                layer_of(&place).unwrap_or(if behind(&place) { config.num_hidden_layers } else { 0 });
            first_layer = first_layer.min(reaches);
        }
        Ok(Self { whole, new, first_layer })
    }
}

/// The layer that a tensor or module of this canonical name is in.
fn layer_of(name: &str) -> Option<usize> {
    name.strip_prefix("layers.")?.split_once('.')?.0.parse().ok()
}

/// What the forward pass keeps.
#[derive(Default)]
struct Inside {
    /// Numbers of a row in a layer, as a mean over layers.
    kept: u64,
    /// Tokens in front of each example's.
    prompt: usize,
    /// Tokens in front of each example's keys and values.
    prefix: u64,
    /// Numbers that are kept once, whatever the batch.
    once: u64,
    /// How many times the logits of a row are there at once.
    logits: u64,
}

impl Inside {
    fn of(method: &Method, config: &OptConfig) -> Result<Self> {
        let (hidden, ffn) = (config.hidden_size as u64, config.ffn_dim as u64);
        // The slope of ReLU is told from its result; of other activations what went in is kept too.
        let is_relu = config.activation()? == Activation::Relu;
        let kept = 8 * hidden + if is_relu { ffn } else { 2 * ffn };
        let plain = Self { kept, logits: 2, ..Self::default() };
        let Some((adapter, is_there)) = adapter(method) else { return Ok(plain) };
        Ok(match &adapter.method {
            AdapterMethod::Lora(lora) => {
                let more = low_rank(adapter, lora, config, is_relu)?;
                let kept = plain.kept + more.div_ceil(config.num_hidden_layers.max(1) as u64);
                let targets = lora.targets(config, &adapter.modules_to_save)?;
                let at_head = targets.iter().any(|target| target.kind == TargetKind::Head);
                // Those of the term itself, or with DoRA those that are scaled.
                Self { kept, logits: plain.logits + u64::from(at_head), ..plain }
            }
            AdapterMethod::Prompt(prompt) => Self { prompt: prompt.sizes.num_virtual_tokens, ..plain },
            AdapterMethod::Prefix(prefix) => {
                // The rows of the projection for each layer's keys and values are copied out of it.
                let inner = prefix.encoder_hidden_size.map_or(hidden, |inner| inner as u64);
                let projection = 2 * config.num_hidden_layers as u64 * hidden * inner;
                let once = if prefix.prefix_projection && !is_there { projection } else { 0 };
                Self { prefix: prefix.sizes.num_virtual_tokens as u64, once, ..plain }
            }
        })
    }
}

/// Numbers of a row that low-rank terms keep, in all layers together.
fn low_rank(adapter: &AdapterConfig, lora: &LoraConfig, config: &OptConfig, is_relu: bool) -> Result<u64> {
    let mut kept = 0;
    let mut apart = BTreeSet::new();
    for target in lora.targets(config, &adapter.modules_to_save)? {
        let [out, input] = target.shape.map(|n| n as u64);
        kept += target.rank as u64;
        if target.kind == TargetKind::Linear {
            kept += if lora.lora_dropout > 0.0 { input } else { 0 };
            kept += if lora.use_dora { out } else { 0 };
        }
        apart.insert(target.module);
    }
    for slot in adapter.slots(config)? {
        if let Part::Instead(name) = &slot.part {
            apart.extend(name.strip_suffix(".bias").map(str::to_owned));
        }
    }
    // Bias, term and ReLU are one op of a plain linear.
    let split = apart.iter().filter(|module| module.ends_with(".fc1")).count() as u64;
    Ok(kept + if is_relu { split * config.ffn_dim as u64 } else { 0 })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::{Names, PromptConfig};

    /// OPT-125m.
    fn config() -> OptConfig {
        OptConfig::from_json(r#"{"model_type": "opt"}"#).expect("a config")
    }

    fn memory(method: &Method, options: &TrainOptions) -> TrainingMemory {
        TrainingMemory::of(&config(), method, DType::F32, None, options, 512).expect("a method that fits")
    }

    #[test]
    fn full_tuning_of_opt_125m() {
        let parameters = 125_239_296;
        assert_eq!(config().parameters(), parameters);
        let options = TrainOptions::default().batch_size(8);
        let found = memory(&Method::full(), &options);
        assert_eq!(
            (found.weights, found.gradients, found.optimizer),
            (4 * parameters, 4 * parameters, 8 * parameters)
        );
        let rows = 8 * 512;
        let head = 2 * 768 + 2 * 50272;
        let kept = 12 * (8 * 768 + 3072) + head;
        assert_eq!(found.activations, 4 * rows * kept + 4 * 768 * 3072);
        assert!(found.total() < 8_000_000_000, "{found:?}");
        let again = memory(&Method::full(), &options.clone().gradient_checkpointing(true));
        assert_eq!(again.activations, 4 * rows * (12 * 768 + head) + 4 * 768 * 3072);
        let sgd = |momentum| memory(&Method::full(), &options.clone().optimizer(Optimizer::Sgd { momentum }));
        assert_eq!((sgd(0.0).optimizer, sgd(0.9).optimizer), (0, 4 * parameters));
    }

    #[test]
    fn adapters_and_layers() {
        let options = TrainOptions::default();
        let lora = memory(&Method::adapter(LoraConfig::default(), 1), &options);
        let new = 12 * 2 * 8 * (768 + 768);
        assert_eq!((lora.gradients, lora.optimizer), (4 * new, 8 * new));
        assert_eq!(lora.weights, 4 * (config().parameters() + 2 * new));
        let prompt = AdapterConfig::new(AdapterMethod::Prompt(PromptConfig::default()));
        let tokens = prompt.virtual_tokens() as u64;
        let prompt = memory(&Method::adapter(prompt, 1), &options);
        assert_eq!(prompt.gradients, 4 * tokens * 768);
        assert!(prompt.activations > lora.activations);
        let last = memory(&Method::layers([11]), &options);
        let layer = 4 * (768 * 768 + 768) + 2 * 768 * 3072 + 768 + 3072 + 4 * 768;
        assert_eq!(last.gradients, 4 * layer);
        let head = 4 * 8 * 512 * (2 * 768 + 2 * 50272);
        assert_eq!(last.activations, head + 4 * 8 * 512 * (8 * 768 + 3072) + 4 * 768 * 3072);
    }

    #[test]
    fn the_table_and_the_head_apart() {
        let options = TrainOptions::default();
        let of = |targets: &[&str], saved: &[&str]| {
            let lora =
                LoraConfig { target_modules: Names::list(targets.iter().copied()), ..LoraConfig::default() };
            let mut config = AdapterConfig::new(AdapterMethod::Lora(lora));
            config.modules_to_save = saved.iter().map(|name| (*name).to_owned()).collect();
            memory(&Method::adapter(config, 1), &options)
        };
        let (table, term) = (50272 * 768, 8 * (50272 + 768));
        let plain = of(&["fc2"], &[]);
        let more = |found: TrainingMemory| {
            [
                found.weights - plain.weights,
                found.gradients - plain.gradients,
                found.optimizer - plain.optimizer,
            ]
        };
        // A table of its own for what is trained, beside the one that stays.
        assert_eq!(more(of(&["fc2"], &["lm_head"])), [4 * table, 4 * table, 8 * table]);
        assert_eq!(more(of(&["fc2"], &["embed_tokens"])), [4 * table, 4 * table, 8 * table]);
        assert_eq!(more(of(&["fc2", "embed_tokens"], &[])), [8 * term, 4 * term, 8 * term]);
        // Beside the head alone, nothing is gone back through.
        let head = of(&["lm_head"], &[]);
        assert!(head.activations < plain.activations);
        assert!(head.activations >= 4 * 8 * 512 * 3 * 50272);
    }

    #[test]
    fn what_is_frozen_is_held_as_it_is_told() {
        let options = TrainOptions::default();
        let of = |dtype, quantize: Option<&QuantSpec>| {
            let method = Method::adapter(LoraConfig::default(), 1);
            TrainingMemory::of(&config(), &method, dtype, quantize, &options, 64).expect("it fits").weights
        };
        let [plain, half] = [of(DType::F32, None), of(DType::BF16, None)];
        let packed = of(DType::F32, Some(&QuantSpec::nf4()));
        assert!(half < plain * 51 / 100 + 8 * 12 * 2 * 8 * 1536, "{half} of {plain}");
        assert!(packed < half, "{packed} of {half}");
    }
}
