//! Models of random weights that the benchmarks run on: speed does not depend on the values.

use opt_core::{
    Load, Opt, Result,
    backends::{self, BackendOptions},
    checkpoint::Checkpoint,
    config::OptConfig,
};

/// The shape of facebook/opt-125m.
///
/// # Errors
/// None in practice: the configuration is the default one.
pub fn opt_125m() -> Result<OptConfig> {
    OptConfig::from_json(r#"{"model_type": "opt"}"#)
}

/// A model of the given shape with random weights, in memory.
///
/// # Errors
/// [`opt_core::ErrorKind::Checkpoint`] if the file is not what the configuration asks for, which would be a mistake
/// here.
pub fn random(config: &OptConfig) -> Result<Checkpoint> {
    let text = serde_json::to_string(config).unwrap_or_default();
    Checkpoint::from_bytes(&text, vec![random_file(config)])
}

/// The bytes of a bf16 safetensors file of random weights.
pub fn random_file(config: &OptConfig) -> Vec<u8> {
    let mut header = serde_json::Map::new();
    let mut end = 0;
    for (name, shape) in config.tensor_shapes() {
        let start = end;
        end += 2 * shape.iter().product::<usize>();
        let entry = serde_json::json!({"dtype": "BF16", "shape": shape, "data_offsets": [start, end]});
        header.insert(format!("model.decoder.{name}"), entry);
    }
    let mut header = serde_json::Value::Object(header).to_string().into_bytes();
    // The data begins on a multiple of 8.
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut file = Vec::with_capacity(8 + header.len() + end);
    file.extend((header.len() as u64).to_le_bytes());
    file.extend(header);
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for _ in 0..end / 2 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        // Of bf16: either sign, an exponent of 2^-6 and any fraction, so about +-0.02 to 0.03.
        let bits = (state as u16 & 0x807f) | (121 << 7);
        file.extend(bits.to_le_bytes());
    }
    file
}

/// The model on a backend by name, weights held as `dtype`.
///
/// # Errors
/// Those of loading.
pub fn load(checkpoint: &Checkpoint, backend: &str, dtype: opt_core::DType) -> Result<Opt> {
    let load = Load::with(backends::choose(backend, &BackendOptions::default())?).dtype(dtype);
    Opt::assemble(checkpoint, None, None, load)
}

/// `rows` token ids that mean nothing.
pub fn ids(rows: usize, config: &OptConfig) -> Vec<u32> {
    (0..rows).map(|i| (4 + i * 7919 % (config.vocab_size - 4)) as u32).collect()
}
