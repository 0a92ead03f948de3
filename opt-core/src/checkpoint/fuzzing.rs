//! Doors for the fuzz targets and for the test that replays their inputs: each takes any bytes, returns quietly
//! whether they were accepted, and panics only where this crate has a fault.

use super::{Checkpoint, entry::Entry, flax, index, pickle, safetensors, source::Source, tensor};

/// A safetensors file.
pub fn safetensors(bytes: &[u8]) -> bool {
    safetensors::read(bytes).is_ok_and(|entries| visit(entries, bytes))
}

/// A shard index.
pub fn index(bytes: &[u8]) -> bool {
    let index = std::str::from_utf8(bytes).ok().and_then(|text| index::Index::parse(text).ok());
    index.is_some_and(|index| index.files().iter().all(|file| !file.contains(['/', '\\'])))
}

/// A `.bin` file, or without the zip around it, the pickle alone; its storages are then all of `bytes`.
pub fn pickle(bytes: &[u8]) -> bool {
    let entries = match super::zip::is_zip(bytes) {
        true => pickle::read(bytes),
        false => pickle::entries(bytes, |key| key.parse().ok().map(|length| 0..bytes.len().min(length))),
    };
    entries.is_ok_and(|entries| visit(entries, bytes))
}

/// A Flax file.
pub fn flax(bytes: &[u8]) -> bool {
    flax::read(bytes).is_ok_and(|entries| visit(entries, bytes))
}

/// A whole checkpoint in memory, under the config of a very small model.
pub fn checkpoint(bytes: &[u8]) -> bool {
    let config = r#"{"model_type": "opt", "vocab_size": 4, "hidden_size": 2, "num_hidden_layers": 1,
        "num_attention_heads": 1, "ffn_dim": 2, "max_position_embeddings": 2}"#;
    Checkpoint::from_bytes(config, vec![bytes.to_vec()]).is_ok_and(|checkpoint| checkpoint.validate().is_ok())
}

/// Reads every tensor: what a header promises must be there.
fn visit(entries: Vec<Entry>, bytes: &[u8]) -> bool {
    let source = Source::memory("fuzz".to_owned(), bytes.to_vec());
    for (number, entry) in entries.into_iter().enumerate() {
        let info = tensor::TensorInfo::new(number.to_string(), String::new(), 0, entry);
        let read = tensor::Tensor::new(&info, &source);
        let length = read.map(|tensor| {
            let _ = (tensor.matrix().is_ok(), tensor.vector().is_ok());
            tensor.bytes().len()
        });
        assert_eq!(length.ok(), Some(info.bytes()), "an accepted tensor must be readable");
    }
    true
}
