//! What a training starts from: the plan of a method for one model, new parameters, and how they become files again.

use super::{
    SideFiles,
    distill::is_projection,
    learner::Learn,
    store::write_model,
    tuner::{Full, Method},
    weights::{LoraStart, Magnitude, Plan, VirtualStart},
};
use crate::{
    Error, ErrorKind, Result,
    adapter::{
        Adapter, AdapterConfig, AdapterMethod, HEADS, LoraConfig, PREFIX, Part, PrefixConfig, PromptConfig,
        TargetKind,
    },
    checkpoint::{Checkpoint, Weight, io, pretty},
    config::OptConfig,
    generation::Random,
    heads::{HEAD_CONFIG, Task},
};
use ndarray::{Array2, ArrayD, Axis};
use opt_backend::DType;
use serde_json::Value;
use std::{
    collections::{BTreeSet, HashMap},
    path::Path,
    sync::Arc,
};

/// How what was trained becomes files that can be used.
pub(super) enum Artifact {
    /// A whole model: the weights it was made from, the files beside them, and the head on top.
    Model { base: Arc<Checkpoint>, files: SideFiles, head: Option<Task> },
    /// An adapter in PEFT's files, for a model of this shape.
    Adapter { config: Box<AdapterConfig>, model: OptConfig, head: Option<Task> },
}

impl Artifact {
    pub(super) fn write(&self, inside: &Path, learner: &dyn Learn) -> Result<()> {
        match self {
            Self::Model { base, files, head: None } => write_model(inside, base, files, &[], learner),
            Self::Model { base, files, head: Some(task) } => {
                let mut files = files.clone();
                for (_, contents) in files.iter_mut().filter(|(name, _)| name == "config.json") {
                    *contents = with_head(contents, task)?;
                }
                write_model(inside, base, &files, &task.shapes(base.config().word_embed_proj_dim), learner)
            }
            Self::Adapter { config, model, head } => {
                adapter(config, model, head.as_ref(), learner)?.save(inside)?;
                let Some(task) = head else { return Ok(()) };
                let path = inside.join(HEAD_CONFIG);
                std::fs::write(&path, pretty(&Value::Object(task.config_keys()))?)
                    .map_err(|e| io("cannot write", &path, e))
            }
        }
    }

    /// Whether what was trained under this name cannot be read from the files again.
    pub(super) fn leaves_out(&self, name: &str) -> bool {
        matches!(self, Self::Adapter { .. }) || is_projection(name)
    }

    /// Puts a head on top, as transformers and PEFT describe it.
    pub(super) fn put_on(&mut self, task: &Task) -> Result<()> {
        match self {
            Self::Model { head, .. } => *head = Some(task.clone()),
            Self::Adapter { config, head, .. } => {
                if config.lora().is_none() {
                    let message =
                        "a head: expected a whole model or LoRA to train it with, found another adapter";
                    return Err(Error::new(ErrorKind::Unsupported, message));
                }
                let (task_type, modules) = task.peft();
                **config = without_head(config);
                config.task_type = Some(task_type.to_owned());
                config.modules_to_save.extend(modules.iter().map(|module| (*module).to_owned()));
                *head = Some(task.clone());
            }
        }
        Ok(())
    }
}

/// A config.json that says what a head is for.
fn with_head(config_json: &[u8], task: &Task) -> Result<Vec<u8>> {
    let mut config: Value = serde_json::from_slice(config_json)
        .map_err(|e| Error::because(ErrorKind::Config, "config.json is not usable", e))?;
    if let Some(map) = config.as_object_mut() {
        map.remove("num_labels");
        map.extend(task.config_keys());
    }
    pretty(&config)
}

/// An adapter's configuration without the head that was trained beside it: the adapter is trained further for tokens.
pub(super) fn without_head(config: &AdapterConfig) -> AdapterConfig {
    let mut config = config.clone();
    if config.modules_to_save.iter().any(|module| HEADS.contains(&&module[..])) {
        config.modules_to_save.retain(|module| !HEADS.contains(&&module[..]));
        config.task_type = Some("CAUSAL_LM".to_owned());
    }
    config
}

