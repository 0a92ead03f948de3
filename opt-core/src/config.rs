//! `config.json`: the shape of an OPT model.

use crate::{Error, ErrorKind, Result, generation::TokenIds};
use opt_backend::{Activation, DType};
use serde::{Deserialize, Serialize};

/// The epsilon of every LayerNorm; torch's default, not in any config.
pub const LAYER_NORM_EPS: f32 = 1e-5;

/// Rows of the position table before position 0 (fairseq numbered positions from its padding id + 1).
pub const POSITION_OFFSET: usize = 2;

/// The model's shape and switches, with the names and defaults of transformers' `OPTConfig` (4.57.6).
///
/// ```
/// let config = opt_core::config::OptConfig::from_json(r#"{"model_type": "opt", "hidden_size": 1024,
///     "num_attention_heads": 16, "word_embed_proj_dim": 512, "do_layer_norm_before": false}"#)?;
/// assert_eq!(config.head_dim(), 64);
/// assert!(config.has_projections());
/// # Ok::<(), opt_core::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
#[serde(default)]
pub struct OptConfig {
    /// Rows of the token table and width of the logits.
    pub vocab_size: usize,
    /// Width of the hidden states.
    pub hidden_size: usize,
    /// Number of decoder layers.
    pub num_hidden_layers: usize,
    /// Attention heads of each layer; must divide `hidden_size`.
    pub num_attention_heads: usize,
    /// Width of the feed-forward block.
    pub ffn_dim: usize,
    /// Longest context; the position table has [`POSITION_OFFSET`] rows more.
    pub max_position_embeddings: usize,
    /// Width of the token embeddings; `hidden_size` unless given. Where it differs, the model has `project_in/out`.
    pub word_embed_proj_dim: usize,
    /// LayerNorm before each block (true) or after its residual (false, 350m).
    pub do_layer_norm_before: bool,
    /// No LayerNorm after the last layer (fine-tunes from before transformers 4.20.1).
    #[serde(rename = "_remove_final_layer_norm")]
    pub remove_final_layer_norm: bool,
    /// Biases in the six linears of each layer.
    pub enable_bias: bool,
    /// Scale and shift in the LayerNorms.
    pub layer_norm_elementwise_affine: bool,
    /// The LM head is the token table.
    pub tie_word_embeddings: bool,
    /// Function of the feed-forward block, as transformers names it.
    pub activation_function: String,
    /// Dropout after attention output and feed-forward, in training.
    pub dropout: f64,
    /// Dropout of attention weights, in training.
    pub attention_dropout: f64,
    /// Probability of skipping a layer, in training.
    pub layerdrop: f64,
    /// Deviation of new weights.
    pub init_std: f64,
    /// Padding token.
    pub pad_token_id: Option<u32>,
    /// Token put before a text.
    pub bos_token_id: Option<u32>,
    /// Token or tokens that end a text.
    pub eos_token_id: Option<TokenIds>,
    /// Always `opt`.
    pub model_type: String,
    /// Number format of the weights in the file, if the config says it.
    #[serde(alias = "torch_dtype")]
    pub dtype: Option<String>,
}

/// The keys of special ids.
const SPECIAL_IDS: [&str; 3] = ["pad_token_id", "bos_token_id", "eos_token_id"];

/// Ids that are no token's become null (or leave their list): nothing can be equal to them.
fn drop_impossible(id: &mut serde_json::Value, vocabulary: u64) {
    let impossible = |id: &serde_json::Value| {
        id.as_i64().is_some_and(|id| u64::try_from(id).map_or(true, |id| id >= vocabulary))
    };
    match id {
        serde_json::Value::Array(ids) => ids.retain(|id| !impossible(id)),
        id if impossible(id) => *id = serde_json::Value::Null,
        _ => {}
    }
}

impl Default for OptConfig {
    fn default() -> Self {
        Self {
            vocab_size: 50272,
            hidden_size: 768,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            ffn_dim: 3072,
            max_position_embeddings: 2048,
            word_embed_proj_dim: 0,
            do_layer_norm_before: true,
            remove_final_layer_norm: false,
            enable_bias: true,
            layer_norm_elementwise_affine: true,
            tie_word_embeddings: true,
            activation_function: "relu".to_owned(),
            dropout: 0.1,
            attention_dropout: 0.0,
            layerdrop: 0.0,
            init_std: 0.02,
            pad_token_id: Some(1),
            bos_token_id: Some(2),
            eos_token_id: Some(TokenIds::One(2)),
            model_type: "opt".to_owned(),
            dtype: None,
        }
    }
}

