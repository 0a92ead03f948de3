//! Small models with random weights, of any shape, made in memory.

use opt_core::{Load, Opt, checkpoint::Checkpoint, config::OptConfig, generation::Random};
use safetensors::{Dtype, tensor::TensorView};
use serde_json::json;

/// The shape of a random model.
#[derive(Debug, Clone)]
pub struct Tiny {
    pub vocab: usize,
    pub context: usize,
    pub hidden: usize,
    pub layers: usize,
    pub heads: usize,
    /// Width of the token embeddings.
    pub embed: usize,
    pub pre_norm: bool,
    pub seed: u64,
}

impl Default for Tiny {
    fn default() -> Self {
        Self { vocab: 61, context: 96, hidden: 32, layers: 2, heads: 2, embed: 32, pre_norm: true, seed: 1 }
    }
}

impl Tiny {
    /// The text of its config.json; eos is left to the call.
    pub fn config(&self) -> String {
        json!({
            "model_type": "opt", "vocab_size": self.vocab, "max_position_embeddings": self.context,
            "hidden_size": self.hidden, "num_hidden_layers": self.layers, "num_attention_heads": self.heads,
            "ffn_dim": 2 * self.hidden, "word_embed_proj_dim": self.embed, "do_layer_norm_before": self.pre_norm,
            "bos_token_id": null, "eos_token_id": null, "pad_token_id": null,
        })
        .to_string()
    }

    /// A safetensors file of it.
    pub fn weights(&self) -> Vec<u8> {
        let config = OptConfig::from_json(&self.config()).unwrap();
        let shapes = config.tensor_shapes();
        let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = shapes
            .into_iter()
            .enumerate()
            .map(|(index, (name, shape))| {
                let mut random = Random::new(self.seed, index as u64);
                let count: usize = shape.iter().product();
                let norm = name.contains("layer_norm");
                // Large enough that attention and position matter for what comes next.
                let (mean, spread) = match &shape[..] {
                    [_] if norm && name.ends_with("weight") => (1.0, 0.3),
                    [_] => (0.0, 0.3),
                    _ if name.starts_with("embed") => (0.0, 1.5),
                    [_, columns] => (0.0, 3.0 / (*columns as f64).sqrt()),
                    _ => unreachable!("{name}"),
                };
                let values = (0..count).map(|_| (mean + spread * (2.0 * random.uniform() - 1.0)) as f32);
                (format!("model.decoder.{name}"), shape, values.flat_map(f32::to_le_bytes).collect())
            })
            .collect();
        let views = tensors.iter().map(|(name, shape, bytes)| {
            (name.clone(), TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap())
        });
        safetensors::serialize(views, None).unwrap()
    }

    /// The model on a backend.
    pub fn load(&self, load: Load<'_>) -> Opt {
        let checkpoint = Checkpoint::from_bytes(&self.config(), vec![self.weights()]).unwrap();
        Opt::assemble(&checkpoint, None, None, load).unwrap()
    }

    /// The model on the backend under test, with two threads.
    pub fn opt(&self) -> Opt {
        self.on_threads(2)
    }

    /// The model on the backend under test.
    pub fn on_threads(&self, threads: usize) -> Opt {
        self.load(super::backend::load_with_threads(Some(threads)))
    }
}

/// Random ids below `vocab`.
pub fn random_ids(seed: u64, len: usize, vocab: usize) -> Vec<u32> {
    let mut random = Random::new(seed, 99);
    (0..len).map(|_| (random.uniform() * vocab as f64) as u32).collect()
}

impl Tiny {
    /// The rows of the token table that belong to `ids`.
    pub fn embeddings(&self, ids: &[u32]) -> ndarray::Array2<f32> {
        let checkpoint = Checkpoint::from_bytes(&self.config(), vec![self.weights()]).unwrap();
        let table = checkpoint.tensor("embed_tokens.weight", &[self.vocab, self.embed]).unwrap();
        let values: Vec<f32> = bytemuck::pod_collect_to_vec(table.bytes());
        let table = ndarray::Array2::from_shape_vec((self.vocab, self.embed), values).unwrap();
        let rows: Vec<usize> = ids.iter().map(|id| *id as usize).collect();
        table.select(ndarray::Axis(0), &rows)
    }
}
