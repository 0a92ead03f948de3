//! `adapter_config.json`, as PEFT 0.21 writes it.

use crate::{Error, ErrorKind, Result};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::DeserializeOwned};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

/// What an adapter is, and to which modules it belongs: the content of `adapter_config.json`.
///
/// ```
/// use opt_core::adapter::{AdapterConfig, AdapterMethod};
///
/// let config = AdapterConfig::from_json(r#"{"peft_type": "LORA", "r": 16, "lora_alpha": 32}"#)?;
/// let AdapterMethod::Lora(lora) = &config.method else { unreachable!() };
/// assert_eq!((lora.r, lora.scale(16, 32.0)), (16, 2.0));
/// # Ok::<(), opt_core::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct AdapterConfig {
    /// How the model is adapted.
    pub method: AdapterMethod,
    /// What it was trained for, as PEFT names it: `CAUSAL_LM`.
    pub task_type: Option<String>,
    /// The model it was trained for: a path or a hub id.
    pub base_model_name_or_path: Option<String>,
    /// That model's revision on the hub.
    pub revision: Option<String>,
    /// Modules that are trained whole and saved beside the adapter: those whose names end so.
    pub modules_to_save: Vec<String>,
}

/// The ways of adapting a model.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum AdapterMethod {
    /// Low-rank terms beside weights (arXiv 2106.09685), and what grew out of it.
    Lora(LoraConfig),
    /// Trained keys and values before the first token, in every layer (arXiv 2101.00190).
    Prefix(PrefixConfig),
    /// Trained embeddings before the first token (arXiv 2104.08691). What P-tuning saves is the same.
    Prompt(PromptConfig),
}

/// LoRA's settings, by PEFT's names.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct LoraConfig {
    /// The rank.
    pub r: usize,
    /// Scales the low-rank term, see [`LoraConfig::scale`].
    #[serde(serialize_with = "number")]
    pub lora_alpha: f64,
    /// Dropout before the low-rank term, in training.
    pub lora_dropout: f64,
    /// Which biases are trained too.
    pub bias: Bias,
    /// The modules that are adapted.
    pub target_modules: Names,
    /// Modules that are not, although they are among the targets.
    pub exclude_modules: Option<Names>,
    /// Only these layers, for targets that are a list.
    pub layers_to_transform: Option<Layers>,
    /// The name before a layer's number: `layers`. Any if none.
    pub layers_pattern: Option<Names>,
    /// Other ranks, by regular expressions that match the end of a module's name; the first that does counts.
    pub rank_pattern: BTreeMap<String, usize>,
    /// Other values of `lora_alpha`, likewise.
    #[serde(serialize_with = "numbers")]
    pub alpha_pattern: BTreeMap<String, f64>,
    /// Scales by α / √r (arXiv 2312.03732).
    pub use_rslora: bool,
    /// Weights are split into direction and magnitude (arXiv 2402.09353).
    pub use_dora: bool,
    /// Whether the low-rank term has a bias of its own.
    pub lora_bias: bool,
    /// How the low-rank term began: `true`, `false` or a name.
    pub init_lora_weights: Value,
}

/// Settings of prefix tuning.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct PrefixConfig {
    /// The sizes.
    #[serde(flatten)]
    pub sizes: VirtualTokens,
    /// Width of the network that the prefix came from, in training.
    pub encoder_hidden_size: Option<usize>,
    /// Whether there was such a network. What is saved has passed through it.
    pub prefix_projection: bool,
}

/// Settings of prompt tuning.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct PromptConfig {
    /// The sizes.
    #[serde(flatten)]
    pub sizes: VirtualTokens,
    /// `RANDOM`, `SAMPLE_VOCAB` or `TEXT`.
    pub prompt_tuning_init: String,
    /// The text it began as.
    pub prompt_tuning_init_text: Option<String>,
    /// The tokenizer of that text.
    pub tokenizer_name_or_path: Option<String>,
}