impl OptConfig {
    /// Reads a config.json; keys that OPT does not use are ignored, `null` leaves a key's default standing (and a
    /// special id without a token), and so does a special id that no token has, such as -1.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] for text that is not JSON, another `model_type`, and values no model can have.
    pub fn from_json(text: &str) -> Result<Self> {
        let fail = |e: serde_json::Error| Error::because(ErrorKind::Config, "config.json is not usable", e);
        let text = text.trim_start_matches('\u{feff}');
        // Through a value, so that a file with both names of the dtype is not a duplicate field to serde.
        let mut value: serde_json::Value = serde_json::from_str(text).map_err(fail)?;
        let Some(map) = value.as_object_mut() else {
            return Err(Error::new(ErrorKind::Config, "config.json: expected a JSON object"));
        };
        if map.contains_key("dtype") {
            map.remove("torch_dtype");
        }
        if map.get("dtype").and_then(serde_json::Value::as_str) == Some("auto") {
            map.remove("dtype");
        }
        map.retain(|key, value| !value.is_null() || SPECIAL_IDS.contains(&&key[..]));
        let vocabulary = map.get("vocab_size").and_then(serde_json::Value::as_u64);
        let vocabulary = vocabulary.unwrap_or(Self::default().vocab_size as u64);
        for key in SPECIAL_IDS {
            if let Some(id) = map.get_mut(key) {
                drop_impossible(id, vocabulary);
            }
        }
        // serde does not name the key whose value it cannot use; one at a time, it is known.
        for (key, value) in map.iter() {
            let alone = serde_json::Map::from_iter([(key.clone(), value.clone())]);
            serde_json::from_value::<Self>(alone.into())
                .map_err(|e| Error::because(ErrorKind::Config, format_args!("config.json: {key}"), e))?;
        }
        let mut config: Self = serde_json::from_value(value).map_err(fail)?;
        if config.word_embed_proj_dim == 0 {
            config.word_embed_proj_dim = config.hidden_size;
        }
        config.validate()?;
        Ok(config)
    }

    /// Width of one attention head.
    pub fn head_dim(&self) -> usize {
        self.hidden_size / self.num_attention_heads
    }

    /// Whether embeddings are narrower (or wider) than the hidden states, so that projections stand between.
    pub fn has_projections(&self) -> bool {
        self.word_embed_proj_dim != self.hidden_size
    }

    /// Whether a LayerNorm follows the last layer.
    pub fn has_final_layer_norm(&self) -> bool {
        self.do_layer_norm_before && !self.remove_final_layer_norm
    }

    /// The feed-forward block's function.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] for a name that is not known.
    pub fn activation(&self) -> Result<Activation> {
        let place = "config.json: activation_function";
        self.activation_function.parse().map_err(|e: String| Error::new(ErrorKind::Config, e).at(place))
    }

    /// Names and shapes of the tensors of a model of this shape, in the order of the forward pass.
    ///
    /// Names are without the prefix `model.decoder.`; `lm_head.weight` is listed only where it is not tied.
    pub fn tensor_shapes(&self) -> Vec<(String, Vec<usize>)> {
        let (hidden, embed) = (self.hidden_size, self.word_embed_proj_dim);
        let mut shapes = vec![
            ("embed_tokens.weight".to_owned(), vec![self.vocab_size, embed]),
            (
                "embed_positions.weight".to_owned(),
                vec![self.max_position_embeddings + POSITION_OFFSET, hidden],
            ),
        ];
        let norm = |shapes: &mut Vec<(String, Vec<usize>)>, name: String| {
            if self.layer_norm_elementwise_affine {
                shapes.push((format!("{name}.weight"), vec![hidden]));
                shapes.push((format!("{name}.bias"), vec![hidden]));
            }
        };
        let linear = |shapes: &mut Vec<(String, Vec<usize>)>, name: String, out: usize, inputs: usize| {
            shapes.push((format!("{name}.weight"), vec![out, inputs]));
            if self.enable_bias {
                shapes.push((format!("{name}.bias"), vec![out]));
            }
        };
        if self.has_projections() {
            shapes.push(("project_in.weight".to_owned(), vec![hidden, embed]));
        }
        for i in 0..self.num_hidden_layers {
            let layer = format!("layers.{i}");
            for name in ["q_proj", "k_proj", "v_proj", "out_proj"] {
                linear(&mut shapes, format!("{layer}.self_attn.{name}"), hidden, hidden);
            }
            norm(&mut shapes, format!("{layer}.self_attn_layer_norm"));
            linear(&mut shapes, format!("{layer}.fc1"), self.ffn_dim, hidden);
            linear(&mut shapes, format!("{layer}.fc2"), hidden, self.ffn_dim);
            norm(&mut shapes, format!("{layer}.final_layer_norm"));
        }
        if self.has_final_layer_norm() {
            norm(&mut shapes, "final_layer_norm".to_owned());
        }
        if self.has_projections() {
            shapes.push(("project_out.weight".to_owned(), vec![embed, hidden]));
        }
        if !self.tie_word_embeddings {
            shapes.push(("lm_head.weight".to_owned(), vec![self.vocab_size, embed]));
        }
        shapes
    }