/// What was trained, as an adapter.
pub(super) fn adapter(
    config: &AdapterConfig,
    model: &OptConfig,
    head: Option<&Task>,
    learner: &dyn Learn,
) -> Result<Adapter> {
    let mut tensors = Vec::new();
    for (name, shape) in head.map_or_else(Vec::new, |task| task.shapes(model.word_embed_proj_dim)) {
        let value = learner.value(&name)?.into_iter().collect();
        let misfit = |e| Error::because(ErrorKind::Checkpoint, format_args!("tensor {name}"), e);
        tensors.push((format!("{PREFIX}{name}"), ArrayD::from_shape_vec(shape, value).map_err(misfit)?));
    }
    for slot in config.slots(model)? {
        let value = match &slot.part {
            // On the tape it is a table.
            Part::A(module) if module == "embed_tokens" => {
                learner.value(&format!("{module}.lora_A"))?.reversed_axes()
            }
            Part::A(module) => learner.value(&format!("{module}.lora_A"))?,
            Part::B(module) => learner.value(&format!("{module}.lora_B"))?,
            Part::Magnitude(module) => learner.value(&format!("{module}.lora_magnitude_vector"))?,
            Part::Instead(name) => learner.value(name)?,
            Part::OwnBias(module) => learner.value(&format!("{module}.lora_B.bias"))?,
            Part::Virtual => virtual_rows(learner)?,
            Part::Copy(_) => continue,
        };
        let value = ArrayD::from_shape_vec(slot.shape, value.iter().copied().collect());
        let misfit = |e| Error::because(ErrorKind::Checkpoint, format_args!("tensor {}", slot.key), e);
        tensors.push((slot.key.clone(), value.map_err(misfit)?));
    }
    Ok(Adapter::new("trained", config.clone(), tensors))
}

/// What a prefix or prompt came to; a projection is applied, as PEFT saves it.
fn virtual_rows(learner: &dyn Learn) -> Result<Array2<f32>> {
    let projected = learner.shapes().iter().any(|(name, _)| name == "transform.0.weight");
    if !projected {
        return learner.value("prompt_embeddings");
    }
    let value = |name: &str| learner.value(name);
    let inner =
        value("embedding.weight")?.dot(&value("transform.0.weight")?.t()) + &value("transform.0.bias")?;
    let bias = value("transform.2.bias")?;
    let bias = bias.iter().copied().collect::<ndarray::Array1<f32>>().insert_axis(Axis(0));
    Ok(inner.mapv(f32::tanh).dot(&value("transform.2.weight")?.t()) + &bias)
}

/// Random numbers for new parameters.
pub(crate) struct Draws(pub(crate) Random);

impl Draws {
    pub(super) fn uniform(&mut self, shape: [usize; 2], bound: f64) -> Array2<f32> {
        Array2::from_shape_simple_fn(shape, || ((2.0 * self.0.uniform() - 1.0) * bound) as f32)
    }

    /// By Box and Muller's transform.
    pub(crate) fn normal(&mut self, shape: [usize; 2], deviation: f64) -> Array2<f32> {
        Array2::from_shape_simple_fn(shape, || {
            let radius = (-2.0 * (1.0 - self.0.uniform()).ln()).sqrt();
            (deviation * radius * (std::f64::consts::TAU * self.0.uniform()).cos()) as f32
        })
    }
}