/// Sizes of what stands before the first token, and of the model.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct VirtualTokens {
    /// How many virtual tokens there are.
    pub num_virtual_tokens: usize,
    /// Their width: that of the token table for prompts, of the hidden states for prefixes.
    pub token_dim: Option<usize>,
    /// Layers of the model.
    pub num_layers: Option<usize>,
    /// Attention heads of each.
    pub num_attention_heads: Option<usize>,
    /// 1: there is a decoder only.
    pub num_transformer_submodules: Option<usize>,
}

/// Which biases are trained and saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Bias {
    /// None.
    #[default]
    None,
    /// All of the model's.
    All,
    /// Those of the adapted modules.
    LoraOnly,
}

/// Names of modules: a list of which each is the end of a module's name, or one regular expression for the whole of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Names {
    /// A regular expression, or [`Names::ALL_LINEAR`].
    Pattern(String),
    /// Ends of names, such as `q_proj`.
    List(Vec<String>),
}

impl Names {
    /// Stands for all linears but the LM head.
    pub const ALL_LINEAR: &'static str = "all-linear";

    /// Whether this is [`Names::ALL_LINEAR`].
    pub fn is_all_linear(&self) -> bool {
        matches!(self, Names::Pattern(pattern) if pattern.eq_ignore_ascii_case(Self::ALL_LINEAR))
    }

    /// A list.
    pub fn list(names: impl IntoIterator<Item = impl Into<String>>) -> Self {
        Names::List(names.into_iter().map(Into::into).collect())
    }

    /// The entries of the list, or the one pattern.
    pub fn entries(&self) -> &[String] {
        match self {
            Names::Pattern(pattern) => std::slice::from_ref(pattern),
            Names::List(names) => names,
        }
    }
}

/// Numbers of layers: one, or several.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Layers {
    /// One layer.
    One(usize),
    /// Several; none at all means no restriction.
    Many(Vec<usize>),
}

impl Layers {
    /// The numbers.
    pub fn numbers(&self) -> &[usize] {
        match self {
            Layers::One(layer) => std::slice::from_ref(layer),
            Layers::Many(layers) => layers,
        }
    }
}