    /// Number of parameters, a tied LM head counted once.
    pub fn parameters(&self) -> u64 {
        self.tensor_shapes().iter().map(|(_, shape)| shape.iter().map(|&n| n as u64).product::<u64>()).sum()
    }

    fn validate(&self) -> Result<()> {
        let fail = |message: String| Err(Error::new(ErrorKind::Config, format!("config.json: {message}")));
        if self.model_type != "opt" {
            return fail(format!("model_type: expected \"opt\", found {:?}", self.model_type));
        }
        // The upper bounds keep products of two sizes far from overflow; the largest OPT has 12288 x 49152.
        let sizes = [
            ("vocab_size", self.vocab_size, 1 << 24),
            ("hidden_size", self.hidden_size, 1 << 20),
            ("num_hidden_layers", self.num_hidden_layers, 1 << 12),
            ("num_attention_heads", self.num_attention_heads, 1 << 20),
            ("ffn_dim", self.ffn_dim, 1 << 22),
            ("max_position_embeddings", self.max_position_embeddings, 1 << 24),
            ("word_embed_proj_dim", self.word_embed_proj_dim, 1 << 20),
        ];
        if let Some((name, found, most)) = sizes.iter().find(|(_, n, most)| *n == 0 || n > most) {
            return fail(format!("{name}: expected 1 to {most}, found {found}"));
        }
        if !self.hidden_size.is_multiple_of(self.num_attention_heads) {
            return fail(format!(
                "hidden_size: expected a multiple of num_attention_heads {}, found {}",
                self.num_attention_heads, self.hidden_size
            ));
        }
        if let Some(dtype) = &self.dtype {
            dtype.parse::<DType>().map_err(|e| Error::new(ErrorKind::Config, e).at("config.json: dtype"))?;
        }
        self.activation().map(drop)
    }
}

/// Whether this is the weight of one of the six linears of a decoder layer.
pub(crate) fn is_linear(name: &str) -> bool {
    const PARTS: [&str; 6] = [
        ".self_attn.q_proj.weight",
        ".self_attn.k_proj.weight",
        ".self_attn.v_proj.weight",
        ".self_attn.out_proj.weight",
        ".fc1.weight",
        ".fc2.weight",
    ];
    name.starts_with("layers.") && PARTS.iter().any(|part| name.ends_with(part))
}

/// Bytes of a tensor of this shape in memory: matrices in `dtype`, biases and LayerNorms in f32.
pub(crate) fn held_bytes(shape: &[usize], dtype: DType) -> u64 {
    let count = shape.iter().fold(1u64, |count, n| count.saturating_mul(*n as u64));
    count.saturating_mul(if shape.len() > 1 { dtype.size() as u64 } else { 4 })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str) -> Result<OptConfig> {
        OptConfig::from_json(json)
    }

    #[test]
    fn forms_that_transformers_accepts() {
        let config =
            read(r#"{"eos_token_id": [2, 5, 60000], "pad_token_id": -1, "bos_token_id": null}"#).unwrap();
        assert_eq!(config.eos_token_id, Some(TokenIds::Many(vec![2, 5])));
        assert_eq!((config.pad_token_id, config.bos_token_id), (None, None));
        let config = read(r#"{"dropout": null, "tie_word_embeddings": null, "dtype": "auto"}"#).unwrap();
        assert!(config.tie_word_embeddings && config.dtype.is_none());
        assert_eq!(read("\u{feff}{}").unwrap().eos_token_id, Some(TokenIds::One(2)));
    }

    #[test]
    fn errors_name_the_key() {
        for (json, key) in [
            (r#"{"enable_bias": 3}"#, "enable_bias"),
            (r#"{"eos_token_id": "x"}"#, "eos_token_id"),
            (r#"{"hidden_size": 0}"#, "hidden_size"),
            (r#"{"dtype": "int3"}"#, "dtype"),
        ] {
            let error = read(json).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Config);
            assert!(error.to_string().starts_with(&format!("config.json: {key}: ")), "{error}");
        }
    }
}