impl Plan {
    /// What a method means for a model; products with what is trained are in `dtype`.
    pub(super) fn new(method: &Method, checkpoint: &Checkpoint, dtype: DType) -> Result<Self> {
        let config = checkpoint.config();
        if config.attention_dropout > 0.0 {
            let message = format_args!(
                "config.json: attention_dropout {}: dropout of attention weights is not supported; expected 0",
                config.attention_dropout
            );
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        let plan =
            Plan { dtype, dropout: config.dropout as f32, padding: config.pad_token_id, ..Plan::default() };
        match method {
            Method::Full(Full { layers: None }) => Ok(Plan { trains: Box::new(|_| true), ..plan }),
            Method::Full(Full { layers: Some(layers) }) => {
                let count = config.num_hidden_layers;
                if let Some(found) = layers.iter().find(|layer| **layer >= count) {
                    let message =
                        format_args!("layers to train: expected numbers below {count}, found {found}");
                    return Err(Error::new(ErrorKind::Option, message));
                }
                if layers.is_empty() {
                    return Err(Error::new(
                        ErrorKind::Option,
                        "layers to train: expected at least one, found none",
                    ));
                }
                let heads: Vec<String> = layers.iter().map(|layer| format!("layers.{layer}.")).collect();
                let trains = move |name: &str| heads.iter().any(|head| name.starts_with(head));
                Ok(Plan { trains: Box::new(trains), ..plan })
            }
            Method::New(config, seed) => {
                plan.with_adapter(config, None, checkpoint, &mut Draws(Random::new(*seed, 3)))
            }
            Method::Continue(adapter) => {
                adapter.check(config)?;
                plan.with_adapter(adapter.config(), Some(adapter), checkpoint, &mut Draws(Random::new(0, 3)))
            }
        }
    }

    fn with_adapter(
        self,
        config: &AdapterConfig,
        given: Option<&Adapter>,
        checkpoint: &Checkpoint,
        draws: &mut Draws,
    ) -> Result<Self> {
        let model = checkpoint.config();
        match &config.method {
            AdapterMethod::Lora(lora) => self.with_lora(config, lora, given, model, draws),
            AdapterMethod::Prefix(prefix) => {
                let rows = given.map(|given| virtual_of(given, model)).transpose()?;
                Ok(Plan { tokens: Some(prefix_start(prefix, rows, model, draws)), ..self })
            }
            AdapterMethod::Prompt(prompt) => {
                let rows = match given {
                    Some(given) => virtual_of(given, model)?,
                    None => prompt_start(prompt, checkpoint, draws)?,
                };
                Ok(Plan { tokens: Some(VirtualStart::Prompt(rows)), ..self })
            }
        }
    }

    fn with_lora(
        self,
        config: &AdapterConfig,
        lora: &LoraConfig,
        given: Option<&Adapter>,
        model: &OptConfig,
        draws: &mut Draws,
    ) -> Result<Self> {
        let unsupported = |what: &str| {
            let message = format_args!("{what}: can be used, but not trained");
            Err(Error::new(ErrorKind::Unsupported, message))
        };
        let slots = config.slots(model)?;
        let tensor = |part: &Part| {
            let key = &slots.iter().find(|slot| slot.part == *part)?.key;
            given?.tensors().get(key).map(matrix)
        };
        let mut starts = HashMap::new();
        for target in lora.targets(model, &config.modules_to_save)? {
            let embeds = target.kind == TargetKind::Embedding;
            if embeds && lora.use_dora {
                return unsupported("use_dora beside embed_tokens");
            }
            let [out, input] = target.shape;
            let rank = target.rank;
            let a = match tensor(&Part::A(target.module.clone())) {
                Some(a) => a?,
                // As torch begins tables' terms: A with nothing, B with a normal distribution.
                None if embeds => Array2::zeros((rank, input)),
                None if lora.init_lora_weights == "gaussian" => {
                    draws.normal([rank, input], 1.0 / rank as f64)
                }
                // Kaiming's with a = √5, as torch's linears begin.
                None => draws.uniform([rank, input], (input as f64).sqrt().recip()),
            };
            let b = match tensor(&Part::B(target.module.clone())) {
                Some(b) => b?,
                None if embeds => draws.normal([out, rank], 1.0),
                None => Array2::zeros((out, rank)),
            };
            let a = if embeds { a.reversed_axes().as_standard_layout().into_owned() } else { a };
            let bias = match tensor(&Part::OwnBias(target.module.clone())) {
                _ if !lora.lora_bias => None,
                Some(bias) => Some(bias?),
                None => Some(Array2::zeros((1, out))),
            };
            let magnitude = match tensor(&Part::Magnitude(target.module.clone())) {
                _ if !lora.use_dora => Magnitude::Free,
                Some(magnitude) => Magnitude::Given(magnitude?),
                None => Magnitude::OfWeight,
            };
            let (scale, dropout) = (target.scale as f32, lora.lora_dropout as f32);
            starts.insert(target.module, LoraStart { a, b, bias, scale, dropout, magnitude });
        }
        let mut whole = BTreeSet::new();
        let mut instead = HashMap::new();
        for slot in &slots {
            if let Part::Instead(name) = &slot.part {
                whole.insert(name.clone());
                if let Some(value) = tensor(&slot.part) {
                    instead.insert(name.clone(), value?);
                }
            }
        }
        let table_apart = model.tie_word_embeddings;
        let trains = Box::new(move |name: &str| whole.contains(name));
        Ok(Plan { lora: starts, trains, instead, table_apart, ..self })
    }
}

/// A tensor of one or two dimensions as a matrix; vectors become `[1, width]`.
fn matrix(tensor: &ArrayD<f32>) -> Result<Array2<f32>> {
    let shape = match tensor.shape() {
        [width] => [1, *width],
        [rows, width] => [*rows, *width],
        other => {
            let message = format_args!("expected a vector or a matrix, found shape {other:?}");
            return Err(Error::new(ErrorKind::Checkpoint, message));
        }
    };
    let misfit = |e| Error::because(ErrorKind::Checkpoint, "adapter", e);
    Array2::from_shape_vec(shape, tensor.iter().copied().collect()).map_err(misfit)
}

fn virtual_of(adapter: &Adapter, model: &OptConfig) -> Result<Array2<f32>> {
    let slots = adapter.config().slots(model)?;
    let key = slots.iter().find(|slot| slot.part == Part::Virtual).map(|slot| &slot.key);
    match key.and_then(|key| adapter.tensors().get(key)) {
        Some(rows) => matrix(rows),
        None => Err(Error::new(ErrorKind::Checkpoint, "adapter: tensor prompt_embeddings is missing")),
    }
}

/// PEFT's `PrefixEncoder`: embeddings from a normal distribution, and linears as torch begins them.
fn prefix_start(
    prefix: &PrefixConfig,
    given: Option<Array2<f32>>,
    model: &OptConfig,
    draws: &mut Draws,
) -> VirtualStart {
    let (tokens, hidden) = (prefix.sizes.num_virtual_tokens, model.hidden_size);
    let parts = 2 * model.num_hidden_layers;
    // What is given has passed through the projection, if there was one.
    if let Some(rows) = given {
        let shape = [tokens * parts, hidden];
        let rows: Vec<f32> = rows.iter().copied().collect();
        return VirtualStart::Prefix(Array2::from_shape_vec(shape, rows).unwrap_or_default());
    }
    if !prefix.prefix_projection {
        return VirtualStart::Prefix(draws.normal([tokens * parts, hidden], 1.0));
    }
    let inner = prefix.encoder_hidden_size.unwrap_or(hidden);
    let bound = |input: usize| (input as f64).sqrt().recip();
    VirtualStart::ProjectedPrefix {
        embedding: draws.normal([tokens, hidden], 1.0),
        first: [draws.uniform([inner, hidden], bound(hidden)), draws.uniform([1, inner], bound(hidden))],
        second: [
            draws.uniform([parts * hidden, inner], bound(inner)),
            draws.uniform([parts, hidden], bound(inner)),
        ],
    }
}

/// Random embeddings, those of random tokens, or those of a text.
fn prompt_start(prompt: &PromptConfig, checkpoint: &Checkpoint, draws: &mut Draws) -> Result<Array2<f32>> {
    let model = checkpoint.config();
    let (tokens, width) = (prompt.sizes.num_virtual_tokens, model.word_embed_proj_dim);
    let ids: Vec<u32> = match &prompt.prompt_tuning_init[..] {
        "RANDOM" => return Ok(draws.normal([tokens, width], 1.0)),
        "SAMPLE_VOCAB" => (0..tokens).map(|_| (draws.0.uniform() * model.vocab_size as f64) as u32).collect(),
        "TEXT" => {
            let text = prompt.prompt_tuning_init_text.as_deref().unwrap_or_default();
            let Some(dir) = checkpoint.directory() else {
                return Err(Error::new(
                    ErrorKind::Tokenizer,
                    "prompt_tuning_init_text: expected a model on disk",
                ));
            };
            let ids =
                crate::tokenizer::Tokenizer::from_dir(dir)?.encode(text, crate::tokenizer::Bos::Model)?;
            if ids.is_empty() {
                return Err(Error::new(
                    ErrorKind::Config,
                    "prompt_tuning_init_text: expected a text, found none",
                ));
            }
            // Too short a text is repeated, too long a one cut, as in PEFT.
            ids.into_iter().cycle().take(tokens).collect()
        }
        other => {
            let message =
                format_args!("prompt_tuning_init: expected RANDOM, SAMPLE_VOCAB or TEXT, found {other:?}");
            return Err(Error::new(ErrorKind::Config, message));
        }
    };
    let mut rows = Array2::zeros((tokens, width));
    let table = checkpoint.weight("embed_tokens.weight", [model.vocab_size, width])?;
    let table = match &table {
        Weight::Plain(table) => table.matrix()?.to_f32(),
        Weight::Quantized(table) => table.dequantize(),
    };
    for (mut row, id) in rows.outer_iter_mut().zip(ids) {
        if let Some(entry) = table.outer_iter().nth(id as usize) {
            row.assign(&entry);
        }
    }
    Ok(rows)
}