/// The values of `peft_type` that are known.
const TYPES: [&str; 4] = ["LORA", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING"];

impl Default for LoraConfig {
    fn default() -> Self {
        Self {
            r: 8,
            lora_alpha: 8.0,
            lora_dropout: 0.0,
            bias: Bias::None,
            target_modules: Names::list(["q_proj", "v_proj"]),
            exclude_modules: None,
            layers_to_transform: None,
            layers_pattern: None,
            rank_pattern: BTreeMap::new(),
            alpha_pattern: BTreeMap::new(),
            use_rslora: false,
            use_dora: false,
            lora_bias: false,
            init_lora_weights: Value::Bool(true),
        }
    }
}

impl Default for PrefixConfig {
    fn default() -> Self {
        let sizes = VirtualTokens { num_virtual_tokens: 20, ..VirtualTokens::default() };
        Self { sizes, encoder_hidden_size: None, prefix_projection: false }
    }
}

impl Default for PromptConfig {
    fn default() -> Self {
        Self {
            sizes: PrefixConfig::default().sizes,
            prompt_tuning_init: "RANDOM".to_owned(),
            prompt_tuning_init_text: None,
            tokenizer_name_or_path: None,
        }
    }
}

impl LoraConfig {
    /// What the low-rank term is multiplied by: α / r, or α / √r.
    pub fn scale(&self, rank: usize, alpha: f64) -> f64 {
        let rank = rank.max(1) as f64;
        alpha / if self.use_rslora { rank.sqrt() } else { rank }
    }

    /// # Errors
    /// [`ErrorKind::Config`] naming the key.
    pub(crate) fn check(&self) -> Result<()> {
        if let Some((key, _)) = [("r", self.r)]
            .into_iter()
            .chain(self.rank_pattern.iter().map(|(key, rank)| (&key[..], *rank)))
            .find(|(_, rank)| *rank == 0)
        {
            return Err(wrong(key, "expected a rank of at least 1, found 0"));
        }
        let finite =
            std::iter::once(&self.lora_alpha).chain(self.alpha_pattern.values()).all(|a| a.is_finite());
        if !finite {
            return Err(wrong("lora_alpha", "expected a finite number"));
        }
        if !(0.0..1.0).contains(&self.lora_dropout) {
            return Err(wrong(
                "lora_dropout",
                format_args!("expected 0 to below 1, found {}", self.lora_dropout),
            ));
        }
        let layers = self.layers_to_transform.is_some();
        if matches!(self.target_modules, Names::Pattern(_)) && (layers || self.layers_pattern.is_some()) {
            let message = "expected none where target_modules is no list";
            return Err(wrong(if layers { "layers_to_transform" } else { "layers_pattern" }, message));
        }
        if self.layers_pattern.as_ref().is_some_and(|names| !names.entries().is_empty()) && !layers {
            return Err(wrong("layers_pattern", "expected layers_to_transform beside it"));
        }
        if self.use_dora && self.lora_bias {
            return Err(wrong("lora_bias", "DoRA has none; expected false beside use_dora"));
        }
        Ok(())
    }
}

macro_rules! from {
    ($($kind:ident: $config:ty),*) => {$(
        impl From<$config> for AdapterConfig {
            fn from(config: $config) -> Self {
                Self::new(AdapterMethod::$kind(config))
            }
        }
    )*};
}

from!(Lora: LoraConfig, Prefix: PrefixConfig, Prompt: PromptConfig);

impl AdapterConfig {
    /// An adapter of this kind for a causal language model.
    pub fn new(method: AdapterMethod) -> Self {
        Self {
            method,
            task_type: Some("CAUSAL_LM".to_owned()),
            base_model_name_or_path: None,
            revision: None,
            modules_to_save: Vec::new(),
        }
    }

    /// Sets [`AdapterConfig::base_model_name_or_path`].
    #[must_use]
    pub fn base(self, model: impl Into<String>) -> Self {
        Self { base_model_name_or_path: Some(model.into()), ..self }
    }

    /// Sets [`AdapterConfig::modules_to_save`].
    #[must_use]
    pub fn save(self, modules: impl IntoIterator<Item = impl Into<String>>) -> Self {
        Self { modules_to_save: modules.into_iter().map(Into::into).collect(), ..self }
    }

    /// Reads an adapter_config.json. Keys that are not known are ignored, absent ones and `null` have PEFT's defaults.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] for text that is not JSON and for values that cannot be meant, naming the key;
    /// [`ErrorKind::Unsupported`] for another kind of adapter and for settings that would change what it computes.
    pub fn from_json(text: &str) -> Result<Self> {
        let value = serde_json::from_str(text.trim_start_matches('\u{feff}'))
            .map_err(|e| Error::because(ErrorKind::Config, "adapter_config.json is not usable", e))?;
        Self::from_value(value)
    }

    fn from_value(value: Value) -> Result<Self> {
        let Value::Object(mut map) = value else {
            return Err(Error::new(ErrorKind::Config, "adapter_config.json: expected a JSON object"));
        };
        map.retain(|_, value| !value.is_null());
        let kind = match map.get("peft_type") {
            Some(Value::String(kind)) => kind.to_ascii_uppercase(),
            Some(other) => return Err(wrong("peft_type", format_args!("expected a name, found {other}"))),
            None => {
                return Err(wrong(
                    "peft_type",
                    format_args!("expected one of {}, found none", TYPES.join(", ")),
                ));
            }
        };
        let method = match &kind[..] {
            "LORA" => {
                refuse(&map)?;
                let lora: LoraConfig = fields(&map)?;
                lora.check()?;
                AdapterMethod::Lora(lora)
            }
            "PREFIX_TUNING" => AdapterMethod::Prefix(fields(&map)?),
            "PROMPT_TUNING" | "P_TUNING" => AdapterMethod::Prompt(fields(&map)?),
            other => {
                let message = format_args!("expected one of {}, found {other:?}", TYPES.join(", "));
                return Err(Error::new(ErrorKind::Unsupported, message).at("adapter_config.json: peft_type"));
            }
        };
        let about: About = fields(&map)?;
        let config = Self {
            method,
            task_type: about.task_type,
            base_model_name_or_path: about.base_model_name_or_path,
            revision: about.revision,
            modules_to_save: about.modules_to_save,
        };
        if let Some(sizes) = config.sizes() {
            if sizes.num_virtual_tokens == 0 || sizes.num_virtual_tokens > 1 << 20 {
                let found = sizes.num_virtual_tokens;
                return Err(wrong(
                    "num_virtual_tokens",
                    format_args!("expected 1 to {}, found {found}", 1 << 20),
                ));
            }
            if let Some(found) = sizes.num_transformer_submodules.filter(|n| *n != 1) {
                return Err(wrong("num_transformer_submodules", format_args!("expected 1, found {found}")));
            }
        }
        Ok(config)
    }

    /// The text of an adapter_config.json that PEFT reads: every key its class needs.
    pub fn to_json(&self) -> String {
        let mut text = format!("{:#}", self.to_value());
        text.push('\n');
        text
    }

    fn to_value(&self) -> Value {
        let of = |value: std::result::Result<Value, serde_json::Error>| value.unwrap_or_default();
        let (kind, own, defaults) = match &self.method {
            AdapterMethod::Lora(lora) => ("LORA", of(serde_json::to_value(lora)), lora_defaults()),
            AdapterMethod::Prefix(prefix) => ("PREFIX_TUNING", of(serde_json::to_value(prefix)), json!({})),
            AdapterMethod::Prompt(prompt) => {
                ("PROMPT_TUNING", of(serde_json::to_value(prompt)), json!({ "tokenizer_kwargs": null }))
            }
        };
        let saved = (!self.modules_to_save.is_empty()).then_some(&self.modules_to_save);
        let about = json!({
            "peft_type": kind, "peft_version": "0.21.2", "auto_mapping": null, "inference_mode": true,
            "task_type": self.task_type, "base_model_name_or_path": self.base_model_name_or_path,
            "revision": self.revision, "modules_to_save": saved,
        });
        let parts = [defaults, own, about].into_iter();
        let entries = parts.filter_map(|part| if let Value::Object(map) = part { Some(map) } else { None });
        Value::Object(entries.flatten().collect())
    }

    /// The settings of LoRA, if it is that.
    pub fn lora(&self) -> Option<&LoraConfig> {
        match &self.method {
            AdapterMethod::Lora(lora) => Some(lora),
            _ => None,
        }
    }

    /// The sizes of a prefix or a prompt.
    pub fn sizes(&self) -> Option<&VirtualTokens> {
        match &self.method {
            AdapterMethod::Lora(_) => None,
            AdapterMethod::Prefix(prefix) => Some(&prefix.sizes),
            AdapterMethod::Prompt(prompt) => Some(&prompt.sizes),
        }
    }

    /// How many positions stand before the first token; 0 for LoRA.
    pub fn virtual_tokens(&self) -> usize {
        self.sizes().map_or(0, |sizes| sizes.num_virtual_tokens)
    }
}

impl Serialize for AdapterConfig {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        self.to_value().serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for AdapterConfig {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        Self::from_value(Value::deserialize(deserializer)?).map_err(serde::de::Error::custom)
    }
}

/// What every kind of adapter says.
#[derive(Default, Deserialize)]
#[serde(default)]
struct About {
    task_type: Option<String>,
    base_model_name_or_path: Option<String>,
    revision: Option<String>,
    modules_to_save: Vec<String>,
}

/// The fields that `T` knows.
fn fields<T: DeserializeOwned>(map: &Map<String, Value>) -> Result<T> {
    // serde does not name the key whose value it cannot use; one at a time, it is known.
    for (key, value) in map {
        let alone = Map::from_iter([(key.clone(), value.clone())]);
        serde_json::from_value::<T>(alone.into()).map_err(|e| wrong(key, e))?;
    }
    serde_json::from_value(map.clone().into()).map_err(|e| wrong("values", e))
}

/// Ways of starting a low-rank term that change the weights beside it.
const CHANGE_THE_BASE: [&str; 5] = ["pissa", "olora", "corda", "loftq", "lora_ga"];

/// Settings of PEFT's that are training's alone, or that nothing here depends on.
fn lora_defaults() -> Value {
    json!({
        "alora_invocation_tokens": null, "arrow_config": null, "corda_config": null, "ensure_weight_tying": false,
        "eva_config": null, "fan_in_fan_out": false, "kasa_config": null, "layer_replication": null,
        "loftq_config": {}, "lora_ga_config": null, "megatron_config": null, "megatron_core": "megatron.core",
        "monteclora_config": null, "qalora_group_size": 16, "target_parameters": null,
        "trainable_token_indices": null, "use_bdlora": null, "use_qalora": false, "velora_config": null,
    })
}

/// Refuses settings that would make the adapter compute something else than what is implemented.
fn refuse(map: &Map<String, Value>) -> Result<()> {
    let is_set = |key: &str| match map.get(key) {
        None | Some(Value::Null | Value::Bool(false)) => false,
        Some(Value::Array(entries)) => !entries.is_empty(),
        Some(Value::Object(entries)) => !entries.is_empty(),
        Some(_) => true,
    };
    let keys = [
        "alora_invocation_tokens",
        "arrow_config",
        "ensure_weight_tying",
        "kasa_config",
        "layer_replication",
        "megatron_config",
        "monteclora_config",
        "target_parameters",
        "trainable_token_indices",
        "use_bdlora",
        "use_qalora",
    ];
    let unsupported = |key: &str, message: String| {
        Err(Error::new(ErrorKind::Unsupported, message).at(format_args!("adapter_config.json: {key}")))
    };
    if let Some(key) = keys.into_iter().find(|key| is_set(key)) {
        let found = map.get(key).map(ToString::to_string).unwrap_or_default();
        let found: String = found.chars().take(60).collect();
        return unsupported(key, format!("not supported; expected it absent or null, found {found}"));
    }
    if let Some(Value::String(init)) = map.get("init_lora_weights")
        && CHANGE_THE_BASE.iter().any(|name| init.to_ascii_lowercase().starts_with(name))
    {
        return unsupported(
            "init_lora_weights",
            format!(
                "{init:?} also changed the model's own weights; in PEFT, save it as plain LoRA with path_initial_model_for_weight_conversion"
            ),
        );
    }
    Ok(())
}

fn wrong(key: &str, message: impl std::fmt::Display) -> Error {
    Error::new(ErrorKind::Config, format_args!("adapter_config.json: {key}: {message}"))
}

/// Whole numbers without a fraction, as PEFT writes them.
fn tidy(value: f64) -> Value {
    if value.fract() == 0.0 && value.abs() < 1e15 { json!(value as i64) } else { json!(value) }
}

fn number<S: Serializer>(value: &f64, serializer: S) -> std::result::Result<S::Ok, S::Error> {
    tidy(*value).serialize(serializer)
}

fn numbers<S: Serializer>(
    values: &BTreeMap<String, f64>,
    serializer: S,
) -> std::result::Result<S::Ok, S::Error> {
    serializer.collect_map(values.iter().map(|(key, value)| (key, tidy(*value))))
}
